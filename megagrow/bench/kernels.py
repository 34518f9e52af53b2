"""Each fused op on a GPU: its bytes against the measured copy, and its time against its rivals.

Rivals are eager PyTorch, torch.compile, and apex, Transformer Engine and Liger where installed.

Bytes are those that an op must move, whatever it does move.  Tensors are much larger than the
second-level cache.  `dry_run` takes tiny sizes on the CPU with the emulated kernels: it shows that
every step works, and its times mean nothing.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config

from megagrow import ops
from megagrow.errors import ConfigError
from megagrow.model.loss import vocab_parallel_cross_entropy
from megagrow.ops import alternatives, library

_ops = torch.ops.megagrow
Call = Callable[[], Any]
_WIN = 1.05  # an own op stays under torch.compile where it is at least this much faster


@dataclass(frozen=True)
class Device:
    """Where and how large.

    Attributes:
        name: of the torch device.
        scale: divides the sizes.
        warm_ups: calls before the clock runs.
        calls: that are timed.
    """

    name: str
    scale: int = 1
    warm_ups: int = 5
    calls: int = 30

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Random numbers on the device."""
        return torch.randn(*shape, device=self.name, dtype=dtype)

    def size(self, n: int) -> int:
        """A size, scaled down to a multiple of 8."""
        return max(8, n // self.scale // 8 * 8)


@dataclass(frozen=True)
class Case:
    """One op, forward or backward.

    Attributes:
        op: as `library.own` names it.
        pass_: ``forward``, ``backward``, ``both`` or ``update``.
        bytes: that must be moved.
        own: the own kernel.
        eager: PyTorch's own ops.
        compiled: the same under torch.compile, if that is a rival.
        others: other libraries' calls, by name.
    """

    op: str
    pass_: str
    bytes: int
    own: Call
    eager: Call
    compiled: Call | None = None
    others: Mapping[str, Call] = field(default_factory=dict)


def measure(*, dry_run: bool = False) -> dict[str, Any]:
    """The table of all ops.

    Raises:
        ConfigError: there is no CUDA device, or the kernels are not built.
    """
    if not dry_run and not torch.cuda.is_available():
        raise ConfigError(
            "kernels: there is no CUDA device, and a CPU trains with PyTorch's own ops",
            mend="run this on a machine with a GPU (kernels/README.md), or add --dry-run, which "
            "shows with emulated kernels that every step works",
        )
    device = Device("cpu", 512, 0, 1) if dry_run else Device("cuda")
    # Graphs are walked more than once, so their buffers must outlive a backward pass.
    functorch_config.donated_buffer = False
    with library.using("emulated" if dry_run else "cuda"):
        copy = _copy_bandwidth(device)
        rows = [_row(case, device, copy) for case in _cases(device)]
    return {
        "benchmark": "kernels",
        "dry_run": dry_run,
        "device": torch.cuda.get_device_name() if not dry_run else "cpu, emulated",
        "copy_bytes_per_second": copy,
        "rows": rows,
        "wins_over_compile": wins(rows),
    }


def wins(rows: list[dict[str, Any]]) -> list[str]:
    """The ops whose own kernels beat torch.compile in every pass that was compared."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if "compiled" in row["milliseconds"]:
            faster = (
                row["milliseconds"]["compiled"]["median"] / row["milliseconds"]["own"]["median"]
            )
            ratios.setdefault(row["op"], []).append(faster)
    return sorted(op for op, all_ in ratios.items() if min(all_) >= _WIN)


def table(result: Mapping[str, Any]) -> str:
    """The result as text."""
    copy = result["copy_bytes_per_second"]
    lines = [f"{result['device']}: copy {copy / 1e12:.3f} TB/s (read and written)"]
    if result["dry_run"]:
        lines.append("dry run: tiny, on the CPU, emulated; the times mean nothing")
    lines.append(
        f"{'op':<16}{'pass':<10}{'MB':>9}{'own ms':>9}{'of copy':>9}"
        f"{'x eager':>9}{'x compile':>10}{'extra MB':>10}  others"
    )
    for row in result["rows"]:
        times = {name: t["median"] for name, t in row["milliseconds"].items()}
        own = times["own"]
        ratio = {name: f"{t / own:.2f}" for name, t in times.items()}
        others = ", ".join(
            f"{n} x{r}" for n, r in ratio.items() if n not in ("own", "eager", "compiled")
        )
        lines.append(
            f"{row['op']:<16}{row['pass']:<10}{row['bytes'] / 1e6:>9.0f}{own:>9.3f}"
            f"{row['fraction_of_copy']:>9.0%}{ratio['eager']:>9}{ratio.get('compiled', '-'):>10}"
            f"{row['extra_bytes']['own'] / 1e6:>10.0f}  {others}{row.get('failed', '')}"
        )
    lines.append("faster than torch.compile in every pass: " + (
        ", ".join(result["wins_over_compile"]) or "none"
    ))  # fmt: skip
    return "\n".join(lines)


# --- the clock ------------------------------------------------------------------------------


def _time(call: Call, device: Device) -> dict[str, float]:
    """Milliseconds of a call: median, tenth and ninetieth percentile."""
    for _ in range(device.warm_ups):
        call()
    times: list[float] = []
    if device.name == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(device.calls + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    else:
        for _ in range(device.calls):
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
    times.sort()
    tenth = len(times) // 10
    return {"median": statistics.median(times), "p10": times[tenth], "p90": times[-1 - tenth]}


def _extra_bytes(call: Call, device: Device) -> int:
    """Memory that a call takes at its peak, above what was taken before."""
    if device.name != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _copy_bandwidth(device: Device) -> float:
    source = device.randn(device.size(1 << 30), dtype=torch.float32)
    target = torch.empty_like(source)
    milliseconds = _time(lambda: target.copy_(source), device)["median"]
    return 2 * source.nbytes / (milliseconds / 1e3)


def _row(case: Case, device: Device, copy: float) -> dict[str, Any]:
    calls = {"own": case.own, "eager": case.eager, **case.others}
    if case.compiled is not None:
        calls["compiled"] = case.compiled
    times, extra, failed = {}, {}, []
    for name, call in calls.items():
        try:
            times[name] = _time(call, device)
            extra[name] = _extra_bytes(call, device)
        except Exception as error:
            if name in ("own", "eager"):
                raise
            # A rival that fails is told and left out; it is not ours to mend.
            failed.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    row = {
        "op": case.op,
        "pass": case.pass_,
        "bytes": case.bytes,
        "milliseconds": times,
        "extra_bytes": extra,
        "fraction_of_copy": case.bytes / (times["own"]["median"] / 1e3) / copy,
    }
    return row | ({"failed": " " + "; ".join(failed)} if failed else {})


# --- the cases ------------------------------------------------------------------------------


def _cases(device: Device) -> Iterator[Case]:
    """Cases one after the other, so that few tensors live at a time."""
    for make in (
        _norm_cases,
        _activation_cases,
        _rotary_cases,
        _loss_cases,
        _adamw_cases,
        _box_cases,
    ):
        yield from make(device)
        if device.name == "cuda":
            torch.cuda.empty_cache()


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile; eager in a dry run, where compiling would take minutes."""
    if library.active().mode == "emulated":
        return function
    return torch.compile(function, dynamic=False)


def _autograd_cases(
    op: str,
    *,
    inputs: tuple[Tensor, ...],
    function: Callable[..., Any],
    own: Callable[..., Any],
    own_backward: Call,
    bytes_: tuple[int, int],
    other: Callable[..., Any] | None = None,
) -> Iterator[Case]:
    """Forward and backward of a function that returns one tensor or several."""
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    compiled = _compiled(function)
    rivals: dict[str, Callable[..., Any]] = {"eager": function, "compiled": compiled}
    for name, backend in alternatives.BACKENDS.items():
        if backend.installed() and op in backend.functions and other is not None:
            rivals[name] = lambda *x, call=backend.functions[op]: other(call, *x)

    def forward(call: Callable[..., Any]) -> Call:
        # As in training, what the backward pass needs is kept.
        return lambda: call(*leaves)

    def backward(call: Callable[..., Any]) -> Call:
        made: list[Any] = []

        def run() -> None:
            if not made:
                outputs = call(*leaves)
                outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
                made.append((outputs, [torch.randn_like(y) for y in outputs]))
            outputs, grads = made[0]
            torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

        return run

    for pass_, make, ours, count in (
        ("forward", forward, lambda: own(*inputs), bytes_[0]),
        ("backward", backward, own_backward, bytes_[1]),
    ):
        others = {n: make(call) for n, call in rivals.items() if n not in ("eager", "compiled")}
        yield Case(op, pass_, count, ours, make(function), make(compiled), others)


def _norm_cases(device: Device) -> Iterator[Case]:
    m, h = device.size(32768), device.size(4096)
    x, residual, dy, dz = (device.randn(m, h) for _ in range(4))
    w, b = device.randn(h), device.randn(h)
    eps = 1e-5

    def rms(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        z = x + residual
        return F.rms_norm(z, (h,), w, eps), z

    _, z, rstd = _ops.rms_norm(x, residual, w, eps)

    def added(call: Callable[..., Any], x: Tensor, residual: Tensor, *rest: Tensor) -> Any:
        z = x + residual
        return call(z, *rest, eps), z

    yield from _autograd_cases(
        "rms_norm",
        inputs=(x, residual, w),
        function=rms,
        own=lambda x, r, w: _ops.rms_norm(x, r, w, eps),
        own_backward=lambda: _ops.rms_norm_backward(dy, dz, z, w, rstd),
        bytes_=(4 * x.nbytes, 4 * x.nbytes),
        other=added,
    )

    def layer(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        z = x + residual
        return F.layer_norm(z, (h,), w, b, eps), z

    _, _, mean, rstd_ = _ops.layer_norm(x, residual, w, b, eps)
    yield from _autograd_cases(
        "layer_norm",
        inputs=(x, residual, w, b),
        function=layer,
        own=lambda x, r, w, b: _ops.layer_norm(x, r, w, b, eps),
        own_backward=lambda: _ops.layer_norm_backward(dy, dz, z, w, mean, rstd_),
        bytes_=(4 * x.nbytes, 4 * x.nbytes),
        other=added,
    )


def _activation_cases(device: Device) -> Iterator[Case]:
    m, f = device.size(16384), device.size(11008)
    x, grad = device.randn(m, 2 * f), device.randn(m, f)

    def swiglu(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    yield from _autograd_cases(
        "swiglu",
        inputs=(x,),
        function=swiglu,
        own=_ops.swiglu,
        own_backward=lambda: _ops.swiglu_backward(grad, x),
        bytes_=(3 * grad.nbytes, 5 * grad.nbytes),
        other=lambda call, x: call(*x.chunk(2, -1)),
    )
    f = device.size(16384)
    y, bias, dy = device.randn(m, f), device.randn(f), device.randn(m, f)
    yield from _autograd_cases(
        "bias_gelu",
        inputs=(y, bias),
        function=lambda y, bias: F.gelu(y + bias, approximate="tanh"),
        own=_ops.bias_gelu,
        own_backward=lambda: _ops.bias_gelu_backward(dy, y, bias),
        bytes_=(2 * y.nbytes, 3 * y.nbytes),
    )


def _rotary_cases(device: Device) -> Iterator[Case]:
    sequence, turned = device.size(4096), 5
    x = device.randn(16, sequence, 8, turned + 1, 128)
    angle = device.randn(sequence, 64, dtype=torch.float32)
    cos, sin = angle.cos(), angle.sin()

    def turn(x: Tensor) -> Tensor:
        a, b = x[..., :turned, :].chunk(2, -1)
        c, s = (t.to(x.dtype).view(sequence, 1, 1, 64) for t in (cos, sin))
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    compiled = _compiled(turn)
    moved = 2 * x.nbytes * turned // (turned + 1)
    yield Case(
        "rotary",
        "forward",
        moved,
        lambda: _ops.rotary_(x, cos, sin, turned, False),
        lambda: turn(x),
        lambda: compiled(x),
    )


def _loss_cases(device: Device) -> Iterator[Case]:
    rows, vocabulary = device.size(8192), device.size(128256)
    logits = device.randn(rows, vocabulary)
    labels = torch.randint(vocabulary, (rows,), device=device.name)

    def plain(x: Tensor) -> Tensor:
        return F.cross_entropy(x.float(), labels)

    def both(function: Callable[[Tensor], Tensor]) -> Call:
        def run() -> None:
            # The own kernel writes its gradient over the logits; how large they are is all one.
            leaf = logits.detach().requires_grad_()
            torch.autograd.grad(function(leaf), leaf)

        return run

    compiled = _compiled(plain)
    # Two passes read the logits, one writes the gradient over them.
    yield Case(
        "cross_entropy",
        "both",
        3 * logits.nbytes,
        both(lambda x: vocab_parallel_cross_entropy(x.view_as(x), labels).mean()),
        both(plain),
        both(compiled),
    )


def _adamw_cases(device: Device) -> Iterator[Case]:
    n = device.size(1 << 29)
    p, m = (device.randn(n, dtype=torch.float32) for _ in range(2))
    v, g = torch.rand_like(p), device.randn(n)
    low = torch.empty(n, device=device.name, dtype=torch.bfloat16)
    settings = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 100}
    step = torch.tensor(99.0, device=device.name)

    def chain() -> None:
        """What is done without the kernel: cast the gradient, update, cast the parameters."""
        torch._fused_adamw_(
            [p], [g.float()], [m], [v], [], [step], lr=1e-4, beta1=0.9, beta2=0.95,
            weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip
        low.copy_(p)

    def functional(p: Tensor, g: Tensor, m: Tensor, v: Tensor, low: Tensor) -> None:
        grad = g.float()
        m.lerp_(grad, 0.1)
        v.mul_(0.95).addcmul_(grad, grad, value=0.05)
        p.mul_(1 - 1e-5).sub_(1e-4 * m / (v.sqrt() + 1e-8))
        low.copy_(p)

    compiled = _compiled(functional)
    others = {}
    for name, backend in alternatives.BACKENDS.items():
        if backend.installed() and "adamw" in backend.functions:

            def other(call: Callable[..., Any] = backend.functions["adamw"]) -> None:
                call(p, g.float(), m, v, **settings)
                low.copy_(p)

            others[name] = other
    bytes_ = 28 * n
    yield Case(
        "adamw",
        "update",
        bytes_,
        lambda: ops.adamw_(p, g, m, v, low=low, **settings),  # type: ignore[arg-type]
        chain,
        lambda: compiled(p, g, m, v, low),
        others,
    )
    # Young blocks in half of the partition: matrices whose old quarter is one block.
    side = device.size(4096)
    count = max(1, n // (2 * side * side))
    old = (slice(0, side // 2), slice(0, side // 2))
    boxes = [ops.YoungBox(2 * k * side * side, (side, side), old) for k in range(count)]
    table_ = ops.young_table([b for b in boxes if b.start + side * side <= n], device.name)
    rates = ops.young_rates(
        [(1e-4, 7)] * len(table_), betas=(0.9, 0.95), device=device.name
    )  # fmt: skip
    yield Case(
        "adamw (young)",
        "update",
        bytes_,
        lambda: ops.adamw_(p, g, m, v, low=low, young=table_, rates=rates, **settings),  # type: ignore[arg-type]
        chain,
    )


def _box_cases(device: Device) -> Iterator[Case]:
    side, count = device.size(4096), 32
    sources = [device.randn(side, side, dtype=torch.float32) for _ in range(count)]
    whole = [device.randn(2 * side, 2 * side, dtype=torch.float32) for _ in range(count // 4)]
    half = [x.to(torch.bfloat16) for x in whole]

    def quarters(matrices: list[Tensor]) -> list[Tensor]:
        return [
            matrix[i * side : (i + 1) * side, j * side : (j + 1) * side]
            for matrix in matrices
            for i in range(2)
            for j in range(2)
        ]

    targets, low, scales = quarters(whole), quarters(half), [0.5] * count

    def eager() -> None:
        for target, source, copy in zip(targets, sources, low, strict=True):
            torch.mul(source, 0.5, out=target)
            copy.copy_(target)

    yield Case(
        "copy_boxes",
        "update",
        10 * count * side * side,
        lambda: ops.copy_boxes_(targets, sources, scales, low),
        eager,
    )
