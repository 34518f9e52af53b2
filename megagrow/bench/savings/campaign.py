"""The order of a savings benchmark, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megagrow.bench.savings import runs
from megagrow.bench.savings.config import SCRATCH, SMALL, Branch, Member, SavingsConfig, member
from megagrow.bench.savings.results import (
    SPEEDS,
    Point,
    finished,
    read_points,
    stage_key,
)
from megagrow.bench.savings.summary import Result, claim, derived, ranking
from megagrow.engine.comm import Comm
from megagrow.train.plan import plan_run


class Campaign:
    """A benchmark's members, branches and results; trains nothing by itself.

    Args:
        config: the benchmark.
        world: processes of each run.
        vocab: of the dataset.
    """

    def __init__(self, config: SavingsConfig, *, world: int, vocab: int) -> None:
        self.config, self._world, self._vocab = config, world, vocab
        path = Path(config.dir) / SPEEDS
        self.speeds: dict[str, float] = json.loads(path.read_bytes()) if path.is_file() else {}

    def member(self, name: str, *, seed: int, lr: float) -> Member:
        """A variant or control at a learning rate and a seed."""
        return member(self.config, name, lr=lr, seed=seed)

    def branches(self, one: Member) -> list[Branch]:
        """All budgets of a member."""
        return one.branches(
            list(self.config.budgets),
            decay=self.config.decay,
            world=self._world,
            vocab=self._vocab,
        )

    def points(self, one: Member) -> list[Point]:
        """What a member has finished."""
        branches = self.branches(one)
        stages = plan_run(
            one.branch(branches[-1]), world=self._world, vocabulary=self._vocab
        ).stages
        speeds = [self.speeds.get(stage_key(stage)) for stage in stages]
        return read_points(one, branches, speeds=speeds)

    # --- what to train --------------------------------------------------------------------

    def sweep(self) -> list[runs.Task]:
        """The baseline at every learning rate, up to the budget that decides."""
        tasks = []
        for lr in self.config.sweep.lr:
            one = self.member(SCRATCH, seed=self.config.seeds[0], lr=lr)
            upto = [b for b in self.branches(one) if b.budget <= self.config.sweep_budget]
            tasks.append((one, tuple(upto)))
        return tasks

    def first_seed(self, lr: float) -> list[runs.Task]:
        """The baseline and every variant."""
        return [self._task(name, lr, self.config.seeds[0])
                for name in (SCRATCH, *self.config.variants)]  # fmt: skip

    def rest(self, lr: float) -> list[runs.Task]:
        """The small models alone, and all other seeds of the baseline and the finalists."""
        best = self.ranking(lr)
        everyone = self.config.small_controls == "all"
        alone = list(self.config.variants) if everyone else best[:1]
        tasks = [self._task(f"{SMALL}_{name}", lr, self.config.seeds[0]) for name in alone]
        for seed in self.config.seeds[1:]:
            names = (*best[: self.config.finalists], SCRATCH)
            tasks += [self._task(name, lr, seed) for name in names]
        return tasks

    def _task(self, name: str, lr: float, seed: int) -> runs.Task:
        one = self.member(name, seed=seed, lr=lr)
        return one, tuple(self.branches(one))

    def complete(self) -> bool:
        """Whether everything is trained."""
        lr = self.best_lr()
        tasks = self.sweep()
        if lr is not None:
            tasks += self.first_seed(lr) + self.rest(lr)
        return lr is not None and all(finished(one, b) for one, own in tasks for b in own)

    # --- what came of it ------------------------------------------------------------------

    def sweep_losses(self) -> dict[float, float]:
        """The baseline's loss at the budget that decides, by learning rate, as far as known."""
        losses = {}
        for lr in self.config.sweep.lr:
            one = self.member(SCRATCH, seed=self.config.seeds[0], lr=lr)
            for point in self.points(one):
                if point.budget == self.config.sweep_budget:
                    losses[lr] = point.loss
        return losses

    def best_lr(self) -> float | None:
        """The best of the sweep so far; None before any is finished."""
        losses = self.sweep_losses()
        return min(losses, key=lambda lr: losses[lr]) if losses else None

    def ranking(self, lr: float) -> list[str]:
        """Variants that have finished something: those that came furthest, the best first."""
        seed, names = self.config.seeds[0], list(self.config.variants)
        points = {(name, seed): self.points(self.member(name, seed=seed, lr=lr)) for name in names}
        return ranking(points, names, seed)

    def result(self) -> Result:
        """Everything that is known, as plain data."""
        losses, lr = self.sweep_losses(), self.best_lr()
        found: Result = {
            "benchmark": "savings",
            "config": self.config.model_dump(mode="json", by_alias=True),
            "sweep": {
                "budget": self.config.sweep_budget,
                "loss": {f"{rate:g}": loss for rate, loss in losses.items()},
                "best": lr,
                "best_at_an_edge": lr is not None and lr in _edges(self.config.sweep.lr),
            },
            "tokens_per_second": self.speeds,
            "runs": [],
            "variants": {},
            "controls": {},
            "claim": {"variant": None, "saving": None, "bound": "",
                      "why_not": ["nothing to compare yet"]},
        }  # fmt: skip
        if lr is None:
            return found
        names = [
            SCRATCH,
            *self.config.variants,
            *(f"{SMALL}_{name}" for name in self.config.variants),
        ]
        points = {
            (name, seed): self.points(self.member(name, seed=seed, lr=lr))
            for name in names
            for seed in self.config.seeds
        }
        found["runs"] = [
            {"name": name, "seed": seed, "lr": lr, "points": [asdict(p) for p in own]}
            for (name, seed), own in points.items()
            if own
        ]
        found |= derived(points, variants=list(self.config.variants), seeds=self.config.seeds)
        found["claim"] = claim(found, points)
        return found


def _edges(rates: Sequence[float]) -> tuple[float, float]:
    return min(rates), max(rates)


def train(campaign: Campaign, *, comm: Comm | None, workers: int, until: float | None) -> bool:
    """Train all that is missing; returns whether everything is finished.

    Args:
        campaign: the benchmark.
        comm: the launcher's processes; None starts workers.
        workers: processes to start, a run each.
        until: time after which no leg begins.
    """
    if not runs.run_all(campaign.sweep(), comm=comm, workers=workers, until=until):
        return False
    lr = campaign.best_lr()
    if comm is not None:
        lr = comm.broadcast(lr)  # other ranks may look before rank 0 has written all
    assert lr is not None  # the sweep is finished
    first = runs.run_all(campaign.first_seed(lr), comm=comm, workers=workers, until=until)
    return first and runs.run_all(campaign.rest(lr), comm=comm, workers=workers, until=until)
