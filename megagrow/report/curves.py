"""The charts of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megagrow.report.axis import Axis, axis, progress_axis
from megagrow.report.chart import Marker, Point, Series, chart
from megagrow.report.run import Run
from megagrow.report.step_facts import StepFacts
from megagrow.report.units import human, number_text, signed, whole


@dataclass(frozen=True)
class _Across:
    """The quantity on the horizontal axis."""

    key: str
    label: str


_FLOPS = _Across("flops", "compute (FLOPs, forward and backward)")
_SIDE_HEIGHT = 190  # px
_TOKENS = _Across("tokens", "tokens seen")


def loss_charts(run: Run) -> list[str]:
    """Loss over compute and loss over tokens."""
    return [
        _loss_chart(run, _FLOPS, "Loss over compute"),
        _loss_chart(run, _TOKENS, "Loss over tokens"),
    ]


def side_charts(run: Run) -> list[str]:
    """Learning rate, throughput and gradient norm over tokens."""
    lr = [step.lr for step in run.steps]
    speed = [step.tokens_per_second for step in run.steps]
    norm = [step.grad_norm for step in run.steps]
    x = _x_axis(run, _TOKENS)
    markers = _markers(run, _TOKENS, short=True)
    log_norm = _spread(norm) > 20
    return [
        chart(
            title="Learning rate",
            note="as applied, with warm-up and re-warming",
            x=x,
            y=axis(lr, zero=True, snap=True),
            series=[Series("learning rate", _points(run.steps, "tokens", lr), "main")],
            hover=_hover(run, "tokens", lambda s: f"learning rate {number_text(s.lr)}"),
            x_label=_TOKENS.label,
            markers=markers,
            height=_SIDE_HEIGHT,
        ),
        chart(
            title="Throughput",
            note="tokens per second, all ranks together",
            x=x,
            y=axis(speed, zero=True, snap=True, prefixes=True),
            series=_raw_and_mean(run, "tokens", "tokens_per_second"),
            hover=_hover(run, "tokens", lambda s: human(s.tokens_per_second, "tokens/s")),
            x_label=_TOKENS.label,
            markers=markers,
            height=_SIDE_HEIGHT,
        ),
        chart(
            title="Gradient norm",
            note=f"before clipping{', logarithmic' if log_norm else ''}",
            x=x,
            y=axis(norm, log=log_norm, zero=not log_norm, snap=True),
            series=_raw_and_mean(run, "tokens", "grad_norm"),
            hover=_hover(run, "tokens", lambda s: f"gradient norm {number_text(s.grad_norm)}"),
            x_label=_TOKENS.label,
            markers=markers,
            height=_SIDE_HEIGHT,
        ),
    ]


def growth_markers(run: Run) -> list[Marker]:
    """The positions of growths on a chart over tokens."""
    return _markers(run, _TOKENS, short=True)


def running_mean(values: Sequence[float], stages: Sequence[int], reach: int) -> list[float]:
    """A centred moving average over up to `reach` values on either side.

    It neither lags nor mixes stages: at the ends of a stage the window shrinks, so a jump at a
    growth stays a jump. A non-finite value is kept as it is and left out of its neighbours' means.
    """
    means: list[float] = []
    begin = 0
    while begin < len(values):
        end = begin
        while end < len(values) and stages[end] == stages[begin]:
            end += 1
        total, count = [0.0], [0]
        for value in values[begin:end]:
            fine = math.isfinite(value)
            total.append(total[-1] + (value if fine else 0.0))
            count.append(count[-1] + fine)
        for i, value in enumerate(values[begin:end]):
            side = min(reach, i, end - begin - 1 - i)
            low, high = i - side, i + side + 1
            if math.isfinite(value):
                means.append((total[high] - total[low]) / (count[high] - count[low]))
            else:
                means.append(math.nan)
        begin = end
    return means


def _loss_chart(run: Run, across: _Across, title: str) -> str:
    losses = [step.loss for step in run.steps]
    validation = [(getattr(v, across.key), v.loss) for v in run.validations]
    every = losses + [loss for _, loss in validation]
    log = _spread(every) > 2.5
    x = _x_axis(run, across)
    series = _raw_and_mean(run, across.key, "loss", "training, ")
    series.append(Series("validation", validation, "dots"))
    by_step = {v.step: v.loss for v in run.validations}

    def text(step: StepFacts) -> str:
        lines = f"training loss {number_text(step.loss)}"
        if step.step in by_step:
            lines += f"\nvalidation loss {number_text(by_step[step.step])}"
        return lines

    scale = [name for name, on in (("loss", log), ("compute", x.log and across is _FLOPS)) if on]
    scale += ["tokens"] if x.log and across is _TOKENS else []
    return chart(
        title=title,
        note="nats per token" + (f"; {' and '.join(scale)} on a log scale" if scale else ""),
        x=x,
        y=axis(every, log=log, snap=True, count=7),
        x_label=across.label,
        series=series,
        markers=_markers(run, across),
        hover=_hover(run, across.key, text),
        height=300,
    )


def _x_axis(run: Run, across: _Across) -> Axis:
    points = (*run.steps, *run.validations, *run.growths)
    return progress_axis([getattr(one, across.key) for one in points])


def _raw_and_mean(run: Run, key: str, what: str, prefix: str = "") -> list[Series]:
    """A value of every step, and its running mean."""
    values = [getattr(step, what) for step in run.steps]
    raw = "each step" if run.steps_each == 1 else f"extremes of {run.steps_each} steps"
    reach = min(len(run.means) // 150, 200)
    if reach == 0:
        return [Series(f"{prefix}{raw}", _points(run.steps, key, values), "main")]
    means = [getattr(step, what) for step in run.means]
    means = running_mean(means, [step.stage for step in run.means], reach)
    width = (2 * reach + 1) * run.steps_each
    return [
        Series(f"{prefix}{raw}", _points(run.steps, key, values), "raw"),
        Series(f"{prefix}mean of {width} steps", _points(run.means, key, means), "main"),
    ]


def _points(steps: Sequence[StepFacts], key: str, values: Sequence[float]) -> list[Point]:
    return [(getattr(step, key), value) for step, value in zip(steps, values, strict=True)]


def _markers(run: Run, across: _Across, *, short: bool = False) -> list[Marker]:
    markers = []
    for growth in run.growths:
        at = getattr(growth, across.key)
        if not math.isfinite(at):
            continue
        name = growth.operator if len(growth.operator) <= 18 else growth.operator[:17] + "…"
        markers.append(
            Marker(
                x=at,
                label=name if short else f"{name} {signed(growth.jump)}",
                title=(
                    f"{growth.operator} after step {whole(growth.step)}\n"
                    f"loss {number_text(growth.loss_before, digits=6)} → "
                    f"{number_text(growth.loss_after, digits=6)} ({signed(growth.jump)})\n"
                    f"parameters {human(growth.parameters_before)} → "
                    f"{human(growth.parameters_after)}"
                ),
            )
        )
    return markers


def _hover(run: Run, key: str, text: Callable[[StepFacts], str]) -> list[tuple[float, str]]:
    return [
        (
            getattr(step, key),
            "\n".join(
                (
                    f"step {whole(step.step)}, stage {step.stage}",
                    text(step),
                    f"{human(step.tokens, 'tokens')}, {human(step.flops, 'FLOPs')}",
                )
            ),
        )
        for step in run.steps
    ]


def _spread(values: Sequence[float]) -> float:
    """Ratio of the largest to the smallest; 1 if it is not meaningful."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or min(finite) <= 0:
        return 1.0
    return max(finite) / min(finite)
