"""Hand-made manifests with a correct digest: refused by name, no code run."""

import json
import os
import shutil
import tracemalloc

import pytest

from megagrow.checkpoint import NativeCheckpoint
from megagrow.checkpoint.native import manifest
from megagrow.errors import CheckpointError
from tests.checkpoint.worlds import reseal, save_world


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_world(tmp_path_factory.mktemp("sound"), 40, world=2, seed=5)[0]


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / checkpoint.name)


def body_of(path):
    return json.loads((path / "manifest.json").read_bytes())["body"]


def refused(path, says):
    with pytest.raises(CheckpointError, match=says) as caught:
        NativeCheckpoint.open(path)
    assert "manifest.json" in str(caught.value) or "rank_" in str(caught.value)
    return str(caught.value)


def test_an_unchanged_body_resealed_is_read(copy):
    (copy / "manifest.json").write_bytes(reseal(body_of(copy)))
    NativeCheckpoint.open(copy).verify()


def entry(body, file=0, index=0):
    return body["files"][file]["entries"][index]


def big(body):
    """An entry for a box with more than one element."""
    return next(e for f in body["files"] for e in f["entries"] if max(e["shape"], default=1) > 1)


def assign(*path_and_value):
    *path, key, value = path_and_value

    def change(body):
        for part in path:
            body = body[part]
        body[key] = value

    return change


def in_entry(key, value, index=0):
    return assign("files", 0, "entries", index, key, value)


def twice(body):
    body["files"][0]["entries"].append(dict(entry(body)))


def overlapping_boxes(body):
    e = big(body)
    axis = next(a for a, n in enumerate(e["shape"]) if n > 1)
    e["shape"][axis] -= 1


def swapped_files(body):
    body["files"].reverse()


def one_dtype(body):
    e = next(e for e in body["files"][0]["entries"] if e["tensor"] == "up")
    e["dtype"] = "I32"


def shape_of_up(*shape):
    def change(body):
        tensor = next(t for t in body["catalog"] if t["name"] == "up")
        tensor["shape"] = list(shape)

    return change


def drop_tensor(body):
    body["catalog"] = [t for t in body["catalog"] if t["name"] != "up"]


def add_tensor(body):
    body["catalog"].append({**body["catalog"][1], "name": "extra"})


def add_slot(body):
    body["slots"].append({"name": "momentum", "kind": "first_moment"})


def no_files(body):
    body["files"] = []


HOSTILE = {
    "format": (assign("format", "other"), "not the manifest of a megagrow"),
    "version 2": (assign("version", 2), "version"),
    "version true": (assign("version", True), "version"),
    "version text": (assign("version", "1"), "version"),
    "unknown key": (assign("code", "import os"), "code"),
    "unknown key in an entry": (in_entry("code", 1), "code"),
    "step text": (assign("step", "40"), "step"),
    "step negative": (assign("step", -1), "step"),
    "step float": (assign("step", 40.5), "step"),
    "step true": (assign("step", True), "step"),
    "save id": (assign("save", "../../etc"), "save"),
    "save id of another save": (assign("save", "0" * 16), "rank_00000"),
    "world": (assign("world", 3), "missing or too many"),
    "world zero": (assign("world", 0), "world"),
    "no files": (no_files, "missing or too many"),
    "config list": (assign("config", []), "config"),
    "chunk of 0": (assign("chunk_bytes", 0), "chunk_bytes"),
    "chunk huge": (assign("chunk_bytes", 1 << 40), "chunk_bytes"),
    "chunk odd": (assign("chunk_bytes", 257), "chunk_bytes"),
    "name ../": (assign("files", 0, "name", "../rank_00000.safetensors"), "rank_00000"),
    "name absolute": (assign("files", 0, "name", "/etc/passwd"), "rank_00000"),
    "name NUL": (assign("files", 0, "name", "rank_00000.safetensors\0"), "rank_00000"),
    "name of another rank": (swapped_files, "rank_00000"),
    "size": (assign("files", 0, "size", 10), "size"),
    "size negative": (assign("files", 0, "size", -1), "size"),
    "size huge": (assign("files", 0, "size", 2**61), "size"),
    "no checksums": (assign("files", 0, "crc32", []), "number of checksums"),
    "checksum upper case": (assign("files", 0, "crc32", 0, "ABCDEF01"), "crc32"),
    "checksum with newline": (assign("files", 0, "crc32", 0, "abcdef01\n"), "crc32"),
    "start negative": (in_entry("start", -8), "start"),
    "start at the header": (in_entry("start", 0), "overlaps another or leaves a hole"),
    "start of the one before": (in_entry("start", 8, index=1), "overlaps another"),
    "start beyond the file": (in_entry("start", 2**40), "overlaps another or leaves a hole"),
    "start float": (in_entry("start", 8.0), "start"),
    "start true": (in_entry("start", True), "start"),
    "offset negative": (in_entry("offset", [-1]), "offset"),
    "offset text": (in_entry("offset", ["0"]), "offset"),
    "offset huge": (in_entry("offset", [2**61]), "outside the tensor"),
    "shape of zero": (in_entry("shape", [0]), "shape"),
    "shape huge": (in_entry("shape", [2**47] * 3), "outside the tensor"),
    "shape of many axes": (in_entry("shape", [1] * 100_000), "shape"),
    "axes disagree": (in_entry("shape", [1, 1, 1, 1, 1]), "outside the tensor"),
    "dtype unknown": (in_entry("dtype", "F8"), "element type"),
    "dtype an object": (in_entry("dtype", "O"), "element type"),
    "dtype of another width": (in_entry("dtype", "F64"), "overlaps another|size does not agree"),
    "dtype of one box": (one_dtype, "element types differ"),
    "tensor unknown": (in_entry("tensor", "w"), "tensor w.*not in the catalog"),
    "slot unknown": (in_entry("slot", "w"), "slot w.*not in the catalog"),
    "box twice": (twice, "comes twice"),
    "box smaller": (overlapping_boxes, "overlaps another or leaves a hole|size does not"),
    "tensor larger": (shape_of_up(14, 9), "tensor up.*a piece is missing"),
    "tensor smaller": (shape_of_up(12, 9), "tensor up.*outside the tensor"),
    "tensor of zero": (shape_of_up(0, 9), "shape"),
    "tensor with other axes": (shape_of_up(117), "catalog"),
    "tensor gone": (drop_tensor, "tensor up.*not in the catalog"),
    "tensor without boxes": (add_tensor, "tensor extra.*no box at all"),
    "slot without boxes": (add_slot, "slot momentum.*no box at all"),
    "no catalog": (assign("catalog", []), "catalog"),
    "tensor listed twice": (assign("catalog", 0, "name", "norm"), "catalog"),
    "slot listed twice": (assign("slots", 1, "name", "master"), "slots"),
    "init kind": (assign("catalog", 0, "init", "kind", "exec"), "init"),
    "layout": (assign("layout", "zero", 9), "layout"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_manifest(copy, case):
    change, says = HOSTILE[case]
    body = body_of(copy)
    change(body)
    (copy / "manifest.json").write_bytes(reseal(body))
    refused(copy, f"(?s){says}")


@pytest.mark.parametrize(
    ("boxes", "says"),
    [
        ([(0, 4), (3, 4)], r"overlap"),
        ([(0, 4), (2, 4)], r"overlap"),
        ([(0, 4), (5, 2)], r"a piece is missing"),
        ([(0, 4)], r"a piece is missing"),
        ([(0, 4), (4, 3), (0, 7)], r"overlap"),
    ],
)
def test_boxes_that_do_not_tile_in_files_that_are_sound(tmp_path, boxes, says):
    """Offsets, sizes and headers are consistent; only the boxes are wrong."""
    path, _ = save_world(tmp_path, 40, world=1)
    body = body_of(path)
    entries = body["files"][0]["entries"]
    old = next(e for e in entries if e["tensor"] == "norm")
    index = entries.index(old)
    entries[index : index + 1] = [{**old, "offset": [o], "shape": [n]} for o, n in boxes]
    _recompute(body)
    (path / "manifest.json").write_bytes(reseal(body))
    message = refused(path, says)
    assert f"tensor norm, slot {old['slot']}" in message
    assert "[0:4] in rank_00000.safetensors" in message


def test_bytes_that_belong_to_no_box(copy):
    body = body_of(copy)
    body["files"][1]["size"] += 1
    with open(copy / "rank_00001.safetensors", "ab") as stream:
        stream.write(b"x")
    (copy / "manifest.json").write_bytes(reseal(body))
    refused(copy, "rank_00001.*size does not agree with its boxes")


def _recompute(body):
    """Make starts, size and checksums consistent with the boxes again."""
    from megagrow.checkpoint.native.shard_file import Part, lay_out
    from megagrow.state.boxes import Box

    [file] = body["files"]
    entries = file["entries"]
    parts = [
        Part(e["tensor"], e["slot"], Box(tuple(e["offset"]), tuple(e["shape"])), e["dtype"])
        for e in entries
    ]
    plan = lay_out(parts, manifest.stamp(save=body["save"], step=body["step"], rank=0))
    for e, start in zip(entries, plan.starts, strict=True):
        e["start"] = start
    file["size"] = plan.size
    file["crc32"] = ["0" * 8] * -(-plan.size // body["chunk_bytes"])


def sound_json(copy, **more):
    return json.dumps({**body_of(copy), **more})


TEXTS = {
    "not JSON": (lambda text: text[:-1], "not valid JSON"),
    "a list": (lambda text: "[]", "not the manifest"),
    "nothing": (lambda text: "", "not valid JSON"),
    "null": (lambda text: "null", "not the manifest"),
    "NaN": (lambda text: text.replace('"step": 40', '"step": NaN'), "NaN"),
    "infinity": (lambda text: text.replace('"step": 40', '"step": -Infinity'), "Infinity"),
    "infinite exponent": (lambda text: text.replace('"step": 40', '"step": 1e999'), "out of range"),
    "endless number": (
        lambda text: text.replace('"step": 40', '"step": ' + "9" * 100_000),
        "100000 digits",
    ),
    "duplicate key": (lambda text: text.replace('"step": 40', '"step": 40, "step": 40'), "twice"),
    "duplicate key deep inside": (
        lambda text: text.replace('"family": "gpt2"', '"family": "gpt2", "family": "x"'),
        "'family' comes twice",
    ),
    "deep list": (
        lambda text: text.replace('"step": 40', '"step": ' + "[" * 200_000 + "]" * 200_000),
        "nested too deeply",
    ),
    "deep object": (
        lambda text: text.replace(
            '"step": 40', '"step": ' + '{"a":' * 200_000 + "1" + "}" * 200_000
        ),
        "nested too deeply",
    ),
    "not UTF-8": (lambda text: text.encode() + b"\xff", "not valid JSON"),
    "pickle": (lambda text: b"\x80\x04cos\nsystem\n(S'true'\ntR.", "not valid JSON"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_hostile_text(copy, case):
    change, says = TEXTS[case]
    text = change(sound_json(copy))
    body = text if isinstance(text, bytes) else text.encode()
    (copy / "manifest.json").write_bytes(reseal(body))
    refused(copy, f"(?s){says}")


def test_a_manifest_beyond_the_limit_is_not_even_read(copy):
    with open(copy / "manifest.json", "r+b") as stream:
        stream.truncate(manifest.BYTES_LIMIT + 1)  # sparse: no disk is used
    tracemalloc.start()
    try:
        refused(copy, "too long")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["manifest.json", "rank_00001.safetensors"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "directory"])
def test_only_regular_files_are_read(copy, name, kind):
    file = copy / name
    elsewhere = file.rename(copy.parent / "elsewhere")
    if kind == "link":
        file.symlink_to(elsewhere)
    elif kind == "dangling link":
        file.symlink_to("/nowhere")
    elif kind == "pipe":
        os.mkfifo(file)  # a plain open would block forever
    else:
        file.mkdir()
    with pytest.raises(CheckpointError, match=name):
        NativeCheckpoint.open(copy)


def test_a_pickle_in_place_of_a_shard_is_not_run(copy, tmp_path):
    mark = tmp_path / "ran"
    bomb = b"cposix\nsystem\n(S'touch " + os.fsencode(mark) + b"'\ntR."
    file = copy / "rank_00000.safetensors"
    file.write_bytes(bomb + bytes(file.stat().st_size - len(bomb)))
    refused(copy, "rank_00000")
    assert not mark.exists()
