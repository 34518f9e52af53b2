"""The order of a savings benchmark: what is to be trained next, given what is finished.

The first seed tunes (in the sweeps, perhaps with some of the others) and chooses (the finalists);
all others measure.  At every budget the baseline and the variants have the settings that were best
for the baseline there, the small models those that were best for them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megagrow.engine.comm import Comm
from megagrow.savings.config import SCRATCH, SavingsConfig, SweepConfig
from megagrow.savings.known import EndPoint, Key, Known, differs
from megagrow.savings.members import Branch, Member, Members
from megagrow.savings.results import (
    SPEEDS,
    Point,
    is_done,
    made_by,
    read_point,
    stage_key,
)
from megagrow.savings.runs import MemberTask, run_all
from megagrow.savings.sweep import Search, search

_FINGERPRINT = 16  # characters of the dataset's that are kept


class Campaign:
    """A benchmark's members and where it stands; trains nothing by itself.

    Args:
        config: the benchmark.
        world: processes of each run.
        vocab: of the dataset.
        data: the dataset's fingerprint.
        known: what files know, besides what the benchmark's directory holds.
    """

    def __init__(
        self,
        config: SavingsConfig,
        *,
        world: int,
        vocab: int,
        data: str = "",
        known: Known | None = None,
    ) -> None:
        self.config = config
        self.members = Members(config, world=world, vocab=vocab)
        self.budgets = self.members.budgets
        self.smalls = list(self.members.smalls)
        path = Path(config.dir) / SPEEDS
        self.speeds: dict[str, float] = json.loads(path.read_bytes()) if path.is_file() else {}
        self.known = known or Known()
        self.data = data[:_FINGERPRINT]
        self._found: dict[Key, tuple[Member, Branch]] = {}
        self._own: dict[str, dict[str, Any]] = {}
        self._stage_keys: dict[Path, list[str]] = {}

    # --- what to train --------------------------------------------------------------------

    def missing(self) -> list[MemberTask]:
        """What can be trained now and is not, the most wanted first; empty at the end.

        A task is a member with the branches that are wanted of it.
        """
        found: dict[Path, tuple[Member, list[Branch]]] = {}
        for one, branch in self._wanted():
            if not is_done(one, branch) and self.key(one, branch) not in self.known.points:
                branches = found.setdefault(one.directory, (one, []))[1]
                if branch not in branches:
                    branches.append(branch)
        return [self._task(one, branches) for one, branches in found.values()]

    def _task(self, one: Member, wanted: list[Branch]) -> MemberTask:
        last = max(branch.budget for branch in wanted)
        return MemberTask(
            one,
            branches=tuple(self.members.branches(one, last)),
            wanted=tuple(wanted),
            longest=self.members.longest(one, last),
            keep=self.config.keep_states,
        )

    def _wanted(self) -> Iterator[tuple[Member, Branch]]:
        """Every run that is known to be wanted, finished or not."""
        first, others = self.config.seeds[0], self.config.seeds[1:]
        names = [SCRATCH, *self.smalls]
        for budget in self.budgets:
            for name in names:
                at = self.sweep_budget(name, budget)
                for point in self._search(name, at).missing:
                    for seed in self._tuning(name):
                        yield self._run(name, seed, at, point)
                best = self.best(name, budget)
                if best is not None:
                    yield self._run(name, first, budget, best)
            best = self.best(SCRATCH, budget)
            for name in self.config.variants if best is not None else ():
                yield self._run(name, first, budget, best)
        for seed in others:
            for budget in self.budgets:
                for name in (*names, *self.finalists(budget)):
                    best = self.best(name if name in names else SCRATCH, budget)
                    if best is not None:
                        yield self._run(name, seed, budget, best)

    def _run(
        self, name: str, seed: int, budget: float, point: dict[str, Any] | None
    ) -> tuple[Member, Branch]:
        one = self.members.member(name, point or {}, seed=seed, budget=budget)
        return one, self.members.branches(one, budget)[-1]

    def complete(self) -> bool:
        """Whether everything is trained."""
        return not self.missing()

    # --- tuning ---------------------------------------------------------------------------

    def best(self, name: str, budget: float) -> dict[str, Any] | None:
        """The best settings of the baseline or a small model at a budget, once they are known."""
        return self._search(name, self.sweep_budget(name, budget)).best

    def sweep_of(self, name: str) -> tuple[SweepConfig, str]:
        """What a baseline or a small model is tuned by, and its key in the configuration."""
        return self.config.sweep_of(name)

    def swept_at(self, name: str) -> list[float]:
        """Budgets in FLOPs at which it is tuned."""
        named, given = self.sweep_of(name)[0].budgets, self.config.budgets.values
        return [b for b, value in zip(self.budgets, given, strict=True)
                if named is None or value in named]  # fmt: skip

    def sweep_budget(self, name: str, budget: float) -> float:
        """Where the settings of a budget are found: there, at the next larger one, or the last."""
        at = self.swept_at(name)
        return next((one for one in at if one >= budget), at[-1])

    def _search(self, name: str, budget: float) -> Search:
        sweep, _ = self.sweep_of(name)
        return search(sweep, self.own(name), lambda point: self.loss(name, budget, point))

    def own(self, name: str) -> dict[str, Any]:
        """The point that a search by coordinate begins at."""
        if name not in self._own:
            sweep, key = self.sweep_of(name)
            self._own[name] = self.members.own(name, sweep, key=key)
        return self._own[name]

    def loss(self, name: str, budget: float, point: dict[str, Any]) -> float | None:
        """Of a baseline or small model, over the seeds that tune; None before all are trained."""
        found = [self._point(*self._run(name, seed, budget, point)) for seed in self._tuning(name)]
        losses = [one.loss for one in found if one is not None]
        return statistics.fmean(losses) if len(losses) == len(found) else None

    def _tuning(self, name: str) -> list[int]:
        """The seeds that the sweep of a baseline or small model is decided by."""
        return self.config.seeds[: self.sweep_of(name)[0].seeds]

    def run(self, name: str, seed: int, budget: float) -> tuple[Member, Branch]:
        """A member's run for a budget, at the best settings, or those that sweeps begin at."""
        tuned = name if name not in self.config.variants else SCRATCH
        return self._run(name, seed, budget, self.best(tuned, budget) or self.own(tuned))

    # --- what is known --------------------------------------------------------------------

    def finalists(self, budget: float) -> list[str]:
        """The best variants of a budget, by the first seed; none before all have finished it."""
        losses = {}
        for name in self.config.variants:
            found = self.point(name, self.config.seeds[0], budget)
            if found is None:
                return []
            losses[name] = found.loss
        return sorted(losses, key=lambda name: losses[name])[: self.config.finalists]

    def point(self, name: str, seed: int, budget: float) -> Point | None:
        """What a baseline, small model or variant came to at a budget; None before that."""
        best = self.best(name if name not in self.config.variants else SCRATCH, budget)
        return None if best is None else self._point(*self._run(name, seed, budget, best))

    def member(self, name: str, seed: int, budget: float) -> Member | None:
        """Whose runs count for a baseline, small model or variant; None before it is tuned."""
        best = self.best(name if name not in self.config.variants else SCRATCH, budget)
        return None if best is None else self._run(name, seed, budget, best)[0]

    def _point(self, one: Member, branch: Branch) -> Point | None:
        key = self.key(one, branch)
        found = self._trained_here(one, branch)
        if found is None and key in self.known.points:
            found = replace(self.known.points[key].point, budget=branch.budget)
        if found is not None:
            self._found[key] = (one, branch)
        return found

    def _trained_here(self, one: Member, branch: Branch) -> Point | None:
        speeds = [self.speeds.get(key) for key in self.stage_keys(one, branch)]
        return read_point(one, branch, speeds=speeds)

    def key(self, one: Member, branch: Branch) -> Key:
        """What tells an end point from every other, on any machine."""
        return Key(one.run, self.data, branch.start, branch.end, one.average)

    def end_points(self) -> tuple[list[EndPoint], list[EndPoint], list[str]]:
        """All that was asked for and is finished: trained here, and known from files.

        The third is a line for each that was trained here and is known with another loss.
        """
        here, files, notes = [], [], []
        for key, (one, branch) in self._found.items():
            point, known = self._trained_here(one, branch), self.known.points.get(key)
            if point is None and known is not None:
                files.append(replace(known, point=replace(known.point, budget=branch.budget)))
            elif point is not None:
                own = EndPoint(key, point, made_by(one.place(branch), one.stable(branch)))
                here.append(own)
                if known is not None and known.point.loss != point.loss:
                    notes.append(differs(own, known, "the known one"))
        return here, files, notes

    def stage_keys(self, one: Member, branch: Branch) -> list[str]:
        """What the speeds of a member's stages are called."""
        if not self.speeds:
            return []
        if one.directory not in self._stage_keys:
            stages = one.stages(branch, world=self.members.world, vocab=self.members.vocab)
            self._stage_keys[one.directory] = [stage_key(stage) for stage in stages]
        return self._stage_keys[one.directory]


def train(campaign: Campaign, *, comm: Comm | None, jobs: int, until: float | None) -> bool:
    """Train all that is missing; returns whether everything is finished.

    Args:
        campaign: the benchmark.
        comm: the launcher's processes; None starts workers.
        jobs: runs at a time, a process each.
        until: time after which no leg begins.
    """
    return run_all(campaign.missing, comm=comm, jobs=jobs, until=until)
