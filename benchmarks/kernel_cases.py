"""The cases of the kernel benchmark: each op at a size, the bytes it must move, and its rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow import ops
from megagrow.models.common.loss import vocab_parallel_cross_entropy
from megagrow.ops import library, third_party

_ops = torch.ops.megagrow
Call = Callable[[], Any]


@dataclass(frozen=True)
class Device:
    """The device and problem size.

    Attributes:
        name: torch's name of the device.
        scale: divides the sizes.
        warm_ups: untimed calls first.
        calls: number of timed calls.
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
        op: its name in `library.own`.
        pass_: ``forward``, ``backward``, ``both`` or ``update``.
        bytes: minimum number of bytes moved.
        own: our kernel.
        eager: PyTorch's own ops.
        compiled: the same under torch.compile, if compared.
        others: other libraries' calls, by name.
    """

    op: str
    pass_: str
    bytes: int
    own: Call
    eager: Call
    compiled: Call | None = None
    others: Mapping[str, Call] = field(default_factory=dict)


def every_case(device: Device) -> Iterator[Case]:
    """Yield the cases one at a time, so that few tensors are alive at once."""
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
    """Apply torch.compile; eager in a dry run, where compiling would take minutes."""
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
    """Forward and backward of a function that returns one or several tensors."""
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    compiled = _compiled(function)
    rivals: dict[str, Callable[..., Any]] = {"eager": function, "compiled": compiled}
    for name, backend in third_party.BACKENDS.items():
        if backend.installed() and op in backend.functions and other is not None:
            rivals[name] = lambda *x, call=backend.functions[op]: other(call, *x)

    def forward(call: Callable[..., Any]) -> Call:
        # As in training, keep what the backward pass needs.
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
            # Our kernel overwrites the logits with its gradient; their values do not matter.
            leaf = logits.detach().requires_grad_()
            torch.autograd.grad(function(leaf), leaf)

        return run

    compiled = _compiled(plain)
    # Two passes read the logits, one overwrites them with the gradient.
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
        """The steps without the kernel: cast the gradient, update, cast the parameters."""
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
    for name, backend in third_party.BACKENDS.items():
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
    # New blocks in half of the partition: matrices whose old quarter is one block.
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
