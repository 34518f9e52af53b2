"""Damage anywhere is found, and the error names the file."""

import random
import shutil

import pytest

from megagrow.checkpoint import NativeCheckpoint
from megagrow.errors import CheckpointError
from megagrow.state.boxes import whole
from tests.checkpoint.worlds import save_world


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("sound")
    return save_world(root, 40, world=3, seed=5)[0]


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / checkpoint.name)


def open_and_verify(path):
    NativeCheckpoint.open(path).verify()


def read_all(path):
    opened = NativeCheckpoint.open(path)
    for tensor in opened.catalog:
        for slot in opened.slots:
            opened.read(tensor.name, slot.name, whole(tensor.shape))


FILES = ["manifest.json", *(f"rank_{rank:05d}.safetensors" for rank in range(3))]


@pytest.mark.parametrize("check", [open_and_verify, read_all])
@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(copy, name, check):
    file = copy / name
    sound = file.read_bytes()
    rng = random.Random(name)
    places = [0, len(sound) - 1, *(rng.randrange(len(sound)) for _ in range(38))]
    for place in places:
        damaged = bytearray(sound)
        damaged[place] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name):
            check(copy)
    file.write_bytes(sound)
    check(copy)


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_and_every_tail_is_found(copy, name):
    file = copy / name
    sound = file.read_bytes()
    rng = random.Random(name)
    lengths = [0, 1, 7, 8, len(sound) - 1, *(rng.randrange(len(sound)) for _ in range(25))]
    for damaged in [*(sound[:n] for n in lengths), sound + b"\0", sound + b"\n", sound + sound]:
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name):
            NativeCheckpoint.open(copy)


def test_a_flip_is_named_with_tensor_slot_and_box(copy):
    opened = NativeCheckpoint.open(copy)
    tensor = opened.catalog["up"]
    file = copy / "rank_00001.safetensors"
    entry = next(
        box for box in opened._stored["up", "exp_avg_sq"] if box.file == "rank_00001.safetensors"
    )
    data = bytearray(file.read_bytes())
    data[entry.start] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        opened.read("up", "exp_avg_sq", whole(tensor.shape))
    assert "rank_00001.safetensors: tensor " in str(caught.value)
    assert "slot" in str(caught.value) and "box [" in str(caught.value)
    # Undamaged parts are still readable, and so is the damage if nothing is checked.
    opened.read("scale", "master", whole(()))
    NativeCheckpoint.open(copy, verify=False).read("up", "exp_avg_sq", whole(tensor.shape))
    # A failed comparison is not remembered as a success.
    with pytest.raises(CheckpointError, match="damaged"):
        opened.read("up", "exp_avg_sq", whole(tensor.shape))


def test_a_chunk_is_compared_once(copy, monkeypatch):
    from megagrow.checkpoint.interface import stored_source as stored

    opened = NativeCheckpoint.open(copy)
    compared = []
    crc32 = stored.crc32
    monkeypatch.setattr(stored, "crc32", lambda data, crc: compared.append(1) or crc32(data, crc))
    for _ in range(3):
        for tensor in opened.catalog:
            for slot in opened.slots:
                opened.read(tensor.name, slot.name, whole(tensor.shape))
    assert len(compared) <= opened.checksums


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        NativeCheckpoint.open(copy)


def test_a_file_that_shrinks_after_opening_is_found(copy):
    opened = NativeCheckpoint.open(copy)
    file = copy / "rank_00002.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="rank_00002"):
        opened.verify()


@pytest.mark.parametrize("step", [40, 41])
def test_a_file_of_another_checkpoint_is_found(copy, tmp_path, step):
    """Same model, same layout, even the same step of another run: only values and stamp differ."""
    other, _ = save_world(tmp_path / "other", step, world=3, seed=5)
    name = "rank_00001.safetensors"
    assert (other / name).stat().st_size == (copy / name).stat().st_size
    shutil.copy(other / name, copy / name)
    with pytest.raises(CheckpointError, match=r"rank_00001.*from another checkpoint"):
        NativeCheckpoint.open(copy)


def test_the_files_of_two_ranks_swapped_are_found(copy):
    a, b = (copy / f"rank_0000{rank}.safetensors" for rank in (0, 1))
    a_data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(a_data)
    with pytest.raises(CheckpointError, match="rank_00000"):
        NativeCheckpoint.open(copy)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("absent", "nothing by that name"),
        ("step_00000040/manifest.json", "a file"),
        ("empty", "without manifest.json"),
        ("step_00000041.tmp-ab", "never finished"),
    ],
)
def test_what_is_no_checkpoint_says_what_it_is(copy, name, says):
    root = copy.parent
    (root / "empty").mkdir()
    shutil.copytree(copy, root / "step_00000041.tmp-ab")
    with pytest.raises(CheckpointError, match=says):
        NativeCheckpoint.open(root / name)
