"""What was saved is read back, in any boxes; sources and properties are correct."""

import random
import threading

import pytest
import torch

from megagrow.checkpoint import NativeCheckpoint, Piece, SoloGroup, save
from megagrow.checkpoint.interface import file_writer, stored_source
from megagrow.errors import CheckpointError
from megagrow.state.boxes import Box, tiling_fault, whole
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.state.layout import Layout
from tests.checkpoint.worlds import (
    CATALOG,
    CHUNK,
    meta,
    random_box,
    random_cuts,
    random_values,
    save_outcomes,
)
from tests.checkpoint.worlds import save_world as saved


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_any_box_comes_back(tmp_path, world, verify):
    path, values = saved(tmp_path, 40, world=world, seed=world)
    checkpoint = NativeCheckpoint.open(path, verify=verify)
    rng = random.Random(world)
    for _ in range(60):
        (name, slot), tensor = rng.choice(list(values.items()))
        box = random_box(tensor.shape, rng)
        assert torch.equal(checkpoint.read(name, slot, box), tensor[box.slices])
    for (name, slot), tensor in values.items():
        assert torch.equal(checkpoint.read(name, slot, whole(tensor.shape)), tensor)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_element_types_and_their_mix_in_one_file(tmp_path, dtype):
    values = random_values(1)
    values.update({key: v.to(dtype) for key, v in values.items() if key[1] != "master"})
    [path] = save_outcomes(tmp_path, 1, random_cuts(values, 1, 1))
    checkpoint = NativeCheckpoint.open(path)
    for (name, slot), tensor in values.items():
        read = checkpoint.read(name, slot, whole(tensor.shape))
        assert read.dtype == tensor.dtype == checkpoint.dtype(name, slot)
        assert torch.equal(read, tensor)


def test_bits_are_kept_also_of_nan_and_negative_zero(tmp_path):
    values = random_values(1)
    odd = torch.tensor([0x7FC12345, 0xFF812345 - 2**32, -(2**31), 1], dtype=torch.int32)
    values["norm", "master"] = torch.cat([odd.view(torch.float32), torch.ones(3)])
    [path] = save_outcomes(tmp_path, 1, random_cuts(values, 1, 1))
    read = NativeCheckpoint.open(path).read("norm", "master", whole((7,)))
    assert torch.equal(read.view(torch.int32), values["norm", "master"].view(torch.int32))


def test_reading_into_a_strided_part_of_a_parameter(tmp_path):
    path, values = saved(tmp_path, 40, world=3)
    target = torch.nn.Parameter(torch.full((20, 12), torch.nan))
    box = Box((2, 1), (9, 7))
    out = target.data[3:21:2, 4:11]
    assert NativeCheckpoint.open(path).read("up", "exp_avg", box, out=out) is out
    assert torch.equal(target.data[3:21:2, 4:11], values["up", "exp_avg"][box.slices])
    assert target.data.isnan().sum() == 20 * 12 - box.volume


def test_out_of_the_wrong_kind_is_refused(tmp_path):
    checkpoint = NativeCheckpoint.open(saved(tmp_path, 40)[0])
    for out in (torch.empty(8), torch.empty(7, dtype=torch.float64)):
        with pytest.raises(ValueError, match="norm@master"):
            checkpoint.read("norm", "master", whole((7,)), out=out)


def test_what_it_does_not_hold_is_named(tmp_path):
    checkpoint = NativeCheckpoint.open(saved(tmp_path, 40)[0])
    with pytest.raises(CheckpointError, match="no tensor down"):
        checkpoint.read("down", "master", whole((7,)))
    with pytest.raises(CheckpointError, match="slot momentum"):
        checkpoint.read("norm", "momentum", whole((7,)))
    for box in (Box((1,), (7,)), Box((0, 0), (1, 1))):
        with pytest.raises(CheckpointError, match="tensor norm has no box"):
            checkpoint.read("norm", "master", box)


def test_sources_tile_the_box_and_name_files_that_hold_it(tmp_path):
    path, _ = saved(tmp_path, 40, world=4, seed=3)
    checkpoint = NativeCheckpoint.open(path)
    rng = random.Random(0)
    for _ in range(40):
        tensor = rng.choice(CATALOG.tensors)
        box = random_box(tensor.shape, rng)
        found = list(checkpoint.sources(tensor.name, box, reader=rng.randrange(9)))
        assert all(0 <= file < 4 and box.contains(part) for file, part in found)
        parts = [part.relative_to(box.offset) for _, part in found]
        assert tiling_fault(box.shape, parts) is None
        for file, part in found:
            others = [p for p in path.glob("rank_*") if p.name != f"rank_{file:05d}.safetensors"]
            moved = [(other, other.rename(other.with_suffix(".away"))) for other in others]
            try:
                checkpoint.read(tensor.name, "master", part)
            finally:
                for name, away in moved:
                    away.rename(name)


def test_properties(tmp_path):
    path, _ = saved(tmp_path, 40, world=3, about=meta(world=3, random_state=[1, 2**127, "x", None]))
    checkpoint = NativeCheckpoint.open(path)
    assert path == tmp_path / "step_00000040"
    assert checkpoint.step == 40
    assert checkpoint.catalog == CATALOG
    assert checkpoint.slots == ADAM_SLOTS
    assert checkpoint.layout == Layout(data=3, zero=1)
    assert checkpoint.config["model"] == {"family": "gpt2", "layers": 2}
    assert checkpoint.config["betas"] == [0.9, 0.95]
    assert checkpoint.run_state["random_state"] == [1, 2**127, "x", None]
    assert checkpoint.fingerprints == {"tokenizer": "t0", "data": "d0"}
    on_disk = {p.name: p.stat().st_size for p in path.glob("*.safetensors")}
    assert checkpoint.files == on_disk
    assert checkpoint.bytes == sum(on_disk.values())
    assert checkpoint.checksums == sum(-(-size // CHUNK) for size in on_disk.values())
    checkpoint.verify()


def test_a_checkpoint_may_be_copied_under_another_name_but_not_another_step(tmp_path):
    path, _ = saved(tmp_path, 40)
    assert NativeCheckpoint.open(path.rename(tmp_path / "best")).step == 40
    wrong = (tmp_path / "best").rename(tmp_path / "step_00000041")
    with pytest.raises(CheckpointError, match="its step is not that of"):
        NativeCheckpoint.open(wrong)


def test_a_rank_without_pieces_writes_an_empty_file(tmp_path):
    values = random_values(0)
    ranks = [random_cuts(values, 1, 0)[0], []]
    path = save_outcomes(tmp_path, 3, ranks)[1]
    checkpoint = NativeCheckpoint.open(path)
    checkpoint.verify()
    assert torch.equal(checkpoint.read("up", "master", whole((13, 9))), values["up", "master"])


def test_memory_of_save_and_read_is_one_buffer(tmp_path, monkeypatch):
    values = random_values(0)
    [pieces] = random_cuts(values, 1, 0)
    made = []
    monkeypatch.setattr(file_writer, "_rooms", threading.local())  # no buffer of another test's
    for place, maker in ((torch, "empty"), (file_writer, "page_aligned")):
        real = getattr(place, maker)
        monkeypatch.setattr(
            place, maker, lambda *a, _real=real, **k: made.append(_real(*a, **k)) or made[-1]
        )
    for name in ("contiguous", "clone", "cpu", "to"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, _name=name, **k: pytest.fail(_name))
    path = save(tmp_path, step=1, pieces=pieces, meta=meta(), group=SoloGroup(), chunk_bytes=CHUNK)
    assert [t.numel() * t.element_size() for t in made] == [CHUNK]
    out = torch.zeros(13, 9)
    made.clear()
    checkpoint = NativeCheckpoint.open(path)
    for row in range(13):
        box = Box((row, 0), (1, 9))
        checkpoint.read("up", "master", box, out=out[box.slices])
    checkpoint.verify()
    assert [t.numel() * t.element_size() for t in made] == [stored_source._BUFFER_BYTES]


def test_pieces_may_be_a_generator_and_keep_their_gradient_history(tmp_path):
    values = {key: v.requires_grad_() for key, v in random_values(0).items()}
    pieces = (Piece(*key, whole(v.shape), v * 1) for key, v in values.items())
    path = save(tmp_path, step=0, pieces=pieces, meta=meta(), group=SoloGroup())
    read = NativeCheckpoint.open(path).read("up", "master", whole((13, 9)))
    assert torch.equal(read, values["up", "master"]) and not read.requires_grad
