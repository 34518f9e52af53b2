"""A growth that is fitted on data: live in every kind of layout, and the same offline."""

from pathlib import Path

import numpy as np
import pytest

from megagrow.checkpoint import NativeCheckpoint, newest
from megagrow.config import GrowConfig, ModelConfig
from megagrow.config.load import load_config
from megagrow.models.flops import train_flops_per_token
from megagrow.plan.dry_run import vocabulary
from megagrow.train.grow_offline import plan_offline, write_offline
from megagrow.train.run_plan import plan_run
from tests.jobs import events, launch, log_of, settings, train, trajectory, write_config

TARGET = {"hidden": 16, "heads": 4, "ffn": 32, "layers": 3}
GROW = {"operator": "ligo", "target": TARGET, "fit_steps": 5, "rewarm": 2}
LAYOUTS = [(3, 1, 1), (0, 1, 2), (1, 2, 2)]  # (ZeRO, tensor, pipeline) after the growth


def _stages(layout=None):
    grown = {"grow": GROW, "until": {"steps": 6}}
    if layout is not None:
        zero, tensor, pipeline = layout
        grown["layout"] = {"zero": zero, "tensor": tensor, "pipeline": pipeline}
    return [{"until": {"steps": 3}}, grown]


def _config(dataset, tmp_path, name, layout=None):
    checks = {"validate_every": 4, "validation_samples": 8, "tensorboard": False}
    mapping = settings(dataset, tmp_path / name, stages=_stages(layout), train=checks)
    return write_config(tmp_path / f"{name}.yaml", mapping)


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    """The run in one process: (its configuration, its log)."""
    config = _config(dataset, tmp_path_factory.mktemp("alone"), "run")
    return config, train(1, config)


def test_fitting_costs_flops_and_samples_as_planned(alone):
    steps = events(alone[1], "step")
    [growth] = events(alone[1], "growth")
    assert [line["tokens"] for line in steps] == [64 * n for n in range(1, 7)]
    assert growth["flops"] == steps[2]["flops"] + growth["fit_flops"]
    assert steps[3]["flops"] > growth["flops"]
    model = ModelConfig(**growth["model"])
    assert growth["fit_flops"] > GROW["fit_steps"] * 64 * train_flops_per_token(model)
    # Its samples are consumed: they do not come again.
    assert growth["fit_samples"] == GROW["fit_steps"] * 8
    config = load_config(alone[0])
    state = NativeCheckpoint.open(newest(Path(config.run.dir) / "checkpoints")).run_state
    assert state["taken"] == [[8, 6 * 8 + GROW["fit_steps"] * 8]]
    plan = plan_run(config, world=1, vocabulary=vocabulary(config))
    assert plan.stages[1].plan.start_flops == growth["flops"]
    assert plan.stages[1].plan.end_flops == steps[-1]["flops"] == state["flops"]


def test_live_in_every_kind_of_layout(alone, dataset, tmp_path):
    configs = [_config(dataset, tmp_path, str(n), layout) for n, layout in enumerate(LAYOUTS)]
    outcomes = launch(4, *(["--config", config] for config in configs), timeout=400)
    assert all(o.status == 0 for ranks in outcomes for o in ranks), outcomes
    expected = np.array([line["loss"] for line in events(alone[1], "step")])
    for config, layout in zip(configs, LAYOUTS, strict=True):
        found = np.array([line["loss"] for line in events(log_of(config), "step")])
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=str(layout))


def test_offline_is_the_live_growth(alone, tmp_path):
    config, live = alone
    half = tmp_path / "half"
    train(1, config, f"run.dir={half}", "train.stop_after_steps=3")
    plan = plan_offline(half, GrowConfig(**GROW))
    write_offline(plan, tmp_path / "grown")
    lines = train(1, config, f"run.dir={tmp_path / 'after'}", resume=tmp_path / "grown")
    assert trajectory(lines) == trajectory(live)[3:]
