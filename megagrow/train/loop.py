"""The training loop: steps, validation, growths and checkpoints until the last stage ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megagrow.errors import CheckpointError
from megagrow.forecast.fit import Validated
from megagrow.growth.plan import Growth
from megagrow.report.step_facts import StepFacts
from megagrow.train import checkpoints
from megagrow.train.grow_live import GrowthReport, grow
from megagrow.train.health.agree import on_first
from megagrow.train.health.recovery import RollBack, remember
from megagrow.train.health.signals import agreed
from megagrow.train.run import TrainingRun
from megagrow.train.run_plan import Stage
from megagrow.train.stage_rules import carry, decide, settles_at
from megagrow.train.uploading import LOOK_SECONDS
from megagrow.train.validation import mean_loss


class Trainer(TrainingRun):
    """Trains a run to its end."""

    # --- the run --------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the end of the last stage, or to `train.stop_after_steps`.

        Returns:
            0, or the number of the signal that asked it to stop earlier.
        """
        try:
            return self._run()
        finally:
            self.saver.close()

    def _run(self) -> int:
        started_at = None if self.copies.resumed else self.state  # what is on disk
        self._ask_whether_to_stop()
        validated = False
        while not self._asked:
            try:
                if not validated:
                    validated = True
                    self._validate_the_start()
                self._train()
                break
            except RollBack as bad:
                self._roll_back(bad)
        if self.state is not started_at or not self._asked:
            self._save(last=True)
        while not on_first(self.comm, lambda: self.uploads.finish(LOOK_SECONDS)):
            self._begin("uploading the last checkpoint", slow=True)
        if self.state.step >= self._stop:
            self._asked = 0
        self.journal.end(
            self.state,
            total_steps=self.plan.total_steps,
            signal=self._asked,
            checkpoint=self.last_saved,
        )
        self.copies.close()
        return self._asked

    def _train(self) -> None:
        while not self._asked:
            # A rule may end the stage, and thereby move the end of the run.
            while self.state.step < min(self.stage.plan.end_step, self._stop):
                self._step()
                self._settle(self.saver.poll)
                self.uploads.poll()
                # After its last step a run ends in any case, with a validation.
                if self._asked and self.state.step < self._stop:
                    return
                self._now_and_then()
                if self._asked:
                    return
            if self.state.step >= self._stop or self.stage.index + 1 == len(self.plan.stages):
                return
            # Saved before a growth, so that an interrupted growth can be repeated.  A stage
            # without a step has nothing to save: the state is that of the previous stage's save.
            if self.stage.plan.steps:
                self._save()
            if not self._asked:
                self._next_stage()

    def _ask_whether_to_stop(self) -> None:
        """A safe point: the ranks agree on whether one of them was asked to stop."""
        heard = self.comm.gather_floats(float(self.stop_request.signal))
        self._asked = agreed(heard)

    def _step(self) -> None:
        begin = time.perf_counter()
        lr = self.plan.learning_rate.at(self.state.step)
        self._guard.begin(self.state.recent)
        probe = self.diagnostics.probe(self.engine, self.plan, self.state)
        result = self.engine.train_step(
            self._batches(),
            lr=lr,
            seed=self._seed_of_step(),
            accept=self._guard.accept,
            probe=probe,
        )
        found = {} if probe is None else probe.finish(self.comm.add_up)
        self._begin(f"end of step {self.state.step + 1}")
        at_log_line = (self.state.step + 1) % self.config.train.log_every == 0
        busy = self.watch.busy_share() if at_log_line else 0.0
        asked, gone = float(self.stop_request.signal), float(self.lock.lost())
        rows = self.comm.gather_rows([result.loss, asked, busy, gone, self.cost.take()])
        losses, signals, shares, lost, costs = map(list, zip(*rows, strict=True))
        if any(lost):
            self.lock.require_on_all()
        self._asked = agreed(signals)
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
            sequence=plan.sequence,
            flops=plan.flops_per_step,
            applied=result.applied,
            mixture=self.samples.mixture,
        )
        self._let_units_in()
        self._average.after_step(
            self.engine, step=self.state.step, total_steps=self.plan.total_steps
        )
        if fault is not None:
            self.journal.passed_over(self.state, fault)
            return
        if self.config.recovery.spike is not None:
            self.state = replace(self.state, recent=remember(self.state.recent, loss))
        if not result.applied:
            self.journal.overflowed(self.state, scale=self.engine.loss_scale["cur_scale"])
        facts = StepFacts(
            step=self.state.step,
            tokens=self.state.tokens,
            flops=self.state.flops,
            loss=loss,
            lr=lr,
            grad_norm=result.grad_norm,
            tokens_per_second=plan.tokens_per_step / seconds,
            growth_stage=self.stage.index,
        )
        self.journal.step(facts, flops_per_second=sum(costs) / seconds)
        if found:
            self.journal.diagnosed(self.state, found)
        if at_log_line and self.comm.world > 1:
            self.journal.pace(self.state, shares)

    def _let_units_in(self) -> None:
        """Advance a growth's ramp by one step; at its end the model becomes a plain one."""
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
        self.journal.say(f"step {self.state.step}: all units of the growth are in")

    def _move_into(self, stage: Stage, growth: Growth | None) -> GrowthReport:
        """Replace the engine by a new one for a stage and the current state."""
        formats = self.engine.precisions
        self.engine, report = grow(
            self.engine,
            growth=growth,
            config=self.config,
            stage=stage,
            state=self.state,
            comm=self.comm,
            samples=self.samples,
            eod=self.data.eod(stage.index),
        )
        self._say_precision(formats)
        self._average.begin()
        self.comm.limit_collectives(self.config.watch.slow)
        # Every rank fits the same maps redundantly, so count one rank's FLOPs.
        self.state = replace(
            self.state,
            flops=self.state.flops + report.fit_flops,
            position=self.state.position.after(
                report.fit_samples,
                sequence=self.samples.sequence,
                mixture=self.samples.mixture,
            ),
        )
        return report

    @property
    def _stop(self) -> int:
        """The step after which this job ends."""
        return self.config.train.stop_after_steps or self.plan.total_steps

    def _validate_the_start(self) -> None:
        """Validate fresh weights, or a state whose validation an earlier job skipped."""
        if self.state.step == 0:
            self._validate()
        elif self._missed_its_validation():
            self._ask_rule(self._validate())

    def _missed_its_validation(self) -> bool:
        """Whether this run was asked to stop after its last step and exited before validating."""
        if not self._validation_is_due():
            return False
        return on_first(self.comm, lambda: self.journal.lacks_validation(self.state))

    def _validation_is_due(self) -> bool:
        step, every = self.state.step, self.config.train.validate_every
        return step % every == 0 or step in (self.stage.plan.end_step, self._stop)

    def _now_and_then(self) -> None:
        """Validation, the stage's rule, and checkpoints that are due at this step."""
        step = self.state.step
        ends = step == self.stage.plan.end_step or step == self._stop
        if self._validation_is_due():
            self._ask_rule(self._validate())
            self._validate_average()
            self._ask_whether_to_stop()
        if ends or self._asked:
            return
        if step % self.config.checkpoint.every == 0:
            self._save()
        elif self.copies.due(step):
            self._begin(f"copying step {step} to memory", slow=True)
            self.saver.copy(self.engine, self.state)

    def _ask_rule(self, loss: float) -> None:
        """Pass a validation to the stage's rule, and end the stage here if it says so."""
        stage, state = self.stage, self.state
        until = self.config.stages[stage.index].until
        if not until.watches or state.ramp is not None:
            return
        if not self._is_settled():
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
        self.journal.event(
            "stage_rule", step=state.step, rule=until.rule, **{"end": end, **decision.inputs}
        )
        if end:
            self.journal.say(f"step {state.step}: {until.rule} ends stage {stage.index}")
            self.state = replace(self.state, ends=(*state.ends, state.step))
            before = self.plan.total_steps
            self._plan_from(self.state.ends)
            if self.plan.total_steps != before:
                self.journal.say(
                    f"the run ends at step {self.plan.total_steps:,} now, not {before:,}; the "
                    "learning rate continues from its current value"
                )
            self.stage = self.plan.stages[stage.index]

    def _is_settled(self) -> bool:
        """Whether the stage's warm-up, or its re-warming after a growth, is over."""
        own = self.config.stages[self.stage.index].schedule
        return self.state.step > settles_at(self.plan, self.stage, warmup=(own and own.warmup) or 0)

    def _next_stage(self) -> None:
        stage = self.plan.stages[self.stage.index + 1]
        self._begin(f"growing into stage {stage.index}", slow=True)
        before, small = self._validation_loss(), self.engine.placement.catalog.parameters
        old_stage, seen = self.stage, self.state.seen
        betas = stage.optimizer.bias_correction
        self.state = self.state.after_growth(stage.growth, betas=betas)
        if stage.growth is None:
            self.state = self.state.retrained(old_stage.catalog, stage.catalog)
        self.state = replace(
            self.state, seen=carry(seen, config=self.config, plan=self.plan, index=stage.index)
        )
        self.state = self.diagnostics.after_growth(self.state, self.plan, stage.index)
        report = self._move_into(stage, stage.growth)
        self._enter_stage()
        after, large = self._validation_loss(), self.engine.placement.catalog.parameters
        self.journal.growth(
            self.state,
            report,
            stages=(old_stage, stage),
            losses=(before, after),
            parameters=(small, large),
        )

    # --- its parts ------------------------------------------------------------------------

    def _validate(self) -> float:
        self._begin(f"validation after step {self.state.step}", slow=True)
        losses = self._losses(self.validation)
        loss, watched = mean_loss(losses, self.validation), self._losses(self.watched)
        first, several = self.comm.rank == 0, len(self.data.datasets) > 1
        self.journal.validation(
            self.state,
            loss,
            stage=self.stage,
            losses={**(losses if len(losses) > 1 else {}), **watched},
            bits_per_byte=self._bits.of({**losses, **watched}) if first else {},
            tokens=self.data.tokens_seen(self.state.position) if several else {},
        )
        if not math.isfinite(loss):
            ranks = [f"{loss} on all ranks"]
            raise RollBack(f"validation loss after step {self.state.step} is not finite", ranks)
        self.state, mixed = self.diagnostics.after_validation(
            self.state, loss, settled=self._is_settled()
        )
        if mixed:
            self.journal.mixed(self.state, loss)
        return loss

    def _validate_average(self) -> None:
        """After the run's last step: the loss of the mean of its last weights."""
        if self.state.step < self.plan.total_steps or not self._average.count:
            return
        self._begin("validation of the mean of the last weights", slow=True)
        with self._average.in_place(self.engine):
            loss = self._validation_loss()
        states, wanted = self._average.count, self._average.wanted(self.plan.total_steps)
        self.journal.average(self.state, loss, states=states, wanted=wanted)

    def _save(self, *, last: bool = False) -> None:
        """Save, possibly in the background; a second save waits for the first.

        Args:
            last: nothing will be trained after this save, so it must succeed.
        """
        self._begin(f"saving step {self.state.step}", slow=True)
        self._settle(self.saver.wait)
        self.state = replace(self.state, loss_scale=self.engine.loss_scale)
        known = self.last_saved
        self._settle(lambda: self.saver.save(self.engine, self.state, known=known), last=last)
        if last:
            self._settle(self.saver.wait, last=True)
        else:
            self._ask_whether_to_stop()

    def _settle(self, save: Callable[[], tuple[int, Path] | None], *, last: bool = False) -> None:
        """Handle the outcome of a save.

        A run that cannot save continues, since its last good checkpoint still exists.
        """
        try:
            saved = save()
        except CheckpointError as error:
            if last:
                raise
            self.journal.save_failed(self.state, error, last_good=self.last_saved)
            return
        if saved is None:
            return
        step, path = saved
        self.journal.saved(step, path, is_new=path != self.last_saved)
        self.last_saved = path
        self.uploads.begin(path)

    # --- bad steps ------------------------------------------------------------------------

    def _roll_back(self, bad: RollBack) -> None:
        """Roll back to the newest checkpoint, and continue after the data that led here.

        Raises:
            TrainingError: there is none, or the run has rolled back too often.
        """
        self._settle(self.saver.wait)
        paths = on_first(self.comm, lambda: checkpoints.candidates(self.root, "auto"))
        if not paths or self._rollbacks >= self.config.recovery.rollback:
            self._give_up(bad)
        self._rollbacks += 1
        step, plan = self.state.step, self.stage.plan
        beyond = self.state.position.after(
            plan.batch.global_, sequence=plan.sequence, mixture=self.samples.mixture
        )
        self.journal.goes_back(bad, to=paths[0], beyond=beyond.samples, count=self._rollbacks)
        self.engine.close()
        self._go_on_from(paths[0])
        self.state = replace(self.state, position=beyond, recent=())
        self._open_samples()
        self._open_journal(resumed=True)
        self.journal.event(
            "rollback", step=self.state.step, from_step=step, why=bad.why, ranks=bad.ranks
        )
