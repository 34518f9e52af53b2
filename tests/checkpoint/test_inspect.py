"""launch/inspect.py as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

from megagrow.checkpoint.convert.registry import FORMATS
from tests.checkpoint.states import save_model, to
from tests.checkpoint.worlds import CATALOG, save_world

LAUNCH = Path(__file__).parent.parent.parent / "launch"


def inspect(*arguments):
    command = [sys.executable, LAUNCH / "inspect.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    base = tmp_path_factory.mktemp("run")
    for step in (10, 40):
        save_world(base / "checkpoints", step, world=2)
    return base


def test_a_run_directory_shows_its_newest_checkpoint(run_directory):
    done = inspect(run_directory)
    assert done.returncode == 0 and not done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    rows = {key: value.strip() for key, value in rows.items()}
    assert rows["step"] == "40"
    assert rows["model"] == "unknown: the checkpoint's configuration describes no model"
    assert rows["layout"] == "tensor 1 x pipeline 1 x data 2, ZeRO 1"
    assert rows["tensors"] == f"4 with {CATALOG.parameters} parameters, torch.float32"
    assert rows["slots"] == "master, exp_avg, exp_avg_sq"
    files = sorted((run_directory / "checkpoints" / "step_00000040").glob("rank_*"))
    assert rows["bytes"] == f"{sum(f.stat().st_size for f in files):,} in 2 files"
    assert rows["checksums"].endswith("not compared")
    assert rows["other steps"] == "10, 40"


def test_damage_ends_with_status_1_only_where_it_is_looked_for(run_directory):
    path = run_directory / "checkpoints" / "step_00000010"
    assert "all correct" in inspect(path, "--verify").stdout
    file = path / "rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert inspect(path).returncode == 0
    done = inspect(path, "--verify")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: ") and "rank_00001.safetensors: tensor " in done.stderr


@pytest.mark.parametrize("fmt", [name for name in FORMATS if name != "native"])
def test_every_format(fmt, tmp_path):
    path, _ = save_model(tmp_path)
    done = inspect(to(path, tmp_path / "out", fmt), "--verify", "--tensors")
    assert done.returncode == 0, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line)
    assert rows["format"].strip() == fmt
    assert rows["step"].strip() == ("0" if fmt == "huggingface" else "7")
    assert "all correct" in rows["checksums"]
    assert "embed 8" in rows["final_norm.bias"] and "float32" in rows["final_norm.bias"]


def test_no_checkpoint_and_help(tmp_path):
    done = inspect(tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path}: no checkpoint")
    done = inspect("--help")
    assert done.returncode == 0 and "examples:" in done.stdout


def test_scripts_beside_it_still_get_the_standard_inspect(tmp_path):
    """A script's directory is first in its search path, and this file is named `inspect`."""
    (tmp_path / "inspect.py").write_text((LAUNCH / "inspect.py").read_text())
    (tmp_path / "other.py").write_text(
        "import dataclasses, inspect\n"
        "print(inspect.signature(lambda a, b: 0), inspect is dataclasses.inspect)\n"
        "import torch\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "other.py"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "(a, b) True\n", done.stderr
    assert done.returncode == 0
