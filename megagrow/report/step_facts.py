"""What is logged of one optimizer step: the one list of its numbers.

A further number is a field here, given where the step is made (`megagrow.train.loop`); the log, its
mirrors, the reader of the log and the means over steps take all fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any


def _number(*, averaged: bool = True, timed: bool = False) -> Any:
    return field(metadata={"averaged": averaged, "timed": timed})


@dataclass(frozen=True, slots=True)
class StepFacts:
    """One optimizer step (`event` step of the log, in this order); what was not logged is nan.

    Attributes:
        step: the number of steps done.
        tokens, flops: consumed since the start of the run.
        loss: mean over the batch, in nats per token.
        lr: the learning rate, before factors of parameter groups.
        grad_norm: before clipping.
        tokens_per_second: of all ranks together.
        growth_stage: the stage that the step belongs to.
    """

    step: int = _number(averaged=False)
    tokens: float = _number()
    flops: float = _number()
    loss: float = _number()
    lr: float = _number()
    grad_norm: float = _number()
    tokens_per_second: float = _number(timed=True)
    growth_stage: int = _number(averaged=False)

    @property
    def stage(self) -> int:
        """The same as `growth_stage`."""
        return self.growth_stage

    def to_json(self) -> dict[str, Any]:
        """The numbers by name."""
        return {name: getattr(self, name) for name in FACTS}

    @staticmethod
    def read(number: Callable[[str], float], *, step: int, growth_stage: int) -> StepFacts:
        """Those of a logged line; `number` gives its numbers by name, nan where there is none."""
        return StepFacts(step=step, growth_stage=growth_stage, **{n: number(n) for n in AVERAGED})


FACTS = tuple(one.name for one in fields(StepFacts))
# Those that have a mean over neighbouring steps.
AVERAGED = tuple(one.name for one in fields(StepFacts) if one.metadata["averaged"])
# Those that are the same when the step is repeated.
TIMELESS = tuple(one.name for one in fields(StepFacts) if not one.metadata["timed"])
