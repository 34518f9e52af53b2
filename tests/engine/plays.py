"""Real training jobs under DeepSpeed, as scripts of a few acts.

An act is ("train", steps), ("grow", operator, policy, factor, layout) or ("move", layout).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from megagrow.config import Config, LayoutConfig, ModelConfig
from megagrow.engine.comm import Comm
from megagrow.engine.engine import Engine
from megagrow.engine.probe import Probe
from megagrow.growth.optimizer_rules import OptimizerRules, group_keys
from megagrow.growth.plan import Growth, make_growth
from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import slots_of
from megagrow.state.layout import Layout
from megagrow.state.optimizers import OPTIMIZERS
from megagrow.state.placement import Placement
from megagrow.transfer.execute import TransferReport, transfer_between_ranks
from megagrow.transfer.state_map import FreshStart, Identity, StateMap
from megagrow.transfer.whole_state import MemoryState
from tests.toys import grow, larger, random_state, toy_model

BATCH, SEED, LR, STAGING = 12, 3, 5e-3, 32768


def data_layouts(world: int) -> list[Layout]:
    """Pure data parallelism, at every ZeRO stage."""
    return [Layout(data=world, zero=zero) for zero in (0, 1, 2, 3)]


def model_layouts(world: int) -> list[Layout]:
    """Layouts that split the model itself, at every ZeRO stage that each allows."""
    grids = {2: [(2, 1), (1, 2)], 4: [(2, 2), (2, 1), (1, 2)]}.get(world, [])
    return [
        Layout(data=world // (tensor * pipeline), tensor=tensor, pipeline=pipeline, zero=zero)
        for tensor, pipeline in grids
        for zero in ((0, 1) if pipeline > 1 else (0, 1, 2))
    ]


class Job:
    """One rank of a training run."""

    def __init__(
        self,
        comm: Comm,
        *,
        layout: Layout | None = None,
        model: ModelConfig | None = None,
        micro: int | None = None,
        sequence: bool = False,
        fresh: bool = True,
        precision: dict[str, Any] | None = None,
        frozen: Iterable[str] = (),
        eod: int | None = None,
        **optimizer: Any,
    ) -> None:
        self.comm, self.sequence, self.frozen = comm, sequence, frozenset(frozen)
        self.eod = eod
        layout = layout or Layout(data=comm.world)
        self.model = model or toy_model(init_std=0.2)
        self.micro = micro or math.gcd(2, BATCH // comm.world)
        sections: dict[str, Any] = {
            "model": self.model,
            "data": {"path": "unused"},
            "batch": {"global": BATCH, "micro": self.micro},
            "stages": [{"until": {"steps": 1}}],
            "precision": precision or {},
            "optimizer": {"grad_clip": 1.0, "eps": 1e-6} | optimizer,
        }
        self.config = Config(**sections)
        self.rules, self.step, self.optimizer_step = OptimizerRules(), 0, 0
        self.optimizer = OPTIMIZERS[self.config.optimizer.name]
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.reports: list[TransferReport] = []
        vocab, length = self.model.vocabulary, self.model.sequence + 1
        # Each sample counts up with its own increment, so that there is something to learn.
        rng = np.random.default_rng(SEED)
        steps = rng.integers(1, 4, (60 * BATCH, 1))
        self.data = (rng.integers(0, vocab, (60 * BATCH, 1)) + steps * np.arange(length)) % vocab
        self.engine = self._engine(layout)
        if fresh:
            self._fill(FreshStart(self.engine.placement.catalog), self.engine, self.engine)

    def _engine(self, layout: Layout) -> Engine:
        catalog = build_catalog(self.model).with_frozen(self.frozen)
        return Engine(
            config=self.config, model=self.model,
            spread=LayoutConfig(
                tensor=layout.tensor, pipeline=layout.pipeline, zero=layout.zero,
                sequence_parallel=self.sequence and layout.tensor > 1,
            ),
            placement=Placement(catalog, layout, group_keys(catalog, self.rules, self.optimizer)),
            rules=self.rules, optimizer_step=self.optimizer_step, eod=self.eod, comm=self.comm,
        )  # fmt: skip

    def _fill(self, state_map: StateMap, old: Engine, new: Engine) -> None:
        report = transfer_between_ranks(
            state_map=state_map, old=old.state, old_placement=old.placement, new=new.state,
            new_placement=new.placement, slots=new.slots, channel=self.comm, seed=SEED,
            staging_bytes=STAGING,
        )  # fmt: skip
        self.reports.append(report)
        new.publish()

    def load(self, seed: int) -> MemoryState:
        """Write a random state into the engine."""
        state = random_state(self.engine.placement.catalog, seed=seed, dtype=torch.float32)
        for shard in self.engine.placement.shards(self.comm.rank):
            for slot in slots_of(self.engine.placement.catalog[shard.tensor], self.engine.slots):
                place = self.engine.state.view(shard.tensor, slot.name, shard.box)
                place.copy_(state.view(shard.tensor, slot.name, shard.box))
        self.engine.publish()
        return state

    def train(self, steps: int, probe: Probe | None = None) -> None:
        """Take some steps; losses and gradient norms are the whole batch's."""
        share = BATCH // self.engine.layout.data
        for _ in range(steps):
            first = self.step * BATCH + self.engine.coordinates.data * share
            starts = range(first, first + share, self.micro)
            batches = (self.data[i : i + self.micro] for i in starts)
            result = self.engine.train_step(batches, lr=LR, seed=self.step, probe=probe)
            self.losses.append(float(np.mean(self.comm.gather_floats(result.loss))))
            self.norms.append(result.grad_norm)
            self.step += 1
            self.optimizer_step += 1

    def move(self, layout: Layout) -> None:
        """Tear down the engine and continue in another layout of the same model."""
        old = self.engine
        old.close()
        self.engine = self._engine(layout)
        self._fill(Identity(self.engine.placement.catalog), old, self.engine)

    def grow(self, operator: str, policy: str | None, factor: float, layout: Layout) -> Growth:
        """Grow live into another engine."""
        old = self.engine
        self.model = larger(self.model, operator, factor)
        growth = make_growth(
            operator=operator, policy=policy, small=old.placement.catalog,
            target=build_catalog(self.model), rewarm=5,
        )  # fmt: skip
        old.close()
        self.optimizer_step *= not growth.policy.restart_steps
        self.rules = growth.rules_after(self.rules, step=self.optimizer_step)
        self.engine = self._engine(layout)
        self._fill(growth, old, self.engine)
        return growth

    def evaluate(self) -> float:
        """The loss of a fixed set of samples."""
        total, count = self.engine.evaluate(self.data[-BATCH:], micro=self.micro)
        return sum(self.comm.gather_floats(total)) / sum(self.comm.gather_floats(count))

    def fault(self, whole_state: MemoryState) -> str | None:
        """The first shard of this rank that is not a slice of a whole state."""
        for shard in self.engine.placement.shards(self.comm.rank):
            for slot in slots_of(self.engine.placement.catalog[shard.tensor], self.engine.slots):
                here = self.engine.state.read(shard.tensor, slot.name, shard.box)
                if not torch.equal(
                    here.cpu(), whole_state.view(shard.tensor, slot.name, shard.box)
                ):
                    return f"{slot.name} of {shard.tensor} at {shard.box}"
        return None


def play(
    comm: Comm, script: Iterable[Sequence[Any]], options: dict[str, Any]
) -> tuple[list[float], list[float], list[float]]:
    """Run a script: (losses, gradient norms, evaluations after each act)."""
    job = Job(comm, **options)
    evaluations = []
    for act, *args in script:
        getattr(job, act)(*args)
        evaluations.append(job.evaluate())
    return job.losses, job.norms, evaluations


def play_all(
    comm: Comm, plays: Iterable[tuple[list[Any], dict[str, Any]]]
) -> list[tuple[list[float], list[float], list[float]]]:
    """Run several scripts one after another, each (script, options), in one job."""
    return [play(comm, script, options) for script, options in plays]


def growth_faults(
    comm: Comm, cases: Iterable[tuple[Layout, Layout, tuple[str, str, float]]]
) -> list[str | None]:
    """Faults of this rank: growing a random state live against growing it in one process."""
    faults: list[str | None] = []
    for before, after, (operator, policy, factor) in cases:
        job = Job(comm, layout=before, fresh=False)
        state = job.load(seed=11)
        model = job.model
        job.grow(operator, policy, factor, after)
        _, _, expected = grow(
            model, state, operator=operator, policy=policy, factor=factor, seed=SEED
        )
        report = job.reports[-1]
        too_much = "staging" if report.peak_staging_bytes > STAGING else None
        faults.append(job.fault(expected) or too_much)
    return faults
