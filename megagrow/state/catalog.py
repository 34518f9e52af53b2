"""The catalog: the logical tensors that a model configuration defines.

A logical tensor is a whole parameter, as one process without any parallelism
would hold it.  Fused weights keep their structure as axes, so that
tensor-parallel splits and growth act on whole axes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

from megagrow.state.roles import MATRICES, ROLES, Role, with_roles

InitKind = Literal["normal", "zeros", "ones", "constant"]
SlotKind = Literal["parameter", "first_moment", "second_moment"]
Training = Literal["trained", "frozen", "buffer"]
# What an axis of a tensor of megagrow's models means: the vocabulary; the residual stream; groups
# of query heads that share a key/value head; the group's queries, its key and its value; its
# queries; the features of a head; the units of the MLP; the gate and the unit itself; the position.
Axis = Literal[
    "vocab", "embed", "kv_group", "projection", "query", "head_dim", "ffn", "gate_up", "position"
]  # fmt: skip
AXES: tuple[Axis, ...] = get_args(Axis)

_OF_A_BLOCK = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Init:
    """How a tensor is initialised; `std` is the std of "normal" and the value of "constant"."""

    kind: InitKind
    std: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(InitKind):
            raise ValueError(f"init of kind {self.kind!r:.40}, which is none of InitKind")


@dataclass(frozen=True)
class Rates:
    """Per-tensor multipliers of the run's optimizer settings (muP).

    Attributes:
        lr, eps: multiply the learning rate and eps of AdamW and Lion; weight decay is divided by
            `lr`, so that the decay per step is unchanged.
        orthogonal: multiplies the learning rate of Muon's matrices, likewise.
    """

    lr: float = 1.0
    eps: float = 1.0
    orthogonal: float = 1.0


@dataclass(frozen=True)
class LogicalTensor:
    """One whole parameter.

    Attributes:
        name: unique in the catalog, e.g. ``layers.3.mlp.up.weight``.
        shape: whole shape, without any padding.
        axes: the meaning of each axis: one of `AXES`, except in a foreign model.
        init: how it is initialised.
        decay: whether weight decay applies.
        places: positions in the model's layer list that use it: 0 is the embedding,
            1..L the blocks, L+1 the final norm and head.  A tied tensor has two.
        role: its function in the model; see `megagrow.state.roles`.
        reads: the input axes, which it sums over and which come last; the others are outputs, gains
            or table rows.
        centred: for a norm, whether it subtracts the mean (LayerNorm).
        scaled: for the token embedding, whether the model multiplies what it looks up by the square
            root of the width.
        offset: what the model adds to it in use, as 1 to Gemma's gains.
        kind: of a block's tensor, how its block differs from others with the same tensors, for
            instance in its window; empty if all blocks are alike.
        training: a tensor may also be a frozen parameter, and in a foreign model a buffer; those
            have a value only, in a foreign model of any dtype.
        aliases: other names of the same tensor in such a model.
        rates: multipliers of the optimizer's settings.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init
    decay: bool
    places: tuple[int, ...]
    role: Role = "other"
    reads: tuple[str, ...] = ()
    centred: bool = False
    scaled: bool = False
    offset: float = 0.0
    kind: str = ""
    training: Training = "trained"
    aliases: tuple[str, ...] = ()
    rates: Rates = Rates()

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"{self.name}: {len(self.shape)} axes but {len(self.axes)} names")
        if self.role not in ROLES:
            raise ValueError(f"{self.name}: role {self.role!r:.40}")
        if self.training not in get_args(Training):
            raise ValueError(f"{self.name}: training {self.training!r:.40}")
        if self.reads != self.axes[len(self.axes) - len(self.reads) :]:
            raise ValueError(f"{self.name}: reads {self.reads!r:.80}, not its last axes")

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        """A form that JSON holds; what is so by default is left out."""
        defaults = {
            "reads": (),
            "centred": False,
            "scaled": False,
            "offset": 0.0,
            "kind": "",
            "training": "trained",
            "aliases": (),
            "rates": asdict(Rates()),
        }
        return {k: v for k, v in asdict(self).items() if k not in defaults or v != defaults[k]}

    @property
    def is_matrix(self) -> bool:
        """Whether it is a weight matrix of a block: not an embedding, head, norm or bias."""
        return self.role in MATRICES

    @property
    def layer(self) -> int | None:
        """The index of its block, from 0; None for tensors outside the blocks."""
        match = _OF_A_BLOCK.fullmatch(self.name)
        return int(match[1]) if match else None

    @property
    def inner(self) -> str:
        """Its name inside its block, the same in every block."""
        match = _OF_A_BLOCK.fullmatch(self.name)
        return match[2] if match else self.name


def of_layer(layer: int, inner: str) -> str:
    """The full name of a block's tensor; inverts `LogicalTensor.layer` and `inner`."""
    return f"layers.{layer}.{inner}"


@dataclass(frozen=True)
class Slot:
    """A per-parameter array that training keeps: the parameter itself or optimizer state.

    Attributes:
        name: its key in files and in the optimizer's state.
        kind: how growth scales it (the slot law).
        matrices: whether the blocks' weight matrices have it; all other tensors do.
    """

    name: str
    kind: SlotKind
    matrices: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(SlotKind):
            raise ValueError(f"slot {self.name} of kind {self.kind!r:.40}, none of SlotKind")

    def of(self, tensor: LogicalTensor) -> bool:
        """Whether a tensor has this slot."""
        if tensor.training != "trained":
            return self.kind == "parameter"
        return self.matrices or not tensor.is_matrix

    def to_json(self) -> dict[str, Any]:
        """A form that JSON holds; what is so by default is left out."""
        return {k: v for k, v in asdict(self).items() if (k, v) != ("matrices", True)}


MASTER = Slot("master", "parameter")
ADAM_SLOTS = (MASTER, Slot("exp_avg", "first_moment"), Slot("exp_avg_sq", "second_moment"))
# Muon keeps only momentum for matrices, and is AdamW for all other tensors.
MUON_SLOTS = (*ADAM_SLOTS[:2], Slot("exp_avg_sq", "second_moment", matrices=False))


def slots_of(tensor: LogicalTensor, slots: Iterable[Slot]) -> tuple[Slot, ...]:
    """The given slots that a tensor has, in the given order."""
    return tuple(slot for slot in slots if slot.of(tensor))


@dataclass(frozen=True)
class Catalog:
    """All logical tensors of one model, in the order of its layer list."""

    tensors: tuple[LogicalTensor, ...]
    _by_name: Mapping[str, LogicalTensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_name = {tensor.name: tensor for tensor in self.tensors}
        if len(by_name) != len(self.tensors):
            raise ValueError("two tensors of a catalog have the same name")
        object.__setattr__(self, "_by_name", by_name)

    def __getitem__(self, name: str) -> LogicalTensor:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[LogicalTensor]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @cached_property
    def layers(self) -> int:
        """Number of blocks."""
        return 1 + max((t.layer for t in self.tensors if t.layer is not None), default=-1)

    def of(self, role: Role) -> LogicalTensor | None:
        """The one tensor with this role, or None; for roles that occur at most once."""
        found = self._by_role.get(role, ())
        if len(found) > 1:
            raise ValueError(f"{len(found)} tensors have the role {role}")
        return found[0] if found else None

    @cached_property
    def centred(self) -> bool:
        """Whether the norms subtract the mean."""
        return any(tensor.centred for tensor in self.tensors)

    @cached_property
    def period(self) -> int:
        """The least number of layers after which the kinds of layers repeat."""
        kinds = {tensor.layer: tensor.kind for tensor in self.tensors if tensor.layer is not None}
        order = [kinds[layer] for layer in sorted(kinds)]
        for period in range(1, len(order) + 1):
            if all(kind == order[i % period] for i, kind in enumerate(order)):
                return period
        return 1

    @cached_property
    def scaled(self) -> bool:
        """Whether embeddings are multiplied by the square root of the width."""
        return any(tensor.scaled for tensor in self.tensors)

    @cached_property
    def _by_role(self) -> dict[Role, list[LogicalTensor]]:
        found: dict[Role, list[LogicalTensor]] = {}
        for tensor in self.tensors:
            found.setdefault(tensor.role, []).append(tensor)
        return found

    def with_frozen(self, names: Container[str]) -> Catalog:
        """The catalog with these tensors frozen, and all others as they are."""
        return Catalog(
            tuple(replace(t, training="frozen") if t.name in names else t for t in self.tensors)
        )

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the frozen tensors."""
        return frozenset(t.name for t in self.tensors if t.training == "frozen")

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied tensor counts once, buffers are excluded."""
        return sum(tensor.volume for tensor in self.tensors if tensor.training != "buffer")

    def to_json(self) -> list[dict[str, Any]]:
        """A form that JSON holds; `from_json` is its inverse."""
        return [tensor.to_json() for tensor in self.tensors]

    @staticmethod
    def from_json(data: Iterable[Mapping[str, Any]]) -> Catalog:
        """Read what `to_json` wrote (raises KeyError, TypeError or ValueError on anything else)."""
        return Catalog(
            tuple(
                LogicalTensor(
                    name=str(item["name"]),
                    shape=tuple(int(n) for n in item["shape"]),
                    axes=tuple(str(axis) for axis in item["axes"]),
                    init=Init(item["init"]["kind"], float(item["init"]["std"])),
                    decay=bool(item["decay"]),
                    places=tuple(int(place) for place in item["places"]),
                    role=item["role"],
                    reads=tuple(str(axis) for axis in item.get("reads", ())),
                    centred=bool(item.get("centred", False)),
                    scaled=bool(item.get("scaled", False)),
                    offset=float(item.get("offset", 0.0)),
                    kind=str(item.get("kind", "")),
                    training=item.get("training", "trained"),
                    aliases=tuple(str(name) for name in item.get("aliases", ())),
                    rates=Rates(**{k: float(v) for k, v in item.get("rates", {}).items()}),
                )
                for item in with_roles(data)
            )
        )

    def fingerprint(self) -> str:
        """Canonical text: equal if and only if two catalogs are equal."""
        return json.dumps(self.to_json(), sort_keys=True)
