"""Small models and states that several tests share."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

from megagrow.config import ModelConfig
from megagrow.growth.operators.ramp import Ramp
from megagrow.growth.plan import Growth, grown_model, make_growth
from megagrow.growth.registry import OPERATORS
from megagrow.models.catalog import build_catalog
from megagrow.models.common.masks import ramp_in
from megagrow.models.registry import FAMILIES as BUILT_IN
from megagrow.models.transformer import Transformer, named_tensors
from megagrow.state.boxes import Box
from megagrow.state.catalog import ADAM_SLOTS, Catalog
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from megagrow.transfer.ends import NoChannel, Operation
from megagrow.transfer.execute import transfer_between_ranks
from megagrow.transfer.state_map import StateMap
from megagrow.transfer.whole_state import MemoryState


def _plain() -> tuple[str, ...]:
    """The families of plain models, one of each kind; `featured_models` has the others."""
    found: dict[tuple[str, ...], str] = {}
    for name, family in BUILT_IN.items():
        made = family.architecture
        if made.plain:
            kind = (made.norm, made.positions, str(made.gated), made.activation)
            found.setdefault(kind, name)
    return tuple(found.values())


FAMILIES = _plain()

_Result = TypeVar("_Result")


def toy_model(**changes: Any) -> ModelConfig:
    """A model of about a thousand parameters; `init_std` is large so that every part matters."""
    sizes = {
        "layers": 2, "hidden": 8, "heads": 2, "ffn": 12, "sequence": 6, "vocab": 13,
        "init_std": 0.4,
    }  # fmt: skip
    return ModelConfig(**(sizes | changes))


def toy_models() -> Iterator[tuple[str, ModelConfig]]:
    """Every family, tied and untied: (id, model)."""
    for family, tied in itertools.product(FAMILIES, (True, False)):
        name = f"{family}-{'tied' if tied else 'untied'}"
        yield name, toy_model(family=family, tie_embeddings=tied)


# Settings with which what a family has beyond plain models matters in a toy.
_FEATURES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_scaling": {
            "type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_sequence": 8,
        },
    },
    "mistral": {"window": 3},
    "qwen2": {},
    "qwen3": {"head_dim": 6},
    "olmo2": {"tie_embeddings": False},
    "smollm3": {"no_rope_every": 2},
    "phi3": {"window": 4, "rope_fraction": 0.5, "tie_embeddings": False},
    "gpt_neox": {"rope_fraction": 0.5, "tie_embeddings": False},
    "gemma2": {
        "window": 3, "full_every": 2, "attention_softcap": 2.0, "logit_softcap": 3.0,
        "attention_scale": 0.6,
    },
}  # fmt: skip


def featured_models(**changes: Any) -> dict[str, ModelConfig]:
    """A model of every family that is not plain, or has settings of its own: by name."""
    return {
        family: toy_model(family=family, **(_FEATURES[family] | changes))
        for family, registered in BUILT_IN.items()
        if registered.architecture.settings or not registered.architecture.plain
    }


def growths(
    *, policies: bool = True, keeps: str | None = None, fractions: bool = False
) -> list[tuple[str, str, float]]:
    """Every registered operator, with its policies (or the first alone), and factors.

    Factor 4 comes with the first policy only, and so does 1.5, for operators that take any size
    (it makes three heads, which no two ranks share).
    """
    return [
        (operator.name, policy, factor)
        for operator in OPERATORS.values()
        if keeps is None or operator.keeps == keeps
        for policy in (operator.policies if policies else operator.policies[:1])
        for factor in (
            (2, 3)
            + (4,) * (policy == operator.policies[0])
            + (1.5,) * (fractions and operator.any_size and policy == operator.policies[0])
        )
    ]


def larger(model: ModelConfig, operator: str, factor: float) -> ModelConfig:
    """The configuration that a registered operator makes; the factor may be a fraction."""
    if isinstance(factor, int):
        return grown_model(model, operator=operator, factor=factor)
    fields = model.model_dump(by_alias=True)
    sizes = {key: int(fields[key] * factor) for key in OPERATORS[operator].sizes if fields[key]}
    return OPERATORS[operator].grown(model, sizes)


def random_state(catalog: Catalog, *, seed: int, dtype: torch.dtype = torch.float64) -> MemoryState:
    """Whole tensors with random values in every slot; norms and biases are random as well."""
    generator = torch.Generator().manual_seed(seed)
    state = MemoryState.empty(catalog, ADAM_SLOTS, dtype=dtype)
    for tensor in catalog:
        noise = torch.randn((3, *tensor.shape), generator=generator, dtype=torch.float64)
        base, scale = {
            "ones": (1.0, 0.3),
            "zeros": (0.0, 0.3),
            "normal": (0.0, tensor.init.std),
            "constant": (tensor.init.std, 0.3 * tensor.init.std),
        }[tensor.init.kind]
        state.tensors[tensor.name, "master"].copy_(base + scale * noise[0])
        state.tensors[tensor.name, "exp_avg"].copy_(0.1 * noise[1])
        state.tensors[tensor.name, "exp_avg_sq"].copy_(0.01 * noise[2] ** 2)
    return state


def build(
    model: ModelConfig, state: MemoryState, ramp: Ramp | None = None, progress: float = 0.0
) -> Transformer:
    """The module of a model with the parameters of a whole state, in the state's precision.

    With a ramp it stands as far in it as `progress` says.
    """
    dtype = next(iter(state.tensors.values())).dtype
    module = Transformer(model).to(dtype)
    with torch.no_grad():
        for name, parameter in named_tensors(module).items():
            parameter.copy_(state.tensors[name, "master"])
    if ramp is not None:
        ramp_in(module, model, ramp.old).set(progress)
    return module


def grow(
    model: ModelConfig,
    state: MemoryState,
    *,
    operator: str,
    policy: str | None = None,
    factor: float = 2,
    seed: int = 0,
) -> tuple[ModelConfig, Growth, MemoryState]:
    """Grow a whole state in one process: (grown model, growth, grown state)."""
    grown = larger(model, operator, factor)
    small, target = build_catalog(model), build_catalog(grown)
    growth = make_growth(operator=operator, policy=policy, small=small, target=target)
    return grown, growth, mapped(growth, small, state, seed=seed)


def mapped(
    state_map: StateMap, small: Catalog, state: MemoryState, *, seed: int = 0
) -> MemoryState:
    """Apply a state map to a whole state in one process."""
    dtype = next(iter(state.tensors.values())).dtype
    new = MemoryState.empty(state_map.target, ADAM_SLOTS, dtype=dtype)
    transfer_between_ranks(
        state_map=state_map,
        old=state,
        old_placement=Placement(small, Layout()),
        new=new,
        new_placement=Placement(state_map.target, Layout()),
        slots=ADAM_SLOTS,
        channel=NoChannel(),
        seed=seed,
        staging_bytes=1 << 20,
        dtype=dtype,
    )
    return new


def token_batches(model: ModelConfig, *, samples: int, seed: int, steps: int = 1) -> np.ndarray:
    """Random samples [steps, samples, sequence + 1]."""
    shape = (steps, samples, model.sequence + 1)
    return np.random.default_rng(seed).integers(0, model.vocabulary, shape)


class ShardState:
    """One rank's boxes and nothing else; NaN until written.

    Reading or writing anything but a part of one shard is an error.
    """

    def __init__(
        self,
        placement: Placement,
        rank: int,
        *,
        dtype: torch.dtype = torch.float32,
        whole_state: MemoryState | None = None,
    ) -> None:
        self._dtype = dtype
        self.boxes: dict[tuple[str, str], list[tuple[Box, torch.Tensor]]] = {}
        for shard in placement.shards(rank):
            for slot in ADAM_SLOTS:
                memory = torch.full(shard.box.shape, torch.nan, dtype=dtype)
                if whole_state is not None:
                    memory.copy_(whole_state.view(shard.tensor, slot.name, shard.box))
                self.boxes.setdefault((shard.tensor, slot.name), []).append((shard.box, memory))

    def view(self, tensor: str, slot: str, box: Box) -> torch.Tensor:
        """The memory of a part of one shard."""
        for held, memory in self.boxes.get((tensor, slot), ()):
            if held.contains(box):
                return memory[box.relative_to(held.offset).slices]
        raise KeyError(f"{box} of {tensor} is not here")

    def dtype(self, tensor: str, slot: str) -> torch.dtype:
        return self._dtype

    def read(
        self, tensor: str, slot: str, box: Box, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        values = self.view(tensor, slot, box)
        return values if out is None else out.copy_(values)

    def fault(self, whole_state: MemoryState) -> str | None:
        """The first box that is not, bit for bit, a slice of a whole state; None if all are."""
        for (tensor, slot), held in self.boxes.items():
            for box, memory in held:
                if not torch.equal(memory, whole_state.view(tensor, slot, box)):
                    return f"{slot} of {tensor} at {box}"
        return None


class ThreadChannel:
    """A rank's end of an in-process channel; make all of a job with `job`."""

    def __init__(
        self, rank: int, world: int, lines: dict[tuple[int, int], queue.Queue[torch.Tensor]]
    ) -> None:
        self.rank, self.world, self._lines = rank, world, lines

    @staticmethod
    def job(world: int) -> list[ThreadChannel]:
        """The channels of all ranks."""
        lines: dict[tuple[int, int], queue.Queue[torch.Tensor]] = {
            (a, b): queue.Queue() for a in range(world) for b in range(world)
        }
        return [ThreadChannel(rank, world, lines) for rank in range(world)]

    def exchange(
        self, *, send: torch.Tensor | None, to: int, receive: torch.Tensor | None, source: int
    ) -> None:
        """Send and receive; a message of the wrong length is an error."""
        if send is not None:
            self._lines[self.rank, to].put(send.clone())
        if receive is not None:
            message = self._lines[source, self.rank].get(timeout=30)
            assert message.shape == receive.shape
            receive.copy_(message)

    def reduce(self, values: torch.Tensor, *, operation: Operation) -> None:
        """Every rank gives its tensor to every other."""
        mine = values.clone()
        for step in range(1, self.world):
            to, source = (self.rank + step) % self.world, (self.rank - step) % self.world
            other = torch.empty_like(mine)
            self.exchange(send=mine, to=to, receive=other, source=source)
            values.copy_(values + other if operation == "sum" else torch.maximum(values, other))


def on_threads(function: Callable[[ThreadChannel], _Result], world: int) -> list[_Result]:
    """Run function(channel) for every rank of an in-process job; returns the results by rank."""
    results: dict[int, _Result] = {}
    errors: list[BaseException] = []

    def work(channel: ThreadChannel) -> None:
        try:
            results[channel.rank] = function(channel)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(channel,), daemon=True)
        for channel in ThreadChannel.job(world)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return [results[rank] for rank in range(world)]
