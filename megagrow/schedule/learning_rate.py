"""The learning rate as a pure function of the step.

Steps count from 0: `at(step)` is the rate of the update that comes after `step`
updates are done, so a run of T steps uses `at(0)` ... `at(T - 1)`.  With W warm-up
steps, D decay steps and floor f (all rates are times the peak):

    warm-up    step < W                 (step + 1) / W, so the update W - 1 has the peak
    wsd        W <= step < T - D        1
               T - D <= step            from 1 at T - D in a straight line to f at T
    linear     W <= step                from 1 at W in a straight line to f at T
    cosine     W <= step                f + (1 - f) (1 + cos(pi (step - W) / (T - W))) / 2
    constant   W <= step                1

Decays reach the floor at T, after the last update, so that even with f = 0 no update has a rate of
0 (nor does any warm-up step). Beyond T the rate is constant.

The rate of an update never depends on what happens after it. Three events change the schedule, each
from its own step on; the rates of earlier updates are unaffected.

A growth at step g with a restart (Shen et al., arXiv 2203.06211, set the step of the schedule back
at a growth) gives the updates from g on the rates of an earlier position: update g + i has position
p + i, p < g. From g on, T is the position of the run's end, so that a decay still ends with the
run.

A rule that ends a stage at step s may move the end of the run (a bound in tokens or FLOPs is
reached after another number of steps).  A schedule that is decaying at s continues from its current
rate: the rest of the way to T is stretched or compressed to the remaining steps, so that the rate
does not jump and still ends at the floor. One that is not (warm-up, the plateau of wsd) takes the
new end, and wsd decays over the last D of the new T, or over all remaining steps if there are
fewer.

A growth at step g with a re-warm of r steps multiplies the rates of the updates
g ... g + r - 1 by 1/r, 2/r ... 1; where re-warms overlap, the smaller factor applies.

A growth stage may set its own peak, which applies from its first update until a later stage sets
another. It may have a warm-up, which is a re-warm at its start, and its own decay: over its last d
updates, before the end of the stage at step e, its rates are multiplied by a factor that falls
linearly from 1 at e - d to the stage's floor at e. That end is known when the stage begins.

Sources: warm-up and cosine, Loshchilov and Hutter, "SGDR" (2017); warmup-stable-decay,
Hu et al., "MiniCPM" (2024) and Haegele et al., "Scaling Laws and Compute-Optimal Training
Beyond Fixed Training Durations" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from megagrow.config.schema import Config
from megagrow.errors import ConfigError

Kind = Literal["wsd", "cosine", "linear", "constant"]


class _Shape(NamedTuple):
    """How a schedule falls: when, and the rate as a function of the share of the fall left."""

    falls: Literal["never", "at the end", "from warm-up on"]
    curve: Callable[[float], float] = lambda left: left


_SHAPES: dict[Kind, _Shape] = {
    "wsd": _Shape("at the end"),
    "cosine": _Shape("from warm-up on", lambda left: (1.0 - math.cos(math.pi * left)) / 2),
    "linear": _Shape("from warm-up on"),
    "constant": _Shape("never"),
}


class Rewarm(NamedTuple):
    """The rate warms up again over `steps` updates, from update `step` on; 0 steps: no re-warm."""

    step: int
    steps: int


class Restart(NamedTuple):
    """From update `step` on, the schedule continues from its position `to`."""

    step: int
    to: int


class Moved(NamedTuple):
    """At update `step` the end of the run moved; until then it was `total_steps`."""

    step: int
    total_steps: int


class Phase(NamedTuple):
    """A growth stage with its own peak or decay: the updates `start` to `end` - 1.

    The peak applies until the next phase; the last `decay` updates fall to `floor` times the rate.
    """

    start: int
    end: int
    peak: float
    decay: int = 0
    floor: float = 0.0

    def factor(self, step: int) -> float:
        """The factor of the phase's own decay on the rate of an update."""
        if not self.end - self.decay <= step < self.end:
            return 1.0
        left = (self.end - step) / self.decay
        return left + self.floor * (1.0 - left)


class _Span(NamedTuple):
    """The updates from `start` until the next span, and their positions in the schedule.

    Update `start` is at `position`, and each later one `pace` further.
    """

    start: int
    position: float
    pace: float
    length: float  # T
    decay: float  # D

    def at(self, step: int) -> float:
        """The position of an update."""
        if self.pace == 1.0:
            return self.position + (step - self.start)
        return self.position + (step - self.start) * self.pace


@dataclass(frozen=True)
class LearningRate:
    """A schedule; see the module docstring for the formulas.

    Attributes:
        peak: the highest rate, until the first phase.
        total_steps: number of steps of the whole run, over all growth stages.
        warmup: W in steps, at most T - D.
        kind: wsd, cosine, linear or constant.
        decay: D / T, the fraction of all steps over which wsd decays (D is rounded to a step).
        floor: f, the final rate as a fraction of the peak (0 to 1).
        rewarms: one for each growth that has one.
        restarts: likewise, in the order of their steps.
        moved: moves of the run's end by rules, in the order of their steps.
        phases: growth stages with their own peak or decay, in the order of their steps.

    Raises:
        ConfigError: warm-up and decay do not fit into the run.
    """

    peak: float
    total_steps: int
    warmup: int = 0
    kind: Kind = "wsd"
    decay: float = 0.1
    floor: float = 0.0
    rewarms: tuple[Rewarm, ...] = ()
    restarts: tuple[Restart, ...] = ()
    moved: tuple[Moved, ...] = ()
    phases: tuple[Phase, ...] = ()

    def __post_init__(self) -> None:
        planned = self._total_at(0)
        decay = self._decay(planned)
        available = planned - decay
        if self.warmup > available:
            decays = f" and decays over the last {decay}" if decay else ""
            raise ConfigError(
                f"schedule.warmup = {self.warmup} steps does not fit: "
                f"the run has {planned} steps{decays}",
                found=self.warmup,
                expected=f"at most {available}",
                fix="set schedule.warmup lower, schedule.decay lower, or train longer (stages)",
            )

    @property
    def decay_steps(self) -> int:
        """D: the number of final steps over which wsd decays; 0 for the other kinds."""
        return round(self._spans[-1].decay)

    def position(self, step: int) -> float:
        """The position in the schedule of update `step`, restarts included."""
        return self._span(step).at(step)

    @property
    def length(self) -> float:
        """T at the end of the run; restarts make it shorter than the run."""
        return self._spans[-1].length

    def at(self, step: int) -> float:
        """The rate of update `step`, counted from 0."""
        span = self._span(step)
        phase = next((phase for phase in reversed(self.phases) if phase.start <= step), None)
        peak, factor = (phase.peak, phase.factor(step)) if phase else (self.peak, 1.0)
        return peak * self._shape(span.at(step), span) * self._rewarm(step) * factor

    def _total_at(self, step: int) -> int:
        """The end of the run as it was known at an update."""
        later = (moved.total_steps for moved in self.moved if step < moved.step)
        return next(later, self.total_steps)

    def _decay(self, length: float) -> int:
        return round(self.decay * length) if _SHAPES[self.kind].falls == "at the end" else 0

    def _span(self, step: int) -> _Span:
        return next(span for span in reversed(self._spans) if span.start <= max(step, 0))

    @cached_property
    def _spans(self) -> tuple[_Span, ...]:
        """The schedule as spans between events, each computed from what was known before it."""
        total = self._total_at(0)
        spans = [_Span(0, 0, 1.0, total, self._decay(total))]
        events: list[Moved | Restart] = [*self.moved, *self.restarts]
        for event in sorted(events, key=lambda event: event.step):
            before, step = spans[-1], event.step
            total = self._total_at(step)
            if isinstance(event, Restart):
                length: float = event.to + total - step
                spans.append(_Span(step, event.to, 1.0, length, self._decay(length)))
                continue
            position = before.at(step)
            left = max(total - step, 1)
            if self._falls(position, before):
                pace = max(before.length - position, 0) / left
                spans.append(_Span(step, position, pace, before.length, before.decay))
            else:
                length = position + left
                most = max(length - max(position, self.warmup), 0)
                spans.append(_Span(step, position, 1.0, length, min(self._decay(length), most)))
        return tuple(spans)

    def _falls(self, position: float, span: _Span) -> bool:
        """Whether the rate at a position depends on where the schedule ends."""
        return _SHAPES[self.kind].falls != "never" and position > self._fall_start(span)

    def _fall_start(self, span: _Span) -> float:
        """The position from which the rate falls, if it does."""
        at_the_end = _SHAPES[self.kind].falls == "at the end"
        return span.length - span.decay if at_the_end else self.warmup

    def _shape(self, step: float, span: _Span) -> float:
        """The schedule without any growth, as a fraction of the peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        shape, start = _SHAPES[self.kind], self._fall_start(span)
        if shape.falls == "never":
            return 1.0
        length = span.length - start
        if step < start or length <= 0:
            return 1.0
        left = max(0, span.length - step) / length  # 1 at the start of the decay, 0 at T
        left = shape.curve(left)
        return left + self.floor * (1.0 - left)

    def _rewarm(self, step: int) -> float:
        """The re-warm factor of recent growths."""
        climbs = ((step - at + 1) / steps for at, steps in self.rewarms if at <= step < at + steps)
        return min(climbs, default=1.0)


def default_warmup(total_steps: int) -> int:
    """The default number of warm-up steps: 100, or a tenth of a shorter run."""
    return min(100, total_steps // 10)


def learning_rate(
    config: Config,
    *,
    total_steps: int,
    rewarms: Sequence[tuple[int, int]] = (),
    restarts: Sequence[tuple[int, float]] = (),
    moved: Sequence[tuple[int, int]] = (),
    phases: Sequence[Phase] = (),
) -> LearningRate:
    """The schedule that `config` defines.

    Args:
        config: only `optimizer.lr` and `schedule` are used.
        total_steps: the end of the last growth stage (see `resolve_stages`).
        rewarms: (step of the growth, re-warm steps) for each growth, with the state policy's
            default filled in.
        restarts: (step of the growth, divisor of its position), in order.
        moved: (step at which a rule moved the end of the run, the end before that), in order.
        phases: growth stages with their own peak or decay, in order. If the last one has a decay
            that ends with the run, it replaces the run's own.

    Raises:
        ConfigError: warm-up and decay do not fit into the run.
    """
    schedule = config.schedule
    warmup = schedule.warmup
    if warmup is None:
        # From the run's initial length: a rule that ends a stage must not change the past.
        warmup = default_warmup(moved[0][1] if moved else total_steps)
    own_decay = bool(phases) and phases[-1].decay > 0 and phases[-1].end == total_steps
    rate = LearningRate(
        peak=config.optimizer.lr,
        total_steps=total_steps,
        warmup=warmup,
        kind=schedule.name,
        decay=0.0 if own_decay else schedule.decay,
        floor=schedule.floor,
        rewarms=tuple(Rewarm(*rewarm) for rewarm in rewarms),
        moved=tuple(Moved(*move) for move in moved),
        phases=tuple(phases),
    )
    for step, ratio in restarts:
        to = max(round(rate.position(step) / ratio), warmup)
        rate = replace(rate, restarts=(*rate.restarts, Restart(step, min(to, step))))
    return rate
