"""Checkpoints of runs are converted, and runs resume from the results."""

import subprocess
import sys

import pytest

from megagrow.checkpoint import NativeCheckpoint
from tests.checkpoint.states import assert_same, contents
from tests.jobs import settings, stages, train, write_config


def convert(*arguments):
    done = subprocess.run(
        [sys.executable, "launch/convert.py", "--verify", *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", name="grown")
def grown_run(dataset, tmp_path_factory):
    """A widened run at its last step: (run directory, its settings)."""
    root = tmp_path_factory.mktemp("grown")
    config = settings(dataset, root / "run", stages=stages()[:2], model={"vocab": 320})
    train(1, write_config(root / "run.yaml", config))
    return root, config


def test_a_run_goes_on_from_another_layout(grown, tmp_path):
    root, config = grown
    longer = config | {
        "stages": [config["stages"][0], config["stages"][1] | {"until": {"steps": 9}}]
    }
    rows = {}
    for name, layout in (("as_it_was", []), ("converted", ["--data", 2, "--zero", 3])):
        start = tmp_path / name / "start"
        start.parent.mkdir()
        convert("--from", root / "run", "--to", start, "--to-format", "native", *layout)
        file = write_config(
            tmp_path / f"{name}.yaml", longer | {"run": {"dir": str(tmp_path / name), "seed": 5}}
        )
        rows[name] = train(1, file, resume=start)
    losses = {name: [row["loss"] for row in log if "loss" in row] for name, log in rows.items()}
    assert losses["as_it_was"]
    assert losses["as_it_was"] == losses["converted"]


def test_a_grown_model_goes_to_transformers_and_a_new_run_starts_from_it(grown, tmp_path):
    root, config = grown
    weights = tmp_path / "hf"
    said = convert("--from", root / "run", "--to", weights, "--to-format", "huggingface")
    assert "left out: exp_avg, exp_avg_sq" in said
    file = write_config(
        tmp_path / "new.yaml",
        config
        | {
            "run": {"dir": str(tmp_path / "new"), "seed": 6},
            "model": config["model"] | {"hidden": 16, "heads": 4, "ffn": 32},
            "stages": [{"until": {"steps": 3}}],
        },
    )
    said = convert(
        "--from", weights, "--to", tmp_path / "start", "--to-format", "native", "--config", file
    )
    assert "zeros: exp_avg, exp_avg_sq (the source has none)" in said
    old, new = NativeCheckpoint.open(root / "run/checkpoints/step_00000007"), tmp_path / "start"
    assert_same(contents(new), contents(old.path), slots={"master"})
    rows = train(1, file, resume=new)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
