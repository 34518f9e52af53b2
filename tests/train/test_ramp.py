"""A run with a ramp: every layout, stopped in between, plain at the end."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from megagrow.checkpoint import NativeCheckpoint, step_path
from megagrow.checkpoint.convert.load_model import load_model
from megagrow.data.dataset import open_dataset
from megagrow.data.sampler import validation_samples
from tests.jobs import events, launch, log_of, main, settings, train, trajectory, write_config
from tests.toys import FAMILIES
from tests.train.runs import same_tensors

# (tensor, pipeline, ZeRO) of four processes before and after the stop, which is inside the ramp.
MOVES = [((2, 1, 1), (1, 2, 0)), ((1, 1, 3), (2, 2, 1)), ((1, 2, 1), (1, 1, 2))]
STOP, BORN, IN = 5, 3, 7


def _config(dataset, tmp_path, name, *, family, ramp=IN - BORN, **changes):
    target = {"hidden": 12, "heads": 4, "ffn": 24}
    if family == "llama":  # heads that share keys, more of both
        target |= {"heads": 16, "kv_heads": 8}
        changes["model"] = {
            "family": "llama", "heads": 4, "kv_heads": 4, "head_dim": 4, "tie_embeddings": False,
        }  # fmt: skip
    grow = {"operator": "width_random", "target": target, "ramp": ramp}
    stages = [{"until": {"steps": BORN}}, {"grow": grow, "until": {"steps": 9}}]
    train = {"validate_every": 4, "validation_samples": 8, "tensorboard": False}
    mapping = settings(dataset, tmp_path / name, stages=stages, train=train, **changes)
    return write_config(tmp_path / f"{name}.yaml", mapping)


def _losses(lines):
    return np.array([line["loss"] for line in events(lines, "step")])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ramp_in_every_kind_of_layout(tmp_path, dataset, family):
    alone = train(1, _config(dataset, tmp_path, "alone", family=family))
    [growth] = events(alone, "growth")
    assert growth["loss_after"] == pytest.approx(growth["loss_before"], rel=1e-6)
    config = _config(dataset, tmp_path, "spread", family=family)
    commands = []
    for number, pair in enumerate(MOVES):
        command = ["--config", config, f"run.dir={tmp_path / str(number)}"]
        for layout, more in zip(pair, ([f"train.stop_after_steps={STOP}"], []), strict=True):
            keys = zip(("tensor", "pipeline", "zero"), layout, strict=True)
            commands.append([*command, *(f"layout.{key}={n}" for key, n in keys), *more])
    outcomes = launch(4, *commands, timeout=500)
    assert all(o.status == 0 for ranks in outcomes for o in ranks), outcomes
    for number, pair in enumerate(MOVES):
        found = log_of(config, f"run.dir={tmp_path / str(number)}")
        np.testing.assert_allclose(_losses(found), _losses(alone), rtol=1e-5, err_msg=str(pair))


def test_stopped_and_resumed_inside_the_ramp_bit_for_bit(tmp_path, dataset):
    config = _config(dataset, tmp_path, "chain", family="gpt2")
    straight = ["--config", config, f"run.dir={tmp_path / 'straight'}"]
    stops = (4, 5, 6, 7, 8)
    chain = [["--config", config, f"train.stop_after_steps={n}"] for n in stops]
    outcomes = launch(2, straight, *chain, ["--config", config], timeout=300)
    assert all(o.status == 0 for ranks in outcomes for o in ranks), outcomes
    assert trajectory(log_of(config)) == trajectory(log_of(config, straight[-1]))
    same_tensors(*(step_path(tmp_path / d / "checkpoints", 9) for d in ("chain", "straight")))
    inside = step_path(tmp_path / "straight" / "checkpoints", 6)
    model, shape, _ = load_model(inside)
    fixed = validation_samples(open_dataset(dataset).validation, sequence=shape.sequence, count=8)
    [validated] = [x for x in events(log_of(config), "validation") if x["step"] == 6]
    with torch.no_grad():
        loss = model(torch.from_numpy(fixed)).item()
    assert loss == pytest.approx(validated["val_loss"], rel=1e-5)
    # Inside the ramp it is not a plain model: it can be trained and evaluated, no more.
    early = ["--from", inside, "--to", tmp_path / "x"]
    for program, *more in (
        ("convert", "--to-format", "huggingface"),
        ("grow", "--operator", "depth_stack"),
    ):
        command = [sys.executable, f"launch/{program}.py", *map(str, early), *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "train to " in done.stderr, done.stderr
        assert not (tmp_path / "x").exists()
    ended = NativeCheckpoint.open(step_path(tmp_path / "chain" / "checkpoints", 9))
    assert ended.run_state["ramp"] is None


def test_the_mask_changes_the_run(tmp_path, dataset):
    """Another ramp length, another curve: from the step after the ramp's first."""
    short, long = (
        _losses(train(1, _config(dataset, tmp_path, f"ramp-{n}", family="gpt2", ramp=n)))
        for n in (2, 4)
    )
    same = short == long
    assert same[: BORN + 1].all() and not same[BORN + 1 :].any()


def test_a_stage_must_let_its_units_in(tmp_path, dataset):
    outcome = main(["--config", _config(dataset, tmp_path, "short", family="gpt2", ramp=7)])
    assert outcome.status == 1
    assert "stages[1]: is over before all units of its growth are in" in outcome.err
    assert "set stages[1].grow.ramp=6 or less" in outcome.err
