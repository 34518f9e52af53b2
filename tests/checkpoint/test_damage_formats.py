"""At least 200 damaged checkpoints of every format: each refused by name, and no code run."""

import io
import itertools
import json
import os
import pickle
import random
import shutil
import struct
import zipfile

import pytest

from megagrow.checkpoint.convert.registry import FORMATS
from megagrow.checkpoint.convert.run import Job, convert
from megagrow.checkpoint.interface import sidecar_checksums as seal
from megagrow.errors import CheckpointError
from megagrow.state.layout import Layout
from tests.checkpoint.states import contents, opened, save_model, to
from tests.toys import toy_model

LAYOUT = Layout(tensor=2, data=2, zero=1)
PICKLED = ("deepspeed", "universal", "megatron", "dcp")


@pytest.fixture(scope="module", name="sound")
def sound_checkpoints(tmp_path_factory):
    """Exported checkpoints by format and run (two runs of one model, at the same step)."""
    root = tmp_path_factory.mktemp("sound")
    made = {}
    for run, fmt in itertools.product((0, 1), FORMATS):
        if fmt == "native":
            path, _ = save_model(root / f"run{run}", toy_model(layers=1), layout=LAYOUT, seed=run)
            made[fmt, run] = path
        else:
            made[fmt, run] = to(made["native", run], root / f"{fmt}{run}", fmt)
    return made


@pytest.fixture(name="copy")
def copied(sound, tmp_path, request):
    return shutil.copytree(sound[request.param, 0], tmp_path / sound[request.param, 0].name)


def files_of(path):
    """Files in which every byte counts: not tag names, not mere descriptions of a model."""
    small = {"latest", "latest_universal", "latest_checkpointed_iteration.txt", "config.json",
             "README.md"}  # fmt: skip
    return sorted(p for p in path.rglob("*") if p.is_file() and p.name not in small)


def refused(path, marker=None):
    """The text of the refusal; a damaged checkpoint must not be loaded."""
    with pytest.raises(CheckpointError) as error:
        opened(path).verify()
    text = str(error.value)
    assert str(path) in text, text
    assert marker is None or not marker.exists(), "code of a checkpoint was run"
    return text


@pytest.mark.parametrize(("copy", "fmt"), [(f, f) for f in FORMATS], indirect=["copy"])
def test_two_hundred_damaged_files(copy, fmt, sound, tmp_path):
    """Flipped bits, truncations, missing files, files of another run or another place."""
    rng = random.Random(fmt)
    files = files_of(copy)
    other = sound[fmt, 1]
    count = 0
    for number in range(150):
        file = files[number % len(files)]
        data = file.read_bytes()
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        refused(copy)
        file.write_bytes(data)
        count += 1
    for number in range(60):
        file = files[number % len(files)]
        data = file.read_bytes()
        file.write_bytes(data[: rng.choice([0, 1, len(data) - 1, rng.randrange(len(data))])])
        refused(copy)
        file.write_bytes(data)
        count += 1
    for file in files[:12]:
        data = file.read_bytes()
        foreign = (other / file.relative_to(copy)).read_bytes()
        for change in ("missing", "another run", "longer", "another place"):
            if change == "missing":
                if file.name == seal.NAME:
                    continue
                file.unlink()
            elif change == "another place":
                twins = [p for p in files if p != file and p.suffix == file.suffix]
                twin = next((p.read_bytes() for p in twins if p.read_bytes() != data), None)
                if twin is None:
                    continue
                file.write_bytes(twin)
            else:
                file.write_bytes(foreign if change == "another run" else data + b"x")
            if file.exists() and file.read_bytes() == data:
                continue  # the same in both runs
            refused(copy)
            file.write_bytes(data)
            count += 1
    assert count >= 200
    opened(copy).verify()
    # Converting a damaged checkpoint leaves nothing at the target.
    largest = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(CheckpointError):
        convert(Job(copy, tmp_path / "target", "dcp"), workers=1)
    assert not (tmp_path / "target").exists()


def bombs(marker):
    """Pickles that would leave a marker, in several ways."""

    class Call:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    made = pickle.dumps(Call(), protocol=2)
    path = str(marker).encode()
    yield made
    yield pickle.dumps({"module": {}, "args": Call()}, protocol=2)
    yield pickle.dumps([Call()] * 3, protocol=4)
    yield b"\x80\x02cos\nmkdir\nX" + struct.pack("<I", len(path)) + path + b"\x85R."
    yield b"(S'" + path + b"'\nios\nmkdir\n."
    yield b"\x80\x02cbuiltins\neval\nX\x04\x00\x00\x00exit\x85R."
    yield b"\x80\x02cbuiltins\ngetattr\ncos\n__dict__\n\x86R."
    yield b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R."
    yield b"\x80\x02ctorch\ndevice\n)\x81}X\x09\x00\x00\x00__class__cos\nsystem\nsb."
    yield b"\x80\x02" + b"]" * 100_000 + b"."
    yield b"\x80\x02\x8a\xff" + b"\xff" * 255 + b"."
    yield b"\x80\x02X\xff\xff\xff\x7f."


def with_pickle(data, text):
    """The archive with another data.pkl and a correct checksum."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            name = entry.filename
            new.writestr(name, text if name.endswith("/data.pkl") else old.read(entry))
    return made.getvalue()


@pytest.mark.parametrize(("copy", "fmt"), [(f, f) for f in PICKLED], indirect=["copy"])
def test_hostile_pickles(copy, fmt, tmp_path):
    """Without our checksums, as a forger would omit them."""
    for side in copy.rglob(seal.NAME):
        side.unlink()
    if fmt == "dcp":
        (copy / "megagrow.json").unlink()
        files = [copy / ".metadata"]
    else:
        read = ("fp32.pt", "exp_avg.pt") if fmt == "universal" else ()  # the rest has no values
        files = [p for p in files_of(copy) if p.suffix == ".pt" and (not read or p.name in read)]
        files = files[:3]
    marker = tmp_path / "ran"
    for file in files:
        data = file.read_bytes()
        for text in bombs(marker):
            file.write_bytes(text if fmt == "dcp" else with_pickle(data, text))
            refused(copy, marker)
        file.write_bytes(data)
    if fmt == "dcp":
        shard = copy / "__0_0.distcp"
        metadata = pickle.loads(files[0].read_bytes())
        info = next(i for i in metadata.storage_data.values() if i.relative_path == shard.name)
        data = shard.read_bytes()
        chunk = data[info.offset : info.offset + info.length]
        for text in bombs(marker):
            forged = with_pickle(chunk, text)
            if len(forged) <= info.length:
                padded = bytes(info.length - len(forged)) + forged  # a zip is found by its end
                shard.write_bytes(data.replace(chunk, padded))
                refused(copy, marker)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/../../b.safetensors", ".."])
def test_names_that_lead_outside(name, sound, tmp_path):
    hf = shutil.copytree(sound["huggingface", 0], tmp_path / "hf")
    (hf / seal.NAME).unlink()
    index = {"weight_map": {"transformer.wte.weight": name}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    (hf / "model.safetensors").unlink()
    refused(hf)
    made = shutil.copytree(sound["dcp", 0], tmp_path / "dcp")
    (made / seal.NAME).unlink()
    (made / "megagrow.json").unlink()
    metadata = pickle.loads((made / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = name
    (made / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(made)
    for fmt in ("deepspeed", "universal", "megatron"):
        copy = shutil.copytree(sound[fmt, 0], tmp_path / fmt)
        for latest in copy.glob("latest*"):
            latest.write_text(name)
        with pytest.raises(CheckpointError, match="no checkpoint"):
            opened(copy)


def test_a_forged_seal_is_refused(sound, tmp_path):
    for fmt in ("huggingface", "deepspeed", "dcp"):
        copy = shutil.copytree(sound[fmt, 0], tmp_path / fmt)
        [side] = copy.rglob(seal.NAME)
        content = json.loads(side.read_text())
        for change in ({"chunk_bytes": 1}, {"files": []}, {"files": {"../x": {"size": 1}}}, {}):
            side.write_text(json.dumps(content | change if change else []))
            assert seal.NAME in refused(copy)
        body = {"chunk_bytes": content["chunk_bytes"], "files": {}}
        side.write_text(json.dumps({"sha256": seal._digest(body), **body}))
        opened(copy)  # no checksums, so nothing to check
        name = next(iter(content["files"]))
        body["files"] = {name: {"size": 5, "crc32": ["00000000"]}}
        side.write_text(json.dumps({"sha256": seal._digest(body), **body}))
        refused(copy)


def test_the_values_are_those_that_were_saved(sound):
    for fmt in FORMATS:
        a, b = contents(sound[fmt, 0]), contents(sound["native", 0])
        assert all((a[key] == b[key]).all() for key in a), fmt
