"""Runs of models with a base shape: in other layouts, stopped and resumed, grown, exported."""

import pytest
import torch

from megagrow.checkpoint import NativeCheckpoint, step_path
from megagrow.checkpoint.convert.registry import get_format
from megagrow.checkpoint.convert.run import Job, convert, survey
from megagrow.config import ModelConfig
from megagrow.config.load import parse_config
from megagrow.growth.optimizer_rules import OptimizerRules, group_keys
from megagrow.models.catalog import build_catalog
from megagrow.state.layout import Layout
from megagrow.train.run_plan import plan_run
from tests.jobs import events, growths, launch, log_of, main, settings, stages, train, trajectory
from tests.jobs import write_config as write
from tests.toys import FAMILIES
from tests.train.runs import groups_in

MUP = {"mup": {"hidden": 4, "layers": 1}}


def mapping_of(dataset, path, *, policy="kept", **changes):
    model = MUP | changes.pop("model", {})
    plan = stages(policy=policy, rewarm=0, depth_policy="kept")
    return settings(dataset, path, model=model, stages=plan, **changes)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_stopped_and_resumed_through_growths(tmp_path, dataset, name):
    mapping = mapping_of(dataset, tmp_path / "chain", optimizer={"name": name})
    config = write(tmp_path / "run.yaml", mapping)
    straight = ["--config", config, f"run.dir={tmp_path / 'straight'}"]
    chain = [["--config", config, f"train.stop_after_steps={n}"] for n in (2, 4, 7, 8)]
    outcomes = launch(2, straight, *chain, ["--config", config])
    assert all(o.status == 0 for ranks in outcomes for o in ranks), outcomes
    one, two = log_of(config), log_of(config, straight[-1])
    assert trajectory(one) == trajectory(two) and growths(one) == growths(two)
    stored = NativeCheckpoint.open(step_path(tmp_path / "chain" / "checkpoints", 10))
    plan = plan_run(parse_config(mapping), world=2, vocabulary=320)
    assert stored.catalog == build_catalog(plan.stages[-1].model)
    assert stored.catalog["layers.0.mlp.up.weight"].rates.lr == 1 / 4  # hidden 16 of 4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_has_the_curve_of_one_process(tmp_path, dataset, family):
    """Alternating over both growths, tensor, pipeline and data parallel, ZeRO 0 to 3."""
    model = {"family": family, "tie_embeddings": family == "gpt2"}
    mapping = mapping_of(dataset, tmp_path / "one", model=model)
    config = write(tmp_path / "run.yaml", mapping)
    alone = events(train(1, config), "step")
    layouts = [["layout.tensor=2"], ["layout.pipeline=2"], ["layout.zero=0"], ["layout.zero=3"],
               ["layout.tensor=2", "stages.1.layout={pipeline: 2}"]]  # fmt: skip
    commands = [
        ["--config", config, f"run.dir={tmp_path / str(i)}", *layout]
        for i, layout in enumerate(layouts)
    ]
    outcomes = launch(2, *commands, timeout=400.0)
    assert all(o.status == 0 for ranks in outcomes for o in ranks), outcomes
    for command in commands:
        found = events(log_of(config, command[2]), "step")
        for mine, other in zip(found, alone, strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5), command
    plain = write(tmp_path / "plain.yaml", mapping | {
        "model": mapping["model"] | {"mup": None},
        "run": {"dir": str(tmp_path / "plain"), "seed": 5},
    })  # fmt: skip
    assert events(train(1, plain), "step")[-1]["loss"] != alone[-1]["loss"]


def test_a_grown_stage_has_the_groups_of_a_fresh_run_of_its_shape(dataset, tmp_path):
    mapping = mapping_of(dataset, tmp_path / "run")
    plan = plan_run(parse_config(mapping), world=1, vocabulary=320)
    for stage in plan.stages:
        rules = plan.rules_at(stage.index)
        sizes = {key: getattr(stage.model, key) for key in ("layers", "hidden", "heads", "ffn")}
        other = ModelConfig(**mapping["model"] | sizes | {"vocab": 320})
        fresh = build_catalog(other)
        assert group_keys(build_catalog(stage.model), rules) == group_keys(fresh, OptimizerRules())
    shrinking = [
        build_catalog(stage.model)["layers.0.mlp.down.weight"].rates.lr for stage in plan.stages
    ]
    # ffn 16, 32, 32 of a base of 8; layers 2, 2, 4 of a base of 1.
    assert shrinking == [1 / 4, 1 / 8, 1 / 16]


def test_a_dry_run_tells_the_rates_of_every_stage(tmp_path, dataset):
    config = write(tmp_path / "run.yaml", mapping_of(dataset, tmp_path / "run"))
    dry = main(["--config", config, "--dry-run"])
    assert dry.status == 0, dry.err
    assert "final norm's gain 0.5" in dry.out
    base = "(model.mup: hidden 4, heads 1, ffn 8, layers 1)"
    for reader, writer, norm in (("0.5", "0.25", "0.5"), ("0.25", "0.125", "0.25"),
                                 ("0.25", "0.0625", "0.25")):  # fmt: skip
        assert f"reader {reader}, writer {writer}" in dry.out
        assert f"final norm {norm} {base}" in dry.out


def test_other_formats_carry_the_rates_or_say_that_they_do_not(tmp_path, dataset):
    mapping = mapping_of(dataset, tmp_path / "run", checkpoint={"keep": 9})
    config = write(tmp_path / "run.yaml", mapping)
    train(1, config)
    path = step_path(tmp_path / "run" / "checkpoints", 6)  # widened, not deepened
    source = NativeCheckpoint.open(path)
    for name in ("dcp", "deepspeed", "universal", "megatron"):
        target = tmp_path / name
        convert(Job(path, target, name, layout=Layout(data=1)))
        form = get_format(name)
        assert form.open_source(form.find(target)).catalog == source.catalog, name
        back = tmp_path / f"{name}-back"
        convert(Job(target, back, "native"))
        assert NativeCheckpoint.open(back).catalog == source.catalog, name
    groups = [
        group
        for file in (tmp_path / "deepspeed").rglob("*.pt")
        for group in groups_in(torch.load(file, weights_only=False))
    ]
    keys = set(group_keys(source.catalog, OptimizerRules()).values())
    wanted = sorted({(0.01 * lr, 1e-8 * eps) for _, lr, _, eps, _ in keys})
    for found, (lr, eps) in zip(sorted({(g["lr"], g["eps"]) for g in groups}), wanted, strict=True):
        assert found == (pytest.approx(lr), pytest.approx(eps))
    for name in ("megatron", "huggingface"):
        left = [item.name for item in survey(Job(path, tmp_path / "x", name)).left_out]
        assert any("mup" in item for item in left), name
    plain = tmp_path / "hf"
    convert(Job(path, plain, "huggingface"), verify=True)
