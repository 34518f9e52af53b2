"""Diagnostics of growths in a run: when to measure them, and the mixing time."""

from __future__ import annotations

from megagrow.config import Config
from megagrow.engine.engine import Engine
from megagrow.engine.probe import Probe
from megagrow.forecast.fit import Validated
from megagrow.forecast.mixing import Mixing
from megagrow.forecast.planned_ends import run_law
from megagrow.forecast.planner import size_of
from megagrow.growth.diagnostics import Watched, watched
from megagrow.growth.plan import Growth
from megagrow.train.run_plan import RunPlan
from megagrow.train.state import RunState


class Diagnostics:
    """The diagnostics that `train.growth_diagnostics` enables.

    Args:
        config: the run.
    """

    def __init__(self, config: Config) -> None:
        self._config, self._every = config, config.train.growth_diagnostics
        self._known: dict[int, tuple[Watched, ...]] = {}

    def probe(self, engine: Engine, plan: RunPlan, state: RunState) -> Probe | None:
        """A probe for the next update; None if it is not due.

        It is due at regular intervals after the first growth, for the last growth.
        """
        if self._every is None or (state.step + 1) % self._every:
            return None
        matrices: tuple[Watched, ...] = ()
        for stage in plan.stages[: state.growth_stage + 1]:
            if stage.growth is not None:
                matrices = self._watched(stage.index, stage.growth)
        frozen = plan.stages[state.growth_stage].catalog.frozen
        matrices = tuple(one for one in matrices if one.tensor.name not in frozen)
        return engine.probe(matrices) if matrices else None

    def _watched(self, index: int, growth: Growth) -> tuple[Watched, ...]:
        if index not in self._known:
            self._known[index] = watched(growth)
        return self._known[index]

    def after_validation(
        self, state: RunState, loss: float, *, settled: bool
    ) -> tuple[RunState, bool]:
        """The state after a validation, and whether it ends the last growth's mixing time.

        Args:
            settled: whether the stage's warm-up is over.
        """
        if self._every is None:
            return state, False
        before = state.mixing or Mixing()
        seen = Validated(state.step, state.tokens, state.flops, loss)
        after = before.after(seen, settled=settled)
        return state.with_mixing(after), before.met is None and after.met is not None

    def after_growth(self, state: RunState, plan: RunPlan, index: int) -> RunState:
        """The state at the start of a stage, after its growth.

        There is no mixing time of a growth of which a part alone is trained.
        """
        if self._every is None or plan.stages[index].growth is None:
            return state
        if plan.stages[index].catalog.frozen:  # the law is of models that are trained as a whole
            return state.with_mixing(Mixing())
        law = run_law(self._config)
        small, large = (size_of(plan.stages[i].seen, law).n for i in (index - 1, index))
        mixing = (state.mixing or Mixing()).grown(
            law, small=small, large=large, tokens=state.tokens, points=self._config.growth.points
        )
        return state.with_mixing(mixing)
