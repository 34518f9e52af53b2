"""Rank 0's progress output: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

from megagrow.report.step_facts import StepFacts
from megagrow.report.units import human

_BAR_FORMAT = (
    "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
)


class Progress:
    """The progress of a run, or its silent version for the other ranks.

    Everything goes to `stream` (stderr), so that bar, plain lines and `say` stay
    in order.  On a terminal there is a bar; otherwise a line every `log_every`
    steps, and one at the last step.

    Args:
        total_steps: optimizer steps of the whole run.
        log_every: steps between two plain lines.
        speaking: False makes it silent: pass `rank == 0`.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        log_every: int = 10,
        speaking: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._speaking = speaking
        self._total = total_steps
        self._log_every = log_every
        self._mark = (0, time.monotonic())
        self._bar: tqdm[Any] | None = None
        if speaking and self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                file=self._stream,
                bar_format=_BAR_FORMAT,
                dynamic_ncols=True,
                unit="step",
            )

    def go_on_from(self, step: int) -> None:
        """Continue from this step after a resume or rollback; time left is estimated from here."""
        self._mark = (step, time.monotonic())
        if self._bar is not None:
            self._bar.initial = self._bar.n = step
            self._bar.refresh()

    def ends_at(self, total_steps: int) -> None:
        """Set a new last step: a rule ended a growth stage."""
        self._total = total_steps
        if self._bar is not None:
            self._bar.total = total_steps
            self._bar.refresh()

    def step(self, facts: StepFacts, *, flops_per_second: float) -> None:
        """Show that a step is done; rates are totals over all ranks."""
        if not self._speaking:
            return
        shown = [
            f"loss {facts.loss:.4f}",
            human(facts.tokens_per_second, "tokens/s"),
            human(flops_per_second, "FLOP/s"),
        ]
        step = facts.step
        if self._bar is not None:
            self._bar.set_description_str(f"stage {facts.growth_stage}", refresh=False)
            self._bar.set_postfix_str(", ".join(shown), refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self._log_every == 0 or step == self._total:
            head = [f"step {step}/{self._total}", f"stage {facts.growth_stage}"]
            self.say("  ".join([*head, *shown, f"{self._time_left(step)} left"]))

    def say(self, text: str) -> None:
        """Print a log line; a bar makes space for it."""
        if self._speaking:
            tqdm.write(text, file=self._stream)
            self._stream.flush()

    def close(self) -> None:
        """Leave the bar as it is; may be called twice."""
        if self._bar is not None:
            self._bar.close()

    def _time_left(self, step: int) -> str:
        """Estimated from the pace since the last plain line, since every growth changes it."""
        before, then = self._mark
        now = time.monotonic()
        self._mark = (step, now)
        if step <= before:
            return "?"
        seconds = (now - then) / (step - before) * max(self._total - step, 0)
        return str(tqdm.format_interval(seconds))
