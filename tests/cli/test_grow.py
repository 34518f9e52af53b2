"""launch/grow.py: a checkpoint grown offline equals the one that a live growth would make."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from megagrow.checkpoint import NativeCheckpoint, newest
from megagrow.config import GrowConfig
from megagrow.errors import CheckpointError, GrowthError
from megagrow.growth.plan import plan_growth
from megagrow.growth.registry import OPERATORS
from megagrow.state.boxes import whole
from megagrow.state.layout import Layout
from megagrow.train.grow_offline import plan_offline, write_offline
from megagrow.transfer.read_through import Through
from tests.jobs import command, settings, stages, train, trajectory, write_config


def _grow(*arguments):
    return command("grow").main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def small(dataset, tmp_path_factory):
    """A run that stopped after its first stage: (its directory, its configuration file)."""
    home = tmp_path_factory.mktemp("small")
    config = write_config(home / "run.yaml", settings(dataset, home / "small"))
    train(1, config, "train.stop_after_steps=3")
    return home / "small", config


def _values(checkpoint):
    return {
        (tensor.name, slot.name): checkpoint.read(tensor.name, slot.name, whole(tensor.shape))
        for tensor in checkpoint.catalog
        for slot in checkpoint.slots
    }


@pytest.mark.parametrize(
    ("operator", "policy"),
    [("width", "sparkling"), ("width", "reset"), ("width_fresh", "kept"), ("width_noise", "kept")],
)
def test_going_on_from_it_is_the_live_run(small, dataset, tmp_path, capsys, operator, policy):
    plan = stages(policy=policy)
    plan[1]["grow"]["operator"] = operator
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "live", stages=plan))
    live = trajectory(train(1, config))
    options = ["--operator", operator, "--state-policy", policy, "--rewarm", "3"]
    assert _grow("--from", small[0], "--to", tmp_path / "grown", *options) == 0
    said = capsys.readouterr().out
    assert (
        f"{operator}, state policy {policy}" in said and str(tmp_path / "grown" / "step_") in said
    )
    lines = train(1, config, f"run.dir={tmp_path / 'after'}", resume=tmp_path / "grown")
    assert trajectory(lines) == live[3:]


def test_the_printed_stages_can_be_gone_on_with(small, dataset, tmp_path, capsys):
    """With a growth that the run's own configuration does not include."""
    target = ["hidden=16", "heads=4", "ffn=48", "layers=3"]
    assert (
        _grow("--from", small[0], "--to", tmp_path / "grown", "--operator", "width+depth_stack",
              "--target", *target, "--state-policy", "sparkling") == 0
    )  # fmt: skip
    printed = capsys.readouterr().out.partition("these stages:")[2]
    mapping = settings(dataset, tmp_path / "after", **yaml.safe_load(printed))
    config = write_config(tmp_path / "run.yaml", mapping)
    lines = trajectory(train(1, config, resume=tmp_path / "grown"))
    assert [line[0] for line in lines] == [4, 5, 6]


@pytest.mark.parametrize("operator", OPERATORS)
def test_boxes_are_those_of_a_growth_in_memory(small, tmp_path, operator, monkeypatch):
    """However the files are cut: into four ranks' boxes, read a few elements at a time."""
    steps = 2 if OPERATORS[operator].fitted else None
    section = GrowConfig(operator=operator, factor=2, fit_steps=steps)
    plan = plan_offline(small[0], section)
    asked = []
    read = Through.read

    def counted(self, tensor, slot, box, *, out=None):
        asked.append(box.volume * self.dtype(tensor, slot).itemsize)
        return read(self, tensor, slot, box, out=out)

    with monkeypatch.context() as patch:
        patch.setattr(Through, "read", counted)
        layout = Layout(tensor=2, data=2, zero=1)
        apart = write_offline(plan, tmp_path / "pieces", layout=layout, workers=2)
    assert sum(asked) == plan.bytes
    pieces = NativeCheckpoint.open(apart)
    assert pieces.layout == layout and len(pieces.files) == 4
    at_once = NativeCheckpoint.open(write_offline(plan, tmp_path / "whole"))
    one, other = _values(pieces), _values(at_once)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert all(torch.isfinite(value).all() for value in one.values())
    assert pieces.catalog == plan_growth(GrowConfig(operator=operator), plan.small)[1].target
    pieces.verify()


def test_what_a_second_growth_starts_from(small, tmp_path):
    """A grown checkpoint is a checkpoint: it can be grown again, before or after training."""
    first = plan_offline(small[0], GrowConfig(operator="width"))
    wide = write_offline(first, tmp_path / "wide")
    second = plan_offline(wide, GrowConfig(operator="depth_stack", factor=3))
    assert (second.model.hidden, second.model.layers) == (16, 6)
    path = write_offline(second, tmp_path / "both")
    checkpoint = NativeCheckpoint.open(path)
    assert checkpoint.run_state["growth_stage"] == 2
    ends = [stage["until"]["steps"] for stage in checkpoint.config["stages"]]
    assert ends == [3, 3, 6]  # a run resumes with these: see test_grow_imports.py


@pytest.mark.parametrize(
    ("options", "section"),
    [
        (["width_noise", "--noise", "0.5"], {"noise": 0.5}),
        (["shrink_pad_perturb", "--shrink", "0.6"], {"shrink": 0.6}),
        (["depth_slices", "--sources", "0", "1", "0"], {"sources": [0, 1, 0]}),
        (["depth_slices", "--keep-first", "1", "--keep-last", "0"],
         {"keep_first": 1, "keep_last": 0}),
    ],
)  # fmt: skip
def test_settings_of_single_operators_have_options(options, section):
    module = command("grow")
    parsed = module.parse(["--from", "here", "--to", "there", "--operator", *options])
    assert module.grow_section(parsed) == GrowConfig(operator=options[0], **section)


def test_an_untied_head_is_reported(small, tmp_path, capsys):
    arguments = ["--from", small[0], "--to", tmp_path / "out", "--operator", "untie"]
    assert _grow(*arguments, "--dry-run") == 0
    assert "tie_embeddings true -> false" in capsys.readouterr().out


@pytest.mark.parametrize(("operator", "stated"), [("width", True), ("width_fresh", False)])
def test_copies_that_never_part_are_reported(small, tmp_path, capsys, operator, stated):
    options = ["--operator", operator, "--state-policy", "reset", "--dry-run"]
    assert _grow("--from", small[0], "--to", tmp_path / "out", *options) == 0
    assert ("copies never part" in capsys.readouterr().out) == stated


def test_a_dry_run_writes_nothing(small, tmp_path, capsys):
    arguments = ["--from", small[0], "--to", tmp_path / "out", "--operator", "width"]
    assert _grow(*arguments, "--dry-run") == 0
    assert "parameters" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_the_source_holds_besides_is_printed(small, tmp_path, capsys):
    made = newest(small[0] / "checkpoints")
    source = shutil.copytree(made, tmp_path / made.name)
    (source / "note.txt").write_text("x")
    assert _grow("--from", source, "--operator", "width", "--dry-run") == 0
    assert "left out    note.txt (no file that this format reads)" in capsys.readouterr().out


def test_the_list_names_every_operator(capsys):
    assert _grow("--list") == 0
    text = capsys.readouterr().out
    assert _grow("--list", "--markdown") == 0
    markdown = capsys.readouterr().out
    for operator in OPERATORS.values():
        assert operator.name in text and f"| `{operator.name}` |" in markdown
        assert operator.breaker in text and operator.source in markdown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--operator", "widht"], "set grow.operator to width"),
        (["--operator", "width", "--factor", "1"], "greater than or equal to 2"),
        (["--operator", "width", "--target", "hidden=12"], "cannot grow from 8 to 12"),
        (["--operator", "width", "--target", "layers=4"], "no operator grows it"),
        (["--operator", "width", "--target", "hidden=x"], "not a size"),
        (["--operator", "width", "--target", "hiden=16"], "target.hiden"),
        (["--operator", "width", "--target", "hidden=8"], "changes nothing"),
        (["--operator", "width", "--target", "hidden=16", "--factor", "2"], "not both"),
        (["--operator", "width", "--state-policy", "exakt"], "set grow.state_policy to exact"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    small, tmp_path, capsys, arguments, said
):
    assert _grow("--from", small[0], "--to", tmp_path / "out", *arguments) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_or_damaged_source_is_refused(small, tmp_path, capsys):
    assert _grow("--from", tmp_path, "--to", tmp_path / "out", "--operator", "width") == 1
    assert "no checkpoint" in capsys.readouterr().err
    broken = tmp_path / newest(small[0] / "checkpoints").name
    shutil.copytree(newest(small[0] / "checkpoints"), broken)
    file = next(broken.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        write_offline(plan_offline(broken, GrowConfig(operator="width")), tmp_path / "out")
    assert not list(Path(tmp_path / "out").glob("*"))


def test_a_committed_step_is_never_overwritten(small):
    plan = plan_offline(small[0], GrowConfig(operator="width"))
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        write_offline(plan, small[0] / "checkpoints")


def test_a_result_that_cannot_be_synchronised_is_not_kept(small, tmp_path, monkeypatch):
    """Otherwise the next attempt would find it in the way, to be removed by hand."""
    plan, root = plan_offline(small[0], GrowConfig(operator="width")), tmp_path / "grown"
    fsync = os.fsync

    def fails_at_root(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(root):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails_at_root)
        with pytest.raises(CheckpointError, match=r"cannot be committed\n.*EIO"):
            write_offline(plan, root)
    assert not (root / "step_00000003").exists()
    NativeCheckpoint.open(write_offline(plan, root)).verify()
    assert [path.name for path in root.iterdir()] == ["step_00000003"]


def test_a_growth_that_needs_more_than_the_operator_has(small):
    with pytest.raises(GrowthError, match="does not support"):
        plan_offline(small[0], GrowConfig(operator="head_dim", state_policy="exact"))
