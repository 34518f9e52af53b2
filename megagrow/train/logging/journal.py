"""A run's reporting: rank 0's terminal output, its log, and the log's mirrors."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megagrow.cluster import lifeline
from megagrow.config import Config
from megagrow.config.load import dump_config
from megagrow.errors import DataError, TrainingError
from megagrow.files import free_name, write_atomically
from megagrow.growth.settings import growth_in_words
from megagrow.growth.training import training_in_words
from megagrow.report import write_report
from megagrow.report.log import read_lines, tail_start
from megagrow.report.step_facts import StepFacts
from megagrow.train.grow_live import GrowthReport
from megagrow.train.health.recovery import RollBack
from megagrow.train.health.run_lock import run_id
from megagrow.train.health.signals import exit_status, left, signal_name
from megagrow.train.logging.metrics import MetricsLog
from megagrow.train.logging.progress import Progress
from megagrow.train.logging.telemetry import open_mirrors
from megagrow.train.rates import rates_in_words
from megagrow.train.run_plan import Stage
from megagrow.train.state import RunState

STRAGGLER = 1.5  # a rank busy this many times as long as the median is reported


class Journal:
    """Reports on rank 0; silent on the other ranks.

    Args:
        config: the run.
        hosts: the host of every rank.
        total_steps: of the whole run, as planned.
        speaking: whether this is rank 0.

    Attributes:
        run_id: the run's random name, after `open` on rank 0; else "".
    """

    def __init__(
        self, config: Config, *, hosts: Sequence[str], total_steps: int, speaking: bool
    ) -> None:
        self.config, self.hosts, self._speaking = config, hosts, speaking
        self._directory = Path(config.run.dir)
        self._log: MetricsLog | None = None
        self.run_id = ""
        self._progress = Progress(
            total_steps=total_steps,
            log_every=config.train.log_every,
            speaking=speaking,
        )

    def open(self, state: RunState, *, resumed: bool) -> None:
        """Open the log: a new one, or the existing one at the state that a run resumes from.

        Raises:
            TrainingError: the run directory cannot be written.
            DataError: the existing log is damaged.
        """
        self._progress.go_on_from(state.step)
        if not self._speaking:
            return
        self.close()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._write_config()
            # A fresh start in a directory that another run used is a new run.
            self.run_id = run_id(self._directory, new=not resumed)
            self._log = MetricsLog(
                self._directory,
                mirrors=open_mirrors(self.config, first_step=state.step + 1 if resumed else 0),
                resume_step=state.step if resumed else None,
                resume_stage=state.growth_stage if resumed else None,
            )
        except OSError as error:
            raise TrainingError(
                f"run.dir = {self._directory}: cannot be written",
                found=f"{error.filename or self._directory}: {error.strerror or error}",
                expected="a directory, or a name that is free, on a disk with space",
                fix="set run.dir to another directory, or free space",
            ) from error

    def _write_config(self) -> None:
        """Write config.yaml; keep an existing one with other content under another name."""
        path, text = self._directory / "config.yaml", dump_config(self.config).encode()
        if path.exists() and (before := path.read_bytes()) != text:
            kept = free_name(path)
            write_atomically(kept, before)
            self.say(
                f"{path} had other settings, now in {kept}; to continue with those: --config {kept}"
            )
        write_atomically(path, text)

    def close(self) -> None:
        """Close the log; may be called twice."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def ends_at(self, total_steps: int) -> None:
        """Set a new last step for the run."""
        self._progress.ends_at(total_steps)

    def say(self, text: str) -> None:
        """Print a line on the terminal."""
        self._progress.say(text)

    def event(self, name: str, **fields: Any) -> None:
        """Write a line to the log."""
        if self._log is not None:
            self._log.event(name, **fields)

    def step(self, facts: StepFacts, *, flops_per_second: float) -> None:
        """Record a step whose update was applied."""
        if self._log is not None:
            self._log.step(facts)
        self._progress.step(facts, flops_per_second=flops_per_second)

    def overflowed(self, state: RunState, *, scale: float) -> None:
        """Record an update skipped because fp16 gradients overflowed."""
        self.say(
            f"step {state.step}: fp16 gradients overflowed, no update; "
            f"the loss scale is {scale:g} now"
        )

    def passed_over(self, state: RunState, fault: str) -> None:
        """Record a bad step whose update was not applied."""
        self.event("passed_over", step=state.step, why=fault)
        self.say(f"warning: step {state.step} is skipped, no update: {fault}")

    def pace(self, state: RunState, busy: Sequence[float]) -> None:
        """Report which rank waits least for the others.

        Args:
            busy: per rank, the share of time in which it did not wait.
        """
        slowest = max(range(len(busy)), key=busy.__getitem__)
        # Ranks that do almost nothing but wait must not make another one look slow.
        ratio = busy[slowest] / max(statistics.median(busy), 0.05)
        host = self.hosts[slowest]
        if self._log is not None:
            self._log.pace(step=state.step, rank=slowest, host=host, ratio=ratio)
        if ratio >= STRAGGLER:
            self.say(
                f"step {state.step}: rank {slowest} on {host} is the slowest, busy "
                f"{ratio:.1f} times as long as the median rank"
            )

    def lacks_validation(self, state: RunState) -> bool:
        """Whether the log of a resumed run ends with the step of `state` but lacks its validation.

        A run that is asked to stop exits after its step, without the validation that was due.
        """
        if self._log is None:
            return False
        start = tail_start(self._log.path, step=state.step, stage=state.growth_stage)
        found = {
            line["event"]
            for _, line in read_lines(self._log.path, start=start)
            if line.get("step") == state.step
        }
        return "step" in found and "validation" not in found

    def validation(
        self,
        state: RunState,
        loss: float,
        *,
        stage: Stage,
        losses: Mapping[str, float],
        bits_per_byte: Mapping[str, float],
        tokens: Mapping[str, int],
    ) -> None:
        """Record the loss on the fixed validation samples.

        Args:
            losses: by dataset, if there are several.
            bits_per_byte: by dataset.
            tokens: trained on, by dataset, if there are several.
        """
        if self._log is not None:
            self._log.validation(
                step=state.step,
                tokens=state.tokens,
                flops=state.flops,
                val_loss=loss,
                growth_stage=stage.index,
                losses=losses,
                bits_per_byte=bits_per_byte,
                tokens_by_source=tokens,
            )
        each = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        self.say(f"step {state.step}: validation loss {loss:.4f}" + (f" ({each})" if each else ""))

    def average(self, state: RunState, loss: float, *, states: int, wanted: int) -> None:
        """Record the loss of the mean of the last weights.

        Args:
            states: number of states in the mean.
            wanted: the number without an interruption.
        """
        config = self.config.train.average
        assert config is not None
        self.event("average", step=state.step, val_loss=loss, last=config.last, states=states,
                   wanted=wanted)  # fmt: skip
        short = "" if states == wanted else f" (of {wanted}: the run was resumed among them)"
        self.say(
            f"step {state.step}: validation loss {loss:.4f} of the mean of {states} states{short}"
        )

    def diagnosed(self, state: RunState, found: Mapping[str, float]) -> None:
        """Record the diagnostics of the last update (see `engine.probe`)."""
        if self._log is not None:
            self._log.diagnostics(step=state.step, tokens=state.tokens, found=found)

    def mixed(self, state: RunState, loss: float) -> None:
        """Record the end of the last growth's mixing time (see `megagrow.forecast.mixing`)."""
        assert state.mixing is not None and state.mixing.met is not None
        tokens, foretold = state.mixing.met, state.mixing.foretold(state.tokens)
        self.say(
            f"step {state.step}: {tokens:,} tokens after its growth the run is where a fresh model "
            f"is foretold to be (loss {loss:.4f}, foretold {foretold:.4f})"
        )
        if self._log is not None:
            self._log.mixing(
                step=state.step,
                tokens=state.tokens,
                growth_stage=state.growth_stage,
                mixing_tokens=tokens,
                loss=loss,
                foretold=foretold,
            )

    def growth(
        self,
        state: RunState,
        report: GrowthReport,
        *,
        stages: tuple[Stage, Stage],
        losses: tuple[float, float],
        parameters: tuple[int, int],
    ) -> None:
        """Record a growth; each pair is before and after it."""
        old, new = stages
        if new.growth is None or new.grow is None:
            self.say(f"stage {new.index}: {old.layout} -> {new.layout}")
        else:
            self.say(
                f"stage {new.index}: {growth_in_words(new.grow)} "
                f"({new.growth.policy.name}), {parameters[0]:,} -> {parameters[1]:,} parameters, "
                f"loss {losses[0]:.4f} -> {losses[1]:.4f}, {report.seconds:.2f} s"
            )
            if report.fit_samples:
                self.say(
                    f"stage {new.index}: fitted on {report.fit_samples:,} samples, which are not "
                    f"trained on again in this epoch; {report.fit_flops:.3g} FLOPs"
                )
            for caveat in new.growth.caveats(
                grad_clip=new.optimizer.grad_clip, dropout=new.model.dropout
            ):
                self.say(caveat)
        trains = training_in_words(new.catalog, before=old.catalog, growth=new.growth)
        for line in (
            *(f"trains {line}" for line in trains),
            *rates_in_words(self.config, new.index),
        ):
            self.say(f"stage {new.index}: {line}")
        if self._log is not None:
            self._log.growth(
                step=state.step,
                tokens=state.tokens,
                flops=state.flops,
                operator=new.growth.operator.name if new.growth else "layout",
                state_policy=new.growth.policy.name if new.growth else "identity",
                loss_before=losses[0],
                loss_after=losses[1],
                parameters_before=parameters[0],
                parameters_after=parameters[1],
                growth_stage=new.index,
                model=new.model.model_dump(),
                layout=asdict(new.layout),
                optimizer=new.optimizer.model_dump(),
                **_foretold(state),
                **report.of_all_ranks(),
            )

    def saved(self, step: int, path: Path, *, is_new: bool) -> None:
        """Record a committed checkpoint."""
        if is_new:
            self.event("checkpoint", step=step, path=str(path))
        lifeline.say("saved", step=step)

    def save_failed(self, state: RunState, error: Exception, *, last_good: Path | None) -> None:
        """Record a failed save; the run continues."""
        self.event("save_failed", step=state.step, why=str(error))
        self.say(
            f"warning: {error}\nThe run continues; its last good checkpoint is "
            f"{last_good or 'none'}, and the next save is tried as usual."
        )

    def goes_back(self, bad: RollBack, *, to: Path, beyond: int, count: int) -> None:
        """Record that the run is about to roll back to a checkpoint, for the `count`-th time."""
        self.say(
            f"warning: {bad.why}; the run rolls back to {to} and skips the samples up to "
            f"{beyond:,} (recovery.rollback: {count} of {self.config.recovery.rollback})"
        )

    def end(
        self, state: RunState, *, total_steps: int, signal: int, checkpoint: Path | None
    ) -> None:
        """Record the end of this job, and of the run unless it was stopped before its last step.

        Args:
            total_steps: of the whole run.
            signal: the signal that asked it to stop, or 0.
            checkpoint: the one that the run can resume from.
        """
        self._progress.close()
        if self._log is None:
            return
        reason = "all stages done" if state.step >= total_steps else "train.stop_after_steps"
        if signal:
            reason = signal_name(signal)
        self.event("end", step=state.step, reason=reason, total_steps=total_steps)
        self.close()
        if signal:
            self.say(
                f"stopped by {reason} at step {state.step:,} of {total_steps:,}; {left(checkpoint)}"
            )
            self.say(
                f"the exit status is {exit_status(signal)}; a launcher may report that as an error "
                f'("exits with return code = {exit_status(signal)}"), which it is not'
            )
        self.say(f"checkpoint: {checkpoint or 'none'}")
        try:
            self.say(f"report: {write_report(self._directory)}")
        except DataError as error:
            # The run itself is complete: its state is saved, its log is closed.
            self.say(f"warning: no report of the run: {error}")


def _foretold(state: RunState) -> dict[str, Any]:
    """The learning curve of a new model of the grown shape, if known; see `forecast.mixing`."""
    mixing = state.mixing
    if mixing is None or mixing.curve is None or mixing.born != state.tokens:
        return {}
    return {"foretold": {**mixing.curve._asdict(), "floor": mixing.floor}}
