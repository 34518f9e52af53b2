"""torch.distributed.checkpoint: torch reads ours, we read torch's, and no pickle runs code."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict import get_state_dict

from megagrow.checkpoint.containers.pickle_reader import read_pickle
from megagrow.checkpoint.convert.run import Job, convert, survey
from megagrow.checkpoint.formats.dcp.sink import digest, stored_name
from megagrow.errors import CheckpointError
from megagrow.state.layout import Layout
from megagrow.train.state import RunState
from tests.checkpoint.states import GQA, assert_same, contents, opened, save_model, to
from tests.checkpoint.worlds import random_box
from tests.toys import toy_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


MOMENTS = ("exp_avg", "exp_avg_sq")


def torch_loads(path, wanted):
    """The values of the same names and shapes, as torch loads them."""
    state = {name: torch.full_like(values, -1) for name, values in wanted.items()}
    dcp.load(state, checkpoint_id=str(path), no_dist=True)
    return state


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tensor=2, data=2, zero=1), Layout(data=3, zero=3)], ids=str
)
def test_torch_loads_ours(tmp_path, layout):
    path, state = save_model(tmp_path, toy_model(**GQA))
    target = to(path, tmp_path / "dcp", "dcp", layout=layout)
    assert len(list(target.glob("*.distcp"))) == layout.world
    wanted = {stored_name(*pair): values for pair, values in state.tensors.items()}
    found = torch_loads(target, wanted)
    assert all(torch.equal(found[name], values) for name, values in wanted.items())


def test_torch_loads_each_chunk_as_an_archive(tmp_path):
    """Not only by its own plan: each is a complete torch.save file, safe to load."""
    path, state = save_model(tmp_path)
    target = to(path, tmp_path / "dcp", "dcp", dtype=torch.bfloat16)
    metadata = pickle.loads((target / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        data = (target / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        values = torch.load(io.BytesIO(data), weights_only=True)
        name = "master" if ".state." not in index.fqn else index.fqn.rpartition(".")[2]
        tensor = index.fqn.removeprefix("optimizer.state.").removesuffix(f".{name}")
        assert torch.equal(values, state.tensors[tensor, name].bfloat16())


def torchs_own(path, *, moments=True):
    """A directory as another program writes it, including things that are not tensors."""
    torch.manual_seed(4)
    tensors = {
        "tok.weight": torch.randn(5, 3),
        "turned": torch.randn(4, 6).t(),
        "one": torch.ones(1),
    }
    state = dict(tensors)
    if moments:
        for name, values in tensors.items():
            state[f"optimizer.state.{name}.exp_avg"] = torch.randn(values.shape)
            state[f"optimizer.state.{name}.exp_avg_sq"] = torch.rand(values.shape)
    state |= {"optimizer.state.one.step": torch.tensor(3.0), "train_state.step": 3, "note": "text"}
    dcp.save(state, checkpoint_id=str(path), no_dist=True)
    return state


@pytest.mark.parametrize("moments", [True, False])
def test_torchs_own_is_read(tmp_path, moments):
    state = torchs_own(tmp_path / "dcp", moments=moments)
    found = contents(tmp_path / "dcp")
    assert {slot for _, slot in found} == (
        {"master", "exp_avg", "exp_avg_sq"} if moments else {"master"}
    )
    for pair, values in found.items():
        assert torch.equal(values, state[stored_name(*pair)]), pair
    native = to(tmp_path / "dcp", tmp_path / "native", "native", layout=Layout(data=2, zero=1))
    assert_same(contents(native), found, slots={slot for _, slot in found})
    left_out = {item.name for item in opened(tmp_path / "dcp").left_out}
    assert left_out >= {"train_state.step", "note"}
    assert ("optimizer.state.one.step" in left_out) == (not moments)


def test_moments_are_carried_tensor_by_tensor_and_what_is_missing_is_named(tmp_path):
    state = {f"t{i}": torch.randn(4, 3) for i in range(4)}
    for name in ("t0", "t1"):
        state |= {
            f"optimizer.state.{name}.exp_avg": torch.randn(4, 3),
            f"optimizer.state.{name}.exp_avg_sq": torch.rand(4, 3),
            f"optimizer.state.{name}.step": torch.tensor(5.0),
        }
    state["optimizer.state.t2.exp_avg"] = torch.randn(4, 3)  # alone it would make endless updates
    state["optimizer.state.t1.max_exp_avg_sq"] = torch.rand(4, 3)
    state["optimizer.state.t0.exp_avg_sq"] = torch.rand(3, 4)
    dcp.save(state, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    source = opened(tmp_path / "dcp")
    assert source.run_state == {"optimizer_step": 5}
    found = contents(tmp_path / "dcp")
    for slot in MOMENTS:
        assert torch.equal(found["t1", slot], state[f"optimizer.state.t1.{slot}"])
        assert not any(found[name, slot].any() for name in ("t0", "t2", "t3"))
    assert {item.name for item in source.left_out} == {
        "optimizer.state.t0.exp_avg",  # its second moment has another shape
        "optimizer.state.t0.exp_avg_sq",
        "optimizer.state.t1.max_exp_avg_sq",
        "optimizer.state.t2.exp_avg",
    }
    job = Job(tmp_path / "dcp", tmp_path / "native", "native", run_state=RunState().to_json())
    about = survey(job)
    assert about.made == tuple(f"{slot} of {t}" for slot in MOMENTS for t in ("t0", "t2", "t3"))
    assert about.left_out == source.left_out
    convert(job, verify=True)
    assert_same(contents(tmp_path / "native"), found)
    assert RunState.from_json(opened(tmp_path / "native").run_state).optimizer_step == 5


def test_counts_that_differ_are_named(tmp_path):
    state = {}
    for name, count in {"a": 3.0, "b": 5.0}.items():
        state |= {name: torch.ones(2), f"optimizer.state.{name}.step": torch.tensor(count)}
        state |= {f"optimizer.state.{name}.{slot}": torch.ones(2) for slot in MOMENTS}
    dcp.save(state, checkpoint_id=str(tmp_path), no_dist=True)
    source = opened(tmp_path)
    assert source.run_state == {"optimizer_step": 5}
    assert [item.name for item in source.left_out] == ["optimizer.state.a.step"]


@pytest.mark.parametrize("root", ["", "app."])
def test_a_model_beside_its_optimizer_has_the_optimizers_moments(tmp_path, root):
    """As in torch's tutorials: {"model": ..., "optim": ...}, alone or in a Stateful."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    parts = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    dcp.save({"app": parts} if root else parts, checkpoint_id=str(tmp_path), no_dist=True)
    source, found = opened(tmp_path), contents(tmp_path)
    assert source.run_state == {"optimizer_step": 1}
    for name, parameter in model.named_parameters():
        assert torch.equal(found[f"{root}model.{name}", "master"], parameter)
        for slot in MOMENTS:
            wanted = optimizer.state[parameter][slot]
            assert torch.equal(found[f"{root}model.{name}", slot], wanted)
    assert len(found) == 6
    assert any("param_groups" in item.name for item in source.left_out)


def test_a_name_that_ours_does_not_tell_of_is_refused(sound, tmp_path):
    copy = shutil.copytree(sound, tmp_path / "copy")
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    metadata.state_dict_metadata["more"] = metadata.state_dict_metadata["embedding.token"]
    for index, info in list(metadata.storage_data.items()):
        if index.fqn == "embedding.token":
            metadata.storage_data[MetadataIndex("more", index.offset, index.index)] = info
    data = pickle.dumps(metadata)
    (copy / ".metadata").write_bytes(data)
    ours = json.loads((copy / "megagrow.json").read_bytes())["body"]
    ours["metadata_sha256"] = hashlib.sha256(data).hexdigest()
    (copy / "megagrow.json").write_text(json.dumps({"sha256": digest(ours), "body": ours}))
    with pytest.raises(CheckpointError, match=r"tensor more: not listed in megagrow\.json"):
        opened(copy)


def test_megatrons_distributed_format_is_not_taken_for_it(tmp_path):
    """It also has a .metadata, but its names are Megatron's own."""
    step = tmp_path / "iter_0000100"
    torchs_own(step)
    torch.save({"iteration": 100}, step / "common.pt")
    (step / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    for path in (tmp_path, step):
        with pytest.raises(CheckpointError, match="has no `args`, so the model is unknown"):
            opened(path)


def test_boxes_of_what_torch_wrote(tmp_path):
    state = torchs_own(tmp_path / "dcp")
    source = opened(tmp_path / "dcp")
    rng = random.Random(2)
    for _ in range(50):
        name = rng.choice(["tok.weight", "turned"])
        box = random_box(tuple(state[name].shape), rng)
        assert torch.equal(source.read(name, "master", box), state[name][box.slices])


# --- damage -------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="sound")
def sound_directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("sound")
    path, _ = save_model(root)
    return to(path, root / "dcp", "dcp", layout=Layout(data=2, zero=1))


def read_all(path):
    found = contents(path)
    opened(path).verify()
    return found


def test_flips_and_truncations_are_refused_or_change_nothing(sound, tmp_path):
    """The bytes between an archive's records are never read: padding, version."""
    copy = shutil.copytree(sound, tmp_path / "copy")
    wanted = contents(copy)
    rng = random.Random(8)
    refused = 0
    for file in sorted(copy.iterdir()):
        data = file.read_bytes()
        for turn in range(60):
            place = rng.randrange(len(data))
            damaged = bytearray(data)
            damaged[place] ^= 1 << rng.randrange(8)
            file.write_bytes(data[:place] if turn % 2 else damaged)
            try:
                found = read_all(copy)
            except CheckpointError:
                refused += 1
            else:
                assert not turn % 2 and file.suffix == ".distcp"
                assert_same(found, wanted)
        file.write_bytes(data)
    assert refused >= 180  # of 240
    read_all(copy)


def test_a_flip_in_the_values_names_file_tensor_and_box(sound, tmp_path):
    copy = shutil.copytree(sound, tmp_path / "copy")
    (copy / "megagrow.checksums.json").unlink()  # what remains is finer: one of each chunk
    file = copy / "__1_0.distcp"
    data = bytearray(file.read_bytes())
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    index, info = next((i, s) for i, s in metadata.storage_data.items()
                       if s.relative_path == file.name and i.fqn.endswith("exp_avg"))  # fmt: skip
    values = opened(copy)
    end = info.offset + info.length
    held = [box for boxes in values._stored.values() for box in boxes if box.file == file.name]
    stored = next(box for box in held if info.offset < box.start < end)
    data[stored.start] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        contents(copy)
    for part in ("__1_0.distcp", stored.tensor, "slot exp_avg", str(stored.box)):
        assert part in str(error.value)
    assert index.fqn.endswith(f"{stored.tensor}.exp_avg")


def rewritten(sound, path, change):
    """A directory that counts as foreign, with a changed .metadata."""
    copy = shutil.copytree(sound, path)
    (copy / "megagrow.json").unlink()
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    change(metadata)
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    return copy


def first(metadata):
    return next(i for i in metadata.storage_data if i.fqn == "embedding.token")


def moved(**changes):
    def change(metadata):
        for name, value in changes.items():
            setattr(metadata.storage_data[first(metadata)], name, value)

    return change


def gap(metadata):
    del metadata.state_dict_metadata["embedding.token"].chunks[0]


def overlap(metadata):
    chunks = metadata.state_dict_metadata["embedding.token"].chunks
    chunks.append(chunks[0])


def lost(metadata):
    del metadata.storage_data[first(metadata)]


def wrong_dtype(metadata):
    metadata.state_dict_metadata["embedding.token"].properties.dtype = torch.float16


def wrong_size(metadata):
    metadata.state_dict_metadata["embedding.token"].size = torch.Size([99, 8])


def swapped(metadata):
    a = first(metadata)
    b = next(i for i in metadata.storage_data if i.fqn == "layers.0.mlp.up.weight")
    data = metadata.storage_data
    data[a], data[b] = data[b], data[a]


def twice(metadata):
    a = first(metadata)
    metadata.storage_data[MetadataIndex(a.fqn, a.offset, index=77)] = metadata.storage_data[a]
    # Equal to torch, which compares no index; a forged pickle can hold both.
    metadata.state_dict_metadata["embedding.token"].chunks *= 2


CHANGES = [
    moved(relative_path="../dcp/__0_0.distcp"),
    moved(relative_path="/etc/passwd"),
    moved(relative_path="__9_0.distcp"),
    moved(relative_path=".metadata"),
    moved(relative_path=""),
    moved(offset=1),
    moved(offset=-1),
    moved(offset=2**70),
    moved(offset="0"),
    moved(length=10),
    moved(length=0),
    moved(length=2**50),
    moved(transform_descriptors=["zstd"]),
    gap,
    overlap,
    lost,
    wrong_dtype,
    wrong_size,
    swapped,
    twice,
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_metadata_that_lies_is_refused(sound, tmp_path, number):
    copy = rewritten(sound, tmp_path / "copy", CHANGES[number])
    with pytest.raises(CheckpointError, match=str(copy)):
        contents(copy)


def test_ours_with_another_metadata_is_refused(sound, tmp_path):
    copy = shutil.copytree(sound, tmp_path / "copy")
    data = (copy / ".metadata").read_bytes()
    (copy / ".metadata").write_bytes(pickle.dumps(pickle.loads(data), protocol=3))
    with pytest.raises(CheckpointError, match="from another checkpoint"):
        contents(copy)


# --- hostile pickles ----------------------------------------------------------------------


class Runs:
    """Unpickles to a call."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def hostile(canary):
    yield "os.system", pickle.dumps(Runs(os.system, f"touch {canary}"))
    yield "builtins.exec", pickle.dumps(Runs(exec, f"open({str(canary)!r}, 'w')"))
    yield "builtins.eval", pickle.dumps({"storage_data": Runs(eval, f"open({str(canary)!r}, 'w')")})
    yield "builtins.getattr", b"\x80\x04cbuiltins\ngetattr\n(cos\nsystem\nX\x01\x00\x00\x00atR."
    yield "an old instruction", f"(S'touch {canary}'\nios\nsystem\n.".encode()
    yield "an old instruction with an object", f"(cos\nsystem\nS'touch {canary}'\no.".encode()
    yield "an extension", b"\x80\x02\x82\x01."
    yield "a huge memo", b"\x80\x02]r\xff\xff\xff\x7f."
    yield "a long text", b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b"x."
    yield "depth", b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b"."
    yield "nothing", b""
    yield "no end", b"\x80\x04]"
    yield "an empty stack", b"\x80\x04."
    yield "attributes of a name", b"\x80\x02ctorch\nSize\n}X\x01\x00\x00\x00aK\x01sb."
    yield "a call of a text", b"\x80\x02X\x01\x00\x00\x00a)R."
    yield "an object outside", b"\x80\x02K\x01Q."
    yield "dots", b"\x80\x04\x8c\x05torch\x8c\x0eos.path.exists\x93."
    yield "a reader of torch", pickle.dumps(Runs(torch.load, str(canary)))
    yield "plain", pickle.dumps({"state_dict_metadata": {}, "storage_data": {}})


@pytest.mark.parametrize("number", range(len(list(hostile("x")))))
def test_hostile_metadata_is_refused_and_nothing_runs(sound, tmp_path, number):
    canary = tmp_path / "canary"
    name, data = list(hostile(canary))[number]
    copy = shutil.copytree(sound, tmp_path / "copy")
    (copy / "megagrow.json").unlink()
    (copy / ".metadata").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        contents(copy)
    assert not canary.exists(), name


def test_hostile_tensors_are_refused_and_nothing_runs(tmp_path):
    canary = tmp_path / "canary"
    state = torchs_own(tmp_path / "dcp")
    assert state
    metadata = pickle.loads((tmp_path / "dcp/.metadata").read_bytes())
    info = next(s for i, s in metadata.storage_data.items() if i.fqn == "tok.weight")
    buffer = io.BytesIO()
    torch.save(Runs(os.system, f"touch {canary}"), buffer)
    file = tmp_path / "dcp" / info.relative_path
    info.offset, info.length = file.stat().st_size, len(buffer.getvalue())
    with open(file, "ab") as end:
        end.write(buffer.getvalue())
    (tmp_path / "dcp/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"tensor tok\.weight.*damaged or refused"):
        contents(tmp_path / "dcp")
    assert not canary.exists()


def test_random_pickles_end_in_a_value_or_a_refusal():
    rng = random.Random(11)
    known = [code for code in vars(pickle).values() if isinstance(code, bytes) and len(code) == 1]
    refused = 0
    for _ in range(3000):
        data = b"".join(rng.choice(known) for _ in range(rng.randrange(1, 12)))
        try:
            text = b"\x80\x02" + data + b"."
            read_pickle(text, where=Path("p"), names=frozenset({"torch.Size"}))
        except CheckpointError:
            refused += 1
    assert refused > 2000
