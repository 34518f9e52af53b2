"""The rules that may end a growth stage, and what the rest of the code has to know about each.

A new rule is an entry here, a setting of `megagrow.config.growths.UntilConfig`, and, if it watches
the run, an entry of `megagrow.train.stage_rules.WATCHERS`.
"""

from __future__ import annotations

from dataclasses import dataclass

BOUNDS = ("steps", "tokens", "flops")  # units in which the end of a stage can be given


@dataclass(frozen=True)
class StageRule:
    """How a rule ends a stage.

    Attributes:
        watches: it decides after each validation, so the stage's last step is not known before;
            otherwise its end is computed before the run starts.
        looks_ahead: it compares the model with that of the next stage, so it cannot end the last.
        bounds: units in which a latest end can be given beside it.
    """

    watches: bool
    looks_ahead: bool
    bounds: tuple[str, ...] = BOUNDS


RULES: dict[str, StageRule] = {
    "slope": StageRule(watches=True, looks_ahead=False),
    "marginal": StageRule(watches=True, looks_ahead=True),
    "planned": StageRule(watches=False, looks_ahead=True, bounds=("tokens",)),
}
