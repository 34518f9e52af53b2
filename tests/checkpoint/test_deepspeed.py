"""DeepSpeed's checkpoints: read what its engine saves, write what its engine resumes from."""

import argparse
import itertools
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from megagrow.checkpoint.formats.deepspeed import names
from megagrow.checkpoint.formats.deepspeed import source as deepspeed
from megagrow.checkpoint.formats.deepspeed import universal_source as universal
from megagrow.errors import CheckpointError, ConfigError
from megagrow.models.catalog import build_catalog
from megagrow.state.boxes import whole
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.state.layout import Layout
from tests.checkpoint.foreign import WholeSource, differing, open_checkpoint, write_checkpoint
from tests.engine.plays import Job
from tests.ranks import run_ranks
from tests.toys import FAMILIES, random_state, toy_model, toy_models

FORMAT = deepspeed.FORMAT
LAYOUTS = [
    Layout(),
    Layout(data=2),
    Layout(data=3, zero=1),
    Layout(data=2, zero=2),
    Layout(data=3, zero=3),
    Layout(tensor=2),
    Layout(tensor=2, data=2, zero=1),
    Layout(tensor=2, data=3, zero=3),
    Layout(pipeline=2, data=2),
    Layout(pipeline=4, data=3, zero=1),
    Layout(pipeline=3, tensor=2, zero=1),
    Layout(pipeline=2, tensor=2, data=2),
]


def whole_source(model, **options):
    state = random_state(build_catalog(model), seed=5, dtype=torch.float32)
    return WholeSource(model, state, **options)


@pytest.mark.parametrize(
    ("name", "model"), list(toy_models()), ids=[name for name, _ in toy_models()]
)
def test_what_is_written_is_read_again_in_every_layout(name, model, tmp_path):
    source = whole_source(model)
    for number, layout in enumerate(LAYOUTS):
        back = open_checkpoint(
            FORMAT, write_checkpoint(FORMAT, source, tmp_path / str(number), layout)
        )
        back.verify()
        assert differing(source, back) is None, layout
        assert (back.layout, back.step) == (layout, source.step)
        assert back.config["model"] == source.config["model"]
        assert back.run_state == source.run_state and back.fingerprints == source.fingerprints


@pytest.mark.parametrize("family", FAMILIES)
def test_from_layout_to_layout(family, tmp_path):
    """Twelve pairs in a chain: what is read in one layout is written in the next."""
    source = first = whole_source(toy_model(family=family, tie_embeddings=family == "llama"))
    for number, layout in enumerate([*LAYOUTS, LAYOUTS[0]]):
        path = write_checkpoint(FORMAT, source, tmp_path / str(number), layout)
        source = open_checkpoint(FORMAT, path)
        assert source.layout == layout
        assert differing(first, source) is None, layout


def test_sixteen_bit_runs_keep_fp32_masters(tmp_path):
    for dtype, zero in itertools.product(("bf16", "fp16"), (0, 1, 3)):
        source = whole_source(toy_model(), config={"precision": {"dtype": dtype}})
        path = write_checkpoint(FORMAT, source, tmp_path / f"{dtype}{zero}", Layout(2, zero=zero))
        assert differing(source, open_checkpoint(FORMAT, path)) is None, (dtype, zero)
        assert any(f.name.startswith("bf16_") for f in path.rglob("*.pt")) == (
            dtype == "bf16" and zero > 0
        )


def test_the_model_is_reported_by_names_and_shapes_where_nothing_else_tells(tmp_path):
    source = whole_source(toy_model(family="gpt2"))
    source.config = {}  # makes the writer treat the model as foreign
    plain = open_checkpoint(FORMAT, write_checkpoint(FORMAT, source, tmp_path, Layout(2, zero=1)))
    assert differing(source, plain) is None
    with pytest.raises(ConfigError, match="not ours"):
        write_checkpoint(FORMAT, source, tmp_path / "cut", Layout(tensor=2))


def test_files_of_another_save_missing_and_damaged_ones_are_named(tmp_path):
    source = whole_source(toy_model())
    good = write_checkpoint(FORMAT, source, tmp_path / "good", Layout(2, tensor=2, zero=1))
    later = whole_source(toy_model(), step=8)
    other = write_checkpoint(FORMAT, later, tmp_path / "other", Layout(2, tensor=2, zero=1))
    tag = "global_step7"
    names = sorted(p.name for p in (good / tag).iterdir())
    assert len(names) == 2 + 4

    def refusal(change, name):
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        change(bad / tag / name)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(FORMAT, bad).verify()
        return str(caught.value)

    for name in names:
        missing = refusal(Path.unlink, name)
        assert "rank" in missing or name in missing
        cut = refusal(lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), name)
        assert name in cut
        size = (good / tag / name).stat().st_size
        for at in range(1000, size - 2000, max(1, size // 12)):

            def flip(path, at=at):
                data = bytearray(path.read_bytes())
                data[at] ^= 4
                path.write_bytes(data)

            # A byte between records is no one's; every other flip must be noticed.
            try:
                assert name in refusal(flip, name)
            except pytest.fail.Exception:
                still = open_checkpoint(FORMAT, tmp_path / "bad")
                assert differing(source, still) is None
    models = [name for name in names if "model_states" in name]
    swapped = refusal(lambda p: shutil.copy(other / "global_step8" / p.name, p), models[1])
    assert models[1] in swapped and "another save" in swapped


def test_latest_cannot_lead_outside(tmp_path):
    source = whole_source(toy_model())
    write_checkpoint(FORMAT, source, tmp_path / "a", Layout())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "latest").write_text("../a/global_step7")
    assert FORMAT.find(tmp_path / "b") is None
    assert FORMAT.find(tmp_path / "a") == tmp_path / "a" / "global_step7"


def test_zero_to_fp32_of_deepspeed_reads_it(tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for family, zero in itertools.product(FAMILIES, (1, 2, 3)):
        model = toy_model(family=family)
        source = whole_source(model)
        path = write_checkpoint(FORMAT, source, tmp_path / f"{family}{zero}", Layout(3, zero=zero))
        weights = get_fp32_state_dict_from_zero_checkpoint(str(path))
        last = model.layers + 1
        for tensor in source.catalog:
            for place in tensor.places:
                name = names.module_name(tensor.name, place, last, pipelined=False)
                expected = source._state.tensors[tensor.name, "master"]
                found = weights[name]
                assert torch.equal(found.contiguous() if zero == 3 else found, expected), name


@pytest.mark.parametrize("layout", [Layout(tensor=2, pipeline=2, data=2, zero=1),
                                    Layout(tensor=2, data=3, zero=2)], ids=str)  # fmt: skip
def test_ds_to_universal_of_deepspeed_reads_it(layout, tmp_path):
    from deepspeed.checkpoint.ds_to_universal import main

    source = whole_source(toy_model(family="llama", tie_embeddings=False))
    path = write_checkpoint(FORMAT, source, tmp_path / "d", layout)
    tag = tmp_path / "u" / "global_step7_universal"
    options = {"input_folder": str(path / "global_step7"), "output_folder": str(tag)}
    options |= {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    main(argparse.Namespace(**options, strict=True, inject_missing_state=False))
    assert differing(source, open_checkpoint(universal.FORMAT, tag)) is None


# --- real engines -------------------------------------------------------------------------


def save_and_go_on(comm, root, layouts, targets):
    """Train, save, compare; then resume from the sink's files in other layouts, in DeepSpeed."""
    answers = []
    for number, (family, layout) in enumerate(layouts):
        model = toy_model(init_std=0.2, family=family)
        job = Job(comm, model=model, layout=layout)
        job.train(2)
        saved = root / str(number)
        client = {"megagrow": {"config": {"model": model.model_dump(mode="json", by_alias=True)}}}
        job.engine._deepspeed.save_checkpoint(str(saved), client_state=client)
        source = open_checkpoint(FORMAT, saved)
        for shard in job.engine.placement.shards(comm.rank):
            for slot in ADAM_SLOTS:
                live = job.engine.state.read(shard.tensor, slot.name, shard.box)
                assert torch.equal(live, source.read(shard.tensor, slot.name, shard.box)), shard
        assert source.step == 2 and source.layout == layout
        job.train(2)
        expected = job.losses[2:]
        job.engine.close()
        for target in [layout, *targets[layout]]:
            there = root / f"{number}-{target.tensor}{target.pipeline}{target.zero}"
            if comm.rank == 0:
                write_checkpoint(FORMAT, source, there, target)
            comm.barrier()
            job = Job(comm, model=model, layout=target, fresh=False)
            job.engine._deepspeed.load_checkpoint(str(there))
            job.step = 2
            job.train(2)
            answers.append((layout, target, expected, job.losses))
            job.engine.close()
    return answers


def test_deepspeed_saves_what_we_read_and_goes_on_from_what_we_write(tmp_path):
    zero = [Layout(data=2, zero=z) for z in range(4)]
    tensor, pipeline = Layout(tensor=2, zero=1), Layout(pipeline=2, zero=1)
    flat_pipeline = Layout(pipeline=2)
    targets = {
        zero[0]: [zero[1]],
        zero[1]: [zero[2], tensor],
        zero[2]: [zero[0]],
        zero[3]: [pipeline],
        tensor: [zero[3]],
        pipeline: [zero[2]],
        flat_pipeline: [tensor],
    }
    families = itertools.cycle(FAMILIES)
    layouts = [(next(families), layout) for layout in targets]
    for answers in run_ranks(2, save_and_go_on, tmp_path, layouts, targets, timeout=300.0):
        for layout, target, expected, losses in answers:
            near = 0.0 if layout == target else 1e-5
            assert losses == pytest.approx(expected, rel=near, abs=0.0), (layout, target)


# --- models that are not ours -------------------------------------------------------------


def foreign_ranks(root, *, tensor):
    """A ZeRO 1 checkpoint as DeepSpeed writes it, of an unknown model; returns its tensors."""
    torch.manual_seed(3)
    parts = {
        "wte.weight": (torch.randn(10, 4), 0, 1), "h.0.ln.weight": (torch.randn(4), None, 1),
        "h.0.glu.weight": (torch.randn(8, 4), 0, 2), "h.0.down.weight": (torch.randn(4, 6), 1, 1),
    }  # fmt: skip
    tag = root / "global_step3"
    tag.mkdir(parents=True)
    (root / "latest").write_text("global_step3")
    for rank in range(tensor):
        mine = {}
        for name, (values, axis, blocks) in parts.items():
            if axis is None:
                mine[name] = values
                continue
            if name == "wte.weight":
                values = torch.cat([values, torch.zeros(2, 4)])  # padding
            pieces = [b.chunk(tensor, axis)[rank] for b in values.chunk(blocks, axis)]
            mine[name] = torch.cat(pieces, axis)
        flat = torch.cat([v.reshape(-1) for v in mine.values()])
        flat = torch.cat([flat, torch.zeros(-len(flat) % 4)])
        head = {
            "module": mine, "param_shapes": [{n: v.shape for n, v in mine.items()}],
            "buffer_names": [], "global_steps": 3, "dp_world_size": 2, "mp_world_size": tensor,
        }  # fmt: skip
        torch.save(head, tag / f"mp_rank_{rank:02d}_model_states.pt")
        for data, part in enumerate(flat.chunk(2)):
            state = {0: {"step": torch.tensor(3.0), "exp_avg": part * 2, "exp_avg_sq": part**2}}
            saved = {
                "zero_stage": 1, "single_partition_of_fp32_groups": [part.clone()],
                "base_optimizer_state": {"state": state, "param_groups": [{"params": [0]}]},
            }  # fmt: skip
            name = f"zero_pp_rank_{data}_mp_rank_{rank:02d}_optim_states.pt"
            torch.save({"optimizer_state_dict": saved}, tag / name)
    return {name: values for name, (values, _, _) in parts.items()}


MAPPING = r"""
tensors:
  - {match: wte\.weight, name: embedding, split: 0, length: 10}
  - {match: 'h\.(\d+)\.glu\.weight', name: 'blocks.{1+1}.glu', split: 0, parts: 2}
  - {match: 'h\.\d+\.down\.weight', split: 1}
  - {match: 'h\.\d+\.ln\.weight'}
"""
RENAMED = {"wte.weight": "embedding", "h.0.glu.weight": "blocks.1.glu"}


def test_a_model_that_is_not_ours_is_mapped(tmp_path):
    tensors = foreign_ranks(tmp_path, tensor=2)
    with pytest.raises(CheckpointError, match=r"an unknown model.*unknown way(.|\n)*mapping\.yaml"):
        open_checkpoint(FORMAT, tmp_path)
    (tmp_path / "megagrow.mapping.yaml").write_text(MAPPING)
    source = open_checkpoint(FORMAT, tmp_path)
    source.verify()
    assert source.slots == ADAM_SLOTS and source.step == 3
    for name, values in tensors.items():
        name = RENAMED.get(name, name)
        box = whole(source.catalog[name].shape)
        assert torch.equal(source.read(name, "master", box), values), name
        assert torch.equal(source.read(name, "exp_avg", box), values * 2), name
        assert torch.equal(source.read(name, "exp_avg_sq", box), values**2), name
    one = tmp_path / "one"
    tensors = foreign_ranks(one, tensor=1)  # without tensor parallelism no rule is needed
    assert torch.equal(
        open_checkpoint(FORMAT, one).read("h.0.ln.weight", "master", whole((4,))),
        tensors["h.0.ln.weight"],
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("  - {match: 'h\\.\\d+\\.ln\\.weight'}\n", ""), r"h\.0\.ln\.weight: no rule matches"),
        (("down", ".*"), "two rules match"),
        (("{1+1}", "{2}"), "does not fit its pattern"),
        (("split: 1", "split: 2"), "split 2"),
        (("length: 10", "length: 99"), "length 99"),
        (("parts: 2", "parts: 3"), "3 parts of"),
        (("parts: 2", "pieces: 2"), "pieces"),
        (("tensors:", "tensors: ["), "not valid"),
        (("split: 1", "split: 0"), "not stored exactly once|cut short|shape"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused_by_name(change, says, tmp_path):
    foreign_ranks(tmp_path, tensor=2)
    (tmp_path / "megagrow.mapping.yaml").write_text(MAPPING.replace(*change))
    if change == ("split: 1", "split: 0"):  # another full shape: undetectable
        source = open_checkpoint(FORMAT, tmp_path)
        assert source.catalog["h.0.down.weight"].shape == (8, 3)
        return
    with pytest.raises(CheckpointError, match=says) as error:
        open_checkpoint(FORMAT, tmp_path)
    assert "megagrow.mapping.yaml" in str(error.value)


def test_a_mapping_onto_a_model_of_ours(tmp_path):
    """Another program's names for one of our models: only the names must be given."""
    model = toy_model(family="llama", tie_embeddings=False)
    source = whole_source(model)
    path = write_checkpoint(FORMAT, source, tmp_path, Layout(2, tensor=2, zero=1))
    for file in (path / "global_step7").glob("*_model_states.pt"):
        head = torch.load(file, weights_only=False)
        del head["megagrow"]
        head["param_shapes"] = [
            {n.replace("layers.", "net."): s for n, s in g.items()} for g in head["param_shapes"]
        ]
        head["module"] = {n.replace("layers.", "net."): v for n, v in head["module"].items()}
        torch.save(head, file)
    with pytest.raises(CheckpointError, match="an unknown model"):
        open_checkpoint(FORMAT, path)
    last = model.layers + 1
    rules = [{"match": r"net\.0\.(.+)", "name": "embedding.{1}"}]
    rules += [{"match": rf"net\.{last}\.(.+)", "name": "{1}"}]
    rules += [{"match": rf"net\.([1-{model.layers}])\.(.+)", "name": "layers.{1-1}.{2}"}]
    mapping = {"model": model.model_dump(mode="json", by_alias=True), "tensors": rules}
    (path / "global_step7" / "megagrow.mapping.yaml").write_text(yaml.safe_dump(mapping))
    assert differing(source, open_checkpoint(FORMAT, path)) is None


def test_settings_that_no_shape_tells_are_said_to_be_assumed(tmp_path):
    """One of our models without its client state: read, but not as if its settings were known."""
    model = toy_model(family="mistral", window=3, rope_theta=5e5, tie_embeddings=False)
    source = whole_source(model)
    path = write_checkpoint(FORMAT, source, tmp_path, Layout(2, zero=1))
    assert "settings of the model" not in {i.name for i in open_checkpoint(FORMAT, path).left_out}
    for file in (path / "global_step7").glob("*_model_states.pt"):
        head = torch.load(file, weights_only=False)
        del head["megagrow"]
        torch.save(head, file)
    opened = open_checkpoint(FORMAT, path)
    [item] = [item for item in opened.left_out if item.name == "settings of the model"]
    assert "assumed norm_eps 1e-05" in item.reason and "rope_theta 10000.0" in item.reason
    assert opened.config["model"]["family"] == "llama"
