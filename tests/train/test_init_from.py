"""Runs that start from a checkpoint: `init.from`, the growth at step 0, what is refused."""

import copy
import json
import re
import shutil

import pytest
import torch
import transformers

from megagrow.checkpoint import NativeCheckpoint, newest
from megagrow.checkpoint.convert.run import Job, convert
from megagrow.checkpoint.interface.model_of import model_of
from megagrow.config import StartConfig
from megagrow.data.dataset import open_dataset
from megagrow.data.sampler import SampleIndex
from megagrow.growth.optimizer_rules import OptimizerRules, group_keys
from megagrow.report.log import read_metrics
from megagrow.state.boxes import whole
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from megagrow.train.init_from import open_start
from megagrow.transfer.execute import transfer_from_storage
from megagrow.transfer.state_map import Identity, WeightsAlone
from megagrow.transfer.whole_state import MemoryState
from tests.jobs import (
    REPOSITORY,
    command,
    events,
    launch,
    log_of,
    main,
    settings,
    train,
    trajectory,
    write_config,
)
from tests.train.released import run_from, save_released, their_loss

FAMILIES = ("llama-3.2", "qwen3", "pythia")
DEEPER = {"operator": "depth_identity", "target": {"layers": 3}}
WIDER = {
    "llama-3.2": {"hidden": 48, "heads": 8, "kv_heads": 4, "ffn": 60},
    "qwen3": {"hidden": 36, "ffn": 60},
    "pythia": {"hidden": 48, "heads": 6, "ffn": 60},
}
BOTH = "depth_identity+width_fresh"
LAYOUTS = {"tensor": {"tensor": 2, "zero": 0}, "data": {"zero": 1}}


@pytest.fixture(scope="module")
def models(tmp_path_factory, dataset):
    """By name: (directory with the tokenizer of the data, transformers' validation loss)."""
    home = tmp_path_factory.mktemp("released")
    paths = {name: save_released(home / name, name, dataset) for name in (*FAMILIES, "gpt2")}
    return {name: (path, their_loss(path, dataset)) for name, path in paths.items()}


def first_loss(lines):
    return events(lines, "validation")[0]["val_loss"]


def grown(name, operator):
    target = WIDER[name] if "width" in operator else {}
    deeper = DEEPER["target"] if "depth" in operator else {}
    return [{"grow": {"operator": operator, "target": {**target, **deeper}}, "until": {"steps": 2}}]


def configurations(models, dataset, home, layout, growths):
    """Configurations of runs of two steps, by (family, growth)."""
    made = {}
    for name in FAMILIES:
        for growth in growths:
            stages = grown(name, growth) if growth else [{"until": {"steps": 2}}]
            run = run_from(
                models[name][0], dataset, home / f"{name}-{growth}", stages=stages, layout=layout,
                schedule={"warmup": 1}, checkpoint={"every": 100},
            )  # fmt: skip
            made[name, growth] = write_config(home / f"{name}-{growth}.yaml", run)
    return made


@pytest.fixture(scope="module")
def alone(models, dataset, tmp_path_factory):
    """Logs of runs in one process, by (family, growth)."""
    home = tmp_path_factory.mktemp("alone")
    growths = (None, "depth_identity", "width_fresh", BOTH)
    made = configurations(models, dataset, home, {"zero": 1}, growths)
    jobs = launch(1, *(["--config", path] for path in made.values()))
    assert not (bad := [o.err[-900:] for [o] in jobs if o.status]), bad
    said = {key: outcome.err for key, [outcome] in zip(made, jobs, strict=True)}
    return {key: (log_of(path), said[key], path) for key, path in made.items()}


def test_the_first_loss_is_that_of_transformers(alone, models):
    for (name, growth), (lines, _, _) in alone.items():
        assert abs(first_loss(lines) - models[name][1]) <= 1e-5, (name, growth)
        assert len(events(lines, "step")) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_start_the_same(alone, models, dataset, tmp_path, layout):
    made = configurations(models, dataset, tmp_path, LAYOUTS[layout], (None, BOTH))
    jobs = launch(2, *(["--config", path] for path in made.values()))
    assert not (bad := [o.err[-900:] for job in jobs for o in job if o.status]), bad
    for key, path in made.items():
        lines = log_of(path)
        assert abs(first_loss(lines) - models[key[0]][1]) <= 1e-5, key
        for ours, theirs in zip(events(lines, "step"), events(alone[key][0], "step"), strict=True):
            assert abs(ours["loss"] - theirs["loss"]) <= 1e-4, key


def test_the_start_is_told_and_recorded(alone, models, capsys):
    lines, said, config = alone["qwen3", BOTH]
    path = models["qwen3"][0]
    assert f"start: from {path} (huggingface, step 0" in said
    assert "that of the data is the checkpoint's, by its SHA-256" in said
    assert f"growth at step 0: {BOTH} to layers 3, hidden 36, ffn 60" in said
    assert "the checkpoint has none; the learning rate warms up over 1 steps" in said
    [start] = events(lines, "run_start")
    checkpoint = NativeCheckpoint.open(newest(config.with_suffix("") / "checkpoints"))
    for record in (start["init"], checkpoint.run_state["origin"]):
        assert record["path"] == str(path) and record["format"] == "huggingface"
        assert len(record["sha256"]) == 64 and not record["moments"]
    model = model_of(checkpoint)
    assert (model.layers, model.hidden, model.family) == (3, 36, "qwen3")
    assert checkpoint.config["init"]["from"] == str(path)
    assert command("inspect").main([str(checkpoint.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    [started] = [line for line in lines if line.startswith("started ")]
    assert f"path {path}," in started and "format huggingface" in started


def test_a_dry_run_tells_what_would_be_started_from(models, dataset, tmp_path):
    run = run_from(models["pythia"][0], dataset, tmp_path / "run", stages=grown("pythia", BOTH))
    outcome = main(["--config", write_config(tmp_path / "run.yaml", run), "--dry-run"])
    assert outcome.status == 0, outcome.err
    assert "start: from" in outcome.out and "gpt_neox" in outcome.out
    assert "grows by    depth_identity+width_fresh" in outcome.out
    assert "init std" not in outcome.out and not (tmp_path / "run").exists()


def test_a_run_resumes_bit_identically_without_its_source(models, dataset, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(models["llama-3.2"][0], source)
    stages = grown("llama-3.2", BOTH)
    stages[0]["until"]["steps"] = 3
    stages.append({"grow": {"operator": "depth_stack", "factor": 2}, "until": {"steps": 6}})
    config = write_config(
        tmp_path / "run.yaml", run_from(source, dataset, tmp_path / "run", stages=stages)
    )
    whole_run = trajectory(train(1, config, f"run.dir={tmp_path / 'whole'}"))
    train(1, config, "train.stop_after_steps=2")
    shutil.rmtree(source)
    assert trajectory(train(1, config, "train.stop_after_steps=4")) == whole_run[:4]
    assert trajectory(train(1, config)) == whole_run
    over = main(["--config", config])
    assert over.status == 0, over.err
    # What is written to the run's directory is a configuration as well.
    assert main(["--config", tmp_path / "run/config.yaml", "--dry-run"]).status == 0
    fresh = main(["--config", config, f"run.dir={tmp_path / 'other'}"])
    assert fresh.status == 1 and f"init.from: {source}: no checkpoint" in fresh.err
    checkpoint = NativeCheckpoint.open(newest(tmp_path / "run/checkpoints"))
    assert model_of(checkpoint).layers == 6


class _Counting:
    """A source that counts the elements that are read of it."""

    def __init__(self, source):
        self.source, self.count = source, 0

    def dtype(self, tensor, slot):
        return self.source.dtype(tensor, slot)

    def read(self, tensor, slot, box, *, out=None):
        self.count += box.volume
        return self.source.read(tensor, slot, box, out=out)


@pytest.mark.parametrize("layout", [Layout(data=4, zero=3), Layout(tensor=2, pipeline=2)])
def test_each_rank_reads_its_own_part(models, layout):
    _, source = open_start(StartConfig(from_=str(models["pythia"][0])))
    catalog = source.catalog
    placement = Placement(catalog, layout, group_keys(catalog, OptimizerRules()))
    state, counts = MemoryState.empty(catalog, ADAM_SLOTS), []
    for rank in range(4):
        counting = _Counting(source)
        transfer_from_storage(
            state_map=WeightsAlone(Identity(catalog)), old=counting, locator=source, new=state,
            new_placement=placement, slots=ADAM_SLOTS, rank=rank, seed=0, staging_bytes=1 << 16,
        )  # fmt: skip
        counts.append(counting.count)
        assert counting.count == sum(shard.box.volume for shard in placement.shards(rank))
    assert max(counts) < 0.6 * catalog.parameters
    for tensor in catalog:
        wanted = source.read(tensor.name, "master", whole(tensor.shape))
        assert torch.equal(state.tensors[tensor.name, "master"], wanted)
        assert not state.tensors[tensor.name, "exp_avg"].any()


# --- moments ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(models, dataset, tmp_path_factory):
    """A run of six steps from a model, which has moments: (its directory, its configuration)."""
    home = tmp_path_factory.mktemp("trained")
    run = run_from(
        models["qwen3"][0], dataset, home / "run", stages=[{"until": {"steps": 6}}],
        optimizer={"lr": 0.01, "betas": [0.5, 0.6]},
    )  # fmt: skip
    train(1, write_config(home / "run.yaml", run))
    return home / "run", run


def state_at(run_dir):
    checkpoint = NativeCheckpoint.open(newest(run_dir / "checkpoints"))
    return checkpoint, {
        (tensor.name, slot.name): checkpoint.read(tensor.name, slot.name, whole(tensor.shape))
        for tensor in checkpoint.catalog
        for slot in checkpoint.slots
    }


STILL = {"schedule": {"name": "constant", "warmup": 0}, "train": {"stop_after_steps": 1}}


def first_state(source, dataset, run_dir, **changes):
    """The state after a step that changes nothing but the moments: its gradient is clipped to 0."""
    optimizer = {"lr": 1e-30, "betas": [0.5, 0.6], "grad_clip": 1e-30, "weight_decay": 0.0}
    given = {**STILL, "optimizer": {**optimizer, **changes.pop("optimizer", {})}, **changes}
    config = write_config(run_dir.with_suffix(".yaml"), run_from(source, dataset, run_dir, **given))
    lines = train(1, config)
    return lines, *state_at(run_dir)


def test_moments_and_step_count_are_those_of_a_native_checkpoint(trained, dataset, tmp_path):
    source, before = state_at(trained[0])
    lines, checkpoint, after = first_state(trained[0], dataset, tmp_path / "run")
    assert events(lines, "run_start")[0]["init"]["moments"]
    assert checkpoint.run_state["optimizer_step"] == source.run_state["optimizer_step"] + 1 == 7
    assert checkpoint.step == 1 and checkpoint.run_state["consumed_samples"] == 8
    decay = {"master": 1.0, "exp_avg": 0.5, "exp_avg_sq": 0.6}
    for (tensor, slot), values in before.items():
        wanted, found = values * decay[slot], after[tensor, slot]
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-12), (tensor, slot)
    assert any(values.abs().max() > 1e-3 for (_, s), values in before.items() if s == "exp_avg")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init": {"moments": "reset"}}, "init.moments: reset"),
        ({"optimizer": {"name": "lion"}}, "(exp_avg, exp_avg_sq) are not those of lion"),
        ({"optimizer": {"betas": [0.9, 0.99]}}, "would be wrong under [0.9, 0.99]"),
    ],
)
def test_moments_that_do_not_fit_are_reset_and_that_is_said(
    trained, dataset, tmp_path, capsys, changes, said
):
    config = write_config(
        tmp_path / "run.yaml", run_from(trained[0], dataset, tmp_path / "run", **changes)
    )
    outcome = main(["--config", config, "--dry-run"])
    assert outcome.status == 0, outcome.err
    assert said in outcome.out and "its moments at zero" in outcome.out


def test_a_growth_at_step_0_takes_the_moments_along(trained, dataset, tmp_path):
    """As a growth after the first stage of no steps does, and as an offline one."""
    run = run_from(trained[0], dataset, tmp_path / "a", stages=grown("qwen3", "width_fresh"))
    at_once = train(1, write_config(tmp_path / "a.yaml", run))
    stages = [{"until": {"steps": 0}}, *grown("qwen3", "width_fresh")]
    run = run_from(trained[0], dataset, tmp_path / "b", stages=stages)
    later = train(1, write_config(tmp_path / "b.yaml", run))
    ours, theirs = trajectory(at_once), trajectory(later)
    assert [line[:6] for line in ours] == [line[:6] for line in theirs]


def test_an_import_of_weights_counts_no_update(models, dataset, tmp_path):
    path = models["qwen3"][0]
    convert(Job(path, tmp_path / "native", "native"))
    run = run_from(tmp_path / "native", dataset, tmp_path / "run")
    outcome = main(["--config", write_config(tmp_path / "run.yaml", run), "--dry-run"])
    assert outcome.status == 0, outcome.err
    assert "its moments at zero: the checkpoint counts no update" in outcome.out


def test_a_run_from_elsewhere_is_not_what_a_conversion_is_for(models, dataset, tmp_path, capsys):
    run = run_from(models["qwen3"][0], dataset, tmp_path / "run")
    config = write_config(tmp_path / "run.yaml", run)
    options = ["--to", tmp_path / "native", "--to-format", "native", "--config", config]
    words = [str(word) for word in ("--from", models["qwen3"][0], *options)]
    assert command("convert").main(words) == 1
    assert "init.from says where the run starts" in capsys.readouterr().err


LARGE = {"pipeline": {"pipeline": 2, "zero": 1}, "zero 3": {"zero": 3}}


@pytest.mark.parametrize("layout", LARGE)
def test_moments_in_other_layouts(trained, dataset, tmp_path, layout):
    """Two processes with pipeline 2 or ZeRO 3, from one's checkpoint: the same steps."""
    losses = []
    for world, of in ((1, {"zero": 1}), (2, LARGE[layout])):
        run = run_from(
            trained[0], dataset, tmp_path / f"{world}", layout=of, stages=grown("qwen3", BOTH),
            optimizer={"lr": 0.01, "betas": [0.5, 0.6]}, batch={"global": 8, "micro": 2},
        )  # fmt: skip
        lines = train(world, write_config(tmp_path / f"{world}.yaml", run))
        losses.append([first_loss(lines), *(step["loss"] for step in events(lines, "step"))])
        assert events(lines, "run_start")[0]["init"]["moments"]
    assert torch.allclose(*map(torch.tensor, losses), atol=1e-4)


@pytest.mark.parametrize("form", ["dcp", "deepspeed", "universal", "megatron"])
def test_other_formats(trained, dataset, tmp_path, form):
    path = trained[0]
    if form == "megatron":  # qwen3's norms of queries and keys have no place in it
        run = settings(dataset, tmp_path / "old", stages=[{"until": {"steps": 2}}])
        train(1, write_config(tmp_path / "old.yaml", run))
        path = tmp_path / "old"
    source, before = state_at(path)
    made = tmp_path / "made"
    convert(Job(newest(path / "checkpoints"), made, form))
    betas = {"optimizer": {"betas": list(source.config["optimizer"]["betas"])}}
    lines, _, after = first_state(made, dataset, tmp_path / "run", **betas)
    said = dict(events(lines, "run_start")[0]["init"])
    said.pop("history")  # of the source, for the model card of an export
    assert said | {"sha256": ""} == {
        "path": said["path"],
        "format": form, "step": source.step, "sha256": "", "moments": True,
    }  # fmt: skip
    for (tensor, slot), values in before.items():
        if slot == "master":
            assert torch.equal(after[tensor, slot], values), tensor


# --- the model section -----------------------------------------------------------------------


def refused(config, *arguments):
    outcome = main(["--config", config, *arguments])
    assert outcome.status == 1, outcome.out
    return outcome.err


def test_settings_of_training_may_be_given(models, dataset, tmp_path):
    path = models["gpt2"][0]
    model = {"sequence": 8, "activation_checkpointing": "full", "heads": 4, "layers": 2}
    run = run_from(path, dataset, tmp_path / "run", model=model)
    lines = train(1, write_config(tmp_path / "run.yaml", run))
    wanted = their_loss(path, dataset, sequence=8)
    assert abs(first_loss(lines) - wanted) <= 1e-5
    checkpoint, _ = state_at(tmp_path / "run")
    assert model_of(checkpoint).sequence == 8
    assert any(tensor.shape[0] == 8 and tensor.role == "position" for tensor in checkpoint.catalog)


@pytest.mark.parametrize(
    ("model", "wrong"),
    [
        ({"layers": 3}, "model.layers: is not that of init.from"),
        ({"hidden": 32}, "model.hidden: is not that of init.from"),
        ({"kv_heads": 2}, "model.kv_heads: is not that of init.from"),
        ({"family": "llama"}, "model.family: is not that of init.from"),
        ({"tie_embeddings": False}, "model.tie_embeddings: is not that"),
        ({"vocab": 500}, "model.vocab: is not that of init.from"),
        ({"sequence": 32}, "model.sequence: longer than the learned positions"),
        ({"depth": 3}, "model.depth: unknown key"),
        ({"dropout": 2.0}, "model.dropout"),
    ],
)
def test_another_model_is_refused_by_name(models, dataset, tmp_path, model, wrong):
    run = run_from(models["gpt2"][0], dataset, tmp_path / "run", model=model)
    assert wrong in refused(write_config(tmp_path / "run.yaml", run))


def test_another_tokenizer_is_refused(models, dataset, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(models["qwen3"][0], source)
    [file] = source.glob("tokenizer.*")
    file.write_bytes(file.read_bytes() + b"\n")
    config = write_config(tmp_path / "run.yaml", run_from(source, dataset, tmp_path / "run"))
    for more in ([], ["--dry-run"]):
        error = refused(config, *more)
        assert "trained with another tokenizer" in error
        assert "launch/prepare_data.py --tokenizer" in error
        assert "init.allow_other_tokenizer=true takes the other" in error
    given = main(["--config", config, "--dry-run", "init.allow_other_tokenizer=true"])
    assert given.status == 0, given.err
    assert "not compared (init.allow_other_tokenizer)" in given.out


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [(400, "does not hold its tokenizer"), (300, "smaller than the tokenizer's vocabulary")],
)
def test_an_unknown_tokenizer_of_another_size_is_refused(dataset, tmp_path, rows, wrong):
    source = save_released(tmp_path / "source", "llama-3.2", vocab_size=rows)
    config = write_config(tmp_path / "run.yaml", run_from(source, dataset, tmp_path / "run"))
    error = refused(config)
    assert wrong in error and "launch/prepare_data.py --tokenizer" in error


def test_what_cannot_be_a_start_is_refused(models, trained, dataset, tmp_path):
    def config(**changes):
        path = changes.pop("path", models["qwen3"][0])
        run = run_from(path, dataset, tmp_path / "run", **changes)
        return write_config(tmp_path / "run.yaml", run)

    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/model.safetensors").write_bytes(b"")
    assert "no checkpoint of a known format" in refused(config(path=str(tmp_path / "odd")))
    assert "init.from: nowhere: no checkpoint" in refused(config(path="nowhere"))
    assert "no checkpoint of format dcp" in refused(config(init={"format": "dcp"}))
    assert "init.moments" in refused(config(init={"moments": "some"}))
    ligo = [{"grow": {"operator": "ligo", "factor": 2}, "until": {"steps": 3}}]
    assert "stages[0].grow.operator: ligo is fitted" in refused(config(stages=ligo))
    restart = grown("qwen3", "width_fresh")
    restart[0]["grow"]["restart"] = 2.0
    assert "stages[0].grow.restart" in refused(config(stages=restart))
    planned = [{"until": {"planned": True}}, *grown("qwen3", "width_fresh")]
    assert "until.planned: the law is of training from scratch" in refused(config(stages=planned))
    # A run that did not start from a checkpoint goes on without it.
    plain = settings(dataset, tmp_path / "plain", stages=[{"until": {"steps": 2}}])
    train(1, write_config(tmp_path / "plain.yaml", plain))
    assert "did not start from another checkpoint" in refused(
        config(), f"run.dir={tmp_path / 'plain'}"
    )
    # A growth of a run without init is what it was.
    plain["stages"] = grown("qwen3", "width_fresh")
    assert "stages[0].grow: the first stage starts from fresh weights" in refused(
        write_config(tmp_path / "plain.yaml", plain)
    )


def test_new_units_under_a_mask_are_no_start(trained, dataset, tmp_path):
    ramped = [{"grow": {"operator": "width_random", "factor": 2, "ramp": 4}, "until": {"steps": 5}}]
    run = run_from(trained[0], dataset, tmp_path / "run", stages=ramped)
    config = write_config(tmp_path / "run.yaml", run)
    train(1, config, "train.stop_after_steps=2")
    again = run_from(tmp_path / "run", dataset, tmp_path / "again")
    assert "count in part only, by a mask" in refused(write_config(tmp_path / "b.yaml", again))


def test_a_damaged_source_is_refused(models, dataset, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(models["qwen3"][0], source)
    settings_of = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings_of | {"num_hidden_layers": 3}))
    config = write_config(tmp_path / "run.yaml", run_from(source, dataset, tmp_path / "run"))
    assert "is missing" in refused(config)


SOLAR = REPOSITORY / "configs" / "open" / "solar_10.7b.yaml"


def test_solar_is_two_copies_without_8_layers_each(dataset, tmp_path):
    """The shipped configuration on 32 tiny layers: the loss of the published stacking."""
    source = save_released(tmp_path / "source", "llama-3.2", dataset, num_hidden_layers=32)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    layers = model.model.layers
    stacked = [copy.deepcopy(layer) for layer in (*layers[:24], *layers[8:])]
    for index, layer in enumerate(stacked):
        layer.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(stacked)
    model.config.num_hidden_layers = 48
    model.save_pretrained(tmp_path / "stacked")
    small = [
        f"run.dir={tmp_path / 'run'}", f"init.from={source}", f"data.path={dataset}",
        "model={sequence: 16}", "layout={}", "precision={}", "batch={global: 2, micro: 2}",
        "stages.0.until={steps: 1}", "schedule.warmup=0", "train.validation_samples=10",
        "train.tensorboard=false",
    ]  # fmt: skip
    [[outcome]] = launch(1, ["--config", SOLAR, *small])
    assert outcome.status == 0, outcome.err
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert abs(first_loss(lines) - their_loss(tmp_path / "stacked", dataset)) <= 1e-5


LLAMA_PRO = REPOSITORY / "configs" / "open" / "llama_pro_8b.yaml"


def expanded(model, groups):
    """The published block expansion: after each group of layers a copy of its last, silent."""
    layers, every = model.model.layers, len(model.model.layers) // groups
    found, new = [], []
    for index, layer in enumerate(layers):
        found.append(layer)
        if (index + 1) % every == 0:
            added = copy.deepcopy(layer)
            torch.nn.init.zeros_(added.self_attn.o_proj.weight)
            torch.nn.init.zeros_(added.mlp.down_proj.weight)
            new.append(len(found))
            found.append(added)
    for index, layer in enumerate(found):
        layer.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(found)
    model.config.num_hidden_layers = len(found)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for index in new:
        model.model.layers[index].requires_grad_(True)
    return model, new


def test_llama_pro_is_the_published_procedure(dataset, tmp_path):
    """The shipped configuration on 32 tiny layers, against a loop of PyTorch over transformers."""
    steps, lr, size = 6, 0.02, 4
    source = save_released(tmp_path / "source", "llama-3.2", dataset, num_hidden_layers=32)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, attn_implementation="eager", dtype=torch.float32
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model, new = expanded(model, 8)
    assert new == [4, 9, 14, 19, 24, 29, 34, 39]
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    samples = SampleIndex(open_dataset(dataset).train, 16, seed=1234)
    theirs = []
    for step in range(steps):
        batch = torch.from_numpy(samples.batch(step * size, size).astype("int64"))
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        theirs.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        adamw.zero_grad()
    config = LLAMA_PRO
    small = [
        f"init.from={source}", f"data.path={dataset}", "model={sequence: 16}", "precision={}",
        f"batch={{global: {size}, micro: 2}}", f"optimizer.lr={lr}",
        "schedule={name: constant, warmup: 0}", "train.validation_samples=10",
        f"stages.0.until={{steps: {steps}}}", "train.tensorboard=false", "checkpoint.every=100",
    ]  # fmt: skip
    layouts = {"alone": {}, "data": {"zero": 2}, "pipeline": {"pipeline": 2}}
    for name, layout in layouts.items():
        command = ["--config", config, f"run.dir={tmp_path / name}", f"layout={layout}", *small]
        [outcomes] = launch(1 if name == "alone" else 2, command)
        assert not (bad := [o.err[-900:] for o in outcomes if o.status]), bad
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        ours = [line["loss"] for line in events(lines, "step")]
        assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5), (ours, theirs)
    assert abs(theirs[0] - theirs[-1]) > 0.01, "nothing was learned"
    # Exported: what was there is bit for bit what it was, and the new layers are theirs.
    convert(Job(newest(tmp_path / "alone/checkpoints"), tmp_path / "made", "huggingface"))
    made = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "made", attn_implementation="eager", dtype=torch.float32
    )
    old = [layer for layer in range(40) if layer not in new]
    for name, value in made.state_dict().items():
        found = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if found is None:
            assert torch.equal(value, before[name]), name
        elif int(found[1]) in old:
            was = f"model.layers.{old.index(int(found[1]))}.{found[2]}"
            assert torch.equal(value, before[was]), name
        else:
            wanted = model.state_dict()[name]
            assert torch.allclose(value, wanted, rtol=1e-3, atol=1e-4), name
