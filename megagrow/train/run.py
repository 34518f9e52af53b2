"""Set up a run: plan, engine, state, data and log; fresh, or from a checkpoint."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from megagrow import __version__, ops
from megagrow.checkpoint import NativeCheckpoint
from megagrow.checkpoint.native.memory import MemoryCopy
from megagrow.cluster.environment import threads_of_a_rank
from megagrow.config import Config
from megagrow.data.run_data import RunData
from megagrow.data.sampler import Int64, rank_slice
from megagrow.engine.comm import Comm
from megagrow.engine.precision import Precisions
from megagrow.errors import CheckpointError, DataError, MegagrowError
from megagrow.growth.training import training_in_words
from megagrow.processes import start_up
from megagrow.train import checkpoints
from megagrow.train.agreement import check_agreement
from megagrow.train.average import WeightAverage
from megagrow.train.documents import documents_in_words
from megagrow.train.grow_live import fill_fresh, start_engine
from megagrow.train.health.agree import on_all, on_first
from megagrow.train.health.data_check import DataCheck, reported_by_its_rank
from megagrow.train.health.preflight import preflight
from megagrow.train.health.recovery import RollBack, StepGuard, no_way_back
from megagrow.train.health.run_lock import RunLock
from megagrow.train.health.signals import StopRequest
from megagrow.train.health.watch import Watch, unwatched
from megagrow.train.in_memory import LostCopyError, MemoryCopies
from megagrow.train.init_from import plan_start, require_same
from megagrow.train.logging.diagnostics import Diagnostics
from megagrow.train.logging.journal import Journal
from megagrow.train.ready import validation_of
from megagrow.train.run_plan import RunPlan, Stage, plan_run
from megagrow.train.saving import Saver
from megagrow.train.state import RunState, step_seed
from megagrow.train.step_cost import StepCost
from megagrow.train.uploading import (
    Uploads,
    bring,
    on_first_beating,
    require_store,
    set_aside,
)
from megagrow.train.validation import BitsPerByte, mean_loss


class TrainingRun:
    """Everything that makes up a run on the processes of one job, ready to train.

    Args:
        config: the run.
        plan: its stages, resolved for this number of processes.
        data: the prepared dataset.
        comm: the processes.
        resume: ``auto``, ``good``, ``never`` or the path of a checkpoint.
        watch: is informed of what the run does; by default none.
        stop: the stop request; by default none.
        lock: of run.dir; by default none is needed.

    Raises:
        MegagrowError: on all ranks, for anything that the user can fix.
    """

    def __init__(
        self,
        *,
        config: Config,
        plan: RunPlan,
        data: RunData,
        comm: Comm,
        resume: str,
        watch: Watch | None = None,
        stop: StopRequest | None = None,
        lock: RunLock | None = None,
    ) -> None:
        self.config, self.plan, self.data, self.comm = config, plan, data, comm
        self.watch = watch or unwatched(comm, config)
        self.stop_request = stop or StopRequest()
        self.lock = lock or RunLock(comm)
        self.run_dir = Path(config.run.dir)
        self.root = self.run_dir / checkpoints.DIRECTORY
        self._asked = 0  # the signal that asked the run to stop
        self._guard = StepGuard(config.recovery, scaled=config.precision.dtype == "fp16")
        self._rollbacks = 0
        self._average = WeightAverage(config.train.average)
        self.diagnostics = Diagnostics(config)
        check = DataCheck(config=config, data=data, comm=comm)
        preflight(config=config, plan=plan, data=data, comm=comm)
        torch.set_num_threads(threads_of_a_rank(os.environ, asked=config.train.threads))

        self.journal = Journal(
            config,
            hosts=comm.all_gather(socket.gethostname()),
            total_steps=plan.total_steps,
            speaking=comm.rank == 0,
        )
        self.journal.say(f"fused ops: {ops.active().reason}")
        if config.schedule.warmup is None:
            warmup = plan.learning_rate.warmup
            self.journal.say(f"warm-up: {warmup} steps, since schedule.warmup is not given")
        self.state = RunState()
        self.copies = MemoryCopies(config, comm, self.journal)
        resumed = self._resume(self._brought(resume))
        if not resumed and config.init is None:
            self._start(lambda: fill_fresh(self.engine, config=config, comm=comm))
        elif not resumed:
            self._start_from_another()
        try:
            self.journal.say(check.settle(lambda what: self._begin(what, slow=True)))
        except DataError:
            self.engine.close()
            raise
        self._open_journal(resumed=resumed)
        self.saver = Saver(
            root=self.root,
            config=config,
            data=data,
            comm=comm,
            lock=self.lock,
            run=self.journal.run_id,
            copies=self.copies,
            say=self.journal.say,
        )
        self.uploads = Uploads(
            config.checkpoint.remote if comm.rank == 0 else None,
            keep=config.checkpoint.keep,
            lock=self.lock,
            say=self.journal.say,
            event=self.journal.event,
        )

    # --- set-up ---------------------------------------------------------------------------

    def _brought(self, resume: str) -> str:
        """What to resume from, once it is in the run directory (see `uploading`)."""
        on_first(self.comm, lambda: require_store(self.config))
        return on_first_beating(
            self.comm,
            lambda: self._begin("fetching a checkpoint", slow=True),
            lambda: bring(self.config, resume, say=self.journal.say),
        )

    def _resume(self, resume: str) -> bool:
        """Resume from the first usable checkpoint; False if there is none to try.

        Raises:
            CheckpointError: none is usable.
        """
        paths = on_first(self.comm, lambda: checkpoints.candidates(self.root, resume))
        found: list[Path | MemoryCopy] = [*self.copies.newer_than(resume, paths), *paths]
        for number, one in enumerate(found, start=1):
            try:
                self._go_on_from(one)
                return True
            except CheckpointError as error:
                if number == len(found) and not isinstance(error, LostCopyError):
                    raise
                good = "The one before it is tried (--resume good)."
                of_copy = "What run.dir holds is tried instead."
                self.journal.say(f"warning: {error}\n{of_copy if one not in paths else good}")
        self.state = RunState()
        self._plan_from(())
        return False

    def _go_on_from(self, found: Path | MemoryCopy) -> None:
        start_up.ends("checks with all ranks")
        if isinstance(found, MemoryCopy):
            checkpoint = self.copies.open(found)
        else:
            checkpoint = on_all(self.comm, lambda: checkpoints.open_checkpoint(found))
            self.copies.resumed = None
        self.state, changes = check_agreement(
            checkpoint, config=self.config, data=self.data, plan=self.plan
        )
        self.journal.say(f"resuming from {checkpoint.path} (step {self.state.step})")
        for line in changes:
            self.journal.say(f"changed since then: {line}")
        self._plan_from(self.state.ends)
        self._start(lambda: self._load(checkpoint))
        if isinstance(found, Path):
            self.last_saved = found

    def _load(self, checkpoint: NativeCheckpoint) -> None:
        with self.copies.at_hand(checkpoint, self.engine):
            checkpoints.load_run(checkpoint, self.engine, config=self.config, comm=self.comm)
        if self.copies.resumed is None:
            self.copies.forget()
            self._set_newer_aside(checkpoint.path)

    def _start_from_another(self) -> None:
        """Start at step 0 from the checkpoint of `init.from`."""
        start = on_all(self.comm, lambda: plan_start(self.config, self.plan, self.data))
        require_same(self.comm, start.state.origin)
        for line in start.lines:
            self.journal.say(f"start: {line}")
        self.state = start.state
        self._start(
            lambda: checkpoints.fill_from(
                start.source, start.state_map, self.engine, config=self.config, comm=self.comm
            )
        )

    def _start(self, fill: Callable[[], None]) -> None:
        """Create the engine for `state`, and let `fill` give it its tensors."""
        self._begin(f"starting at step {self.state.step}", slow=True)
        start_up.ends("checkpoint")
        self._first_step = self.state.step
        self._average.begin()
        self._enter_stage()
        for line in training_in_words(self.stage.catalog):
            self.journal.say(f"stage {self.stage.index}: trains {line}")
        self.engine = start_engine(
            config=self.config,
            stage=self.stage,
            state=self.state,
            comm=self.comm,
            loss_scale=self.state.loss_scale,
            eod=self.samples.eod,
        )
        self._say_precision(None)
        start_up.ends("engine")
        try:
            fill()
        except MegagrowError:
            self.engine.close()
            raise
        start_up.ends("checkpoint")
        self.comm.limit_collectives(self.config.watch.slow)

    def _say_precision(self, before: Precisions | None) -> None:
        """Print the engine's number formats, if they differ from the previous engine's."""
        formats = self.engine.precisions
        if formats != before:
            self.journal.say(f"precision: {formats}")
            if formats.caveat is not None:
                self.journal.say(f"warning: this {formats.caveat}")

    def _set_newer_aside(self, path: Path) -> None:
        """Set aside later checkpoints of a run that went back, once its new start is loaded."""
        if path.parent == self.root:
            step = self.state.step
            for name in on_first_beating(
                self.comm,
                lambda: self._begin("setting newer checkpoints aside", slow=True),
                lambda: set_aside(self.config, step),
            ):
                self.journal.say(f"in checkpoint.remote a newer one was set aside as {name}")
            for moved in on_first(
                self.comm, lambda: checkpoints.set_aside(self.root, self.state.step)
            ):
                self.journal.say(f"a newer checkpoint was set aside as {moved.name}")

    def _open_journal(self, *, resumed: bool) -> None:
        on_all(self.comm, lambda: self.journal.open(self.state, resumed=resumed))
        self.copies.begin(self.journal.run_id)
        start_up.ends("data and log")
        self.journal.event(
            "resume" if resumed else "run_start",
            step=self.state.step,
            version=__version__,
            world=self.comm.world,
            parameters=self.engine.placement.catalog.parameters,
            model=self.stage.model.model_dump(),
            layout=asdict(self.stage.layout),
            optimizer=self.stage.optimizer.model_dump(),
            growth_stage=self.state.growth_stage,
            total_steps=self.plan.total_steps,
            device=str(self.comm.device),
            **({"memory": True} if self.copies.resumed else {}),
            **({"start_up": parts} if (parts := start_up.take()) else {}),
            **({"init": asdict(self.state.origin)} if self.state.origin and not resumed else {}),
        )
        for end in () if resumed else self.plan.planned:
            self.journal.event("stage_rule", step=0, rule="planned", **asdict(end))

    def _begin(self, what: str, *, slow: bool = False) -> None:
        self.watch.begin(what, step=self.state.step, slow=slow)

    def _enter_stage(self) -> None:
        """Update everything that depends on the current stage's model."""
        self.stage: Stage = self.plan.stages[self.state.growth_stage]
        plan = self.stage.plan
        self._open_samples()
        self.cost = StepCost(self.stage, self.samples.eod)
        for line in documents_in_words(self.config, self.stage.model, self.stage.index):
            self.journal.say(f"stage {self.stage.index}: documents of a sample {line}")
        self.validation, self.watched = validation_of(self.config, self.data, self.stage)
        self._bits = BitsPerByte(self.data, {**self.validation, **self.watched})
        samples = sum(map(len, self.validation.values()))
        if samples < self.config.train.validation_samples:
            self.journal.say(
                f"validation: {samples} samples, all that the data has of "
                f"{plan.model.sequence} tokens (train.validation_samples = "
                f"{self.config.train.validation_samples})"
            )

    def _open_samples(self) -> None:
        """Training samples of the stage's length, from the run's position in the data."""
        plan = self.stage.plan
        self.samples, over = self.data.samples_for(
            self.stage.index,
            plan.sequence,
            seed=self.config.run.seed,
            position=self.state.position,
            batch=plan.batch.global_,
            inside=self.state.step > plan.start_step,
        )
        for source in over:
            self.journal.say(
                f"step {self.state.step}: {source.name} is over after {source.epochs:g} passes; "
                "the other sources take its share"
            )
        if self._consumed == 0:
            for line in self.samples.recut:
                self.journal.say(f"stage {self.stage.index}: {line}")

    @property
    def _consumed(self) -> int:
        """How many of `samples` are consumed."""
        return self.state.position.split(self.samples.sequence, self.samples.mixture)[1]

    def _batches(self) -> Iterator[np.ndarray]:
        """The micro-batches of the next step, read as they are asked for.

        Not a generator: a pipeline's middle stages may read none, but have to know its mixture.
        """
        limit = self.samples.limit
        if limit is not None and self._consumed + self.stage.plan.batch.global_ > limit:
            self._open_samples()
        return self._read()

    def _read(self) -> Iterator[np.ndarray]:
        micro = self.stage.plan.batch.micro
        starts = rank_slice(
            self._consumed,
            micro=micro,
            accumulation=self.engine.accumulation,
            data_rank=self.engine.coordinates.data,
            data_size=self.engine.layout.data,
        )
        for number, start in enumerate(starts, start=1):
            # The first micro-batch of an engine compiles kernels and allocates memory.
            fresh = (self._first_step, self.stage.plan.start_step)
            first = number == 1 and self.state.step in fresh
            self._begin(f"step {self.state.step + 1}, micro-batch {number}", slow=first)
            with reported_by_its_rank(self.comm):
                samples = self.samples.batch(start, micro)
            self.cost.add(samples)
            yield samples

    def _seed_of_step(self) -> int:
        at = self.engine.coordinates
        return step_seed(self.config.run.seed, step=self.state.step, data=at.data, pipe=at.pipe)

    def _validation_loss(self) -> float:
        """Mean loss over the fixed validation samples, split over the data-parallel ranks."""
        return mean_loss(self._losses(self.validation), self.validation)

    def _losses(self, sets: Mapping[str, Int64]) -> dict[str, float]:
        """Mean loss over each set of samples [n, sequence + 1], by name."""
        found = {}
        for name, samples in sets.items():
            total, count = self.engine.evaluate(samples, micro=self.stage.plan.batch.micro)
            found[name] = sum(self.comm.gather_floats(total)) / sum(self.comm.gather_floats(count))
        return found

    def _plan_from(self, ends: tuple[int, ...]) -> None:
        """Plan again, with the steps at which the stages so far really ended."""
        self.plan = plan_run(
            self.config, world=self.comm.world, vocabulary=self.data.vocab_size, ends=ends
        )
        self.journal.ends_at(self.plan.total_steps)

    def _give_up(self, bad: RollBack) -> NoReturn:
        self.journal.event("not_finite", step=self.state.step, why=bad.why, ranks=bad.ranks)
        raise no_way_back(
            bad, last_good=self.last_saved, recovery=self.config.recovery, rollbacks=self._rollbacks
        )

    @property
    def last_saved(self) -> Path | None:
        """The newest checkpoint that the run can resume from."""
        return self.stop_request.last_saved

    @last_saved.setter
    def last_saved(self, path: Path) -> None:
        self.stop_request.last_saved = path
