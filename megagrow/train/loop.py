"""The training loop: steps, validation, growths, checkpoints, until the last stage ends."""

from __future__ import annotations

import hashlib
import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from megagrow import __version__, ops
from megagrow.checkpoint import NativeCheckpoint
from megagrow.cluster import lifeline
from megagrow.config import Config
from megagrow.config.load import dump_config
from megagrow.data.dataset import PreparedData
from megagrow.data.sampler import SampleIndex, rank_slice, validation_samples
from megagrow.engine.comm import Comm
from megagrow.errors import CheckpointError, TrainingError
from megagrow.files import write_atomically
from megagrow.growth.growth import Growth
from megagrow.report import write_report
from megagrow.schedule.rules import Validated
from megagrow.train import checkpoints
from megagrow.train.agree import on_all, on_first
from megagrow.train.grow import GrowthReport, fill_fresh, grow, start_engine
from megagrow.train.metrics import MetricsLog
from megagrow.train.plan import RunPlan, Stage, plan_run
from megagrow.train.preflight import preflight
from megagrow.train.progress import Progress
from megagrow.train.recovery import RollBack, StepGuard, remember
from megagrow.train.saving import Saver
from megagrow.train.signals import StopRequest, signal_name
from megagrow.train.stage_rules import carry, decide
from megagrow.train.state import RunState
from megagrow.train.telemetry import open_mirrors
from megagrow.train.watch import Watch, unwatched

STRAGGLER = 1.5  # a rank busy this many times as long as the median is told of


class Trainer:
    """One run on the processes of one job.

    Args:
        config: the run.
        plan: its stages, resolved for this number of processes.
        data: the prepared dataset.
        comm: the processes.
        resume: ``auto``, ``good``, ``never`` or the path of a checkpoint.
        watch: is told what the run does; by default nobody watches.
        stop: whether somebody asked for an end; by default nobody does.

    Raises:
        MegagrowError: on all ranks, for anything that the user can mend.
    """

    def __init__(
        self,
        *,
        config: Config,
        plan: RunPlan,
        data: PreparedData,
        comm: Comm,
        resume: str,
        watch: Watch | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.config, self.plan, self.data, self.comm = config, plan, data, comm
        self.watch = watch or unwatched(comm, config)
        self.stop_request = stop or StopRequest()
        self.run_dir = Path(config.run.dir)
        self.root = self.run_dir / checkpoints.DIRECTORY
        self.last_saved: Path | None = None
        self.hosts: list[str] = comm.all_gather(socket.gethostname())
        self._asked = 0  # the signal that asked for an end
        self._guard = StepGuard(config.recovery, scaled=config.precision.dtype == "fp16")
        self._rollbacks = 0
        preflight(config=config, plan=plan, data=data, comm=comm)
        torch.set_num_threads(_threads(config))

        checkpoint, notices = self._choose_checkpoint(resume)
        self.progress = Progress(
            total_steps=plan.total_steps,
            first_step=self.state.step,
            log_every=config.train.log_every,
            speaking=comm.rank == 0,
        )
        for notice in (*notices, f"fused ops: {ops.active().reason}"):
            self.progress.say(notice)
        self._start(checkpoint)
        self.saver = Saver(root=self.root, config=config, data=data, comm=comm)
        self.metrics = on_all(comm, lambda: self._open_log(checkpoint))

    # --- set-up ---------------------------------------------------------------------------

    def _choose_checkpoint(self, resume: str) -> tuple[NativeCheckpoint | None, list[str]]:
        """The checkpoint to go on from, and what to tell about it; sets `state`."""
        path = on_first(self.comm, lambda: checkpoints.find_checkpoint(self.root, resume))
        if path is None:
            self.state = RunState()
            return None, []
        found = on_all(self.comm, lambda: checkpoints.open_checkpoint(path))
        self.state, changes = checkpoints.check_agreement(
            found, config=self.config, data=self.data, plan=self.plan
        )
        notices = [f"resuming from {path} (step {self.state.step})"]
        notices += [f"changed since then: {line}" for line in changes]
        self.last_saved = path
        return found, notices

    def _start(self, checkpoint: NativeCheckpoint | None) -> None:
        """The engine of `state`, with its tensors."""
        self._begin(f"starting at step {self.state.step}", slow=True)
        self._first_step = self.state.step
        self._plan_from(self.state.ends)
        self._enter_stage()
        self.engine = start_engine(
            config=self.config,
            stage=self.stage,
            state=self.state,
            comm=self.comm,
            loss_scale=self.state.loss_scale,
        )
        if checkpoint is None:
            fill_fresh(self.engine, config=self.config, comm=self.comm)
        else:
            checkpoints.load_run(checkpoint, self.engine, config=self.config, comm=self.comm)
            self._set_newer_aside(checkpoint.path)
        self.comm.limit_collectives(self.config.watch.slow)

    def _set_newer_aside(self, path: Path) -> None:
        """Of a run that went back; only once its new start is read and sound."""
        if path.parent == self.root:
            for moved in on_first(
                self.comm, lambda: checkpoints.set_aside(self.root, self.state.step)
            ):
                self.progress.say(f"a newer checkpoint was set aside as {moved.name}")

    def _open_log(self, checkpoint: NativeCheckpoint | None) -> MetricsLog | None:
        if self.comm.rank != 0:
            return None
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(self.run_dir / "config.yaml", dump_config(self.config).encode())
            log = MetricsLog(
                self.run_dir,
                mirrors=open_mirrors(
                    self.config, first_step=0 if checkpoint is None else self.state.step + 1
                ),
                resume_step=None if checkpoint is None else self.state.step,
                resume_stage=None if checkpoint is None else self.state.growth_stage,
            )
        except OSError as error:
            raise TrainingError(
                f"run.dir = {self.run_dir}: cannot be written",
                found=f"{error.filename or self.run_dir}: {error.strerror or error}",
                expected="a directory, or a name that is free, on a disk with space",
                mend="set run.dir to another directory, or free space",
            ) from error
        facts = {
            "step": self.state.step,
            "version": __version__,
            "world": self.comm.world,
            "parameters": self.engine.placement.catalog.parameters,
            "model": self.stage.model.model_dump(),
            "layout": asdict(self.stage.layout),
            "growth_stage": self.state.growth_stage,
            "total_steps": self.plan.total_steps,
            "device": str(self.comm.device),
        }
        log.event("run_start" if checkpoint is None else "resume", **facts)
        for end in self.plan.planned if checkpoint is None else ():
            log.event("stage_rule", step=0, rule="planned", **asdict(end))
        return log

    def _begin(self, what: str, *, slow: bool = False) -> None:
        self.watch.begin(what, step=self.state.step, slow=slow)

    def _enter_stage(self) -> None:
        """Everything that follows from the current stage's model."""
        self.stage: Stage = self.plan.stages[self.state.growth_stage]
        plan = self.stage.plan
        self.samples = SampleIndex(self.data.train, plan.sequence, self.config.run.seed)
        # Always at the model's full length, so that losses compare from stage to stage.
        self.validation = validation_samples(
            self.data.validation,
            sequence=plan.model.sequence,
            count=self.config.train.validation_samples,
        )

    # --- the run --------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the end of the last stage, or to `train.stop_after_steps`.

        Returns:
            0, or the number of the signal that asked for an end before that.
        """
        try:
            return self._run()
        finally:
            self.saver.close()

    def _run(self) -> int:
        if self.state.step == 0:
            self._validate()
        while True:
            try:
                self._train()
                break
            except RollBack as bad:
                self._roll_back(bad)
        self._save(last=True)
        self._finish(stopped=self.state.step < self.plan.total_steps)
        return self._asked

    def _train(self) -> None:
        while True:
            # A rule may end the stage, and with it move the end of the run.
            while self.state.step < min(self.stage.plan.end_step, self._stop):
                self._step()
                self._settle(self.saver.poll)
                if self._asked:
                    return
                self._now_and_then()
            if self.state.step >= self._stop or self.stage.index + 1 == len(self.plan.stages):
                return
            self._next_stage()

    def _step(self) -> None:
        begin = time.perf_counter()
        lr = self.plan.learning_rate.at(self.state.step)
        self._guard.begin(self.state.recent)
        result = self.engine.train_step(
            self._batches(), lr=lr, seed=self._step_seed(), accept=self._guard.accept
        )
        self._begin(f"end of step {self.state.step + 1}")
        at_log_line = (self.state.step + 1) % self.config.train.log_every == 0
        busy = self.watch.busy_share() if at_log_line else 0.0
        rows = self.comm.gather_rows([result.loss, float(self.stop_request.signal), busy])
        losses, signals, shares = map(list, zip(*rows, strict=True))
        self._asked = int(max(signals))
        seconds = time.perf_counter() - begin
        loss = sum(losses) / len(losses)
        fault = self._guard.passes_over(
            step=self.state.step + 1,
            losses=losses,
            grad_norm=result.grad_norm,
            applied=result.applied,
        )
        plan = self.stage.plan
        self.state = self.state.after_step(
            samples=plan.batch.global_,
            tokens=plan.tokens_per_step,
            flops=plan.flops_per_step,
            applied=result.applied,
        )
        self._let_units_in()
        if fault is not None:
            self._tell_passed_over(fault)
            return
        if self.config.recovery.spike is not None:
            self.state = replace(self.state, recent=remember(self.state.recent, loss))
        if not result.applied:
            scale = self.engine.loss_scale.get("cur_scale")
            self.progress.say(
                f"step {self.state.step}: fp16 gradients overflowed, no update; "
                f"the loss scale is {scale:g} now"
            )
        speed = plan.tokens_per_step / seconds
        if self.metrics is not None:
            self.metrics.step(
                step=self.state.step,
                tokens=self.state.tokens,
                flops=self.state.flops,
                loss=loss,
                lr=lr,
                grad_norm=result.grad_norm,
                tokens_per_second=speed,
                growth_stage=self.stage.index,
            )
        self.progress.step(
            step=self.state.step,
            loss=loss,
            tokens_per_second=speed,
            flops_per_second=plan.flops_per_step / seconds,
            growth_stage=self.stage.index,
        )
        if at_log_line and self.comm.world > 1:
            self._tell_slowest(shares)

    def _tell_slowest(self, shares: list[float]) -> None:
        """Which rank waits least for the others."""
        slowest = max(range(len(shares)), key=shares.__getitem__)
        # Ranks that do almost nothing but wait must not make any other look slow.
        ratio = shares[slowest] / max(statistics.median(shares), 0.05)
        if self.metrics is not None:
            self.metrics.pace(
                step=self.state.step, rank=slowest, host=self.hosts[slowest], ratio=ratio
            )
        if ratio >= STRAGGLER:
            self.progress.say(
                f"step {self.state.step}: rank {slowest} on {self.hosts[slowest]} is the slowest, "
                f"busy {ratio:.1f} times as long as the median rank"
            )

    def _let_units_in(self) -> None:
        """Follow a growth's ramp by one step; at its end the model becomes a plain one."""
        ramp = self.state.ramp
        if ramp is None:
            return
        progress = ramp.progress(self.state.step)
        if progress < 1.0:
            self.engine.set_progress(progress)
            return
        self._begin("taking the masks away", slow=True)
        self.state = replace(self.state, ramp=None)
        self._move_into(self.stage, None)
        self.progress.say(f"step {self.state.step}: all units of the growth are in")

    def _move_into(self, stage: Stage, growth: Growth | None) -> GrowthReport:
        """Take the engine down and another up, for a stage and the state as it is now."""
        self.engine, report = grow(
            self.engine,
            growth=growth,
            config=self.config,
            stage=stage,
            state=self.state,
            comm=self.comm,
            samples=self.samples,
        )
        self.comm.limit_collectives(self.config.watch.slow)
        # Every process fits the whole of it; what one does is what had to be done.
        self.state = replace(self.state, flops=self.state.flops + report.fit_flops)
        return report

    @property
    def _stop(self) -> int:
        """The step after which this job ends."""
        return self.config.train.stop_after_steps or self.plan.total_steps

    def _now_and_then(self) -> None:
        """Validation, the stage's rule, and checkpoints that fall on this step."""
        step = self.state.step
        ends = step == self.stage.plan.end_step or step == self._stop
        if step % self.config.train.validate_every == 0 or ends:
            self._ask_rule(self._validate())
        if step % self.config.checkpoint.every == 0 and not ends:
            self._save()

    def _ask_rule(self, loss: float) -> None:
        """Show the stage's rule a validation, and end the stage here if it says so."""
        stage, state = self.stage, self.state
        rule = self.config.stages[stage.index].until.rule
        if rule not in ("slope", "marginal") or state.ramp is not None:
            return
        start = stage.plan.start_step
        settled = start + stage.growth.rewarm if stage.growth else self.config.schedule.warmup
        if state.step <= max(start, settled):
            return
        seen = state.seen.after(Validated(state.step, state.tokens, state.flops, loss))
        self.state = replace(state, seen=seen)
        decision = on_first(
            self.comm,
            lambda: decide(seen, config=self.config, plan=self.plan, index=stage.index),
        )
        if decision is None:
            return
        self.state = replace(self.state, seen=decision.seen)
        end = decision.end and state.step < stage.plan.end_step
        if self.metrics is not None:
            facts = {"end": end, **decision.inputs}
            self.metrics.event("stage_rule", step=state.step, rule=rule, **facts)
        if end:
            self.progress.say(f"step {state.step}: {rule} ends stage {stage.index}")
            self.state = replace(self.state, ends=(*state.ends, state.step))
            self._plan_from(self.state.ends)
            self.stage = self.plan.stages[stage.index]

    def _plan_from(self, ends: tuple[int, ...]) -> None:
        """The plan again, after what really ended the stages so far."""
        self.plan = plan_run(
            self.config, world=self.comm.world, vocabulary=self.data.vocab_size, ends=ends
        )

    def _next_stage(self) -> None:
        # Saved before a growth, so that one that is interrupted can be done again.
        self._save()
        stage = self.plan.stages[self.stage.index + 1]
        self._begin(f"growing into stage {stage.index}", slow=True)
        before, small = self._validation_loss(), self.engine.placement.catalog.parameters
        old_stage, seen = self.stage, self.state.seen
        self.state = self.state.after_growth(stage.growth)
        self.state = replace(
            self.state, seen=carry(seen, config=self.config, plan=self.plan, index=stage.index)
        )
        report = self._move_into(stage, stage.growth)
        self._enter_stage()
        after, large = self._validation_loss(), self.engine.placement.catalog.parameters
        if stage.growth is None or stage.grow is None:
            self.progress.say(f"stage {stage.index}: {old_stage.layout} -> {stage.layout}")
        else:
            self.progress.say(
                f"stage {stage.index}: {stage.growth.operator.name} {stage.grow.extent} "
                f"({stage.growth.policy.name}), {small:,} -> {large:,} parameters, "
                f"loss {before:.4f} -> {after:.4f}, {report.seconds:.2f} s"
            )
        if self.metrics is not None:
            self.metrics.growth(
                step=self.state.step,
                tokens=self.state.tokens,
                flops=self.state.flops,
                operator=stage.growth.operator.name if stage.growth else "layout",
                state_policy=stage.growth.policy.name if stage.growth else "identity",
                loss_before=before,
                loss_after=after,
                parameters_before=small,
                parameters_after=large,
                growth_stage=stage.index,
                model=stage.model.model_dump(),
                layout=asdict(stage.layout),
                **asdict(report),
            )

    def _finish(self, *, stopped: bool) -> None:
        self.progress.close()
        if self.metrics is not None:
            reason = "train.stop_after_steps" if stopped else "all stages done"
            if self._asked:
                reason = signal_name(self._asked)
            self.metrics.event("end", step=self.state.step, reason=reason)
            self.metrics.close()
            report = write_report(self.run_dir)
            self.progress.say(f"checkpoint: {self.last_saved}\nreport: {report}")

    # --- its parts ------------------------------------------------------------------------

    def _batches(self) -> Iterator[np.ndarray]:
        micro = self.stage.plan.batch.micro
        starts = rank_slice(
            self.state.consumed_samples,
            micro=micro,
            accumulation=self.engine.accumulation,
            data_rank=self.engine.coordinates.data,
            data_size=self.engine.layout.data,
        )
        for number, start in enumerate(starts, start=1):
            # The first micro-batch of an engine compiles and allocates.
            first = number == 1 and self.state.step in (
                self._first_step,
                self.stage.plan.start_step,
            )
            self._begin(f"step {self.state.step + 1}, micro-batch {number}", slow=first)
            yield self.samples.batch(start, micro)

    def _step_seed(self) -> int:
        """Of the step's random numbers (dropout): a function of seed, step and place alone.

        Ranks that share a tensor-parallel group get the same, as its layers ask for.
        """
        at = self.engine.coordinates
        text = f"{self.config.run.seed}/{self.state.step}/{at.data}/{at.pipe}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

    def _validation_loss(self) -> float:
        """Mean loss over the fixed validation samples, shared out over the data ranks."""
        total, count = self.engine.evaluate(self.validation, micro=self.stage.plan.batch.micro)
        return sum(self.comm.gather_floats(total)) / sum(self.comm.gather_floats(count))

    def _validate(self) -> float:
        self._begin(f"validation after step {self.state.step}", slow=True)
        loss = self._validation_loss()
        if self.metrics is not None:
            self.metrics.validation(
                step=self.state.step,
                tokens=self.state.tokens,
                flops=self.state.flops,
                val_loss=loss,
                growth_stage=self.stage.index,
            )
        self.progress.say(f"step {self.state.step}: validation loss {loss:.4f}")
        if not math.isfinite(loss):
            ranks = [f"{loss} on all ranks"]
            raise RollBack(f"validation loss after step {self.state.step} is not finite", ranks)
        return loss

    def _save(self, *, last: bool = False) -> None:
        """Save, perhaps beside the steps that follow; a second save waits for the first.

        Args:
            last: nothing will be trained after this one, so it must succeed.
        """
        self._begin(f"saving step {self.state.step}", slow=True)
        self._settle(self.saver.wait)
        self.state = replace(self.state, loss_scale=self.engine.loss_scale)
        self._settle(lambda: self.saver.save(self.engine, self.state), last=last)
        if last:
            self._settle(self.saver.wait, last=True)

    def _settle(self, save: Callable[[], tuple[int, Path] | None], *, last: bool = False) -> None:
        """Note what became of a save.

        A run that cannot save goes on, since its last good checkpoint is still there.
        """
        try:
            saved = save()
        except CheckpointError as error:
            if last:
                raise
            self.progress.say(
                f"warning: {error}\nThe run goes on; its last good checkpoint is "
                f"{self.last_saved or 'none'}, and the next save is tried as usual."
            )
            if self.metrics is not None:
                self.metrics.event("save_failed", step=self.state.step, why=str(error))
            return
        if saved is None:
            return
        step, path = saved
        if self.metrics is not None and path != self.last_saved:
            self.metrics.event("checkpoint", step=step, path=str(path))
        self.last_saved = path
        lifeline.say("saved", step=step)

    # --- bad steps ------------------------------------------------------------------------

    def _tell_passed_over(self, fault: str) -> None:
        step = self.state.step
        if self.metrics is not None:
            self.metrics.event("passed_over", step=step, why=fault)
        self.progress.say(f"warning: step {step} is passed over, no update: {fault}")

    def _roll_back(self, bad: RollBack) -> None:
        """Go back to the newest checkpoint, and on behind the data that led here.

        Raises:
            TrainingError: there is none, or the run went back often enough.
        """
        self._settle(self.saver.wait)
        path = on_first(self.comm, lambda: checkpoints.find_checkpoint(self.root, "auto"))
        if path is None or self._rollbacks >= self.config.recovery.rollback:
            self._give_up(bad)
        self._rollbacks += 1
        step, beyond = self.state.step, self.state.consumed_samples + self.stage.plan.batch.global_
        self.progress.say(
            f"warning: {bad.why}; the run goes back to {path} and passes over the samples up to "
            f"{beyond:,} (recovery.rollback: {self._rollbacks} of {self.config.recovery.rollback})"
        )
        checkpoint = on_all(self.comm, lambda: checkpoints.open_checkpoint(path))
        self.engine.close()
        self.state, _ = checkpoints.check_agreement(
            checkpoint, config=self.config, data=self.data, plan=self.plan
        )
        self._start(checkpoint)
        self.state = replace(self.state, consumed_samples=beyond, recent=())
        self.last_saved = path
        if self.metrics is not None:
            self.metrics.close()
        self.metrics = on_all(self.comm, lambda: self._open_log(checkpoint))
        if self.metrics is not None:
            self.metrics.event(
                "rollback", step=self.state.step, from_step=step, why=bad.why, ranks=bad.ranks
            )

    def _give_up(self, bad: RollBack) -> NoReturn:
        good = self.last_saved or "none was saved yet"
        if self.metrics is not None:
            self.metrics.event("not_finite", step=self.state.step, why=bad.why, ranks=bad.ranks)
        recovery = self.config.recovery
        raise TrainingError(
            f"{bad.why}; the run stops, and nothing of this step is saved",
            found=", ".join(bad.ranks) or bad.why,
            expected=f"numbers that are finite and no spikes, after {recovery.skip} steps passed "
            f"over (recovery.skip) and {self._rollbacks} of {recovery.rollback} returns to a "
            "checkpoint (recovery.rollback)",
            mend=f"resume from the last good checkpoint ({good}) with a lower optimizer.lr, "
            "a longer schedule.warmup, or optimizer.grad_clip of at most 1",
        )


def _threads(config: Config) -> int:
    """CPU threads of this rank."""
    if config.train.threads is not None:
        return config.train.threads
    if "OMP_NUM_THREADS" in os.environ:
        return int(os.environ["OMP_NUM_THREADS"])
    # torchrun and the deepspeed launcher call the number of ranks on this host differently.
    local_world = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return max(1, (os.cpu_count() or 1) // int(local_world))
