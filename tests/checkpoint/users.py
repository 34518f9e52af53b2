"""A user's own model under DeepSpeed, unknown to megagrow; called on the ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megagrow.checkpoint.convert.registry import FORMATS
from megagrow.checkpoint.convert.run import Job, convert
from megagrow.state.layout import Layout

if TYPE_CHECKING:
    from megagrow.engine.comm import Comm

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=1e-2, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.3, momentum=0.9),
    "plain_sgd": lambda groups: torch.optim.SGD(groups, lr=0.3),
}


class UsersModel(torch.nn.Module):
    """Two tied tables, a frozen matrix, a float buffer and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(11, 7)
        self.a = torch.nn.Linear(7, 5)
        self.norm = torch.nn.LayerNorm(5)
        self.b = torch.nn.Linear(5, 7, bias=False)
        self.head = torch.nn.Linear(7, 11, bias=False)
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.arange(1.0, 4.0))
        self.register_buffer("count", torch.tensor(3))
        self.head.weight = self.emb.weight
        self.b.weight.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.head(self.b(self.norm(self.a(self.emb(tokens)))))
        return (hidden.float() * self.scale.float().sum()).pow(2).mean()


def engine(
    *,
    zero: int,
    dtype: str = "fp32",
    optimizer: str = "adamw",
    seed: int = 0,
    universal: bool = False,
    **zero_settings: Any,
) -> Any:
    """The user's engine: two groups, one without weight decay and with its own learning rate."""
    import deepspeed

    torch.manual_seed(seed)
    model = UsersModel()
    trained = [p for p in model.parameters() if p.requires_grad]
    rate = 1.0 if "sgd" in optimizer else 2e-2  # so that 16 bits show every update
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0, "lr": rate},
    ]
    made = OPTIMIZERS[optimizer](groups)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.7,
        "zero_optimization": {"stage": zero, **zero_settings},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
    }  # fmt: skip
    if dtype != "fp32":
        settings[dtype] = {"enabled": True}
    schedule = torch.optim.lr_scheduler.StepLR(made, 2, gamma=0.5)
    return deepspeed.initialize(
        model=model, optimizer=made, config=settings, lr_scheduler=schedule
    )[0]  # fmt: skip


def train(engine: Any, steps: int, rank: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 * step + rank)
        engine.backward(engine(torch.randint(0, 11, (2, 4), generator=generator)))
        engine.step()


def tensors(engine: Any) -> dict[str, torch.Tensor]:
    """Everything in the module, whole (gathered under ZeRO 3), and with ZeRO the masters."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    gathered: Any = contextlib.nullcontext()
    zero = engine.zero_optimization_stage()
    if zero == 3:
        gathered = deepspeed.zero.GatheredParameters(list(engine.module.parameters()))
    with gathered:
        found = {name: t.detach().clone() for name, t in engine.module.state_dict().items()}
    # DeepSpeed's own look-up does not support parameters dealt round-robin.
    masters = zero and not engine.zero_round_robin_gradients()
    for name, parameter in engine.module.named_parameters() if masters else ():
        if parameter.requires_grad:
            found[f"{name} master"] = safe_get_full_fp32_param(parameter).clone()
    return found


def go_on(
    comm: Comm,
    root: Path,
    cases: Iterable[tuple[str, dict[str, Any], dict[str, Any], Sequence[str]]],
) -> dict[str, tuple[list[str], list[str], list[str], list[str]]]:
    """Train, save, convert, resume from the result; per case the differences to not stopping.

    A case is (name, settings of the first engine, of the second, formats on the way).
    """
    found = {}
    for name, settings, following, route in cases:
        first = engine(**settings)
        train(first, 3, comm.rank)
        first.save_checkpoint(str(root / name), client_state={"note": {"epoch": 4}})
        at_save = tensors(first)
        train(first, 1, comm.rank, first=3)
        expected = tensors(first)
        left_out: list[Any] = []
        if comm.rank == 0:
            path = root / name
            layout = Layout(data=comm.world, zero=following["zero"])
            for number, fmt in enumerate(route):
                kept = layout if "data" in FORMATS[fmt].axes else None
                target = root / f"{name}-{number}"
                report = convert(Job(path, target, fmt, layout=kept), verify=True, workers=1)
                left_out += report.survey.left_out if number == 0 else ()
                path = target
        comm.barrier()
        second = engine(seed=1, **following)
        if following.get("universal"):  # the engine loads no module from there
            module = {name: at_save[name] for name in second.module.state_dict()}
            torch.nn.Module.load_state_dict(second.module, module)
        at, client = second.load_checkpoint(str(root / f"{name}-{len(route) - 1}"))
        assert at is not None and client["note"] == {"epoch": 4}, name
        read = tensors(second)
        differing = differences(at_save, read)
        train(second, 1, comm.rank, first=3)
        read = tensors(second)
        # Gradients are clipped by a norm that other stages sum in another order.
        stages = {settings["zero"], following["zero"]}
        alike = len(stages) == 1 or stages <= ({0, 1, 2} if comm.world == 1 else {1, 2})
        near = 0.0 if alike else {"fp32": 1e-5, "bf16": 2**-7}[settings["dtype"]]
        after = differences(expected, read, near=near)
        moved = [n for n, v in at_save.items() if " " not in n and not same(v, expected[n])]
        found[name] = differing, after, moved, [str(one) for one in left_out]
    return found


def differences(
    wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], *, near: float = 0.0
) -> list[str]:
    """Names whose values differ by more than a fraction of themselves; ZeRO 0 has no masters."""
    masters = any(name.endswith(" master") for name in found)
    return [
        name for name, values in wanted.items()
        if (masters or not name.endswith(" master")) and not same(values, found[name], near)
    ]  # fmt: skip


def same(a: torch.Tensor, b: torch.Tensor, near: float = 0.0) -> bool:
    if near:
        return torch.allclose(a.float(), b.float(), rtol=near, atol=1e-5)
    return a.dtype == b.dtype and torch.equal(a, b)
