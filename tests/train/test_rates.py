"""Stages with their own optimizer settings and schedule."""

import json

import pytest
import torch

from megagrow.checkpoint import step_path
from megagrow.checkpoint.convert.run import Job, convert
from megagrow.config.load import parse_config
from megagrow.errors import ConfigError
from megagrow.train.run_plan import plan_run
from tests.jobs import events, growths, launch, log_of, main, settings, stages, train, trajectory
from tests.jobs import write_config as write
from tests.train.runs import groups_in


def staged(*, optimizer=None, schedule=None, policy="sparkling", stage=1):
    """Train, widen with its own rates, train, deepen, train."""
    found = stages(policy=policy, rewarm=0)
    found[stage] |= {"optimizer": optimizer or {}, "schedule": schedule or {}}
    return found


# --- what is refused ----------------------------------------------------------------------


REFUSED = {
    "name": ({"stages": staged(optimizer={"name": "lion"})},
             ["stages[1].optimizer: name cannot change in a run", "set optimizer.name"]),
    "offload": ({"stages": staged(optimizer={"offload": "cpu"})}, ["offload cannot change"]),
    "muon": ({"stages": staged(optimizer={"muon_lr": 0.1})},
             ["stages[1].optimizer: muon_lr: only for Muon", "optimizer.name = adamw"]),
    "floor alone": ({"stages": staged(schedule={"floor": 0.1})}, ["schedule: floor", "give decay"]),
    "first warm-up": ({"stages": staged(schedule={"warmup": 2}, stage=0)},
                      ["stages[0].schedule.warmup", "set schedule.warmup"]),
    "cosine": ({"stages": staged(schedule={"decay": 0.5}), "schedule": {"name": "cosine"}},
               ["stages[1].schedule.decay: schedule.name = cosine", "wsd or constant"]),
    "a rule": ({"stages": [{"until": {"steps": 20, "slope": -0.1}, "schedule": {"decay": 0.5}},
                           {"until": {"steps": 30}}]},
               ["stages[0].schedule.decay: until.slope", "not known before"]),
    "too long": ({"stages": staged(schedule={"warmup": 2, "decay": 0.9})},
                 ["stages[1].schedule", "2 + 4 steps", "at most 4"]),
    "young moments": ({"stages": staged(optimizer={"betas": [0.9, 0.999]})},
                      ["stages[1].optimizer.betas", "3 updates", "to reset"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(dataset, tmp_path, case):
    changes, says = REFUSED[case]
    mapping = settings(dataset, tmp_path / "run", **changes)
    with pytest.raises(ConfigError) as caught:
        plan_run(parse_config(mapping), world=1, vocabulary=320)
    for words in says:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("optimizer", "change", "policy", "fits"),
    [
        # AdamW's correction is wrong as long as beta^t matters under either beta.
        ({"betas": [0.9, 0.95]}, {"betas": [0.9, 0.99]}, "kept", False),
        ({"betas": [0.5, 0.6]}, {"betas": [0.6, 0.7]}, "kept", True),
        ({"betas": [0.9, 0.95]}, {"betas": [0.9, 0.99]}, "reset", True),
        ({"name": "lion", "betas": [0.9, 0.99]}, {"betas": [0.9, 0.999]}, "kept", True),
        ({"name": "muon", "betas": [0.9, 0.95]}, {"momentum": 0.9, "muon_lr": 0.1}, "kept", True),
    ],
)
def test_betas_change_where_no_bias_correction_is_wrong(
    dataset, tmp_path, optimizer, change, policy, fits
):
    plan = [
        {"until": {"steps": 20}},
        {"grow": {"operator": "width", "state_policy": policy}, "until": {"steps": 40},
         "optimizer": change},
    ]  # fmt: skip
    mapping = settings(dataset, tmp_path / "run", stages=plan, optimizer=optimizer)
    if not fits:
        with pytest.raises(ConfigError, match=r"stages\[1\]\.optimizer\.betas"):
            plan_run(parse_config(mapping), world=1, vocabulary=320)
        return
    found = plan_run(parse_config(mapping), world=1, vocabulary=320)
    for key, value in change.items():
        assert getattr(found.stages[1].optimizer, key) == (
            tuple(value) if key == "betas" else value
        )


def test_what_a_stage_does_not_name_stays(dataset, tmp_path):
    plan = stages()
    plan[1]["optimizer"] = {"lr": 0.5, "weight_decay": 0.3}
    plan[2]["optimizer"] = {"lr": 0.25}
    mapping = settings(dataset, tmp_path / "run", stages=plan, schedule={"name": "constant"})
    found = plan_run(parse_config(mapping), world=1, vocabulary=320)
    rates = [(s.optimizer.lr, s.optimizer.weight_decay, s.optimizer.eps) for s in found.stages]
    assert rates == [(0.01, 0.1, 1e-8), (0.5, 0.3, 1e-8), (0.25, 0.3, 1e-8)]
    assert [found.learning_rate.at(step) for step in (2, 6, 7)] == [0.01, 0.5, 0.25]


# --- runs ---------------------------------------------------------------------------------


CHANGES = {
    "adamw": {"lr": 0.02, "weight_decay": 0.5, "eps": 1e-3, "grad_clip": 0.1},
    "lion": {"lr": 0.003, "weight_decay": 0.5, "betas": [0.5, 0.7]},
    "muon": {"lr": 0.02, "muon_lr": 0.05, "momentum": 0.5, "weight_decay": 0.5},
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("zero", [0, 1])
def test_from_its_first_update_a_stage_is_a_run_with_these_settings(tmp_path, dataset, name, zero):
    """Stopped at the stage's start, and resumed with them as the run's own."""
    change = CHANGES[name]
    plan = stages(ends=(3, 6, 7))[:2]
    mapping = settings(
        dataset, tmp_path / "staged", stages=[plan[0], plan[1] | {"optimizer": change}],
        schedule={"name": "constant"}, layout={"zero": zero}, optimizer={"name": name},
    )  # fmt: skip
    plain = mapping | {"stages": plan, "run": {**mapping["run"], "dir": str(tmp_path / "plain")}}
    one, other = write(tmp_path / "a.yaml", mapping), write(tmp_path / "b.yaml", plain)
    changed = [f"optimizer.{key}={json.dumps(value)}" for key, value in change.items()]
    outcomes = launch(
        2, ["--config", one], ["--config", other, "train.stop_after_steps=3"],
        ["--config", other, *changed],
    )  # fmt: skip
    assert [rank[0].status for rank in outcomes] == [0, 0, 0], outcomes
    found, wanted = log_of(one), log_of(other)
    assert trajectory(found) == trajectory(wanted) and len(trajectory(found)) == 6
    assert [line["lr"] for line in events(found, "step")][3:] == [change["lr"]] * 3
    [growth] = events(found, "growth")
    stated = {key: list(v) if isinstance(v, list) else v for key, v in growth["optimizer"].items()}
    assert {key: stated[key] for key in change} == change
    assert f"stage 1: lr {change['lr']:g}" in outcomes[0][0].err
    # Without the change it is a different run.
    train(2, other, f"run.dir={tmp_path / 'none'}")
    assert trajectory(log_of(other, f"run.dir={tmp_path / 'none'}"))[3:] != trajectory(found)[3:]


def test_resumed_in_the_middle_of_such_stages(tmp_path, dataset):
    plan = stages(policy="sparkling", rewarm=2)
    plan[1] |= {"optimizer": {"lr": 0.02, "weight_decay": 0.3},
                "schedule": {"warmup": 2, "decay": 0.5, "floor": 0.1}}  # fmt: skip
    plan[2] |= {"optimizer": {"grad_clip": 0.5}, "schedule": {"decay": 0.4}}
    mapping = settings(dataset, tmp_path / "chain", stages=plan)
    config = write(tmp_path / "run.yaml", mapping)
    straight = ["--config", config, f"run.dir={tmp_path / 'straight'}"]
    chain = [["--config", config, f"train.stop_after_steps={n}"] for n in (2, 4, 5, 7, 9)]
    outcomes = launch(2, straight, *chain, ["--config", config])
    assert all(o.status == 0 for ranks in outcomes for o in ranks), outcomes
    lines, whole = log_of(config), log_of(config, straight[-1])
    assert trajectory(lines) == trajectory(whole) and growths(lines) == growths(whole)
    assert [line["lr"] for line in events(whole, "step")] == pytest.approx(
        # warm-up 2; stage 1 warms up 2 and decays over its last 2 to 0.1; stage 2 has 3 updates
        [0.005, 0.01, 0.01, 0.01, 0.02, 0.02, 0.02 * 0.55, 0.02, 0.02, 0.02]
    )
    assert events(lines, "resume")[2]["optimizer"]["weight_decay"] == 0.3


def test_a_dry_run_tells_them(tmp_path, dataset):
    plan = staged(optimizer={"lr": 0.02, "eps": 1e-6}, schedule={"warmup": 2, "decay": 0.5})
    config = write(tmp_path / "run.yaml", settings(dataset, tmp_path / "run", stages=plan))
    dry = main(["--config", config, "--dry-run"])
    assert dry.status == 0, dry.err
    assert "rates       lr 0.02, eps 1e-06 from here on\n" in dry.out
    assert "rates       warm-up over its first 2 steps, decay over the last 0.5 of it" in dry.out
    assert "peak 0.01, 0.02 from step 3" in dry.out
    assert "2 steps before 7" in dry.out and "re-warm 2 steps at 3" in dry.out


def test_results_in_other_formats_have_the_settings_of_their_stage(tmp_path, dataset):
    plan = staged(optimizer={"lr": 0.02, "weight_decay": 0.5, "betas": [0.9, 0.95], "eps": 1e-6})
    mapping = settings(dataset, tmp_path / "run", stages=plan, checkpoint={"keep": 9})
    config = write(tmp_path / "run.yaml", mapping)
    train(1, config)
    for step, wanted in ((2, (0.01, 0.1, 1e-8)), (6, (0.02, 0.5, 1e-6))):
        path = step_path(tmp_path / "run" / "checkpoints", step)
        for name in ("deepspeed", "megatron"):
            target = tmp_path / f"{name}{step}"
            convert(Job(path, target, name))
            files = [torch.load(p, weights_only=False) for p in target.rglob("*.pt")]
            groups = [group for file in files for group in groups_in(file)]
            assert groups
            assert {(g["lr"], g["weight_decay"], g["eps"]) for g in groups if g["weight_decay"]} \
                == {wanted}  # fmt: skip
