"""Megatron-Core writes a distributed checkpoint of a model that it has loaded from our export.

Usage: python -m tests.checkpoint.torch_dist_client [SOURCE TARGET FORM NUMBERED]...

SOURCE is an iteration of the classic format, TARGET the directory to make, FORM the kind of
optimizer (`none`, `plain`, or a form of the distributed optimizer's state) and NUMBERED whether
layers have numbers (`yes`) or are one tensor (`no`).  The ranks are those of torch.distributed's
environment, in one tensor-parallel group.

Megatron asks for a GPU in places that do not affect what it writes; they are given the CPU here.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch.overrides import TorchFunctionMode

from tests.checkpoint.megatron_client import their_model


class OnCpu(TorchFunctionMode):
    """Gives the CPU to who asks for a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given = dict(kwargs or {})
        if str(given.get("device")).startswith("cuda"):
            given["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **given)


def main() -> None:
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *a, **k: None
    tensor_parallel.get_cuda_rng_tracker().fork = lambda *a, **k: contextlib.nullcontext()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(torch.distributed.get_world_size(), 1)
    for at in range(1, len(sys.argv), 4):
        save(*sys.argv[at : at + 4])
    print("saved")


def save(source: str, target: str, form: str, numbered: str) -> None:
    rank = torch.distributed.get_rank()
    file = torch.load(
        Path(source) / f"mp_rank_{rank:02d}" / "model_optim_rng.pt", weights_only=False
    )
    model = their_model(file["args"])
    model.load_state_dict(file["model"], strict=True)
    about: dict[str, Any] = {"non_homogeneous_layers": numbered == "yes"}
    state: dict[str, Any] = {key: file[key] for key in ("args", "iteration", "checkpoint_version")}
    if form != "none":
        distributed = form != "plain"
        config = OptimizerConfig(
            optimizer="adam", lr=0.0, weight_decay=0.0, clip_grad=0.0,
            use_distributed_optimizer=distributed,
        )  # fmt: skip
        wrapped = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(use_distributed_optimizer=distributed),
            model,
        )
        optimizer = get_megatron_optimizer(config, [wrapped])
        wrapped.zero_grad_buffer()
        optimizer.step()
        set_moments(optimizer, model, file["optimizer"], distributed=distributed)
        if distributed:
            about["distrib_optim_sharding_type"] = form
        state["optimizer"] = optimizer.sharded_state_dict(
            model.sharded_state_dict(metadata=about), metadata=about
        )
    state["model"] = model.sharded_state_dict(metadata=about)
    os.makedirs(target, exist_ok=True)
    dist_checkpointing.save(state, target, TorchDistSaveShardedStrategy("torch_dist", 1))


def set_moments(optimizer: Any, model: Any, saved: Any, *, distributed: bool) -> None:
    """Set the moments of our export, whose parameters are in Megatron's order."""
    parameters = dict(model.named_parameters())
    order = [p for p in parameters.values() if p.dim() > 1]
    order += [p for p in parameters.values() if p.dim() == 1]
    [one] = getattr(optimizer, "chained_optimizers", [optimizer])
    for index, parameter in enumerate(order):
        if distributed:
            held = one._get_main_param_and_optimizer_states(parameter)
        else:
            held = one.optimizer.state[parameter]
        for slot in ("exp_avg", "exp_avg_sq"):
            held[slot].view(-1).copy_(saved["state"][index][slot].view(-1))


if __name__ == "__main__":
    with OnCpu():
        main()
