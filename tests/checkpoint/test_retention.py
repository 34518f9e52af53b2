"""Which checkpoints stay, which go, and that none is ever half gone."""

import errno
import os
import shutil

import pytest
from worlds import save_world

from megagrow.checkpoint import NativeCheckpoint, list_steps, newest, retire, set_aside, step_path
from megagrow.errors import CheckpointError


@pytest.fixture
def root(tmp_path):
    for step in (10, 20, 30, 40):
        save_world(tmp_path, step)
    return tmp_path


def flip(path, name="rank_00000.safetensors", place=-1):
    data = bytearray((path / name).read_bytes())
    data[place] ^= 1
    (path / name).write_bytes(data)


def test_names_that_are_not_ours_are_no_steps(root, tmp_path):
    for name in ("step_50", "step_000000050", "step_0000005a", "step_٠٠٠٠٠٠٥٠", "other", "step_"):
        (root / name).mkdir()
    (root / "step_00000060").write_text("a file")
    assert list_steps(root) == [10, 20, 30, 40]
    assert newest(root) == root / "step_00000040"
    assert list_steps(tmp_path / "absent") == [] and newest(tmp_path / "absent") is None
    (root / "step_123456789").mkdir()
    assert list_steps(root)[-1] == 123456789 and newest(root) == step_path(root, 123456789)


@pytest.mark.parametrize(("keep", "left"), [(1, [40]), (2, [30, 40]), (4, None), (9, None)])
def test_the_newest_stay(root, keep, left):
    left = left or [10, 20, 30, 40]
    gone = retire(root, keep)
    assert gone == [step_path(root, s) for s in (10, 20, 30, 40) if s not in left]
    assert sorted(p.name for p in root.iterdir()) == [step_path(root, s).name for s in left]
    for step in left:
        NativeCheckpoint.open(step_path(root, step)).verify()


def test_keeping_nothing_is_a_mistake(root):
    with pytest.raises(ValueError, match="at least 1"):
        retire(root, 0)
    assert list_steps(root) == [10, 20, 30, 40]


def test_the_newest_that_opens_stays_when_all_newer_ones_are_damaged(root):
    (root / "step_00000040" / "rank_00001.safetensors").unlink()
    flip(root / "step_00000030", "manifest.json")
    retire(root, 2)
    assert list_steps(root) == [20, 30, 40]
    retire(root, 1)
    assert list_steps(root) == [20, 40]


def test_damage_to_values_counts_when_checksums_are_asked_for(root):
    flip(root / "step_00000040")
    retire(root, 1, verify=True)
    assert list_steps(root) == [30, 40]
    retire(root, 1)
    assert list_steps(root) == [40]


def test_a_deletion_cut_short_leaves_no_committed_name(root, monkeypatch):
    def broken(path, *args, **kwargs):
        next(path.glob("rank_*")).unlink()
        raise OSError(errno.EIO, "cut short")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", broken)
        with pytest.raises(CheckpointError, match="step_00000010"):
            retire(root, 3)
    assert list_steps(root) == [20, 30, 40]
    assert len(list(root.glob("step_00000010.tmp-deleted-*"))) == 1
    save_world(root, 50)
    assert len(list(root.iterdir())) == 4


def test_a_refused_rename_leaves_the_checkpoint_whole(root, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(CheckpointError, match=r"step_00000010.*\n.*EACCES"):
            retire(root, 2)
        with pytest.raises(CheckpointError, match=r"step_00000040.*\n.*EACCES"):
            set_aside(root, 30)
    for step in (10, 20, 30, 40):
        NativeCheckpoint.open(step_path(root, step)).verify()


def test_set_aside_hides_the_newer_ones_and_keeps_them(root):
    moved = set_aside(root, 20)
    assert list_steps(root) == [10, 20]
    names = [path.name.rsplit("-", 1)[0] for path in moved]
    assert names == ["step_00000030.set-aside", "step_00000040.set-aside"]
    for path, step in zip(moved, (30, 40), strict=True):
        assert NativeCheckpoint.open(path).step == step
    # The run goes on, saves the same steps again, and goes back once more.
    save_world(root, 30, seed=9)
    assert len(set_aside(root, 20)) == 1
    retire(root, 1)
    assert list_steps(root) == [20]
    assert len(list(root.glob("*.set-aside-*"))) == 3
    assert set_aside(root, 20) == []
