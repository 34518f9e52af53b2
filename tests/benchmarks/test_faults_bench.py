"""The fault campaigns: they do disturb, and they detect whatever a fault spoils."""

import json
import signal
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.command_line import main
from benchmarks.faults import system, training
from benchmarks.faults.commands import Command, _losses, write_savings
from megagrow.checkpoint import list_steps, step_path
from megagrow.config.load import load_settings
from megagrow.errors import CheckpointError
from megagrow.savings.config import SavingsConfig

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "bench" / "faults.yaml"
WANTED = {signal.SIGKILL: 2, signal.SIGINT: 1}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    directory = tmp_path_factory.mktemp("faults") / "work"
    campaign = training.Campaign(CONFIG, directory, world=2, seed=3)
    campaign.run(WANTED, minutes=10)
    return campaign


def test_runs_come_to_the_same_end(campaign):
    result = campaign.result()
    assert result["faults"] == [] and result["runs"] >= 1
    given = Counter(strike["signal"] for strike in result["every_signal"])
    assert given == {one.name: count for one, count in WANTED.items()}
    assert result["signals"] == sum(
        row["signals"] for phases in result["by_signal"].values() for row in phases.values()
    )
    assert all(strike["left"] >= strike["step"] for strike in result["every_signal"])
    assert "bit for bit" in training.table(result)
    json.dumps(result)


def test_what_a_kill_could_spoil_is_seen(campaign):
    """In the undisturbed run itself, which is still there."""
    path = campaign.directory / "undisturbed"
    wanted = training.outcome(path)
    assert len(wanted["step"]) == 24 and len(wanted["growth"]) == 2
    log = path / "metrics.jsonl"
    text = log.read_text()
    log.write_text(text.replace('"step": 7,', '"step": 6,', 1))
    assert training.outcome(path)["step"] != wanted["step"]
    log.write_text(text)
    newest = step_path(path / "checkpoints", list_steps(path / "checkpoints")[-1])
    shard = next(newest.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError):
        training.newest(path)


def test_faults_are_reported(campaign):
    spoiled = {**campaign.result(), "faults": ["run_000: checkpoint 8 was lost, 6 is left"]}
    assert "FAULTS" in training.table(spoiled)
    assert "checkpoint 8 was lost" in training.table(spoiled)


def files(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name in ("out", "log.txt")}


def test_what_a_command_leaves_beside_its_result_is_seen(tmp_path):
    """A result that differs, and a leftover file next to it, are each named."""
    every = system.System(CONFIG, tmp_path / "work", seed=1)
    command = Command("x", "x", lambda path: [], files)
    known = system._Undisturbed({"out": b"right"}, 1.0, Counter("ww"), frozenset({"out"}))
    place = tmp_path / "attempt"
    place.mkdir()
    (place / "out").write_bytes(b"right")
    every._compare("x, EIO", 1.0, command, place, known)
    assert every.faults == []
    (place / "out").write_bytes(b"wrong")
    (place / "out.work").mkdir()
    (place / ".out.tmp").touch()
    every._compare("x, EIO", 1.0, command, place, known)
    differ, left = every.faults
    assert "differ from the undisturbed: ['out']" in differ
    assert "left behind: ['.out.tmp', 'out.work']" in left
    assert "FAULTS" in system.table(every.result())


def test_a_second_job_may_find_that_nothing_is_left_to_do(tmp_path):
    steps = [{"event": "step", "step": n} for n in (1, 2, 3)]

    def came_too_late(*starts):
        lines = [*starts, *steps]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return system._came_too_late(tmp_path)

    begun = {"event": "run_start", "step": 0}
    assert came_too_late(begun)
    assert came_too_late(begun, {"event": "resume", "step": 3})
    assert not came_too_late(begun, {"event": "resume", "step": 2})
    assert not came_too_late(begun, {"event": "run_start", "step": 0})


def test_the_savings_benchmark_that_is_disturbed_is_one(tmp_path):
    """Its settings are valid today, and what is compared of its result is there."""
    write_savings(tmp_path)
    load_settings(SavingsConfig, tmp_path / "savings.yaml", [])
    result = json.loads((CONFIG.parents[2] / "benchmarks" / "savings_2x48.json").read_text())
    found = _losses(result)
    assert len(found["losses"]) == len(result["runs"]) > 0
    assert all(loss > 0 for *_, loss in found["losses"]) and found["sweeps"]


def test_a_part_that_is_not_run_stays_as_it_was(tmp_path, capsys):
    file = tmp_path / "faults.json"
    file.write_text(json.dumps({"benchmark": "faults", "training": {"faults": [], "signals": 3}}))
    nothing = ["faults", "--kills", "0", "--interrupts", "0", "--stops", "0", "--strikes", "0"]
    assert main([*nothing, "--json", str(file)]) == 0
    assert "training: as " in capsys.readouterr().out
    assert json.loads(file.read_text())["training"] == {"faults": [], "signals": 3}
    file.write_text("{")
    assert main([*nothing, "--json", str(file)]) == 1
    assert "is no result of a benchmark" in capsys.readouterr().err


@pytest.mark.slow
def test_every_command_that_writes_comes_to_the_same_end(tmp_path):
    from benchmarks.faults import processes, shim

    processes.begin(shim.build(tmp_path))
    every = system.System(CONFIG, tmp_path / "work", seed=5)
    every.run(strikes=24, minutes=20)
    assert every.faults == []
    assert {strike.command for strike in every.strikes} >= {"grow", "savings", "train, log"}
