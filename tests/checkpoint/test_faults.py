"""Real faults in real processes: SIGKILL at every system call of a save, full and broken disks."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks.faults.shim import build
from megagrow.checkpoint import NativeCheckpoint, list_steps, save, step_path
from megagrow.checkpoint.native.collective import SoloGroup
from megagrow.errors import CheckpointError
from megagrow.state.boxes import whole
from megagrow.state.catalog import Catalog
from tests.checkpoint.worlds import (
    logical,
    meta,
    random_cuts,
    random_values,
    save_outcomes,
    save_world,
)
from tests.jobs import REPOSITORY


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    if sys.platform != "linux":
        pytest.skip("the fault shim is for Linux")
    return build(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A root with an intact checkpoint of step 40."""
    root = tmp_path_factory.mktemp("earlier")
    save_world(root, 40, seed=40)
    return root


def run(shim, earlier, base, faults, world):
    """Save step 41 with each fault next to a copy of step 40; the driver's results and roots."""
    roots = [base / str(number) for number in range(len(faults))]
    for root in roots:
        shutil.copytree(earlier, root)
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.fault_driver", base, str(world)],
        env={**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": str(REPOSITORY)},
        input=json.dumps(faults),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return list(zip(json.loads(done.stdout), roots, strict=True))


def check_step(root, step):
    checkpoint = NativeCheckpoint.open(step_path(root, step))
    checkpoint.verify()
    for (name, slot), tensor in random_values(step).items():
        assert torch.equal(checkpoint.read(name, slot, whole(tensor.shape)), tensor)


# Count only calls on files of the save itself, not those that a child inherits or prints to.
SAVE = {"FAULT_CALL": "any", "FAULT_PATH": "earlier-run"}


@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_every_call(shim, earlier, tmp_path, world):
    """Before and after each write, fsync, rename and mkdir: step 41 is complete or invisible."""
    base = tmp_path / "earlier-run"
    [((status, calls, _), root)] = run(shim, earlier, base, [SAVE], world)
    assert status == 0
    check_step(root, 41)
    # m: the directory; w, f: files, synced; then directory, manifest, rename, parent.
    assert calls.count("w") > 2 * world and calls.count("r") == 1 and calls.count("m") >= 1
    assert calls.rindex("w") < calls.index("r") < calls.rindex("f") == len(calls) - 1
    assert calls[: calls.index("r")].endswith("wff")
    # The run's directory, each file, the manifest, the directory, and after the rename its parent.
    assert calls.count("f") == 1 + world + 3

    numbers = [str(n) for n in range(1, len(calls) + 1)]
    faults = [
        {**SAVE, "FAULT_HOW": how, "FAULT_AT": at} for how in ("KILL", "DEAD") for at in numbers
    ]
    base = tmp_path / "2" / "earlier-run"
    outcomes = set()
    for ((status, seen, _), root), fault in zip(
        run(shim, earlier, base, faults, world), faults, strict=True
    ):
        assert status == -9, fault
        check_step(root, 40)
        steps = list_steps(root)
        assert steps in ([40], [40, 41])
        committed = "r" in seen and (fault["FAULT_HOW"] == "DEAD" or seen[-1] != "r")
        assert (steps == [40, 41]) == committed, fault
        if committed:
            check_step(root, 41)
        outcomes.add(committed)
        # The restarted run saves again, and cleans up after the dead one.
        save_world(root, 42)
        assert all(path.name.startswith("step_000000") for path in root.iterdir())
        assert not list(root.glob("*.tmp-*"))
    assert outcomes == {True, False}


@pytest.mark.parametrize("how", ["ENOSPC", "EIO", "HALF"])
def test_every_call_refused_once(shim, earlier, tmp_path, how):
    """Each write, fsync and rename fails once: an error on both ranks, or (HALF) no harm."""
    base = tmp_path / "earlier-run"
    kinds = ["write"] if how == "HALF" else ["write", "fsync", "rename", "mkdir"]
    targets = ["rank_00000", "rank_00001", "manifest.json", "step_00000041.tmp-"]
    faults = [
        {"FAULT_CALL": kind, "FAULT_PATH": f"{target}", "FAULT_HOW": how, "FAULT_AT": str(at)}
        for kind, target, at in itertools.product(kinds, targets, (1, 3))
    ]
    hits = 0
    for ((status, calls, text), root), fault in zip(
        run(shim, earlier, base, faults, 2), faults, strict=True
    ):
        check_step(root, 40)
        hit = len(calls) >= int(fault["FAULT_AT"])
        hits += hit
        if hit and how != "HALF":
            assert status == 3, fault
            assert how in text and "step_00000041" in text
            assert [path.name for path in root.iterdir()] == ["step_00000040"]
        else:
            assert status == 0, (fault, text)
            check_step(root, 41)
    assert hits >= 5


def test_a_really_full_disk(tmp_path):
    """On a tmpfs of 1 MiB: refused in advance, or if the size is hidden, when it fills up."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        save_world(disk, 40, seed=40)
        big, about = big_world()
        with pytest.raises(CheckpointError, match="not enough disk space"):
            save(disk, step=41, pieces=big, meta=about, group=SoloGroup())
        with pytest.MonkeyPatch.context() as patch:

            class Hidden:
                f_blocks = f_bavail = f_frsize = 0

            patch.setattr(os, "statvfs", lambda path: Hidden)
            outcomes = save_outcomes(disk, 41, [big, []], about=about, chunk_bytes=1 << 16)
        assert all(isinstance(outcome, CheckpointError) for outcome in outcomes)
        assert "ENOSPC" in str(outcomes[1]) and "rank_00000.safetensors" in str(outcomes[1])
        assert [path.name for path in disk.iterdir()] == ["step_00000040"]
        check_step(disk, 40)
        save_outcomes(disk, 41, random_cuts(random_values(41), 2, 41))
        check_step(disk, 41)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def big_world():
    catalog = Catalog((logical("w", 512, 512),))
    values = random_values(0, catalog)
    return random_cuts(values, 1, 0)[0], meta(catalog)
