"""Optimizer state in a Megatron-LM file: torch's or apex's Adam on whole parameters.

It is stored directly, or inside Megatron's 16-bit optimizer, which keeps the masters in its own
lists.  The distributed optimizer's state is in other files and is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megagrow.checkpoint.containers.stored_tensor import StoredTensor
from megagrow.checkpoint.formats.megatron import names
from megagrow.errors import CheckpointError
from megagrow.state.catalog import ADAM_SLOTS, MASTER

_HALF = 2  # bytes per element of a parameter with a separate master
MASTERS = ("fp32_from_fp16_params", "fp32_from_fp16")
_INNER = ("optimizer", "optimizer_state_dict")


def parts_of(value: Mapping[str, Any]) -> tuple[str, dict[str, Any], str, list[Any]]:
    """The key and value of the torch optimizer's state in a file, then those of the masters."""
    saved = value.get("optimizer")
    if not isinstance(saved, dict):
        return "", {}, "", []
    key = next((key for key in MASTERS if saved.get(key)), "")
    inner = next((name for name in _INNER if isinstance(saved.get(name), dict)), "")
    at = f"optimizer.{inner}" if inner else "optimizer"
    return at, saved[inner] if inner else saved, f"optimizer.{key}", list(saved.get(key) or ())


def has_moments(value: Mapping[str, Any], args: Mapping[str, Any]) -> bool:
    """Whether the file has Adam's moments of whole parameters."""
    if args.get("use_distributed_optimizer"):
        return False
    states = parts_of(value)[1].get("state")
    return bool(states) and isinstance(states, dict)


def states_of(
    value: Mapping[str, Any], parameters: Mapping[str, StoredTensor], *, where: str
) -> dict[str, dict[str, tuple[str, StoredTensor]]]:
    """The optimizer's tensors by stored name and slot, each with its own name in the file.

    Parameters are numbered group by group, each in the module's order; biases and vectors are in
    the group without weight decay.

    Raises:
        CheckpointError: the state does not match the parameters.
    """
    at, optimizer, at_masters, masters = parts_of(value)
    states, groups = optimizer["state"], optimizer["param_groups"]
    plain = {n for n, t in parameters.items() if not names.decays(n, len(t.shape))}
    found: dict[str, dict[str, tuple[str, StoredTensor]]] = {}
    for number, group in enumerate(groups):
        members = list(parameters)
        if len([g for g in groups if g["params"]]) > 1:
            decays = group.get("wd_mult", group.get("weight_decay")) != 0.0
            members = [name for name in members if (name not in plain) == decays]
        if len(members) != len(group["params"]):
            raise CheckpointError(
                f"{where}: optimizer: group {number} is not of these parameters",
                found=f"{len(group['params'])} parameters",
                expected=f"{len(members)}",
            )
        half = [n for n in members if parameters[n].dtype.itemsize == _HALF]
        apart = dict(zip(half, masters[number], strict=True)) if masters else {}
        for name, index in zip(members, group["params"], strict=True):
            state = states[index]
            found[name] = {
                slot.name: (f"{at}.state.{index}.{slot.name}", state[slot.name])
                for slot in ADAM_SLOTS[1:]
            }
            if name in apart:
                found[name][MASTER.name] = (at_masters, apart[name])
            if not all(isinstance(tensor, StoredTensor) for _, tensor in found[name].values()):
                raise CheckpointError(f"{where}: optimizer: state of {name} is no tensor")
    return found


def counts_of(value: Mapping[str, Any]) -> dict[str, int]:
    """The optimizer's step counts, by name.

    torch's Adam counts for each parameter, apex's and Transformer Engine's for each group.
    """
    at, optimizer, _, _ = parts_of(value)
    steps: dict[str, Any] = {
        f"{at}.state.{index}.step": state["step"]
        for index, state in optimizer.get("state", {}).items()
        if "step" in state
    }
    if not steps:
        groups = optimizer.get("param_groups", ())
        steps = {f"{at}.param_groups.{i}.step": group.get("step") for i, group in enumerate(groups)}
    return {
        name: int(count.item() if isinstance(count, StoredTensor) else count)
        for name, count in steps.items()
        if isinstance(count, (int, float, StoredTensor))
    }
