"""Which checkpoint a run resumes from, and what it refuses to resume from."""

import shutil

import pytest

from megagrow.checkpoint import NativeCheckpoint, list_steps, newest, step_path
from megagrow.config.load import load_config
from megagrow.errors import CheckpointError
from megagrow.train.checkpoints import candidates
from tests.jobs import (
    events,
    files_below,
    launch,
    log_of,
    make_dataset,
    settings,
    train,
    write_config,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, dataset):
    """A finished run (configuration, run directory) that no test may modify."""
    base = tmp_path_factory.mktemp("finished")
    config = write_config(base / "run.yaml", settings(dataset, base / "run"))
    train(1, config)
    return config, base / "run"


@pytest.fixture
def used(tmp_path, finished):
    """A copy of it."""
    config, run_dir = finished
    shutil.copytree(run_dir, tmp_path / "run")
    return config, tmp_path / "run"


def refusals(used, cases):
    """Run all cases in one job; each is refused, says its words, and changes no file."""
    config, run_dir = used
    before = files_below(run_dir)
    commands = [["--config", config, f"run.dir={run_dir}", *extra] for extra, _ in cases]
    for (extra, says), [outcome] in zip(cases, launch(1, *commands), strict=True):
        assert outcome.status == 1, extra
        assert outcome.err.count("error: ") == 1
        for words in says:
            assert words in outcome.err, f"{words!r} is not in\n{outcome.err}"
    assert files_below(run_dir) == before


def test_another_run_is_not_gone_on_with(used, dataset, tmp_path):
    other = make_dataset(tmp_path / "other", seed=1)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(used[1], elsewhere)
    root = str(used[1] / "checkpoints")
    stage = "stages=[{until: {steps: 12}}]"
    cases = [
        (["--resume", "never"], [root, "8, 10", "run.dir=NEW"]),
        (["--resume", "nowhere"], ["nowhere", "no such checkpoint", root]),
        (["--resume", elsewhere], [str(elsewhere), "not a checkpoint of this run", "run.dir=NEW"]),
        (["run.seed=6"], ["step_00000010", "run.seed", "found:    6", "expected: 5", "seed=5"]),
        (["model.ffn=32"], ["step_00000010", "another model", "ffn 32", "expected:"]),
        ([f"data.path={other}"], ["step_00000010", "another data", str(other), "data.path"]),
        ([stage], ["growth stage 2", "1 stages", "the stages that the run was started with"]),
    ]  # fmt: skip
    refusals(used, cases)


def _cut_manifest(path):
    manifest = path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])


def _no_manifest(path):
    (path / "manifest.json").unlink()


def _cut_values(path):
    file = path / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def _flip_value(path):
    file = path / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [_cut_manifest, _no_manifest, _cut_values, _flip_value])
def test_a_damaged_newest_checkpoint(used, finished, damage):
    """It is named and kept; the previous one is used only on request, and then leads to the end."""
    config, run_dir = used
    root = run_dir / "checkpoints"
    last, before = step_path(root, 10), step_path(root, 8)
    damage(last)
    refusals(used, [([], [str(last), "cannot be resumed from", f"fix:      --resume {before} "])])

    damaged = files_below(last)
    lines = train(1, config, f"run.dir={run_dir}", resume=before)
    [aside] = root.glob("step_00000010.set-aside-*")
    assert files_below(aside) == damaged
    assert events(lines, "resume")[0]["step"] == 8
    whole = log_of(finished[0])
    assert [line["loss"] for line in events(lines, "step")] == [
        line["loss"] for line in events(whole, "step")
    ]
    NativeCheckpoint.open(newest(root)).verify()


def test_nothing_is_set_aside_for_a_checkpoint_that_turns_out_damaged(used):
    root = used[1] / "checkpoints"
    _flip_value(step_path(root, 8))
    fix = f"--resume {step_path(root, list_steps(root)[0])} resumes"
    refusals(used, [(["--resume", step_path(root, 8)], ["step_00000008", "damaged", fix])])


def test_the_first_checkpoint_has_none_before_it(used):
    root = used[1] / "checkpoints"
    for step in list_steps(root)[:-1]:
        shutil.rmtree(step_path(root, step))
    _cut_manifest(step_path(root, 10))
    refusals(used, [([], ["step_00000010", "there is no earlier checkpoint", "run.dir"])])


def test_a_new_run_from_the_checkpoint_of_another(used, tmp_path):
    """The new directory has its own log, which begins with the resume."""
    config, run_dir = used
    before = files_below(run_dir)
    source = step_path(run_dir / "checkpoints", 8)
    lines = train(1, config, f"run.dir={tmp_path / 'new'}", resume=source)
    assert [line["step"] for line in events(lines, "step")] == [9, 10]
    assert files_below(run_dir) == before
    assert list_steps(tmp_path / "new" / "checkpoints") == [10]


def test_settings_that_changed_and_may_are_reported(used):
    """On rank 0, one line each, by their keys."""
    config, run_dir = used
    changed = ["optimizer.lr=0.02", "stages.2.until.steps=11", "deepspeed.x=1"]
    command = ["--config", config, f"run.dir={run_dir}", *changed]
    before = load_config(run_dir / "config.yaml")
    [[first, second], [further, _]] = launch(
        2, [*command, "train.stop_after_steps=10"], [*command, "deepspeed={}"]
    )
    assert (first.status, second.status, second.err) == (0, 0, "")
    # The first has nothing left to train; the second trains, and the old settings are kept.
    kept = run_dir / "config.1.yaml"
    assert further.status == 0 and f"to continue with those: --config {kept}" in further.err
    assert load_config(kept) == before != load_config(run_dir / "config.yaml")
    stated = [line for line in first.err.splitlines() if line.startswith("changed since then: ")]
    assert [line.partition(": ")[2] for line in stated] == [
        "deepspeed.x: None -> 1",
        "optimizer.lr: 0.01 -> 0.02",
        f"run.dir: {config.parent / 'run'} -> {run_dir}",
        "stages[2].until.steps: 10 -> 11",
        "train.stop_after_steps: None -> 10",
    ]


def test_a_checkpoint_is_the_runs_own_however_its_path_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "run" / "checkpoints"
    relative = root.relative_to(tmp_path)
    assert candidates(root, "auto") == [] and candidates(root, "never") == []
    for step in (2, 4):
        step_path(root, step).mkdir(parents=True)
    (tmp_path / "link").symlink_to(root)
    for spelled in (root, relative, tmp_path / "link", tmp_path / "run" / ".." / relative):
        assert candidates(root, str(spelled / "step_00000002")) == [step_path(root, 2)]
        assert candidates(relative, str(spelled / "step_00000002")) == [step_path(relative, 2)]
        assert candidates(root, str(spelled)) == [step_path(root, 4)]
    assert candidates(root, str(tmp_path / "run")) == [step_path(root, 4)]
    assert candidates(root, "auto") == [step_path(root, 4)]
    aside = root / "step_00000004.set-aside-00"
    aside.mkdir()
    with pytest.raises(CheckpointError, match="not a checkpoint of this run"):
        candidates(root, str(aside))


@pytest.mark.parametrize("damage", [_cut_manifest, _flip_value])
def test_the_newest_that_is_undamaged(used, finished, damage):
    """Damage that shows at once, and damage that only shows while it is read."""
    config, run_dir = used
    root = run_dir / "checkpoints"
    damage(step_path(root, 10))
    [[outcome]] = launch(1, ["--config", config, f"run.dir={run_dir}", "--resume", "good"])
    assert outcome.status == 0, outcome.err
    assert "warning: " in outcome.err and str(step_path(root, 10)) in outcome.err
    lines = log_of(config, f"run.dir={run_dir}")
    assert events(lines, "resume")[0]["step"] == 8
    assert len(list(root.glob("step_00000010.set-aside-*"))) == 1
    for step in list_steps(root)[:-1]:
        damage(step_path(root, step))
    damage(step_path(root, 10))
    [[outcome]] = launch(1, ["--config", config, f"run.dir={run_dir}", "--resume", "good"])
    assert outcome.status == 1 and "cannot be resumed from" in outcome.err
