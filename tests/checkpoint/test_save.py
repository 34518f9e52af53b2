"""A save either commits or fails on all ranks, and never harms existing checkpoints."""

import errno
import fcntl
import os
import re
import threading

import pytest
import torch

from megagrow.checkpoint import NativeCheckpoint, Piece, SoloGroup, list_steps, newest, save
from megagrow.checkpoint.native import steps
from megagrow.errors import CheckpointError
from megagrow.state.boxes import Box, whole
from tests.checkpoint.worlds import (
    CATALOG,
    CHUNK,
    meta,
    random_cuts,
    random_values,
    save_outcomes,
    save_world,
)


def all_refuse(outcomes, *says):
    """Every rank raised the same CheckpointError that says these things."""
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes), outcomes
    assert len({str(outcome) for outcome in outcomes}) == 1
    for text in says:
        assert re.search(text, str(outcomes[0])), outcomes[0]


def only_step_40(root):
    """Only the intact checkpoint of step 40 exists."""
    assert [path.name for path in root.iterdir()] == ["step_00000040"]
    NativeCheckpoint.open(root / "step_00000040").verify()


@pytest.fixture
def root(tmp_path):
    save_world(tmp_path / "run" / "checkpoints", 40, world=2)
    return tmp_path / "run" / "checkpoints"


def cut(world=3, seed=1):
    return random_cuts(random_values(seed), world, seed)


@pytest.mark.parametrize("world", [1, 3])
def test_a_committed_step_is_never_overwritten(root, world):
    before = (root / "step_00000040" / "manifest.json").read_bytes()
    all_refuse(save_outcomes(root, 40, cut(world)), "never overwritten", "step 40 is saved there")
    only_step_40(root)
    assert (root / "step_00000040" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_something_else_in_the_way_is_left_alone(root, kind):
    path = root / "step_00000041"
    if kind == "file":
        path.write_text("mine")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    all_refuse(save_outcomes(root, 41, cut()), "something else is there")
    assert len(list(root.iterdir())) == 2 and os.path.lexists(path)


def fail(function, code, on):
    """The function of `os`, failing with this code where `on` says so."""
    original = getattr(os, function)

    def wrapped(*args, **kwargs):
        if on(*args):
            raise OSError(code, os.strerror(code))
        return original(*args, **kwargs)

    return wrapped


def opens(name):
    return lambda path, *rest: name in str(path)


def descriptor_of(name):
    return lambda fd, *rest: name in os.readlink(f"/proc/self/fd/{fd}")


FAULTS = {
    "no space, rank 2": ("write", errno.ENOSPC, descriptor_of("rank_00002"), "free disk space"),
    "quota, rank 1": ("write", errno.EDQUOT, descriptor_of("rank_00001"), "quota"),
    "broken disk at write": ("write", errno.EIO, descriptor_of("rank_00000"), "check the disk"),
    "broken disk at fsync": ("fsync", errno.EIO, descriptor_of("rank_00001"), "check the disk"),
    "read-only": ("open", errno.EROFS, opens("rank_00001"), "mount it writable"),
    "no right": ("open", errno.EACCES, opens("rank_00002"), "give this user the right"),
    "other host": ("open", errno.ENOENT, opens("rank_00001"), "every host of the job sees"),
    "manifest: no space": ("write", errno.ENOSPC, descriptor_of("manifest"), "free disk space"),
    "manifest: fsync": ("fsync", errno.EIO, descriptor_of("manifest"), "check the disk"),
    "directory: fsync": ("fsync", errno.EIO, descriptor_of(".tmp-"), "check the disk"),
    "rename": ("rename", errno.EIO, opens("step_00000041.tmp-"), "cannot be committed"),
    "mkdir": ("mkdir", errno.ENOSPC, opens("step_00000041.tmp-"), "cannot be made"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_failure_anywhere_fails_everywhere(root, monkeypatch, case):
    function, code, on, fix = FAULTS[case]
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail(function, code, on))
        outcomes = save_outcomes(root, 41, cut())
    all_refuse(outcomes, errno.errorcode[code], re.escape(fix), "step_00000041")
    only_step_40(root)
    assert not isinstance(save_outcomes(root, 41, cut())[0], Exception)


def test_several_failing_ranks_are_all_named(root, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail("write", errno.ENOSPC, descriptor_of("rank_")))
        outcomes = save_outcomes(root, 41, cut(world=6))
    all_refuse(outcomes, "rank 0: ", "rank 3: ", "and 2 more ranks")
    only_step_40(root)


def test_an_error_of_any_type_on_one_rank_fails_all(root):
    ranks = cut()

    def broken():
        yield from ranks[1]
        raise RuntimeError("the device is gone")

    outcomes = save_outcomes(root, 41, [ranks[0], broken(), ranks[2]])
    all_refuse(outcomes, "rank 1: RuntimeError: the device is gone")
    only_step_40(root)


def test_a_parent_that_cannot_be_synchronised_is_reported_but_the_step_is_whole(root, monkeypatch):
    with monkeypatch.context() as patch:
        at_root = lambda fd, *rest: os.readlink(f"/proc/self/fd/{fd}") == str(root)  # noqa: E731
        patch.setattr(os, "fsync", fail("fsync", errno.EIO, at_root))
        outcomes = save_outcomes(root, 41, cut())
    all_refuse(outcomes, "step_00000041 is whole, but a power cut may lose it")
    NativeCheckpoint.open(root / "step_00000041").verify()


def record_directories(monkeypatch):
    """The temporary directories created from now on."""
    made, mkdir = [], os.mkdir

    def recorded(path, *rest):
        if ".tmp-" in str(path):
            made.append(path)
        mkdir(path, *rest)

    monkeypatch.setattr(os, "mkdir", recorded)
    return made


def drop_piece(ranks):
    ranks[1].pop()


def repeat_piece(ranks):
    ranks[0].append(ranks[2][0])


def unknown_tensor(ranks):
    ranks[0].append(Piece("down", "master", whole((3,)), torch.ones(3)))


def outside(ranks):
    ranks[0].append(Piece("norm", "master", Box((7,), (3,)), torch.ones(3)))


def other_dtype(ranks):
    index, piece = next((i, p) for i, p in enumerate(ranks[2]) if p.tensor == "up")
    ranks[2][index] = Piece(piece.tensor, piece.slot, piece.box, piece.values.double())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop_piece, "not stored exactly once"),
        (repeat_piece, "not stored exactly once.*overlap"),
        (unknown_tensor, "tensor down"),
        (outside, "tensor norm.*outside"),
        (other_dtype, "element types differ"),
    ],
)
def test_pieces_that_do_not_tile_are_refused_before_anything_is_written(
    root, monkeypatch, change, says
):
    ranks = cut()
    change(ranks)
    made = record_directories(monkeypatch)
    all_refuse(save_outcomes(root, 41, ranks), f"(?s){says}")
    assert not made
    only_step_40(root)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (float("nan"), r"run_state\.x is nan"),
        ({1: 2}, r"run_state\.x: key 1 is not a text"),
        ([torch.ones(1)], r"run_state\.x\[0\]: a Tensor cannot"),
        ({"a": b"bytes"}, r"run_state\.x\.a: a bytes cannot"),
        (10**100, "digits"),
    ],
)
def test_run_state_that_json_would_change_is_refused(root, value, says):
    all_refuse(save_outcomes(root, 41, cut(), about=meta(world=3, x=value)), says)
    only_step_40(root)


def test_too_little_space_is_reported_before_anything_is_written(root, monkeypatch):
    real = os.statvfs(root)
    size = sum(t.volume for t in CATALOG) * 3 * 4

    class Little:
        f_blocks, f_frsize, f_bavail = real.f_blocks, 1, size

    monkeypatch.setattr(os, "statvfs", lambda path: Little)
    made = record_directories(monkeypatch)
    all_refuse(save_outcomes(root, 41, cut()), "not enough disk space", f"{size:,} bytes free")
    assert not made
    only_step_40(root)


def test_a_file_system_that_states_no_size_is_tried(root, monkeypatch):
    class Unknown:
        f_blocks = f_frsize = f_bavail = 0

    monkeypatch.setattr(os, "statvfs", lambda path: Unknown)
    assert not isinstance(save_outcomes(root, 41, cut())[0], Exception)


def test_a_root_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    all_refuse(
        save_outcomes(tmp_path / "file" / "checkpoints", 1, cut()), "file/checkpoints", "ENOTDIR"
    )


# --- leftovers ----------------------------------------------------------------------------


def leave(root, name="step_00000030.tmp-dead"):
    (root / name).mkdir()
    (root / name / "rank_00000.safetensors").write_bytes(b"half")
    return root / name


def test_leftovers_are_invisible_and_removed_by_the_next_successful_save(root, monkeypatch):
    dead = [leave(root), leave(root, "step_00000050.tmp-deleted-ab")]
    aside, others = leave(root, "step_00000050.set-aside-ab"), leave(root, "notes.tmp-1")
    (root / "step_00000060.tmp-link").symlink_to(others)
    assert list_steps(root) == [40]
    assert newest(root) == root / "step_00000040"
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail("write", errno.EIO, descriptor_of("rank_00000")))
        all_refuse(save_outcomes(root, 41, cut()), "EIO")
    assert all(path.exists() for path in dead)
    save_outcomes(root, 41, cut())
    assert not any(path.exists() for path in dead)
    assert aside.exists() and others.exists() and (root / "step_00000060.tmp-link").is_symlink()


def test_a_directory_in_use_is_not_swept(root):
    live = leave(root)
    with steps.claim(live):
        save_world(root, 41)
        assert live.exists()
    save_world(root, 42)
    assert not live.exists()


def test_a_save_that_runs_is_not_swept_by_another(root):
    """Two saves at once into one root: both commit."""
    inside, go_on = threading.Event(), threading.Event()

    class Slow(SoloGroup):
        calls = 0

        def gather(self, obj):
            self.calls += 1
            if self.calls == 2:  # its file is written, its manifest is not
                inside.set()
                assert go_on.wait(60)
            return [obj]

    [pieces] = cut(1)
    result = []
    thread = threading.Thread(
        target=lambda: result.append(
            save(root, step=41, pieces=pieces, meta=meta(), group=Slow(), chunk_bytes=CHUNK)
        )
    )
    thread.start()
    assert inside.wait(60)
    save_world(root, 42)
    go_on.set()
    thread.join()
    NativeCheckpoint.open(result[0]).verify()
    assert list_steps(root) == [40, 41, 42]


def test_without_locks_only_a_quiet_directory_is_swept(root, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    fresh, old = leave(root), leave(root, "step_00000031.tmp-old")
    for path in (*old.iterdir(), old):
        os.utime(path, (1e9, 1e9))
    save_world(root, 41)
    assert fresh.exists() and not old.exists()


def test_a_save_whose_directory_is_swept_fails_and_commits_nothing(root):
    """Even if a lock lied, renaming the directory makes the victim fail, not commit a torn step."""

    class Swept(SoloGroup):
        calls = 0

        def gather(self, obj):
            self.calls += 1
            if self.calls == 2:
                [live] = root.glob("*.tmp-*")
                steps.discard(live)
            return [obj]

    with pytest.raises(CheckpointError, match="step_00000041"):
        save(root, step=41, pieces=cut(1)[0], meta=meta(), group=Swept())
    only_step_40(root)


def test_leftovers_that_cannot_be_removed_do_not_fail_the_save(root, monkeypatch, caplog):
    dead = leave(root)
    monkeypatch.setattr(os, "rename", fail("rename", errno.EACCES, opens("tmp-dead")))
    save_world(root, 41)
    assert dead.exists() and "leftovers" in caplog.text


def test_leftovers_are_removed_early_where_space_is_short(root, monkeypatch):
    dead = leave(root)
    real = os.statvfs(root)

    class Space:
        f_blocks = f_frsize = 1
        f_bavail = 10**6

    class NoSpace(Space):
        f_bavail = 1

    monkeypatch.setattr(os, "statvfs", lambda path: NoSpace if dead.exists() else Space)
    assert real.f_blocks > 0
    save_world(root, 41)
    assert list_steps(root) == [40, 41]
