"""A dry run tells what a run would do, and does nothing."""

import os
import re
import subprocess

import pytest
from jobs import events, files_below, launch, main, settings, stages, train, write_config

from megagrow.config.load import load_config
from megagrow.train.dryrun import bytes_moved
from megagrow.train.plan import plan_run


def test_it_tells_what_the_run_then_does(tmp_path, dataset):
    mapping = settings(dataset, tmp_path / "run", stages=stages(policy="reset"))
    mapping["stages"][2]["layout"] = {"zero": 2}
    mapping["stages"][1]["until"] = {"tokens": 64 * 6.5}
    config = write_config(tmp_path / "run.yaml", mapping)
    dry = main(["--config", config, "--dry-run", "--world", "2"])
    assert (dry.status, dry.err) == (0, "") and not (tmp_path / "run").exists()

    lines = train(2, config)
    steps = events(lines, "step")
    parameters = re.findall(r"parameters +([\d,]+)", dry.out)
    growths = events(lines, "growth")
    grown = [growths[0]["parameters_before"], *(g["parameters_after"] for g in growths)]
    assert [int(p.replace(",", "")) for p in parameters] == grown
    spans = [(int(a), int(b)) for a, b in re.findall(r"steps +(\d+) to (\d+)", dry.out)]
    stage_steps = [[s["step"] for s in steps if s["growth_stage"] == i] for i in range(3)]
    assert spans == [(mine[0] - 1, mine[-1]) for mine in stage_steps] == [(0, 3), (3, 7), (7, 10)]
    assert f"2 processes, {len(steps)} steps" in dry.out
    assert "width x2, state policy reset" in dry.out and "depth_stack x2" in dry.out
    assert re.findall(r"ZeRO (\d)", dry.out) == ["1", "1", "2"]
    assert "re-warm 3 steps at 3" in dry.out

    plan = plan_run(load_config(config), world=2, vocabulary=320)
    for index, growth in enumerate(growths, start=1):
        told = bytes_moved(plan, index, ranks=range(2))
        assert told == (growth["bytes_moved"], growth["bytes_between_ranks"])
    moved = re.findall(r"moves +([\d.]+ k?B) in all, ([\d.]+ k?B) between ranks", dry.out)
    assert len(moved) == 2


def test_it_starts_no_process_and_writes_nothing(tmp_path, dataset, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a dry run starts processes")

    for owner, name in ((os, "fork"), (os, "posix_spawn"), (subprocess, "Popen")):
        monkeypatch.setattr(owner, name, forbidden)
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run"))
    before = files_below(tmp_path), files_below(dataset)
    assert (
        main(["--config", config, "--dry-run", "--world", "512", "batch.global=1024"]).status == 0
    )
    assert (files_below(tmp_path), files_below(dataset)) == before


def test_without_a_dataset_the_model_must_name_its_vocabulary(tmp_path):
    nowhere = tmp_path / "nowhere"
    config = write_config(tmp_path / "run.yaml", settings(nowhere, tmp_path / "run"))
    named = main(["--config", config, "--dry-run", "model.vocab=500"])
    assert named.status == 0 and "vocabulary 500" in named.out
    unnamed = main(["--config", config, "--dry-run"])
    assert unnamed.status == 1 and str(nowhere) in unnamed.err and "model.vocab=N" in unnamed.err


@pytest.mark.parametrize("world", ["0", "-2"])
def test_a_number_of_processes_that_cannot_be(tmp_path, dataset, world):
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run"))
    outcome = main(["--config", config, "--dry-run", f"--world={world}"])
    assert outcome.status == 1 and f"--world {world}" in outcome.err


@pytest.mark.parametrize(("clip", "told"), [(1.0, True), (0.0, False)])
def test_what_keeps_exact_from_its_promise_is_told(tmp_path, dataset, clip, told):
    mapping = settings(dataset, tmp_path / "run", stages=stages(policy="exact"))
    config = write_config(tmp_path / "run.yaml", mapping)
    command = ["--config", config, f"optimizer.grad_clip={clip}"]
    dry = main([*command, "--dry-run"])
    assert dry.status == 0 and ("only while no gradient is clipped" in dry.out) == told
    [[run]] = launch(1, [*command, "stages.2.until.steps=8"])
    assert run.status == 0 and ("exact retraces the small run only while" in run.err) == told
