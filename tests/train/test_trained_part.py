"""Stages that train a part of the parameters (`stages[i].train`), as whole runs."""

import numpy as np
import pytest
import torch

from megagrow.checkpoint import NativeCheckpoint, step_path
from megagrow.checkpoint.convert.run import Job, convert
from megagrow.checkpoint.formats.deepspeed import source as deepspeed
from megagrow.checkpoint.interface.model_of import model_of
from megagrow.checkpoint.native.steps import find
from megagrow.config import GrowConfig
from megagrow.errors import ConfigError
from megagrow.state.boxes import whole
from megagrow.state.catalog import slots_of
from megagrow.state.layout import Layout
from megagrow.train.grow_offline import plan_offline, write_offline
from tests.engine import plays
from tests.jobs import (
    events,
    growths,
    launch,
    log_of,
    main,
    settings,
    train,
    trajectory,
    write_config,
)
from tests.ranks import run_ranks
from tests.train.released import run_from

DEEPER = {"operator": "depth_identity", "factor": 2}
WIDER = {"operator": "width", "factor": 2, "state_policy": "sparkling", "rewarm": 3}
PART = ["writer", "norm_gain", "layers.2.*"]
ENDS = (3, 6, 9, 12)


def part_stages():
    """Train all, then the new layers, then other tensors, then all of a wider model."""
    return [
        {"until": {"steps": ENDS[0]}},
        {"grow": DEEPER, "train": "new", "until": {"steps": ENDS[1]}},
        {"train": PART, "until": {"steps": ENDS[2]}},
        {"grow": WIDER, "train": "all", "until": {"steps": ENDS[3]}},
    ]


def config_of(dataset, home, name, **changes):
    changes.setdefault("stages", part_stages())
    changes.setdefault("checkpoint", {"every": 1, "keep": 50})
    changes.setdefault(
        "train", {"validate_every": 4, "validation_samples": 8, "tensorboard": False}
    )
    return write_config(home / f"{name}.yaml", settings(dataset, home / name, **changes))


def losses(lines):
    return np.array([line["loss"] for line in events(lines, "step")])


def at_step(config, step):
    return NativeCheckpoint.open(step_path(config.with_suffix("") / "checkpoints", step))


def values(checkpoint):
    return {
        (tensor.name, slot.name): checkpoint.read(tensor.name, slot.name, whole(tensor.shape))
        for tensor in checkpoint.catalog
        for slot in slots_of(tensor, checkpoint.slots)
    }


def frozen_names(checkpoint):
    return {tensor.name for tensor in checkpoint.catalog if tensor.training == "frozen"}


def is_new(name):
    """Of a model of two layers whose layers are each followed by a copy."""
    return name.startswith(("layers.1.", "layers.3."))


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    """A run in one process: (its configuration, its log)."""
    config = config_of(dataset, tmp_path_factory.mktemp("alone"), "run")
    return config, train(1, config)


def test_what_is_frozen_stays_bit_for_bit_and_has_no_moments(alone):
    before, during, after = (values(at_step(alone[0], step)) for step in ENDS[:3])
    sources = {0: 0, 2: 1}
    for (name, slot), found in during.items():
        if not is_new(name):
            assert slot == "master", "a frozen tensor has no moments"
            layer = name.split(".")[1]
            old = name.replace(layer, str(sources[int(layer)]), 1) if "layers" in name else name
            assert torch.equal(found, before[old, slot]), name
    first = values(at_step(alone[0], ENDS[0] + 1))
    moved = {n for (n, s), v in during.items() if s == "master" and not torch.equal(v, first[n, s])}
    assert moved == {name for name, slot in during if is_new(name)}
    frozen = frozen_names(at_step(alone[0], ENDS[2]))
    assert "embedding.token" in frozen and "layers.2.mlp.up.weight" not in frozen
    for name in frozen:
        assert torch.equal(after[name, "master"], during[name, "master"]), name
        assert (name, "exp_avg") not in after
    assert not frozen_names(at_step(alone[0], ENDS[3]))


LAYOUTS = [
    {"zero": 0}, {"zero": 1}, {"zero": 2}, {"zero": 3}, {"tensor": 2, "zero": 1},
    {"tensor": 2, "zero": 1, "sequence_parallel": True}, {"pipeline": 2, "zero": 1},
    {"pipeline": 2, "zero": 0},
]  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_train_the_same_in_any_layout(alone, dataset, tmp_path, optimizer):
    made = {}
    for number, layout in enumerate(LAYOUTS):
        changes = {"layout": layout, "optimizer": {"lr": 0.01, "name": optimizer}}
        made[number] = config_of(dataset, tmp_path, f"run{number}", **changes)
    if optimizer == "adamw":
        expected = alone[1]
    else:
        expected = train(1, made[0], f"run.dir={tmp_path / 'alone'}", "layout.zero=1")
    outcomes = launch(2, *(["--config", config] for config in made.values()), timeout=400)
    assert all(o.status == 0 for ranks in outcomes for o in ranks), outcomes
    for number, config in made.items():
        lines = log_of(config)
        np.testing.assert_allclose(
            losses(lines), losses(expected), rtol=1e-5, err_msg=str(LAYOUTS[number])
        )
        norms = [[s["grad_norm"] for s in events(one, "step")] for one in (lines, expected)]
        np.testing.assert_allclose(*norms, rtol=1e-4, err_msg=str(LAYOUTS[number]))
        for ours, theirs in zip(growths(lines), growths(expected), strict=True):
            assert ours["loss_after"] == pytest.approx(theirs["loss_after"], rel=1e-5)
        first, last = (values(at_step(config, step)) for step in (ENDS[0] + 1, ENDS[1]))
        for (name, slot), found in last.items():
            assert is_new(name) or torch.equal(found, first[name, slot]), (name, LAYOUTS[number])


UPPER = [{"train": ["layers.3.*", "final_norm_gain"], "until": {"steps": 3}},
         {"train": "all", "until": {"steps": 6}}]  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_backward_pass_ends_above_pipeline_stages_that_train_nothing(dataset, tmp_path, dtype):
    """The lower pipeline stages have no gradient, no optimizer state and no messages for them."""
    model = {"layers": 4, "tie_embeddings": False}
    shared = {"stages": UPPER, "model": model, "precision": {"dtype": dtype}}
    layouts = [{"pipeline": 4, "zero": 1}, {"pipeline": 2, "tensor": 2, "zero": 1}]
    if dtype == "fp32":
        layouts += [{"pipeline": 4, "zero": 0}, {"pipeline": 2, "zero": 1}]
    alone = train(1, config_of(dataset, tmp_path, "alone", **shared))
    made = [
        config_of(dataset, tmp_path, f"run{number}", layout=layout, **shared)
        for number, layout in enumerate(layouts)
    ]
    outcomes = launch(4, *(["--config", config] for config in made), hook=(_count_gradients,),
                      timeout=400)  # fmt: skip
    assert all(o.status == 0 for ranks in outcomes for o in ranks), outcomes
    for config, layout in zip(made, layouts, strict=True):
        np.testing.assert_allclose(
            losses(log_of(config)), losses(alone), rtol=1e-5 if dtype == "fp32" else 0.03,
            err_msg=str(layout),
        )  # fmt: skip


def _count_gradients(rank):
    """Let a pipeline stage that sends gradients to one without trained parameters fail."""
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.schedule import SendGrad

    from megagrow.engine.deepspeed import privates

    send, end = PipelineEngine._INSTRUCTION_MAP[SendGrad], privates.end_backward_at

    def counted(engine, buffer_id):
        assert engine.stage_id > engine.lowest, "a gradient that nobody needs"
        send(engine, buffer_id)

    def noted(engine, *, lowest):
        engine.lowest = lowest
        end(engine, lowest=lowest)

    PipelineEngine._INSTRUCTION_MAP[SendGrad] = counted
    privates.end_backward_at = noted


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_low_precision_keeps_frozen_masters_bit_for_bit_and_resumes(dataset, tmp_path, offload):
    """In 16 bit the model's own parameters are rounded; the masters of frozen ones are not."""
    configs = {}
    for zero in (1, 2, 3) if offload == "cpu" else (0, 1, 2, 3):
        changes = {
            "layout": {"zero": zero}, "precision": {"dtype": "bf16"},
            "stages": part_stages()[:3], "optimizer": {"offload": offload},
        }  # fmt: skip
        configs[zero] = config_of(dataset, tmp_path, f"run{zero}", **changes)
    commands = []
    for config in configs.values():
        commands.append(["--config", config, f"run.dir={config.with_suffix('')}-straight"])
        commands += [["--config", config, f"train.stop_after_steps={n}"] for n in (5, 8)]
        commands.append(["--config", config])
    outcomes = launch(2, *commands, timeout=500)
    assert all(o.status == 0 for ranks in outcomes for o in ranks), outcomes
    for zero, config in configs.items():
        straight = log_of(config, f"run.dir={config.with_suffix('')}-straight")
        assert trajectory(log_of(config)) == trajectory(straight), zero
        before, during = (values(at_step(config, step)) for step in (ENDS[0] + 1, ENDS[1]))
        wide = [
            name for name, slot in during
            if slot == "master" and not is_new(name)
            and not torch.equal(during[name, slot], during[name, slot].bfloat16().float())
        ]  # fmt: skip
        assert wide, "no master has more digits than bf16"
        for name, slot in during:
            assert is_new(name) or torch.equal(during[name, slot], before[name, slot]), (zero, name)


def test_a_stage_is_resumed_bit_for_bit_and_in_other_layouts(alone, dataset, tmp_path):
    config = config_of(dataset, tmp_path, "run")
    for stop in (4, 5, 8):
        train(1, config, f"train.stop_after_steps={stop}")
    assert trajectory(train(1, config)) == trajectory(alone[1])
    other = config_of(dataset, tmp_path, "other")
    ways = [["layout.zero=3"], ["layout.tensor=2"], ["layout.pipeline=2"], ["layout.zero=2"], []]
    stops = [4, 5, 8, 9, 12]
    commands = [
        ["--config", other, f"train.stop_after_steps={stop}", *way]
        for stop, way in zip(stops, ways, strict=True)
    ]
    outcomes = launch(2, *commands, timeout=300)
    assert all(o.status == 0 for ranks in outcomes for o in ranks), outcomes
    np.testing.assert_allclose(losses(log_of(other)), losses(alone[1]), rtol=1e-5)


def test_a_resume_that_trains_others_is_refused(alone, dataset, tmp_path):
    stages = part_stages()
    config = config_of(dataset, tmp_path, "run", stages=stages)
    train(1, config, "train.stop_after_steps=5")
    stages[1]["train"] = "all"
    other = config_of(dataset, tmp_path, "run", stages=stages)
    outcome = main(["--config", other])
    assert outcome.status == 1
    assert "stage 1 trains other tensors than those that it has moments of" in outcome.err
    assert "resume with the `train` that the stage was started with" in outcome.err


def test_unfrozen_tensors_start_as_new_ones_and_that_is_said(alone, dataset, tmp_path):
    state = at_step(alone[0], ENDS[1] + 1).run_state
    young = state["rules"]["young"]
    names = {t.name for t in at_step(alone[0], ENDS[1] + 1).catalog if t.training == "trained"}
    again = {name for name in names if not is_new(name)}
    assert again and all(young[name]["born"] == ENDS[1] for name in again)
    assert all(young[name]["kept"] is None for name in again)
    # The growth's new layers keep their own count, while they are trained.
    kept = {name: item["born"] for name, item in young.items() if is_new(name)}
    assert set(kept.values()) == {ENDS[0]} and set(kept) == {n for n in names if is_new(n)}
    config = config_of(dataset, tmp_path, "run")
    [[outcome]] = launch(1, ["--config", config])
    assert "stage 1: trains " in outcome.err and "the others are frozen" in outcome.err
    assert "that were frozen: their moments start at zero" in outcome.err
    dry = main(["--config", config, "--dry-run"])
    assert dry.status == 0 and dry.out.count("  trains      ") == 4, dry.out


def test_diagnostics_and_the_mean_of_weights_are_of_what_is_trained(dataset, tmp_path):
    train_section = {
        "validate_every": 2, "validation_samples": 8, "tensorboard": False,
        "growth_diagnostics": 1, "average": {"last": 0.5},
    }  # fmt: skip
    config = config_of(dataset, tmp_path, "run", train=train_section, layout={"zero": 2})
    lines = train(2, config)
    found = {line["step"]: line for line in events(lines, "growth_diagnostics")}
    assert set(found) == set(range(ENDS[0] + 1, ENDS[3] + 1))
    assert found[ENDS[0] + 1]["update_share"] == 1.0  # the new layers are all that moves
    assert 0 < found[ENDS[2] + 1]["update_share"] < 1
    assert not [line for line in events(lines, "mixing") if line["step"] <= ENDS[2]]
    [average] = events(lines, "average")
    assert np.isfinite(average["val_loss"])


# --- checkpoints -----------------------------------------------------------------------------

WHOLE = [
    ("native", Layout(data=3, zero=1)), ("native", Layout(data=2, zero=3)),
    ("native", Layout(tensor=2, pipeline=2)), ("dcp", Layout()),
    ("deepspeed", Layout()), ("deepspeed", Layout(data=2, zero=1)),
    ("deepspeed", Layout(data=2, zero=2)), ("deepspeed", Layout(data=2, tensor=2, zero=2)),
    ("deepspeed", Layout(data=2, zero=3)), ("deepspeed", Layout(tensor=2)),
    ("deepspeed", Layout(data=2, tensor=2, zero=3)),
]  # fmt: skip


@pytest.mark.parametrize(("form", "layout"), WHOLE, ids=str)
@pytest.mark.parametrize("step", [ENDS[1], ENDS[1] + 2])
def test_a_checkpoint_of_a_part_is_carried_whole(alone, tmp_path, form, layout, step):
    """There and back: the same values, the same frozen tensors, and no moments of them."""
    source = at_step(alone[0], step)
    convert(Job(source.path, tmp_path / "there", form, layout=layout))
    convert(Job(tmp_path / "there", tmp_path / "back", "native"))
    back = NativeCheckpoint.open(find(tmp_path / "back"))
    assert back.catalog == source.catalog and frozen_names(back)
    expected, found = values(source), values(back)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def _load_in_deepspeed(comm, root, native, layouts):
    """Per layout: what differs from the source after DeepSpeed has loaded and saved it."""
    source = NativeCheckpoint.open(native)
    expected, found = values(source), []
    for number, layout in enumerate(layouts):
        there = root / str(number)
        if comm.rank == 0:
            convert(Job(native, there, "deepspeed", layout=layout), workers=1)
        comm.barrier()
        job = plays.Job(
            comm, model=model_of(source), layout=layout, fresh=False, frozen=source.catalog.frozen
        )
        job.engine._deepspeed.load_checkpoint(str(there))
        # What it has in memory now, it saves. Without ZeRO its files do not say what is frozen.
        client = {"config": source.config, "run_state": source.run_state}
        told = {} if layout.zero else {"frozen": sorted(source.catalog.frozen)}
        job.engine._deepspeed.save_checkpoint(
            str(there / "again"), client_state={"megagrow": {**client, **told}}
        )
        comm.barrier()
        saved = deepspeed.open_source(there / "again")
        assert saved.catalog == source.catalog
        bad = [
            key for key, value in expected.items()
            if not torch.equal(saved.read(*key, whole(value.shape)), value)
        ]  # fmt: skip
        job.engine.close()
        found.append(bad)
    return found


def test_deepspeeds_own_engine_loads_a_part(alone, tmp_path):
    layouts = [Layout(data=2, zero=zero) for zero in range(4)] + [Layout(tensor=2, zero=1)]
    native = at_step(alone[0], ENDS[1]).path
    for found in run_ranks(2, _load_in_deepspeed, tmp_path, native, layouts, timeout=300.0):
        assert found == [[]] * len(layouts)


def test_a_run_goes_on_from_a_converted_checkpoint(alone, dataset, tmp_path):
    source = at_step(alone[0], ENDS[1] + 1)
    convert(Job(source.path, tmp_path / "there", "deepspeed", layout=Layout(data=2, zero=1)))
    convert(Job(tmp_path / "there", tmp_path / "back", "native"))
    config = config_of(dataset, tmp_path, "run")
    expected = [step for step in trajectory(alone[1]) if step[0] > ENDS[1] + 1]
    assert trajectory(train(1, config, resume=find(tmp_path / "back"))) == expected


@pytest.mark.parametrize(
    ("form", "layout", "said"),
    [
        ("deepspeed", Layout(pipeline=2), "a pipeline do not tell frozen parameters from others"),
        ("universal", Layout(), "has no place for frozen parameters"),
    ],
)
def test_formats_that_cannot_tell_are_refused(alone, tmp_path, form, layout, said):
    with pytest.raises(ConfigError, match=said):
        convert(Job(at_step(alone[0], ENDS[1]).path, tmp_path / "made", form, layout=layout))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("form", ["huggingface", "megatron"])
def test_formats_of_weights_take_the_weights(dataset, tmp_path, form):
    family = "llama" if form == "megatron" else "gpt2"
    stages = part_stages()[:2]
    config = config_of(dataset, tmp_path, "run", stages=stages, model={"family": family})
    train(1, config)
    source = at_step(config, ENDS[1])
    survey = convert(Job(source.path, tmp_path / "made", form)).survey
    assert {item.name for item in survey.left_out} >= {"exp_avg", "exp_avg_sq"}
    convert(Job(tmp_path / "made", tmp_path / "back", "native"))
    back, expected = NativeCheckpoint.open(find(tmp_path / "back")), values(source)
    for (name, slot), found in values(back).items():
        wanted = expected[name, "master"] if slot == "master" else torch.zeros_like(found)
        assert torch.equal(found, wanted), (name, slot)


def test_an_offline_growth_of_a_part_is_the_live_one(alone, dataset, tmp_path):
    """The growth of stage 3, which unfreezes all: the state after it, bit for bit."""
    grown = write_offline(
        plan_offline(at_step(alone[0], ENDS[2]).path, GrowConfig(**WIDER)), tmp_path / "grown"
    )
    config = config_of(dataset, tmp_path, "live", checkpoint={"every": 1, "keep": 50})
    offline = NativeCheckpoint.open(grown)
    assert not offline.catalog.frozen
    assert offline.run_state["rules"]["young"]["embedding.token"]["inside"]["born"] == ENDS[2]
    expected = [step for step in trajectory(alone[1]) if step[0] > ENDS[2]]
    found = train(1, config, f"run.dir={tmp_path / 'on'}", resume=grown)
    assert trajectory(found) == expected


def test_a_run_may_start_from_a_checkpoint_of_a_part(alone, dataset, tmp_path):
    """Its moments are taken; those of what was frozen start at zero, with a count of their own."""
    source = alone[0].with_suffix("") / "checkpoints" / f"step_{ENDS[1]:08d}"
    for name, changes in {
        "plain": {"stages": [{"until": {"steps": 3}}]},
        "grown": {"stages": [{"grow": WIDER, "until": {"steps": 3}}]},
        "part": {"stages": [{"train": ["writer"], "until": {"steps": 3}}]},
    }.items():
        run = run_from(source, dataset, tmp_path / name, checkpoint={"every": 1}, **changes)
        lines = train(1, write_config(tmp_path / f"{name}.yaml", run))
        assert events(lines, "run_start")[0]["init"]["moments"]
        assert np.isfinite(losses(lines)).all()
        state = NativeCheckpoint.open(step_path(tmp_path / name / "checkpoints", 1))
        young = state.run_state["rules"]["young"]
        token = young.get("embedding.token")
        assert (token is None) == (name == "part")
        if token is not None:
            assert (token["inside"] or token)["born"] == ENDS[1]
        assert bool(frozen_names(state)) == (name == "part")
