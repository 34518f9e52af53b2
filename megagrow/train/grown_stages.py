"""The stages of a run that is grown offline."""

from __future__ import annotations

from megagrow.config import Config, GrowConfig, StageConfig, Trained, UntilConfig
from megagrow.train.state import RunState


def with_growth(config: Config, state: RunState, grow: GrowConfig, frozen: bool) -> Config:
    """The configuration with the growth after the state's stage; it unfreezes what is `frozen`."""
    index = state.growth_stage
    following: list[StageConfig] = config.stages[index + 1 :]
    if following and following[0].grow == grow:
        return config
    left = config.stages[index].until
    done = config.stages[index].model_copy(update={"until": UntilConfig(steps=state.step)})
    train: Trained | None = "all" if frozen else None
    grown = StageConfig(until=_rest(left, state), grow=grow, train=train)
    return config.model_copy(update={"stages": [*config.stages[:index], done, grown]})


def _rest(left: UntilConfig, state: RunState) -> UntilConfig:
    """The end of the old stage, if it is still ahead; else twice the steps so far."""
    reached = {"steps": state.step, "tokens": state.tokens, "flops": state.flops}
    ahead = [key for key, at in reached.items() if (getattr(left, key) or 0) > at]
    if ahead and not left.looks_ahead:  # such rules are about a growth that follows
        return left
    return UntilConfig(steps=2 * max(1, state.step))
