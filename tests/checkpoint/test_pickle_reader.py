"""torch.save files: read as torch reads them, hostile ones refused and never run."""

import argparse
import collections
import io
import os
import pickle
import random
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from megagrow.checkpoint.containers.pickle_reader import STORAGES, Opaque, read_pickle
from megagrow.checkpoint.containers.stored_tensor import StoredTensor
from megagrow.checkpoint.containers.torch_reader import read_torch_file
from megagrow.checkpoint.containers.torch_writer import (
    NewTensor,
    number,
    plan_archive,
    size_of,
    whole_values,
)
from megagrow.checkpoint.interface.format import Values, Zeros
from megagrow.errors import CheckpointError
from megagrow.models.catalog import build_catalog
from megagrow.state.boxes import whole
from tests.checkpoint.foreign import WholeSource, write_file
from tests.toys import random_state, toy_model


def values(tensor):
    """The values of a stored tensor, by a plain read of the file."""
    data = tensor.path.read_bytes()[tensor.start :][: tensor.numel * tensor.dtype.itemsize]
    return torch.frombuffer(bytearray(data), dtype=tensor.dtype).view(tensor.shape)


def save(path, value):
    torch.save(value, path)
    return path


def test_reads_what_torch_saves(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    saved = {
        "plain": [1, -(2**70), 2.5, None, True, "ä", (1, (2,))],
        "ordered": collections.OrderedDict(a=base, b=base[2:]),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "size": base.shape,
        "dtype": torch.bfloat16,
        "arguments": argparse.Namespace(layers=3, name="x"),
        "kinds": [torch.arange(2).to(dtype) for dtype in STORAGES.values()],
        "module": torch.nn.Linear(2, 3).state_dict(),
    }
    found = read_torch_file(save(tmp_path / "x.pt", saved)).value
    assert found["plain"] == saved["plain"] and found["size"] == (4, 6)
    assert torch.equal(values(found["ordered"]["a"]), base)
    assert torch.equal(values(found["ordered"]["b"]), base[2:])
    assert torch.equal(values(found["parameter"]), torch.ones(3))
    assert found["dtype"] == Opaque("torch.bfloat16")
    assert found["arguments"].attribute("layers") == 3
    for tensor, expected in zip(found["kinds"], saved["kinds"], strict=True):
        assert torch.equal(values(tensor), expected) and tensor.dtype == expected.dtype
    assert torch.equal(values(found["module"]["weight"]), saved["module"]["weight"])


def test_torch_reads_what_is_planned(tmp_path):
    model = toy_model()
    source = WholeSource(model, random_state(build_catalog(model), seed=1, dtype=torch.float32))
    name = "layers.0.mlp.up.weight"
    expected = source._state.tensors[name, "master"]
    box = whole(expected.shape)
    tensor = whole_values(Values(name, "master", box, torch.float32), shape=(expected.numel(),))
    low = whole_values(Values(name, "master", box, torch.bfloat16))
    plan = plan_archive(
        "deep/er/x.pt",
        {
            "a": tensor, "again": tensor, "low": low, "step": number(3), "size": size_of((2, 5)),
            "zeros": NewTensor(torch.float16, (7,), (Zeros(14),)), "rest": [1, "x", (None, 2.5)],
        },
    )  # fmt: skip
    path = tmp_path / "x.pt"
    write_file(path, plan, source)
    for options in ({}, {"mmap": True}):
        found = torch.load(path, weights_only=True, **options)
        assert torch.equal(found["a"], expected.view(-1)) and found["step"] == 3.0
        assert found["again"].data_ptr() == found["a"].data_ptr()
        assert torch.equal(found["low"], expected.to(torch.bfloat16))
        assert found["size"] == torch.Size((2, 5)) and found["rest"] == [1, "x", (None, 2.5)]
        assert not found["zeros"].any()
    assert zipfile.ZipFile(path).testzip() is None
    again = read_torch_file(path)
    assert all(start % 64 == 0 for start, _, _ in again.records)
    assert isinstance(again.value["a"], StoredTensor) and again.value["step"].item() == 3.0


class Hostile:
    def __init__(self, function, *args):
        self._call = function, args

    def __reduce__(self):
        return self._call


def test_hostile_pickles_are_refused_by_name_and_not_run(tmp_path):
    proof = tmp_path / "proof"
    calls = [
        (os.system, f"touch {proof}"),
        (subprocess.Popen, ["touch", str(proof)]),
        (eval, f"open({str(proof)!r}, 'w')"),
        (exec, f"open({str(proof)!r}, 'w')"),
        (getattr, "torch", "load"),
        (torch.load, str(proof)),
        (open, str(proof), "w"),
        (pickle.loads, pickle.dumps(Hostile(os.system, f"touch {proof}"))),
        (__import__, "os"),
    ]
    for call in calls:
        path = save(tmp_path / "hostile.pt", {"module": Hostile(*call)})
        with pytest.raises(CheckpointError, match="none of its code was run") as caught:
            read_torch_file(path)
        assert str(path) in str(caught.value)
    assert not proof.exists()


def refusal(path):
    """Why a file is refused; None if it is not."""
    try:
        read_torch_file(path)
    except CheckpointError as error:
        return str(error)
    return None


def archive_of(path, text, storage=b"\0" * 16):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", text)
        archive.writestr("x/data/0", storage)
    return path


def test_crooked_pickles_are_refused(tmp_path):
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    storage = b"((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\4tQ"
    crooked = {
        "a memo of 4 G entries": b"\x80\2]r\xff\xff\xff\xffj\xfe\xff\xff\xff.",
        "no end": b"\x80\2](",
        "an empty stack": b"\x80\2R.",
        "calls a dictionary": b"\x80\2})R.",
        "an extension": b"\x80\2\x82\1.",
        "an instance": b"(i" + b"os\nsystem\n.",
        "attributes of a list": b"\x80\2]}b.",
        "behind its storage": b"\x80\2" + rebuild + storage + b"K\0K\5\x85K\1\x85\x89}tR.",
        "negative shape": b"\x80\2"
        + rebuild
        + storage
        + b"K\0J\xff\xff\xff\xff\x85K\1\x85\x89}tR.",
        "longer storage": b"\x80\2" + storage.replace(b"K\4", b"K\5") + b".",
    }
    for what, text in crooked.items():
        path = archive_of(tmp_path / "crooked.pt", text)
        refused = refusal(path)
        assert refused is not None and str(path) in refused, what


DOUBLED = b")" + b"2\x86" * 40  # a tuple of twice a tuple of twice ...: 2**40 parts
EXPENSIVE = {
    "a key": (b"}" + DOUBLED + b"Ns.", "a key of more than 16 parts"),
    "keys": (b"}(" + DOUBLED + b"Nu.", "a key of more than 16 parts"),
    "a dictionary": (b"(" + DOUBLED + b"Nd.", "a key of more than 16 parts"),
    "a set": (b"\x8f(" + DOUBLED + b"\x90.", "a key of more than 16 parts"),
    "an ordered dictionary": (
        b"ccollections\nOrderedDict\n]" + DOUBLED + b"N\x86a\x85R.", "a key of more than 16 parts",
    ),
    "a storage": (DOUBLED + b"Q.", "it refers to"),
    "a storage's name": (
        b"(X\7\0\0\0storagectorch\nFloatStorage\n" + DOUBLED + b"X\3\0\0\0cpuK\4tQ.",
        "a storage of",
    ),
    "what is called": (DOUBLED + b")R.", "it calls"),
    "a plain value": (DOUBLED + b".", "references that expand to more than"),
    "attributes": (
        b"cargparse\nNamespace\n)\x81}X\1\0\0\0a" + DOUBLED + b"sb.",
        "references that expand to more than",
    ),
    "arguments": (
        b")" + b"q\0cnumpy.x\ny\nh\0h\0\x86R" * 40 + b".", "references that expand to more than",
    ),
    "sizes": (
        b"]q\0(" + b"K\1" * 50_000 + b"e0" + b"ctorch\nSize\nh\0\x85R0" * 9 + b"N.", "50000 axes",
    ),
    "depth": (b"]" * 2000 + b"a" * 1999 + b".", "nested deeper than 100 levels"),
    "itself": (b"]2a.", "holds itself"),
    "a long name": (b"c" + b"m" * 600 + b"\nn\n.", "a name of 601 characters"),
}  # fmt: skip


@pytest.mark.parametrize("what", EXPENSIVE)
def test_a_small_pickle_cannot_stand_for_endless_work(what):
    """Each of these made a reader hash, print, compare or walk 2**40 parts, or crash."""
    text, says = EXPENSIVE[what]
    with pytest.raises(CheckpointError, match=says):
        read_pickle(b"\x80\4" + text, where=Path("hostile.pt"))


def test_instructions_are_counted():
    text = b"\x80\4" + b"N0" * 1000 + b"N."
    assert read_pickle(text, where=Path("p"), instructions=2003) is None
    with pytest.raises(CheckpointError, match="more than 2,002 instructions"):
        read_pickle(text, where=Path("p"), instructions=2002)


def test_a_part_that_comes_often_is_still_read():
    betas = (0.9, 0.95)
    groups = [{"betas": betas, "params": [i], "axes": (i, ("rows", betas))} for i in range(2000)]
    value = {"groups": groups, ("expert", 3, ("up", "weight")): betas}
    assert read_pickle(pickle.dumps(value, protocol=2), where=Path("p")) == value


def test_damaged_archives_are_refused_or_read_alike(tmp_path):
    good = save(tmp_path / "good.pt", {"a": torch.arange(64.0), "b": [torch.ones(3, 4), "text"]})
    data, rng = good.read_bytes(), random.Random(0)
    bad = tmp_path / "bad.pt"
    for _ in range(150):
        cut = data[: rng.randrange(len(data))]
        bad.write_bytes(cut)
        with pytest.raises(CheckpointError, match=r"bad\.pt"):
            read_torch_file(bad)
    for _ in range(300):
        at = rng.randrange(len(data))
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.randrange(8)
        bad.write_bytes(flipped)
        refused = refusal(bad)
        if refused is not None:
            assert "bad.pt" in refused
            continue
        value = read_torch_file(bad).value
        # Accepted damage is only in a tensor's own values, or in bytes without meaning.
        assert value["b"][1] == "text" and value["a"].shape == (64,)


def test_links_compressed_records_and_old_files_are_refused(tmp_path):
    good = save(tmp_path / "good.pt", {"a": torch.ones(2)})
    link = tmp_path / "link.pt"
    link.symlink_to(good)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\2N.")
    old = tmp_path / "old.pt"
    torch.save({"a": torch.ones(2)}, old, _use_new_zipfile_serialization=False)
    twisted = tmp_path / "twisted.pt"
    torch.save(torch.ones(2, 3).T, twisted)
    empty = tmp_path / "empty.pt"
    empty.write_bytes(struct.pack("<4s18x", b"PK\5\6"))
    for path in (link, packed, old, twisted, empty, tmp_path / "missing.pt"):
        with pytest.raises(CheckpointError) as caught:
            read_torch_file(path)
        assert str(path) in str(caught.value)
    assert io.BytesIO(good.read_bytes()).read(2) == b"PK"
