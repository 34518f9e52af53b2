"""A dry run reports what a run would do, and does nothing."""

import os
import re
import subprocess

import pytest

from megagrow.config.load import load_config
from megagrow.data.dataset import open_dataset
from megagrow.plan.dry_run import bytes_moved
from megagrow.report.units import human
from megagrow.train.run_plan import plan_run
from tests.jobs import events, files_below, launch, main, settings, stages, train, write_config


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
        stated = bytes_moved(plan, index, ranks=range(2))
        assert stated == (growth["bytes_moved"], growth["bytes_between_ranks"])
    moved = re.findall(r"moves +([\d.]+ k?B) in all, ([\d.]+ k?B) between ranks", dry.out)
    assert len(moved) == 2


def test_it_tells_how_fresh_parameters_start(tmp_path, dataset):
    by_role = {"embedding": 0.5, "matrices": "fan_in"}
    mapping = settings(dataset, tmp_path / "run", model={"init_std": by_role})
    config = write_config(tmp_path / "run.yaml", mapping)
    dry = main(["--config", config, "--dry-run", "model.tie_embeddings=false"])
    # 8 hidden, 16 ffn, 2 layers: 1 / sqrt(8); 1 / sqrt(4 * 16) to 1 / sqrt(4 * 8)
    roles = "embedding 0.5, position 0.5, head 0.02, reader 0.354, writer 0.125 to 0.177"
    assert dry.status == 0 and f"init std    {roles}\n" in dry.out


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


@pytest.mark.parametrize(("clip", "stated"), [(1.0, True), (0.0, False)])
def test_what_keeps_exact_from_its_promise_is_reported(tmp_path, dataset, clip, stated):
    mapping = settings(dataset, tmp_path / "run", stages=stages(policy="exact"))
    config = write_config(tmp_path / "run.yaml", mapping)
    command = ["--config", config, f"optimizer.grad_clip={clip}"]
    dry = main([*command, "--dry-run"])
    assert dry.status == 0 and ("only while no gradient is clipped" in dry.out) == stated
    [[run]] = launch(1, [*command, "stages.2.until.steps=8"])
    assert run.status == 0 and ("exact retraces the small run only while" in run.err) == stated


@pytest.mark.parametrize(
    ("change", "stated"),
    [
        ({"state_policy": "copy"}, True),
        ({"state_policy": "exact"}, True),
        ({"state_policy": "kept"}, False),
        ({"operator": "width_fresh", "state_policy": "kept"}, False),
    ],
)
def test_copies_that_never_part_are_reported(tmp_path, dataset, change, stated):
    plan = stages()
    plan[1]["grow"] |= change
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run", stages=plan))
    dry = main(["--config", config, "--dry-run"])
    assert dry.status == 0 and ("copies never part" in dry.out) == stated
    [[run]] = launch(1, ["--config", config, "stages.2.until.steps=8"])
    assert run.status == 0 and ("copies never part" in run.err) == stated


# What a single-process run rejects, each with a word that the message must contain.
REFUSED = {
    "sample longer than the data": (["model.sequence=100000"], "too few tokens for one sample"),
    "a later sample longer": (
        ["stages=[{until: {steps: 3}}, {grow: {operator: sequence, target: {sequence: 99999}}, "
         "until: {steps: 9}}]"],
        "stages[1]: ",
    ),
    "vocabulary too small": (["model.vocab=9"], "smaller than the tokenizer's"),
    "no data": (["data.path=nowhere"], "not a prepared dataset"),
    "another tokenizer": (["data.tokenizer=nowhere"], "nowhere"),
    "a library that is missing": (["ops.backend=apex"], "ops.backend"),
    "a file as run.dir": (["run.dir=run.yaml/x"], "is not a directory"),
    "a name too long": ([f"run.dir={'x' * 300}"], "run.dir"),
    "a layout that does not fit": (["layout.tensor=2"], "cannot be arranged"),
    "a growth that cannot be": (["stages.1.grow.operator=widen"], "widen"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses_what_the_run_refuses_with_the_same_words(tmp_path, dataset, monkeypatch, case):
    overrides, says = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run"))
    before = files_below(tmp_path)
    run = main(["--config", config, *overrides])
    dry = main(["--config", config, "--dry-run", *overrides])
    assert run.status == dry.status == 1 and run.out == dry.out == ""
    assert says in run.err
    or_less = run.err.strip()  # a dry run may suggest one more way: to do without data
    assert dry.err.strip() == or_less or (
        dry.err.startswith(or_less) and "model.vocab=N" in dry.err
    )
    assert files_below(tmp_path) == before


def test_it_says_how_often_the_data_is_seen(tmp_path, dataset):
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run"))
    dry = main(["--config", config, "--dry-run", "train.validation_samples=9999999"])
    tokens = open_dataset(dataset).train.total_tokens
    whole, *parts = (float(n) for n in re.findall(r"([\d.e+-]+) (?:times|in stage)", dry.out))
    assert whole == pytest.approx(10 * 8 * 8 / tokens, rel=6e-3)
    assert parts == pytest.approx([n * 8 * 8 / tokens for n in (3, 4, 3)], rel=6e-3)
    assert "of 9999999 asked for" in dry.out


def test_it_says_from_where_the_run_would_start(tmp_path, dataset):
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run"))
    command = ["--config", config, "train.stop_after_steps=2"]
    assert "start: from fresh weights" in main([*command, "--dry-run"]).out
    [[run], [seed], [never]] = launch(
        1, command, [*command, "run.seed=6"], [*command, "--resume", "never"]
    )
    assert run.status == 0
    dry = main([*command, "--dry-run", "optimizer.lr=0.02"])
    assert "start: from step 2" in dry.out and "optimizer.lr" in dry.out
    for real, more in ((seed, ["run.seed=6"]), (never, ["--resume", "never"])):
        refused = main([*command, "--dry-run", *more])
        assert refused.status == real.status == 1
        assert refused.err.startswith("error: ") and real.err.endswith(refused.err)


def test_copies_in_memory_are_told(tmp_path, dataset, monkeypatch):
    """Two shares of the largest model's state on each of two hosts, four during a copy."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run"))
    dry = ["--config", config, "--dry-run", "checkpoint.memory_every=5", "--world"]
    out = main([*dry, "4"]).out
    largest = max(int(n.replace(",", "")) for n in re.findall(r"parameters  ([\d,]+)", out))
    held, peak = human(12 * largest, "B"), human(24 * largest, "B")
    assert f"every 5 steps; {held} on each host, {peak} during a copy" in out
    assert "only one host" in main([*dry, "2"]).out and "only one host" not in out
    assert "copies in memory" not in main(["--config", config, "--dry-run"]).out
