"""What an optimizer under DeepSpeed saved: its groups and the state of each tensor.

DeepSpeed wraps torch's own dictionary in one or two of its own.  With ZeRO each group is one
flat tensor; without it the optimizer numbers parameters, and nothing says which is which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from megagrow.checkpoint.containers.stored_tensor import StoredTensor
from megagrow.checkpoint.interface.format import LeftOut
from megagrow.state.catalog import MASTER, Slot

# By the names of torch's optimizers and of those that use the same names.
MOMENTS = (
    Slot("exp_avg", "first_moment"),
    Slot("exp_avg_sq", "second_moment"),
    Slot("momentum_buffer", "first_moment"),
    Slot("max_exp_avg_sq", "second_moment"),
    Slot("square_avg", "second_moment"),
    Slot("grad_avg", "first_moment"),
    Slot("sum", "second_moment"),
)
_NAMES = frozenset(slot.name for slot in MOMENTS)
# Keys around torch's dictionary that are carried, or follow from what is carried.
_KNOWN = frozenset(
    {
        "base_optimizer_state", "optimizer_state_dict", "single_partition_of_fp32_groups",
        "fp32_flat_groups", "fp32_groups", "zero_stage", "group_paddings",
        "param_alignment_paddings", "partition_count", "ds_version", "param_slice_mappings",
        "loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "cur_scale", "cur_iter",
        "last_overflow_iter", "scale_factor", "scale_window", "state", "param_groups",
        "base_optimizer_state_step",
    }
)  # fmt: skip


@dataclass(frozen=True)
class SavedPiece:
    """Elements [start, stop) of a parameter, as held by a model-parallel rank."""

    name: str
    slot: str
    mp: int
    start: int
    stop: int
    tensor: StoredTensor
    offset: int  # position of its first element in the stored tensor


class Saved:
    """The dictionary that one rank's optimizer saved; empty if it saved nothing."""

    def __init__(self, value: Mapping[str, Any]) -> None:
        self.value = value

    @property
    def base(self) -> Any:
        """The state of the torch optimizer inside DeepSpeed's."""
        for key in ("base_optimizer_state", "optimizer_state_dict"):
            if key in self.value:
                return self.value[key]
        return self.value

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Torch's parameter groups; none in an "elastic" checkpoint."""
        base = self.base
        return list(base.get("param_groups", ())) if isinstance(base, dict) else []

    @property
    def settings(self) -> dict[str, Any]:
        """AdamW's settings in configuration form, from the first group with weight decay."""
        decaying = [group for group in self.groups if group.get("weight_decay")] or self.groups
        if not decaying or not {"betas", "eps", "lr"} <= set(decaying[0]):
            return {}
        told = {key: float(decaying[0][key]) for key in ("eps", "weight_decay", "lr")}
        told["lr"] /= float(decaying[0].get("lr_factor", 1.0))
        if told["lr"] == 0.0:  # set by a schedule, not by the run
            del told["lr"]
        return {"betas": [float(beta) for beta in decaying[0]["betas"]], **told}

    @cached_property
    def states(self) -> list[dict[str, Any]]:
        """The state of each tensor in the optimizer's order; empty if there is no state at all.

        If only some tensors have no state, theirs is an empty dictionary.
        """
        base = self.base
        if isinstance(base, list):  # "elastic" checkpoints
            return base
        states = base.get("state", {})
        order = [i for group in self.groups for i in group["params"]]
        return [states.get(i, {}) for i in order] if states else []

    @property
    def members(self) -> list[list[int]]:
        """The indices of the optimizer's tensors, by group."""
        return [list(group["params"]) for group in self.groups]

    @cached_property
    def masters(self) -> list[StoredTensor]:
        """At ZeRO 0 with 16-bit parameters: the fp32 masters, in the optimizer's order."""
        return [tensor for group in self.value.get("fp32_groups", ()) for tensor in group]

    def shape_of(self, number: int) -> tuple[int, ...] | None:
        """At ZeRO 0: the shape of one of the optimizer's tensors, if known."""
        if self.masters:
            return self.masters[number].shape
        state = self.states[number] if self.states else {}
        return next((state[n].shape for n in _NAMES if _is_tensor(state.get(n))), None)

    def left_out(self, where: str, slots: Sequence[Slot]) -> list[LeftOut]:
        """What the dictionary holds and is not carried.

        Args:
            where: what contains the dictionary.
            slots: the slots that are carried.
        """
        held = {slot.name for slot in slots}
        found = [LeftOut(f"{where}: {key}", "unknown") for key in self.value if key not in _KNOWN]
        names = {key: state[key] for state in self.states for key in state}
        for key, value in names.items():
            if key in held or (key not in _NAMES and is_number(value)):
                continue
            reason = "not kept of every parameter" if key in _NAMES else "an unknown state"
            found.append(LeftOut(f"{where}: optimizer state {key}", reason))
        return found


def common_slots(saved: Sequence[Saved]) -> tuple[Slot, ...]:
    """Masters, and the moments present in every state of every rank."""
    states = [state for one in saved for state in one.states]
    if not states:
        return (MASTER,)
    held = (slot for slot in MOMENTS if all(_is_tensor(s.get(slot.name)) for s in states))
    return (MASTER, *held)


def is_number(value: Any) -> bool:
    """Whether a value is one number (or None), plain or as a scalar tensor."""
    if isinstance(value, StoredTensor):
        return value.shape == () and value.dtype == torch.float32
    return value is None or isinstance(value, (bool, int, float))


def numbers_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers in a tensor's state in JSON form: {"tensor": n} for a scalar tensor."""
    return {
        key: {"tensor": value.item()} if isinstance(value, StoredTensor) else value
        for key, value in state.items()
        if is_number(value) and not (key in _NAMES and value is not None)
    }


def _is_tensor(value: Any) -> bool:
    return isinstance(value, StoredTensor)


# --- which parameter is which -------------------------------------------------------------

_MOST_WAYS = 20_000


def assign(
    parameters: Mapping[str, tuple[int, ...]], groups: Sequence[Sequence[tuple[int, ...] | None]]
) -> list[list[str]] | None:
    """Match parameters to the optimizer's tensors, if their shapes leave exactly one solution.

    A group lists its parameters in the module's order, as any loop over `named_parameters`
    produces; parameters in no group are untrained.

    Args:
        parameters: shape by name, in the module's order.
        groups: the shapes of each group's tensors; None where unknown.

    Returns:
        The names in each group, or None if there is no solution or more than one.
    """
    spare = len(parameters) - sum(map(len, groups))
    end = tuple(map(len, groups))
    # Keyed by how much of each group is used: number of ways (2 for more), and one way's last step.
    ways: dict[tuple[int, ...], int] = {(0,) * len(groups): 1}
    steps: list[dict[tuple[int, ...], tuple[tuple[int, ...], int]]] = []
    for number, shape in enumerate(parameters.values()):
        following: dict[tuple[int, ...], int] = {}
        came: dict[tuple[int, ...], tuple[tuple[int, ...], int]] = {}
        for taken, count in ways.items():
            open_to = [(taken, -1)] if number - sum(taken) < spare else []
            for g, group in enumerate(groups):
                if taken[g] < len(group) and group[taken[g]] in (None, shape):
                    open_to.append(((*taken[:g], taken[g] + 1, *taken[g + 1 :]), g))
            for after, g in open_to:
                following[after] = min(2, following.get(after, 0) + count)
                came[after] = taken, g
        if len(following) > _MOST_WAYS:
            return None
        ways = following
        steps.append(came)
    if ways.get(end) != 1:
        return None
    found: list[list[str]] = [[] for _ in groups]
    for name, came in zip(reversed(list(parameters)), reversed(steps), strict=True):
        end, g = came[end]
        if g >= 0:
            found[g].insert(0, name)
    return found
