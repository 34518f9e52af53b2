"""Checkpoints like those of runs that have grown: random state with a real run description."""

from megagrow.config import Config
from megagrow.data.position import Position
from megagrow.growth.plan import plan_growth
from megagrow.train.state import RunState
from tests.checkpoint.states import save_model
from tests.toys import toy_model

WIDTH = {"operator": "width", "factor": 2, "state_policy": "sparkling"}
DEPTH = {"operator": "depth_stack", "factor": 2, "state_policy": "copy"}
FRESH = {"operator": "width_fresh", "factor": 2}
LLAMA = {"family": "llama", "heads": 4, "kv_heads": 2, "head_dim": 4}
# Runs by name: their growths, and how the first model differs from a toy model.
# `exact` gives every tensor its own learning rate.
HISTORIES = {
    "fresh": ([], {}),
    "wider": ([WIDTH | {"state_policy": "exact"}], LLAMA),
    "deeper": ([DEPTH], LLAMA | {"tie_embeddings": False}),
    "twice": ([WIDTH, DEPTH], {"layers": 1}),
    "composed": ([{"operator": "width + depth_stack", "factor": 2}], LLAMA | {"layers": 1}),
    "padded": ([FRESH], LLAMA | {"norm_eps": 1e-3}),  # another eps after the growth
    "by_rule": ([WIDTH], {"layers": 1}),
}


def grown_run(growths, *, ends="steps", step=7, **changes):
    """(model, configuration, run state) of a run that has been through these growths."""
    first = toy_model(**changes)
    position = Position(((first.sequence, 8 * step),))
    model, state = first, RunState(step=step, optimizer_step=step, position=position)
    stages = [{"until": {"steps": 3}}]
    if ends == "rule":
        stages = [{"until": {"steps": 5, "slope": -0.05}}]
    for number, grow in enumerate(growths):
        stages.append({"until": {"steps": 10 * (number + 1)}, "grow": grow})
        model, growth = plan_growth(_config(first, stages).stages[-1].grow, model)
        state = state.after_growth(growth, betas=(0.9, 0.95))
    config = _config(first, stages)
    return model, config.model_dump(mode="json", by_alias=True), state.to_json()


def _config(model, stages):
    sections = {"data": {"path": "data/x"}, "run": {"seed": 1}, "batch": {"global": 8, "micro": 2}}
    return Config(model=model, stages=stages, **sections)


def save_grown(root, history, *, seed=3, step=7):
    """Save a native checkpoint of such a run; returns (path, its model)."""
    growths, changes = HISTORIES[history]
    ends = "rule" if history == "by_rule" else "steps"
    model, config, state = grown_run(growths, ends=ends, step=step, **changes)
    path, _ = save_model(root, model, seed=seed, step=step, config=config, run_state=state)
    return path, model
