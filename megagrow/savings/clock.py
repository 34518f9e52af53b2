"""Measure the speed of every model of a savings benchmark, in turns.

On a shared machine the runs' own clocks depend on what else ran at the time.  Here the models take
turns in one process, so that disturbances affect all alike; each model is charged the median of its
turns for a step.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megagrow.config import Config
from megagrow.engine.comm import Comm
from megagrow.files import write_atomically
from megagrow.savings.campaign import Campaign
from megagrow.savings.config import SCRATCH
from megagrow.savings.jobs import run_job
from megagrow.savings.results import SPEEDS, stage_key
from megagrow.train.grow_live import fill_fresh, start_engine
from megagrow.train.run_plan import RunPlan, plan_run
from megagrow.train.state import RunState

_ROUNDS, _STEPS = 9, 4


def take_turns(campaign: Campaign, *, world: int, vocab: int) -> dict[str, float]:
    """Measure tokens/s by `stage_key`, and keep the result in the benchmark's directory.

    Uses the best settings found so far, or those that sweeps start from.  Under a launcher all
    processes call together; otherwise `world` processes are started.
    """
    config = campaign.config
    jobs: dict[str, tuple[Config, int]] = {}
    for name in (SCRATCH, *campaign.smalls, *config.variants):
        for budget in campaign.budgets:
            one, branch = campaign.run(name, config.seeds[0], budget)
            for stage in one.stages(branch, world=world, vocab=vocab):
                jobs.setdefault(stage_key(stage), (one.branch(branch), stage.index))
    speeds = run_job(world, _measure, list(jobs.values()), vocab)
    if speeds is None:  # not the first process
        return {}
    found = dict(zip(jobs, speeds, strict=True))
    Path(config.dir).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(config.dir) / SPEEDS, json.dumps(found, indent=1).encode())
    return found


def _measure(comm: Comm, jobs: Sequence[tuple[Config, int]], vocab: int) -> list[float]:
    """Tokens/s of the given stages."""
    steps = [_Step(comm, plan_run(config, world=comm.world, vocabulary=vocab), index, config)
             for config, index in jobs]  # fmt: skip
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(-1, _ROUNDS):  # the first round warms up
        # Rotate the order, so that no model is always first or always follows the same one.
        order = list(range(len(steps)))
        shift = number % len(steps)
        for i in order[shift:] + order[:shift]:
            begin = time.perf_counter()
            for _ in range(_STEPS):
                steps[i].take()
            taken = max(comm.gather_floats(time.perf_counter() - begin))
            if number >= 0:
                seconds[i].append(taken / _STEPS)
    return [
        step.tokens / statistics.median(times) for step, times in zip(steps, seconds, strict=True)
    ]


class _Step:
    """A stage's engine on synthetic samples."""

    def __init__(self, comm: Comm, plan: RunPlan, index: int, config: Config) -> None:
        stage = plan.stages[index]
        self._engine = start_engine(config=config, stage=stage, state=RunState(), comm=comm)
        fill_fresh(self._engine, config=config, comm=comm)
        self.tokens = stage.plan.tokens_per_step
        self._lr, self._batch, self._model = config.optimizer.lr, stage.plan.batch, stage.seen
        self._random = np.random.default_rng(0)

    def take(self) -> None:
        """Take one step."""
        self._engine.train_step(self._batches(), lr=self._lr, seed=0)

    def _batches(self) -> Iterator[np.ndarray]:
        shape = (self._batch.micro, self._model.sequence + 1)
        for _ in range(self._engine.accumulation):
            yield self._random.integers(0, self._model.vocabulary, shape)
