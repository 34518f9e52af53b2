"""Which checkpoints are kept, which are deleted, and that none is ever half deleted."""

import errno
import os
import shutil

import pytest

from megagrow.checkpoint import NativeCheckpoint, list_steps, newest, retire, set_aside, step_path
from megagrow.checkpoint.native.retention import free_room, size_of
from megagrow.errors import CheckpointError
from tests.checkpoint.worlds import save_world


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
    # The run continues, saves the same steps again, and goes back once more.
    save_world(root, 30, seed=9)
    assert len(set_aside(root, 20)) == 1
    retire(root, 1)
    assert list_steps(root) == [20]
    assert len(list(root.glob("*.set-aside-*"))) == 3
    assert set_aside(root, 20) == []


# --- a full disk --------------------------------------------------------------------------


@pytest.fixture
def disk(root, monkeypatch):
    """A disk on which the checkpoints leave 100 bytes free; deleting them frees more."""
    full = sum(size_of(path) for path in root.iterdir()) + 100

    def usage(path):
        held = sum(size_of(path) for path in root.iterdir())
        return type("Usage", (), {"f_blocks": full, "f_frsize": 1, "f_bavail": full - held})

    monkeypatch.setattr(os, "statvfs", usage)
    return root


def test_a_save_that_lacks_room_takes_that_of_what_retention_would_delete_and_says_so(disk):
    said = []
    size = size_of(step_path(disk, 10))
    free_room(disk, needed=size + 100, keep=3, say=said.append)
    # Steps 10 and 20 would go after the save; the first is enough.
    assert list_steps(disk) == [20, 30, 40]
    [text] = said
    assert str(step_path(disk, 10)) in text and f"{size:,} bytes" in text
    assert "checkpoint.keep = 3" in text
    free_room(disk, needed=size, keep=3, say=said.append)
    assert list_steps(disk) == [20, 30, 40] and len(said) == 1


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_what_would_not_be_room_enough_is_not_deleted_and_what_is_there_is_named(disk, keep):
    """As after a growth: the new one is larger than all that may be deleted; the last is kept."""
    sizes = {step: size_of(step_path(disk, step)) for step in (10, 20, 30, 40)}
    said = []
    with pytest.raises(CheckpointError) as caught:
        free_room(disk, needed=sum(sizes.values()) + 100, keep=keep, say=said.append)
    text = str(caught.value)
    assert list_steps(disk) == [10, 20, 30, 40] and not said
    for step, size in sizes.items():
        assert f"{step_path(disk, step).name} ({size:,} bytes)" in text
    assert "do not hold so much besides the last good one" in text and "rm " not in text


def test_the_command_that_a_full_disk_names_makes_room_and_leaves_the_last_good_one(disk):
    needed = size_of(step_path(disk, 10)) + size_of(step_path(disk, 20)) + 100
    flip(step_path(disk, 40), "manifest.json")  # the last good one is the one before it
    with pytest.raises(CheckpointError, match=r"checkpoint\.keep") as caught:
        free_room(disk, needed=needed, keep=9, say=print)
    command = str(caught.value).partition("for instance: ")[2].partition(";")[0]
    assert command == f"rm -r {step_path(disk, 10)} {step_path(disk, 20)}"
    for word in command.split()[2:]:
        shutil.rmtree(word)
    free_room(disk, needed=needed, keep=9, say=print)
    assert list_steps(disk) == [30, 40]


def test_the_only_good_one_is_not_deleted_for_a_newer_one(disk):
    for step in (20, 30, 40):
        flip(step_path(disk, step), "manifest.json")
    said = []
    free_room(disk, needed=size_of(step_path(disk, 20)) + 100, keep=2, say=said.append)
    assert list_steps(disk) == [10, 30, 40] and len(said) == 1
