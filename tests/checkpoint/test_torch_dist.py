"""Megatron-Core's distributed checkpoints, written by Megatron-Core itself, are read."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from megagrow.checkpoint.convert.registry import detect
from megagrow.checkpoint.formats.megatron.source import FORMAT
from megagrow.checkpoint.interface.model_of import model_of
from megagrow.errors import CheckpointError
from megagrow.models.catalog import build_catalog
from megagrow.state.boxes import Box, whole
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.state.layout import Layout
from tests.checkpoint.foreign import WholeSource, write_checkpoint
from tests.jobs import REPOSITORY, command
from tests.toys import build, random_state, toy_model

pytest.importorskip("megatron.core")

KINDS = {
    "gpt2": {"family": "gpt2"},
    "untied": {"family": "llama", "tie_embeddings": False},
    "grouped": {"family": "llama", "heads": 4, "kv_heads": 2, "head_dim": 4},
}
# kind of model, kind of optimizer, numbered layers, ranks
CASES = [
    ("gpt2", "plain", "no", 1),
    ("untied", "fully_reshardable", "no", 1),
    ("untied", "dp_reshardable", "no", 1),
    ("grouped", "plain", "yes", 2),
]


def write(cases, world, home):
    """By case: (model, state, the directory that Megatron-Core wrote)."""
    made, words = {}, []
    for number, case in enumerate(cases):
        model = toy_model(**KINDS[case[0]])
        state = random_state(build_catalog(model), seed=3, dtype=torch.float32)
        classic = write_checkpoint(
            FORMAT, WholeSource(model, state), home / f"classic{number}", Layout(tensor=world)
        )
        saved = home / f"saved{number}"
        words += [str(classic / "iter_0000007"), str(saved / "iter_0000007"), *case[1:3]]
        made[case] = model, state, saved
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.checkpoint.torch_dist_client", *words],
            env={**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                 "RANK": str(rank), "WORLD_SIZE": str(world)},
            cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    for process in ranks:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0 and "saved" in out, err[-2000:]
    for _, _, saved in made.values():
        (saved / "latest_checkpointed_iteration.txt").write_text("7")
    return made


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Megatron-Core takes long to start, so one job writes all cases of its size."""
    made = {}

    def get(case):
        if case not in made:
            cases = [one for one in CASES if one[3] == case[3]]
            made.update(write(cases, case[3], tmp_path_factory.mktemp("torch_dist")))
        return made[case]

    return get


def open_it(path):
    found, at = detect(path)
    assert found.name == "megatron"
    return found.open_source(at)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[3]}")
def test_every_value_is_read_from_its_chunk(written, case):
    model, state, path = written(case)
    source = open_it(path)
    found = model_of(source)
    assert (found.layers, found.kv_groups, found.vocabulary) == (
        model.layers, model.kv_groups, model.vocabulary
    )  # fmt: skip
    moments = case[1] in ("plain", "fully_reshardable")
    assert [slot.name for slot in source.slots] == [
        slot.name for slot in (ADAM_SLOTS if moments else ADAM_SLOTS[:1])
    ]
    for tensor in source.catalog:
        for slot in source.slots:
            wanted = state.tensors[tensor.name, slot.name]
            values = source.read(tensor.name, slot.name, whole(tensor.shape))
            assert torch.equal(values, wanted), (tensor.name, slot.name)
            part = Box((1,) * len(tensor.shape), tuple(n - 1 for n in tensor.shape))
            if part.volume:
                got = source.read(tensor.name, slot.name, part)
                assert torch.equal(got, wanted[part.slices])
    assert source.step == 7 and source.run_state["optimizer_step"] == (1 if moments else 7)
    source.verify()
    left = {item.name: item.reason for item in source.left_out}
    padding = [name for name in left if name.startswith("rows 13 to")]
    assert padding and any("_extra_state" in name for name in left)
    assert source.layout.tensor == case[3]


def test_buckets_of_the_distributed_optimizer_are_named(written):
    source = open_it(written(CASES[2])[2])
    why = [item.reason for item in source.left_out if "bucket_idx" in item.name]
    assert why and all("dp_reshardable: flat buckets of one layout" in reason for reason in why)
    assert all("--dist-ckpt-optim-fully-reshardable" in reason for reason in why)


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=["untied", "grouped"])
def test_it_is_converted_to_a_model_of_transformers(written, case, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, state, path = written(case)
    words = ["--from", str(path), "--to", str(tmp_path / "out"), "--to-format", "huggingface"]
    assert command("convert").main(words) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.randint(0, model.vocabulary, (2, model.sequence))
    with torch.no_grad():
        wanted = build(model, state).logits(tokens)
        assert (theirs(tokens).logits - wanted).abs().max() < 1e-5


def copied(path, target):
    shutil.copytree(path, target)
    return target / "iter_0000007"


def test_damage_is_found(written, tmp_path):
    path = written(CASES[1])[2]
    step = copied(path, tmp_path / "short")
    with open(step / "__0_0.distcp", "r+b") as file:
        file.truncate(3000)
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        open_it(step)
    step = copied(path, tmp_path / "flipped")
    source = open_it(step)
    file, at = _place(source, "output.weight")
    with open(step / file, "r+b") as stream:
        stream.seek(at)
        stream.write(b"\xff\xff")
    with pytest.raises(CheckpointError, match=r"checksum|CRC"):
        open_it(step).verify()
    step = copied(path, tmp_path / "gone")
    (step / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"common\.pt"):
        open_it(step)


def _place(source, tensor):
    stored = [one for boxes in source._stored.values() for one in boxes if one.tensor == tensor]
    return stored[0].file, stored[0].start


@pytest.mark.parametrize("backend", ["zarr", "fsdp_dtensor"])
def test_other_backends_are_refused_by_name(written, tmp_path, backend):
    step = copied(written(CASES[0])[2], tmp_path / "other")
    (step / "metadata.json").write_text(json.dumps({"sharded_backend": backend}))
    with pytest.raises(CheckpointError, match=f"sharded_backend '{backend}'"):
        open_it(step)


def test_no_code_of_it_runs(written, tmp_path):
    step = copied(written(CASES[0])[2], tmp_path / "hostile")

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"args": Hostile()}, step / "common.pt")
    with pytest.raises(CheckpointError, match="refused"):
        open_it(step)
    assert not (tmp_path / "ran").exists()
