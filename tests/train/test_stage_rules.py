"""Growth stages that end by a rule, and stages with their own batch or sequence length."""

import math

import pytest

from megagrow.config import UntilConfig
from megagrow.config.load import parse_config
from megagrow.config.rules import BOUNDS, RULES
from megagrow.errors import ConfigError
from megagrow.forecast.planned_ends import planned_ends
from megagrow.models.flops import train_flops_per_token
from megagrow.schedule.end_rules import Seen
from megagrow.train.run_plan import plan_run
from megagrow.train.stage_rules import WATCHERS, decide
from tests.jobs import events, growths, launch, log_of, settings, train, trajectory, write_config

WIDTH = {"operator": "width", "factor": 2, "rewarm": 1}
EVERY = {"train": {"validate_every": 1, "validation_samples": 10, "tensorboard": False}}


def rule_run(dataset, run_dir, until, **changes):
    """Two stages, the first ended by a rule, twenty steps in all."""
    stages = [{"until": until}, {"grow": WIDTH, "until": {"steps": 20}}]
    return settings(dataset, run_dir, stages=stages, **EVERY, **changes)


def in_parts(config, run_dir, *, stops):
    """The run stopped at some steps and resumed, in one job; returns its log."""
    command = ["--config", config, f"run.dir={run_dir}"]
    outcomes = launch(1, *[[*command, f"train.stop_after_steps={stop}"] for stop in stops], command)
    assert all(o.status == 0 for [o] in outcomes), outcomes[-1][0].err
    return log_of(config, command[-1])


@pytest.mark.parametrize("until", [{"slope": -0.1, "steps": 16}, {"marginal": True, "steps": 16}])
def test_a_rule_ends_a_stage_and_a_resumed_run_decides_alike(tmp_path, dataset, until):
    # A law without a floor, since the toy's loss goes far below any published one.
    law = {"floor": 0.0, "n_scale": 1e9, "n_power": 0.1, "s_scale": 1e5, "s_power": 0.5}
    mapping = rule_run(
        dataset, tmp_path / "run", until, growth={"law": law, "points": 4}, optimizer={"lr": 0.05}
    )
    config = write_config(tmp_path / "run.yaml", mapping)
    whole = train(1, config)
    decisions = events(whole, "stage_rule")
    assert decisions and all(line["rule"] == next(iter(until)) for line in decisions)
    ended = [line for line in decisions if line["end"]]
    assert len(ended) == 1 and not any(line["end"] for line in decisions[:-1])
    [growth] = events(whole, "growth")
    assert growth["step"] == ended[0]["step"] < 16  # before its latest end
    assert events(whole, "step")[-1]["step"] == 20
    names = {"slope": {"slope", "threshold"}, "marginal": {"gain_per_flop", "capacity_after"}}
    assert names[next(iter(until))] <= set(ended[0])

    at = ended[0]["step"]
    resumed = in_parts(config, tmp_path / "parts", stops=(at - 1, at, at + 3))
    assert trajectory(resumed) == trajectory(whole)
    assert growths(resumed) == growths(whole)
    decided = [{k: v for k, v in line.items() if k != "time"} for line in decisions]
    again = events(resumed, "stage_rule")
    assert [{k: v for k, v in line.items() if k != "time"} for line in again] == decided


def test_a_rule_that_never_fires_leaves_the_latest_end(tmp_path, dataset):
    mapping = rule_run(dataset, tmp_path / "run", {"slope": -1e-9, "steps": 7})
    lines = train(1, write_config(tmp_path / "run.yaml", mapping))
    assert [line["step"] for line in events(lines, "growth")] == [7]


def test_stages_by_rules_alone_share_the_way_to_the_next_bound(dataset, tmp_path):
    mapping = settings(dataset, tmp_path, stages=[
        {"until": {"slope": -0.05}},
        {"until": {"slope": -0.05}, "grow": WIDTH},
        {"until": {"steps": 30}, "grow": WIDTH},
    ])  # fmt: skip
    plan = plan_run(parse_config(mapping), world=1, vocabulary=320)
    assert [stage.plan.end_step for stage in plan.stages] == [10, 20, 30]
    after = plan_run(parse_config(mapping), world=1, vocabulary=320, ends=(4,))
    assert [stage.plan.end_step for stage in after.stages] == [4, 20, 30]


def test_planned_is_where_the_small_model_gains_no_more_than_the_large(tmp_path):
    law = {"floor": 0.5, "n_scale": 1e5, "n_power": 0.3, "s_scale": 1e6, "s_power": 0.4}
    model = {"layers": 2, "hidden": 32, "heads": 2, "ffn": 128, "sequence": 16, "vocab": 64}
    run = parse_config({
        "model": model, "data": {"path": "none"}, "batch": {"global": 4, "micro": 4},
        "schedule": {"warmup": 1}, "growth": {"law": law},
        "stages": [{"until": {"planned": True}}, {"grow": WIDTH, "until": {"tokens": 1e9}}],
    })  # fmt: skip
    plan = plan_run(run, world=1, vocabulary=None)
    [end] = plan.planned
    small, large = plan.stages[0].model, plan.stages[1].model
    assert plan.stages[0].plan.end_tokens == pytest.approx(end.tokens, abs=4 * 16)
    [again] = planned_ends(run, [small, large])
    assert again == end

    from megagrow.forecast.planned_ends import run_law
    from megagrow.forecast.planner import Curves, size_of

    constants = run_law(run)
    curves = Curves(constants, batch_tokens=64)

    def gain(model):
        size = size_of(model, constants)
        step = 1e-5
        return step / (curves.flops(size, end.loss - step) - curves.flops(size, end.loss))

    assert gain(small) == pytest.approx(gain(large), rel=1e-3)
    assert curves.tokens(size_of(small, constants), end.loss) == pytest.approx(end.tokens)


def test_planned_after_another_kind_of_end_is_refused(dataset, tmp_path):
    mapping = settings(dataset, tmp_path, stages=[
        {"until": {"steps": 3}}, {"grow": WIDTH, "until": {"planned": True}},
        {"grow": WIDTH, "until": {"steps": 9}},
    ])  # fmt: skip
    with pytest.raises(ConfigError, match=r"stages\[0\].until: the planner"):
        plan_run(parse_config(mapping), world=1, vocabulary=320)


def test_the_last_stage_needs_a_bound(dataset, tmp_path):
    mapping = settings(dataset, tmp_path, stages=[{"until": {"slope": -0.05}}])
    with pytest.raises(ConfigError, match=r"stages\[0\].until.slope: no growth follows"):
        parse_config(mapping)


def test_batch_and_sequence_of_a_stage(tmp_path, dataset):
    """A warm-up of both, through a growth, on one rank and on two with ZeRO 1: the same curve."""
    mapping = settings(dataset, tmp_path / "run", schedule={"warmup": 2, "name": "constant"},
        model={"dropout": 0.0},
        stages=[
            {"until": {"steps": 3}, "batch": {"global": 2, "micro": 1}, "sequence": 4},
            {"until": {"steps": 5}, "batch": {"global": 4, "micro": 2}},
            {"until": {"steps": 8}, "grow": WIDTH, "batch": {"global": 8, "micro": 2},
             "sequence": 8},
        ])  # fmt: skip
    config = write_config(tmp_path / "run.yaml", mapping)
    lines = train(1, config)
    tokens = [line["tokens"] for line in events(lines, "step")]
    assert tokens == [8, 16, 24, 40, 56, 120, 184, 248]
    per_token = [
        (b["flops"] - a["flops"]) / (b["tokens"] - a["tokens"])
        for a, b in zip([{"flops": 0, "tokens": 0}, *events(lines, "step")],
                        events(lines, "step"), strict=False)
    ]  # fmt: skip
    assert per_token[0] == per_token[4] < per_token[5]
    two = train(2, config, f"run.dir={tmp_path / 'two'}")
    for mine, other in zip(events(two, "step"), events(lines, "step"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert [line["val_loss"] for line in events(log_of(config), "validation")]
    resumed = in_parts(config, tmp_path / "parts", stops=(2, 4, 6))
    assert trajectory(resumed) == trajectory(lines)


def test_samples_longer_than_the_model_are_refused(dataset, tmp_path):
    mapping = settings(dataset, tmp_path, stages=[{"until": {"steps": 3}, "sequence": 9}])
    with pytest.raises(ConfigError, match=r"stages\[0\].sequence: samples longer"):
        plan_run(parse_config(mapping), world=1, vocabulary=320)


def test_a_growth_sets_the_schedule_back(dataset, tmp_path):
    grow = {**WIDTH, "restart": 2.0}
    mapping = settings(dataset, tmp_path, schedule={"name": "linear", "warmup": 2},
        stages=[{"until": {"steps": 10}}, {"grow": grow, "until": {"steps": 20}}])  # fmt: skip
    rate = plan_run(parse_config(mapping), world=1, vocabulary=320).learning_rate
    # The growth at 10 continues as from 5, so the schedule is 15 long and still ends at the floor.
    assert rate.length == 15 and rate.position(12) == 7
    assert rate.at(10) == pytest.approx(0.01 * 10 / 13)
    assert rate.at(19) == pytest.approx(0.01 / 13)
    paper = {**grow, "restart": "paper"}
    mapping["stages"][1]["grow"] = paper
    rate = plan_run(parse_config(mapping), world=1, vocabulary=320).learning_rate
    assert rate.position(10) == round(10 / 1.776)
    assert math.isclose(rate.at(19), 0.01 / (rate.length - 2))


@pytest.mark.parametrize(
    ("operator", "target", "ratio"),
    [
        ("ligo", {"layers": 2}, 1.412),
        ("ligo", {"hidden": 16, "heads": 4, "ffn": 32}, 1.776),
        ("ligo", {"hidden": 16, "heads": 4, "ffn": 32, "layers": 2}, 2.455),
        ("depth_stack+vocab", {"layers": 2, "vocab": 330}, 1.412),
        ("head_dim", {"head_dim": 8}, None),
        ("kv_groups", {"heads": 4}, None),
        ("vocab", {"vocab": 330}, None),
        ("sequence", {"sequence": 16}, None),
    ],
)
def test_the_papers_ratio_follows_what_grows(dataset, tmp_path, operator, target, ratio):
    grow = {"operator": operator, "target": target, "restart": "paper"}
    mapping = settings(dataset, tmp_path, schedule={"warmup": 2},
        model={"family": "llama", "layers": 1},
        stages=[{"until": {"steps": 100}}, {"grow": grow, "until": {"steps": 200}}])  # fmt: skip
    if ratio is None:
        with pytest.raises(ConfigError, match=r"stages\[1\].grow.restart: the paper has ratios"):
            plan_run(parse_config(mapping), world=1, vocabulary=320)
        mapping["stages"][1]["grow"]["restart"] = 2.0
        ratio = 2.0
    rate = plan_run(parse_config(mapping), world=1, vocabulary=320).learning_rate
    assert rate.position(100) == round(100 / ratio)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_rate_does_not_jump_where_a_rule_ends_a_stage_of_a_run_bounded_in_flops(
    dataset, tmp_path, kind
):
    mapping = settings(dataset, tmp_path, schedule={"name": kind, "warmup": 2},
        stages=[{"until": {"slope": -0.05}}, {"grow": WIDTH, "until": {"flops": 3e8}}],
    )  # fmt: skip
    config = parse_config(mapping)
    before = plan_run(config, world=1, vocabulary=320)
    end = before.stages[0].plan.end_step // 2
    after = plan_run(config, world=1, vocabulary=320, ends=(end,))
    assert after.total_steps < before.total_steps and end > 20
    rate, planned = after.learning_rate, before.learning_rate
    assert [rate.at(s) for s in range(end)] == [planned.at(s) for s in range(end)]
    # WIDTH re-warms over one step, whose factor is 1.
    assert rate.at(end) == pytest.approx(planned.at(end), rel=1e-12)
    assert rate.at(after.total_steps - 1) > rate.at(after.total_steps) == pytest.approx(0, abs=1e-9)


def test_fitting_counts_in_the_plans_flops(dataset, tmp_path):
    ligo = {"operator": "ligo", "target": {"layers": 4}, "fit_steps": 3}
    mapping = settings(dataset, tmp_path, stages=[
        {"until": {"steps": 4}}, {"grow": ligo, "until": {"flops": 1e8}},
    ])  # fmt: skip
    plan = plan_run(parse_config(mapping), world=1, vocabulary=320)
    small, large = (stage.plan for stage in plan.stages)
    fit = large.start_flops - small.end_flops
    assert fit > 3 * small.batch.global_ * small.sequence * train_flops_per_token(large.model)
    assert large.end_flops - large.flops_per_step < 1e8 <= large.end_flops
    mapping["stages"][1]["grow"] = {"operator": "depth_stack", "target": {"layers": 4}}
    stacked = plan_run(parse_config(mapping), world=1, vocabulary=320).stages[1].plan
    assert stacked.start_flops == small.end_flops and stacked.steps > large.steps


def test_every_rule_is_a_setting_and_every_one_that_watches_is_asked():
    settings_of_rules = set(UntilConfig.model_fields) - set(BOUNDS)
    assert settings_of_rules == set(RULES)
    assert set(WATCHERS) == {name for name, rule in RULES.items() if rule.watches}
    # Those that do not watch are computed before the run, by `forecast.planned_ends`.
    assert set(RULES) - set(WATCHERS) == {"planned"}


def test_a_stage_without_a_rule_that_watches_has_no_verdict(tmp_path, dataset):
    config = parse_config(settings(dataset, tmp_path))
    with pytest.raises(KeyError):
        decide(Seen(), config=config, plan=plan_run(config, world=1, vocabulary=320), index=0)


@pytest.mark.parametrize("rule", RULES)
def test_what_a_rule_says_of_itself_is_what_is_refused(tmp_path, dataset, rule):
    value = -0.1 if rule == "slope" else True
    made = UntilConfig(**{rule: value, "tokens": 1e6})
    assert (made.rule, made.watches) == (rule, RULES[rule].watches)
    for unit in set(BOUNDS) - set(RULES[rule].bounds):
        with pytest.raises(ValueError, match=f"latest end cannot be in {unit}"):
            UntilConfig(**{rule: value, unit: 10})
    mapping = settings(dataset, tmp_path, stages=[{"until": {rule: value, "tokens": 1e6}}])
    if RULES[rule].looks_ahead:
        with pytest.raises(ConfigError, match="no growth follows the last stage"):
            parse_config(mapping)
    else:
        parse_config(mapping)
    decay = [
        {"until": {rule: value, "tokens": 1e6}, "schedule": {"decay": 0.5}},
        {"grow": WIDTH, "until": {"tokens": 2e6}},
    ]
    mapping = settings(dataset, tmp_path, stages=decay)
    if RULES[rule].watches:
        with pytest.raises(ConfigError, match="a step that is not known before"):
            parse_config(mapping)
    else:
        parse_config(mapping)
