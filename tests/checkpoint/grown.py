"""Checkpoints like those of runs that have grown: random state with a real run description."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megagrow.config import Config, ModelConfig
from megagrow.data.position import Position, Taken
from megagrow.growth.plan import plan_growth
from megagrow.train.state import RunState
from tests.checkpoint.states import save_model
from tests.toys import toy_model

Settings = dict[str, Any]
WIDTH: Settings = {"operator": "width", "factor": 2, "state_policy": "sparkling"}
DEPTH: Settings = {"operator": "depth_stack", "factor": 2, "state_policy": "copy"}
FRESH: Settings = {"operator": "width_fresh", "factor": 2}
LLAMA: Settings = {"family": "llama", "heads": 4, "kv_heads": 2, "head_dim": 4}
# Runs by name: their growths, and how the first model differs from a toy model.
# `exact` gives every tensor its own learning rate.
HISTORIES: dict[str, tuple[list[Settings], Settings]] = {
    "fresh": ([], {}),
    "wider": ([WIDTH | {"state_policy": "exact"}], LLAMA),
    "deeper": ([DEPTH], LLAMA | {"tie_embeddings": False}),
    "twice": ([WIDTH, DEPTH], {"layers": 1}),
    "composed": ([{"operator": "width + depth_stack", "factor": 2}], LLAMA | {"layers": 1}),
    "padded": ([FRESH], LLAMA | {"norm_eps": 1e-3}),  # another eps after the growth
    "by_rule": ([WIDTH], {"layers": 1}),
}


def grown_run(
    growths: Iterable[Settings], *, ends: str = "steps", step: int = 7, **changes: Any
) -> tuple[ModelConfig, Settings, Settings]:
    """(model, configuration, run state) of a run that has been through these growths."""
    first = toy_model(**changes)
    position = Position((Taken(first.sequence, 8 * step),))
    model, state = first, RunState(step=step, optimizer_step=step, position=position)
    stages: list[Settings] = [{"until": {"steps": 3}}]
    if ends == "rule":
        stages = [{"until": {"steps": 5, "slope": -0.05}}]
    for number, grow in enumerate(growths):
        stages.append({"until": {"steps": 10 * (number + 1)}, "grow": grow})
        asked = _config(first, stages).stages[-1].grow
        assert asked is not None
        model, growth = plan_growth(asked, model)
        state = state.after_growth(growth, betas=(0.9, 0.95))
    config = _config(first, stages)
    return model, config.model_dump(mode="json", by_alias=True), state.to_json()


def _config(model: ModelConfig, stages: list[Settings]) -> Config:
    sections: Settings = {
        "model": model,
        "stages": stages,
        "data": {"path": "data/x"},
        "run": {"seed": 1},
        "batch": {"global": 8, "micro": 2},
    }
    return Config(**sections)


def save_grown(
    root: Path, history: str, *, seed: int = 3, step: int = 7
) -> tuple[Path, ModelConfig]:
    """Save a native checkpoint of such a run; returns (path, its model)."""
    growths, changes = HISTORIES[history]
    ends = "rule" if history == "by_rule" else "steps"
    model, config, state = grown_run(growths, ends=ends, step=step, **changes)
    path, _ = save_model(root, model, seed=seed, step=step, config=config, run_state=state)
    return path, model
