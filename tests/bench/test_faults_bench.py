"""The kill campaign: that it kills, and that it would see what a kill spoils."""

import json
from pathlib import Path

import pytest

from megagrow.bench import faults
from megagrow.checkpoint import list_steps, step_path
from megagrow.errors import CheckpointError

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "bench" / "faults.yaml"


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    directory = tmp_path_factory.mktemp("faults") / "work"
    campaign = faults.Campaign(CONFIG, directory, world=2, seed=3)
    campaign.run(kills=3, minutes=10)
    return campaign


def test_runs_come_to_the_same_end(campaign):
    result = campaign.result()
    assert result["faults"] == [] and result["runs"] >= 1
    assert result["kills"] == 3 == sum(row["kills"] for row in result["by_phase"].values())
    assert all(kill["left"] >= kill["step"] for kill in result["every_kill"])
    assert "bit for bit" in faults.table(result)
    json.dumps(result)


def test_what_a_kill_could_spoil_is_seen(campaign):
    """In the undisturbed run itself, which is still there."""
    path = campaign.directory / "undisturbed"
    wanted = faults.outcome(path)
    assert len(wanted["step"]) == 24 and len(wanted["growth"]) == 2
    log = path / "metrics.jsonl"
    text = log.read_text()
    log.write_text(text.replace('"step": 7,', '"step": 6,', 1))
    assert faults.outcome(path)["step"] != wanted["step"]
    log.write_text(text)
    newest = step_path(path / "checkpoints", list_steps(path / "checkpoints")[-1])
    shard = next(newest.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError):
        faults.newest(path)


def test_faults_are_told(campaign):
    spoiled = {**campaign.result(), "faults": ["run_000: checkpoint 8 was lost, 6 is left"]}
    assert "FAULTS" in faults.table(spoiled) and "checkpoint 8 was lost" in faults.table(spoiled)
