"""The non-tensor state of a foreign DeepSpeed engine, kept so that it can resume from a result.

It is the optimizer's groups with their settings, the numbers in its state, the loss scale, and the
client's entries.  A checkpoint of any format carries it in its run state, under `deepspeed`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megagrow.checkpoint.containers.pickle_reader import Opaque
from megagrow.checkpoint.containers.stored_tensor import StoredTensor
from megagrow.checkpoint.containers.torch_writer import number
from megagrow.checkpoint.formats.deepspeed.saved_optimizer import Saved, is_number, numbers_of
from megagrow.checkpoint.interface.format import LeftOut
from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.errors import CheckpointError, ConfigError

KEY = "deepspeed"
_SCALERS = tuple(f"deepspeed.runtime.fp16.loss_scaler.{n}LossScaler" for n in ("", "Dynamic"))
_SAVED = ("dynamic_loss_scale", "overflow", "clip_grad", "cur_scale", "cur_iter",
          "last_overflow_iter", "scale_factor", "scale_window")  # fmt: skip
# Keys of the checkpoint's head that describe tensors (already read) or the layout (made anew).
_DERIVED = frozenset(
    {
        "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes",
        "shared_params", "frozen_param_fragments", "global_steps", "dp_world_size",
        "mp_world_size", "checkpoint_parallel_dimensions", "universal_checkpoint_info",
        "ds_config", "ds_version", "megagrow",
    }
)  # fmt: skip


@dataclass(frozen=True)
class OptimizerGroup:
    """A parameter group of the optimizer.

    Attributes:
        tensors: names, in its order.
        options: its settings.
        numbers: the numbers in the state of each tensor; {"tensor": n} for a number in a tensor.
        own: numbers of the tensors whose numbers differ from the group's.
    """

    tensors: tuple[str, ...]
    options: Mapping[str, Any]
    numbers: Mapping[str, Any]
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def numbers_of(self, tensor: str) -> Mapping[str, Any]:
        """The numbers in the state of one of its tensors."""
        return self.own.get(tensor, self.numbers)


@dataclass(frozen=True)
class EngineState:
    """The non-tensor state of an engine.

    Attributes:
        groups: the optimizer's parameter groups.
        slots: the optimizer's slots of each tensor, by name.
        saved: numbers outside the optimizer's own dictionary; `loss_scaler` as (class, attributes).
        head: other entries of the checkpoint's head: counters, schedules, the client's.
    """

    groups: tuple[OptimizerGroup, ...]
    slots: tuple[str, ...]
    saved: Mapping[str, Any]
    head: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """A JSON-compatible form; `from_json` is its inverse."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # lists in place of tuples
        return found

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> EngineState:
        """Read what `to_json` wrote (KeyError, TypeError or ValueError on anything else)."""
        groups = tuple(
            OptimizerGroup(
                tuple(map(str, item["tensors"])),
                dict(item["options"]),
                dict(item["numbers"]),
                {str(name): dict(own) for name, own in item["own"].items()},
            )
            for item in data["groups"]
        )
        return EngineState(
            groups, tuple(map(str, data["slots"])), dict(data["saved"]), dict(data["head"])
        )

    @staticmethod
    def of(meta: CheckpointMeta) -> EngineState | None:
        """The engine state in a checkpoint's metadata, or None.

        Raises:
            CheckpointError: it is damaged, or belongs to another model.
        """
        if KEY not in meta.run_state:
            return None
        try:
            found = EngineState.from_json(meta.run_state[KEY])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"run state: {KEY}: damaged", found=repr(error)[:200]) from None
        named = sorted(name for group in found.groups for name in group.tensors)
        trained = sorted(tensor.name for tensor in meta.catalog if tensor.training == "trained")
        if named != trained:
            odd = sorted(set(named) ^ set(trained))[:3] or "a tensor in two groups"
            raise CheckpointError(f"run state: {KEY}: its groups are not the tensors", found=odd)
        return found

    def options(self, index: int, params: Sequence[int]) -> dict[str, Any]:
        """A parameter group in the form that torch saves."""
        options = {key: _value(value) for key, value in self.groups[index].options.items()}
        if isinstance(options.get("betas"), list):
            options["betas"] = tuple(options["betas"])
        return {**options, "params": list(params)}

    def state(self, index: int, tensor: str | None = None) -> dict[str, Any]:
        """The numbers in the state of a group's tensor, or of the whole group as one flat tensor.

        Raises:
            ConfigError: the group's tensors have different step counts.
        """
        group = self.groups[index]
        if tensor is None and group.own:
            name, own = next(iter(group.own.items()))
            raise ConfigError(
                f"group {index} of the optimizer: its tensors are not at one step, and with ZeRO "
                "a group is one tensor",
                found=f"{name}: {dict(own)}, others: {dict(group.numbers)}",
                fix="give --zero 0",
            )
        numbers = group.numbers if tensor is None else group.numbers_of(tensor)
        return {key: _value(value) for key, value in numbers.items()}

    def loss_scaler(self) -> Opaque | None:
        """DeepSpeed's own loss scaler object."""
        stated = self.saved.get("loss_scaler")
        return (
            Opaque(stated[0], state=dict(stated[1])) if stated and stated[0] in _SCALERS else None
        )


def read_engine(
    saved: Saved,
    head: Mapping[str, Any],
    *,
    groups: Sequence[Sequence[str]],
    slots: Sequence[str],
    zero: int,
) -> EngineState:
    """Build an engine's state from what its first rank saved.

    Args:
        groups: names in each group, in the optimizer's order.
        slots: the optimizer's slots of each tensor, by name.
        zero: the ZeRO stage; with ZeRO a group is one tensor.
    """
    found, at = [], 0
    for names, group in zip(groups, saved.groups, strict=True):
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        states = saved.states[at : at + (1 if zero else len(names))]
        at += len(states)
        each = [numbers_of(state) for state in states]
        most = each[0] if each else {}
        own = {n: e for n, e in zip(names, each, strict=False) if e != most} if not zero else {}
        kept = {key: _kept(value) for key, value in options.items() if _holds(value)}
        found.append(OptimizerGroup(tuple(names), kept, most, own))
    stated = {key: saved.value.get(key) for key in _SAVED}
    around: dict[str, Any] = {
        key: value for key, value in stated.items() if value is not None and is_plain(value)
    }
    scaler = saved.value.get("loss_scaler")
    if isinstance(scaler, Opaque) and scaler.name in _SCALERS and isinstance(scaler.state, dict):
        around["loss_scaler"] = (
            scaler.name,
            {key: value if is_plain(value) else None for key, value in scaler.state.items()},
        )
    rest = {k: v for k, v in head.items() if k not in _DERIVED and v is not None and is_plain(v)}
    return EngineState(tuple(found), tuple(slots), around, rest)


def left_out_of(saved: Saved, head: Mapping[str, Any], *, ours: bool) -> Iterator[LeftOut]:
    """Settings that the result will lack.

    Args:
        ours: whether the model is one of ours, whose run has its own settings.
    """
    for index, group in enumerate(saved.groups):
        for key, value in group.items():
            if key not in ("params", "param_names") and not _holds(value):
                yield LeftOut(f"param_groups[{index}].{key}", "no plain setting")
    counters = ("skipped_steps", "global_samples")
    for key, value in head.items():
        if key in _DERIVED or value is None:
            continue
        if not is_plain(value):
            yield LeftOut(str(key)[:100], "no plain data")
        elif ours and key not in counters:
            yield LeftOut(str(key)[:100], "a run of ours has its own")
    zero = head.get("ds_config")
    zero = zero.get("zero_optimization") if isinstance(zero, dict) else None
    if isinstance(zero, dict) and zero.get("round_robin_gradients"):
        yield LeftOut(
            "zero_optimization.round_robin_gradients",
            "a result for DeepSpeed is for an engine without it: with it, parameters would be "
            "dealt out in another order than they are stored",
        )


def dealt_out(head: Mapping[str, Any], zero: int) -> bool:
    """Whether ZeRO has dealt a group's parameters round-robin over the data-parallel ranks."""
    config = head.get("ds_config")
    stated = config.get("zero_optimization") if isinstance(config, dict) else None
    return zero in (1, 2) and isinstance(stated, dict) and bool(stated.get("round_robin_gradients"))


def collected(names: Sequence[str], ranks: int) -> list[str]:
    """The names of a group in their order before they were dealt over this many data ranks."""
    order = [i for rank in range(ranks) for i in range(rank, len(names), ranks)]
    return [name for _, name in sorted(zip(order, names, strict=True))]


def _holds(value: Any) -> bool:
    if isinstance(value, StoredTensor):
        return is_number(value)
    return is_plain(value)


def _kept(value: Any) -> Any:
    return {"tensor": value.item()} if isinstance(value, StoredTensor) else value


def _value(value: Any) -> Any:
    held = isinstance(value, dict) and set(value) == {"tensor"}
    return number(value["tensor"]) if held else value


def is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value survives a round trip through JSON, except that tuples become lists."""
    if depth > 32:
        return False
    if isinstance(value, dict):
        return all(isinstance(k, str) and is_plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(is_plain(item, depth + 1) for item in value)
    if isinstance(value, float):
        return value - value == 0.0  # finite
    if isinstance(value, int):
        return abs(value) < 1 << 63
    return value is None or isinstance(value, str)
