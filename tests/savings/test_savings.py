"""The savings benchmark: its arithmetic by hand, its plan, and a whole one in miniature."""

import errno
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from itertools import pairwise
from types import SimpleNamespace

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megagrow.cli import benchmark
from megagrow.config import StageConfig
from megagrow.config.load import parse_settings
from megagrow.errors import ConfigError
from megagrow.savings import campaign as campaigns
from megagrow.savings.bound import Bound, bound, falling
from megagrow.savings.config import SavingsConfig, SweepConfig, VariantStage
from megagrow.savings.known import EndPoint, read_known
from megagrow.savings.members import Members, check, eps_follows_width
from megagrow.savings.result import VERSION, collect
from megagrow.savings.results import Point, Saving, cost_at, interval, saving
from megagrow.savings.summary import compared, summarised, why_not
from megagrow.savings.sweep import edges, search
from megagrow.savings.table import origin, plan_text, table
from megagrow.train.run_plan import plan_run
from tests.jobs import REPOSITORY, log_of, make_dataset
from tests.ranks import run_ranks

BUDGETS = (1e3, 2e3, 4e3)


def point(budget, loss, *, growth=0.0):
    return Point(budget, budget + growth, budget / 10, budget / 100, loss, 0.0, growth)


def curve(*losses, growth=0.0):
    return [point(budget, loss, growth=growth) for budget, loss in zip(BUDGETS, losses,
                                                                       strict=False)]  # fmt: skip


# --- arithmetic ---------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
def test_saving_at_each_budget(budget):
    """Both curves are powers of C with known factors, so every interpolation is exact."""
    scratch = curve(*(8 * c**-0.1 for c in BUDGETS))
    grown = curve(*(8 * (c / 0.6) ** -0.1 for c in BUDGETS))  # as far with 60 %
    for cost in ("flops", "tokens", "seconds"):
        found = saving(scratch, grown, cost, budget)
        assert found.value == pytest.approx(0.4) and found.bound == ""
        back = saving(grown, scratch, cost, budget)
        assert back.value == pytest.approx(1 - 1 / 0.6) and back.bound == ""


def test_what_the_budgets_do_not_reach_is_bounded():
    scratch, grown = curve(4.0, 3.8, 3.6), curve(3.5, 3.2, 3.0)
    found = saving(scratch, grown, "flops", 4e3)
    assert (found.bound, found.value) == (">=", 1 - 1e3 / 4e3)
    found = saving(grown, scratch, "flops", 4e3)
    assert (found.bound, found.value) == ("<=", 1 - 4e3 / 1e3)
    assert cost_at(scratch, 3.0, "flops") is None and saving([], grown, "flops", 4e3) is None
    assert saving(scratch, grown[:1], "flops", 4e3) is None  # not finished there
    assert saving(scratch, curve(3.9, 3.8, math.inf), "flops", 4e3) is None  # diverged


def test_growths_are_charged():
    scratch = curve(4.0, 3.8, 3.6)
    free, charged = (saving(scratch, curve(4.0, 3.6, 3.4, growth=g), "flops", 4e3)
                     for g in (0, 100))  # fmt: skip
    assert (free.grown, charged.grown) == pytest.approx((2000, 2100))


def test_interval_over_seeds():
    found = interval([0.30, 0.34, 0.38])
    # Student's t, 2 degrees of freedom: 4.3027 standard errors.
    half = 4.30265 * 0.04 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.34 - half, 0.34 + half), rel=1e-5)
    assert found.sd == pytest.approx(0.04)
    alone = interval([0.3])
    assert (alone.mean, alone.sd, alone.low, alone.seeds) == (0.3, None, None, 1)


# --- the bound ----------------------------------------------------------------------------


def test_the_bound_of_two_power_laws():
    """The target needs 1.5 C + 300 to the small model's loss at C up to 600, then C + 600."""
    small = [(float(c), 8 * c**-0.1) for c in range(100, 1001, 50)]
    lead = {c: min(1.5 * c + 300, c + 600) for c, _ in small}
    target = [(lead[c], loss) for c, loss in small]
    found = bound(small, target, budget=6000.0)
    assert found.saving == pytest.approx(0.1) and not found.open and found.at >= 600
    # The same lead of twice the budget is half; one that is cut off by the budget is open.
    assert bound(small, target, budget=12000.0).saving == pytest.approx(0.05)
    assert bound(small, target, budget=800.0).open
    # The small model goes below all that the target was seen at: the lead is only known so far.
    found = bound(small, target[:5], budget=6000.0)
    assert found.open and found.saving < 0.1
    assert bound([(10.0, 9.0)], target, budget=6000.0) is None  # no loss in common
    assert bound([], target, budget=6000.0) is None


losses = st.lists(st.floats(0.5, 20.0), min_size=1, max_size=30)


@given(losses)
def test_a_pooled_curve_falls_and_keeps_its_mean(noisy):
    given_curve = [(float(2**i), loss) for i, loss in enumerate(noisy)]
    pooled = falling(given_curve)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(pooled))
    if all(a > b for a, b in pairwise(noisy)):  # a curve that falls stays
        assert pooled == [pytest.approx(one) for one in given_curve]
    low, high = min(noisy), max(noisy)
    assert all(low * (1 - 1e-9) <= loss <= high * (1 + 1e-9) for _, loss in pooled)


# --- sweeps -------------------------------------------------------------------------------

RATES, BATCHES = [1e-3, 2e-3, 4e-3, 8e-3], [4, 8, 16]


def sweep_of(**more):
    values = {"batch.global": BATCHES, "optimizer.lr": RATES}
    return parse_settings(SweepConfig, {**values, **more}, source="test")


def train_all(sweep, own, loss):
    """Run a search to its end; returns (best, how often each point was trained)."""
    known, asked = {}, []
    for _ in range(100):
        found = search(sweep, own, lambda p: known.get(tuple(sorted(p.items()))))
        if found.best is not None:
            return found.best, asked
        assert found.missing
        for p in found.missing:
            asked.append(p)
            known[tuple(sorted(p.items()))] = loss(p)
    raise AssertionError("never ends")


@given(best=st.tuples(st.sampled_from(RATES), st.sampled_from(BATCHES)),
       own=st.tuples(st.sampled_from(RATES), st.sampled_from(BATCHES)))  # fmt: skip
def test_both_searches_find_the_best_of_a_separable_loss(best, own):
    def loss(p):
        rate, batch = p["optimizer.lr"], p["batch.global"]
        return math.log(rate / best[0]) ** 2 + math.log(batch / best[1]) ** 2

    start = {"optimizer.lr": own[0], "batch.global": own[1]}
    wanted = {"optimizer.lr": best[0], "batch.global": best[1]}
    found, by_coordinate = train_all(sweep_of(), start, loss)
    assert found == wanted
    found, everything = train_all(sweep_of(by="grid"), start, loss)
    assert found == wanted and len(everything) == len(RATES) * len(BATCHES)
    # No point is trained twice, and the learning rate comes first, at the others' own values.
    assert len({tuple(sorted(p.items())) for p in by_coordinate}) == len(by_coordinate) <= 10
    first = by_coordinate[: len(RATES)]
    assert {p["batch.global"] for p in first} == {own[1]}


def test_a_rate_is_tuned_again_at_another_batch():
    """The best rate rises with the batch, which one round by coordinate cannot see."""

    def loss(p):
        batch = p["batch.global"]
        return math.log(p["optimizer.lr"] / (1e-3 * batch**0.5)) ** 2 + math.log(batch / 4) ** 2

    own = {"optimizer.lr": 2e-3, "batch.global": 16}
    once, _ = train_all(sweep_of(rounds=1), own, loss)
    again, _ = train_all(sweep_of(), own, loss)
    assert again == {"optimizer.lr": 2e-3, "batch.global": 4} and loss(again) < loss(once)


def test_a_run_that_diverged_is_not_the_best():
    found, _ = train_all(
        sweep_of(), {"optimizer.lr": 2e-3, "batch.global": 8},
        lambda p: math.inf if p["optimizer.lr"] > 2e-3 else -p["optimizer.lr"],
    )  # fmt: skip
    assert found["optimizer.lr"] == 2e-3


def test_edges_say_what_to_widen():
    sweep = sweep_of(**{"optimizer.name": ["adamw", "muon"], "model.init_std": [0.02]})
    inside = {"optimizer.lr": 4e-3, "batch.global": 8, "optimizer.name": "muon",
              "model.init_std": 0.02}  # fmt: skip
    assert edges(sweep, inside, key="sweep") == [
        "edge: widen sweep.model.init_std below and above 0.02"
    ]
    low = edges(sweep, {**inside, "optimizer.lr": 1e-3}, key="small_sweep")
    assert low == [
        "edge: widen small_sweep.optimizer.lr below 0.001",
        "edge: widen small_sweep.model.init_std below and above 0.02",
    ]


# --- configuration ------------------------------------------------------------------------


def settings(data, directory):
    return {
        "dir": str(directory),
        "target": {
            "model": {"layers": 4, "hidden": 8, "heads": 2, "ffn": 16, "sequence": 8},
            "layout": {"zero": 0}, "data": {"path": str(data)}, "schedule": {"warmup": 2},
            "optimizer": {"lr": 0.02}, "batch": {"global": 4, "micro": 2},
            "train": {"validation_samples": 8, "tensorboard": False},
        },
        "budgets": [1.0e7, 2.0e7],
        "decay": 0.25,
        "sweep": {"lr": [0.001, 0.02], "budgets": [1.0e7]},
        "small_sweep": {"lr": [0.02]},
        "seeds": [1, 2, 3],
        "variants": {
            "stack": {
                "model": {"layers": 2},
                "stages": [{"until": {"flops": 3.0e6}}, {"grow": {"operator": "depth_stack"}}],
            }
        },
        "curve": {"points": 8, "samples": 4},
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "toy")


def parse(mapping):
    return parse_settings(SavingsConfig, mapping, source="test")


def members_of(mapping):
    found = Members(parse(mapping), world=1, vocab=320)
    check(found)
    return found


def test_an_operator_that_scales_the_norms_eps_reaches_the_target(data, tmp_path):
    mapping = settings(data, tmp_path)
    stack = mapping["variants"]["stack"]
    stack["model"] = {"hidden": 4, "heads": 1, "ffn": 8}
    stack["stages"][1]["grow"]["operator"] = "width_fresh"
    members_of(mapping)  # raises, were it another target


def test_branches_share_a_stable_run_and_decay_alike(data, tmp_path):
    members = members_of(settings(data, tmp_path))
    for name in ("scratch", "stack", "small_2x8"):
        one = members.member(name, {"optimizer.lr": 0.01}, seed=1, budget=2e7)
        same = members.member(name, {"optimizer.lr": 0.01}, seed=1, budget=1e7)
        assert same.directory == one.directory
        branches = members.branches(one, 2e7)
        trunk = one.trunk(branches[-1].start, stop=branches[0].start)
        stable = plan_run(trunk, world=1, vocabulary=320)
        assert {stable.learning_rate.at(s) for s in range(2, branches[-1].start)} == {0.01}
        for branch in branches:
            run = plan_run(one.branch(branch), world=1, vocabulary=320)
            last = run.stages[-1].plan
            assert last.end_flops == pytest.approx(branch.budget, abs=last.flops_per_step)
            rates = run.learning_rate
            assert all(rates.at(s) == stable.learning_rate.at(s) for s in range(branch.start))
            assert rates.at(branch.start + 1) < 0.01
            decayed = (branch.end - branch.start) * last.flops_per_step
            assert decayed == pytest.approx(0.25 * branch.budget, abs=last.flops_per_step)


def test_stages_of_variants_take_what_stages_of_runs_take():
    assert set(VariantStage.model_fields) == {*StageConfig.model_fields, "share"}


def test_a_variants_own_settings_reach_its_runs(data, tmp_path):
    """Rate, batch, sequence: a variant's own settings take precedence over the sweep's."""
    mapping = settings(data, tmp_path)
    stack = mapping["variants"]["stack"]
    stack["settings"] = {"optimizer": {"lr": 0.005}, "schedule": {"warmup": 3}}
    stack["stages"][0] |= {"batch": {"global": 2, "micro": 2}, "sequence": 4}
    stack["stages"][1] |= {"batch": {"global": 8, "micro": 4}, "sequence": 8}
    members = members_of(mapping)
    one = members.member("stack", {"optimizer.lr": 0.001}, seed=1, budget=2e7)
    for run in (one.trunk(500, stop=100), one.branch(members.branches(one, 2e7)[-1])):
        plan = plan_run(run, world=1, vocabulary=320)
        assert run.optimizer.lr == 0.005 and plan.learning_rate.at(5) == 0.005
        assert run.schedule.warmup == 3
        small, grown = (stage.plan for stage in plan.stages)
        assert (small.batch.global_, small.sequence) == (2, 4)
        assert (grown.batch.global_, grown.sequence) == (8, 8)
    # What it does not say is the baseline's.
    del stack["settings"]
    one = members_of(mapping).member("stack", {"optimizer.lr": 0.001}, seed=1, budget=2e7)
    assert one.trunk(500, stop=100).optimizer.lr == 0.001


def test_budgets_in_tokens_a_parameter(data, tmp_path):
    mapping = settings(data, tmp_path)
    mapping["budgets"] = {"tokens_per_parameter": [5, 10]}
    mapping["sweep"]["budgets"] = [10]
    mapping["variants"]["stack"]["stages"][0] = {"share": 0.2}
    members = members_of(mapping)
    # Four blocks of 8 x 8 for q, k, v and o and two of 8 x 16, and a head of 320 x 8.
    assert members.parameters == 4 * (4 * 64 + 2 * 128) + 320 * 8
    assert [members.tokens_per_parameter(b) for b in members.budgets] == pytest.approx([5, 10])
    one = members.member("scratch", {}, seed=1, budget=members.budgets[1])
    last = one.stages(members.branches(one, members.budgets[1])[-1], world=1, vocab=320)[-1].plan
    assert last.end_tokens == pytest.approx(10 * members.parameters, abs=last.tokens_per_step)
    # Each budget has a growth, and so a stable run, of its own.
    places = set()
    for budget in members.budgets:
        one = members.member("stack", {}, seed=1, budget=budget)
        [branch] = members.branches(one, budget)
        small = one.stages(branch, world=1, vocab=320)[0].plan
        assert small.end_flops == pytest.approx(0.2 * budget, abs=small.flops_per_step)
        places.add(one.directory)
    assert len(places) == 2


def test_every_distinct_small_model_is_one_control(data, tmp_path):
    mapping = settings(data, tmp_path)
    stack = mapping["variants"]["stack"]
    wide = {"model": {"hidden": 4, "heads": 1, "ffn": 8},
            "stages": [{"until": {"flops": 1e6}}, {"grow": {"operator": "width"}}]}  # fmt: skip
    later = {**stack, "stages": [{"until": {"flops": 5e6}}, stack["stages"][1]]}
    mapping["variants"] |= {"later": later, "wide": wide}
    assert set(members_of(mapping).smalls) == {"small_2x8", "small_4x4"}
    mapping["controls"] = {"small_half": {"model": {"layers": 2}},
                           "small_thin": {"model": {"ffn": 8}}}  # fmt: skip
    members = members_of(mapping)
    assert set(members.smalls) == {"small_half", "small_thin", "small_4x4"}
    starts = {name: members.start_of(name) for name in mapping["variants"]}
    assert starts == {"stack": "small_half", "later": "small_half", "wide": "small_4x4"}


def test_a_directory_tells_apart_what_a_result_depends_on(data, tmp_path):
    mapping = settings(data, tmp_path)

    def place(**sections):
        for name, section in sections.items():
            mapping["target"][name] = {**mapping["target"].get(name, {}), **section}
        one = members_of(mapping).member("stack", {}, seed=1, budget=2e7)
        return one.directory.name

    first = place()
    assert place(train={"log_every": 3}, checkpoint={"every": 7}) == first
    assert place(optimizer={"weight_decay": 0.1}) == first  # its default
    assert place(optimizer={"weight_decay": 0.2}) != first
    assert place(optimizer={"weight_decay": 0.1}) == first
    assert place(train={"validation_samples": 9}) != first


def test_a_swept_batch_takes_a_micro_batch_that_divides_it(data, tmp_path):
    mapping = settings(data, tmp_path)
    mapping["target"]["batch"] = {"global": 6, "micro": 6}
    mapping["sweep"] = {"batch.global": [4, 6, 9]}
    mapping["small_sweep"] = {"lr": [0.02]}
    members = members_of(mapping)
    found = []
    for batch in (4, 6, 9):
        one = members.member("scratch", {"batch.global": batch}, seed=1, budget=2e7)
        run = one.trunk(500, stop=100).batch
        found.append((run.global_, run.micro))
    assert found == [(4, 2), (6, 6), (9, 3)]


def test_of_norm_eps_a_growth_of_width_may_leave_what_it_must():
    def stages(*models):
        return [SimpleNamespace(model=SimpleNamespace(hidden=h, norm_eps=e)) for h, e in models]

    target = SimpleNamespace(hidden=48, norm_eps=1e-5)
    assert eps_follows_width(stages((24, 1e-5), (48, 0.5e-5)), target)
    assert eps_follows_width(stages((24, 1e-5), (48, 1e-5)), target)
    assert eps_follows_width(stages((12, 1e-5), (24, 0.5e-5), (24, 0.5e-5), (48, 0.5e-5)), target)
    assert not eps_follows_width(stages((24, 1e-5), (48, 0.4e-5)), target)
    assert not eps_follows_width(stages((24, 2e-5), (48, 1e-5)), target)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.update(budgets=[2e7, 1e7]), "budgets: must rise"),
        (lambda s: s.update(budgets={"flops": [1e7, 2e7], "tokens_per_parameter": [1, 2]}),
         "give flops or tokens_per_parameter"),
        (lambda s: s["sweep"].update(budgets=[3e6]), "sweep.budgets: 3e[+]06 is none of"),
        (lambda s: s.update(sweep={"by": "grid"}), "sweep: names no setting"),
        (lambda s: s["sweep"].update({"optimizer.rate": [1.0]}), "no setting of a run that can"),
        (lambda s: s["sweep"].update({"run.seed": [1]}), "no setting of a run that can"),
        (lambda s: s["sweep"].update(lr=[0.1, 0.3]), "lacks the target's own value"),
        (lambda s: s["sweep"].update({"batch.global": [4, 0]}), "batch.global"),
        (lambda s: s["sweep"].update(lr=[0.02, 0.02]), "optimizer.lr: names a value twice"),
        (lambda s: s["sweep"].update(model=[{"init_std": 0.1}]), "model.KEY, instead"),
        (lambda s: s["variants"]["stack"]["stages"][1].update(schedule={"decay": 0.5}), "schedule"),
        (lambda s: s["target"]["train"].update(average={"last": 0.1}), "set average of the bench"),
        (lambda s: s["target"].update(stages=[]), "target.stages: the benchmark sets it"),
        (lambda s: s["target"].update(schedule={}), "target.schedule.warmup: is not given"),
        (lambda s: s["variants"]["stack"]["stages"][0].pop("until"), "say when the stage ends"),
        (lambda s: s["variants"]["stack"]["stages"][0].update(share=0.1), "say when the stage"),
        (lambda s: s["variants"]["stack"]["stages"][1].update(share=0.1), "the budget ends"),
        (lambda s: s["variants"]["stack"]["model"].update(layers=1), "does not grow to the target"),
        (lambda s: s["variants"]["stack"]["stages"][0]["until"].update(flops=9e6), "no room"),
        (lambda s: s.update(seeds=[1, 1]), "seeds: names a value twice"),
        (lambda s: s.update(controls={"half": {"model": {"layers": 2}}}), "must begin with small"),
        (lambda s: s.update(budgetz=1), "did you mean budgets"),
        (lambda s: s["target"]["model"].update(hiden=8), "did you mean model.hidden"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(data, tmp_path, change, said):
    mapping = settings(data, tmp_path)
    change(mapping)
    with pytest.raises(ConfigError, match=said):
        members_of(mapping)


# --- what is called a saving --------------------------------------------------------------

SEEDS = [1, 2, 3, 4]
NOISE = [0.0, 1e-4, -1e-4]


def curves_of(**losses):
    """Three budgets, losses that fall by 0.2 each; every seed a little noise of the run's own."""
    found = {}
    for turn, (name, at) in enumerate(losses.items()):
        for seed in SEEDS:
            off = NOISE[(seed + turn) % 3] if seed > 1 else -0.02
            found[name, seed] = curve(*(at + off - 0.2 * i for i in range(3)))
    return found


def reasons_of(curves, *, edges=(), limit=None, smalls=("small",)):
    at = {"budget": 4e3, "seeds": SEEDS}
    return why_not(
        against_scratch=compared(curves, "grown", "scratch", **at),
        against_smalls={name: compared(curves, "grown", name, **at) for name in smalls},
        edges=list(edges),
        bound=limit,
    )


def without(curves, name, *seeds):
    return {key: own for key, own in curves.items() if key[0] != name or key[1] not in seeds}


GOOD = curves_of(scratch=4.0, small=4.1, grown=3.9)


@pytest.mark.parametrize(
    ("curves", "more", "why"),
    [
        (GOOD, {}, []),
        (GOOD, {"limit": Bound(0.4, 10.0, False)}, []),
        (GOOD, {"edges": ["edge: widen sweep.optimizer.lr above 0.008"]}, ["edge: widen sweep"]),
        (GOOD, {"limit": Bound(1e-5, 10.0, False)}, ["bound below twice the noise"]),
        (curves_of(scratch=4.0, small=4.1, grown=3.99995), {}, ["interval includes 0"]),
        (curves_of(scratch=4.0, small=4.2, grown=4.1), {}, ["scratch is better"]),
        (curves_of(scratch=4.0, small=3.8, grown=3.9), {}, ["small alone is better (small)"]),
        (curves_of(scratch=4.0, small=3.9, grown=3.9), {},
         ["interval includes 0 against small alone (small)"]),
        (curves_of(scratch=5.0, small=5.0, grown=3.9), {}, ["only bounded (>=)"]),
        (without(GOOD, "grown", 2, 3, 4), {}, ["not finished (seed 2, 3, 4, against scratch)",
                                               "not finished", "no seed but the one"]),
        (without(GOOD, "small", 4), {}, ["not finished (seed 4, against small)"]),
        ({**GOOD, ("grown", 3): curve(3.9, 3.7, math.inf)}, {},
         ["a run diverged (seed 3, against scratch)", "a run diverged (seed 3, against small)"]),
    ],
)  # fmt: skip
def test_a_saving_is_called_only_where_nothing_speaks_against_it(curves, more, why):
    found = reasons_of(curves, **more)
    assert len(found) == len(why), found
    assert all(text.startswith(start) for text, start in zip(found, why, strict=True)), found


def test_every_small_model_counts():
    curves = GOOD | {("other", seed): own for (name, seed), own in
                     curves_of(a=1.0, b=1.0, other=3.7).items() if name == "other"}  # fmt: skip
    assert reasons_of(curves, smalls=("small", "other")) == ["small alone is better (other)"]


def test_the_seed_that_tuned_and_chose_is_in_no_mean():
    found = compared(GOOD, "grown", "scratch", budget=4e3, seeds=SEEDS)
    fresh = [found.by_seed[seed]["flops"].value for seed in SEEDS[1:]]
    by_hand = interval(fresh)
    saved = found.costs["flops"]
    assert (saved.mean, saved.sd, saved.low, saved.seeds) == (by_hand.mean, by_hand.sd,
                                                              by_hand.low, 3)  # fmt: skip
    assert set(found.by_seed) == set(SEEDS)  # but it is shown
    differences = [GOOD["grown", s][2].loss - GOOD["scratch", s][2].loss for s in SEEDS[1:]]
    assert asdict(found.loss) == asdict(interval(differences))


def test_bounds_are_never_averaged_as_values():
    value, least, most = (Saving(1.0, grown, 10.0, kind)
                          for kind, grown in (("", 6), (">=", 5), ("<=", 12)))  # fmt: skip
    found = summarised([value, least, least])
    assert (found.bound, found.sd, found.low, found.high) == (">=", None, None, None)
    assert found.mean == pytest.approx((0.4 + 0.5 + 0.5) / 3)
    assert summarised([value, most]).bound == "<="
    both = summarised([value, least, most])
    assert (both.mean, both.low, both.bound) == (None, None, "<=/>=")
    assert summarised([]).mean is None


# --- a whole benchmark --------------------------------------------------------------------


def command(path, *more):
    return benchmark.main(["savings", "--config", str(path), *map(str, more)])


def result_of(path, tmp_path, *more):
    file = tmp_path / "result.json"
    assert command(path, "--json", file, *more) == 0
    return json.loads(file.read_text())


def logs_of(directory):
    return {p: p.read_bytes() for p in directory.rglob("metrics.jsonl")}


def test_a_disk_that_refuses_is_told_of(data, tmp_path, capsys, monkeypatch):
    """Whatever touches the benchmark's directory, in a worker or here."""
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(settings(data, tmp_path / "runs")))

    def refused(*arguments, **more):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "runs" / "log.txt"))

    monkeypatch.setattr("megagrow.savings.command.train", refused)
    assert command(path) == 1
    said = capsys.readouterr().err
    assert "runs: cannot be written or read" in said and "ENOSPC" in said
    assert "free disk space" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_benchmark_in_miniature(data, tmp_path, capsys):
    mapping = settings(data, tmp_path / "runs")
    # One of the rates diverges, which is a result and no failure.
    mapping["sweep"]["lr"] = [0.001, 0.02, 1e30]
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(mapping))
    assert command(path, "--dry-run") == 0
    assert not (tmp_path / "runs").exists()
    assert command(path, "--minutes", 1e-9) == 0
    assert "Not finished" in capsys.readouterr().out

    result = result_of(path, tmp_path, "--jobs", 2)
    assert result["complete"] and result["version"] == VERSION
    by_name = {(one["name"], one["budget"]): one for one in result["sweeps"]}
    tuned = by_name["scratch", 1e7]
    assert tuned["best"] == {"optimizer.lr": 0.02} and tuned["edges"] == []
    assert [one["loss"] is None for one in tuned["tried"]] == [False, False, True]
    assert set(by_name) == {("scratch", 1e7), ("small_2x8", 1e7), ("small_2x8", 2e7)}
    runs = {(one["name"], one["seed"], one["budget"]): one for one in result["runs"]}
    assert set(runs) == {(name, seed, budget) for name in ("scratch", "stack", "small_2x8")
                         for seed in (1, 2, 3) for budget in (1e7, 2e7)}  # fmt: skip
    # What is charged is what the runs logged, and the growth on top.
    for (name, seed, budget), one in runs.items():
        [directory] = (tmp_path / "runs" / name).glob(f"lr_0.02-seed_{seed}-*")
        log = log_of(path, f"run.dir={directory / f'budget_{budget:.4e}'}")
        steps = [line for line in log if line["event"] == "step"]
        final = [line for line in log if line["event"] == "validation"][-1]
        assert one["loss"] == final["val_loss"] and one["tokens"] == steps[-1]["tokens"]
        assert one["flops"] == pytest.approx(steps[-1]["flops"] + one["growth_flops"])
        assert (one["growth_flops"] > 0) == (name == "stack")
        assert not list((directory / f"budget_{budget:.4e}").rglob("*.safetensors"))
        # The first seeds of what is tuned validate along the way.
        log = log_of(path, f"run.dir={directory / 'stable'}")
        validated = sum(line["event"] == "validation" for line in log)
        assert (validated >= 8) == (seed == 1 and name != "stack")
    row = next(one for one in result["rows"] if one["name"] == "stack" and one["budget"] == 2e7)
    assert row["finalist"] and row["against_scratch"]["flops"]["seeds"] == 2
    assert set(row["against_smalls"]) == {"small_2x8"} and row["bound"] is not None
    assert not row["called"] and any("widen small_sweep" in text for text in row["why_not"])
    said = capsys.readouterr().out
    assert "| tokens a parameter" in said and "no saving is called" in said
    page = (tmp_path / "runs/report.html").read_text()
    assert "small_2x8" in page and "http://" not in page.replace("http://www.w3.org", "")
    figure = (tmp_path / "runs/savings.svg").read_text()
    assert "</svg>" in figure and "bound from small_2x8" in figure and "stack" in figure

    # Speeds measured in turns: every step of a stage then costs the same, in every run.
    timed = result_of(path, tmp_path, "--collect", "--clock")
    speeds = {json.loads(key)["layers"]: speed for key, speed in
              timed["tokens_per_second"].items()}  # fmt: skip
    assert set(speeds) == {2, 4}
    for run in timed["runs"]:
        layers = {"scratch": 4, "small_2x8": 2}.get(run["name"])
        if layers:
            assert run["seconds"] == pytest.approx(run["tokens"] / speeds[layers])

    # Again: nothing is trained.  Without a branch: it alone is, to the same loss.
    logs = logs_of(tmp_path / "runs")
    result_of(path, tmp_path)
    assert logs_of(tmp_path / "runs") == logs
    [lost] = (tmp_path / "runs/stack").glob("lr_0.02-seed_2-*/budget_2.0000e+07")
    (lost / "metrics.jsonl").unlink()
    (tmp_path / "result.json").unlink()  # or it is known
    assert not result_of(path, tmp_path, "--collect")["complete"]
    redone = result_of(path, tmp_path)
    after = logs_of(tmp_path / "runs")
    assert {p: content for p, content in after.items() if p.parent != lost} == {
        p: content for p, content in logs.items() if p.parent != lost
    }
    assert [one["loss"] for one in redone["runs"]] == [one["loss"] for one in result["runs"]]


@pytest.mark.slow
@pytest.mark.parametrize("keep", [True, False])
def test_budgets_and_sweeps_that_come_later_redo_nothing(data, tmp_path, keep):
    """A budget between finished ones whose state was not kept, and a wider sweep."""
    mapping = settings(data, tmp_path / "runs")
    mapping |= {"seeds": [1, 2], "small_sweep": {"lr": [0.02]}, "keep_states": keep}
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(mapping))
    before = result_of(path, tmp_path, "--jobs", 1)
    logs = logs_of(tmp_path / "runs")
    assert keep == bool(list((tmp_path / "runs").rglob("*.safetensors")))
    mapping |= {"budgets": [1.0e7, 1.5e7, 2.0e7]}
    mapping["sweep"]["lr"] = [0.001, 0.02, 0.04]
    path.write_text(yaml.safe_dump(mapping))
    after = result_of(path, tmp_path, "--jobs", 1)
    assert after["complete"]
    now = logs_of(tmp_path / "runs")
    assert all(now[p] == content for p, content in logs.items())
    if next(one["best"] for one in after["sweeps"] if one["name"] == "scratch") == {
        "optimizer.lr": 0.02
    }:
        known = {(r["name"], r["seed"], r["budget"]): r["loss"] for r in after["runs"]}
        assert all(known[r["name"], r["seed"], r["budget"]] == r["loss"] for r in before["runs"])
    # Weights that are to be averaged after all: decays are trained again, stable runs are not.
    logs = logs_of(tmp_path / "runs")
    path.write_text(yaml.safe_dump({**mapping, "average": 0.5}))
    mean = result_of(path, tmp_path, "--jobs", 1)
    now = logs_of(tmp_path / "runs")
    assert all(now[p] == logs[p] for p in logs if p.parent.name == "stable")
    for one, other in zip(mean["runs"], after["runs"], strict=True):
        assert one["last_loss"] == other["loss"] != one["loss"]
        assert one["loss"] == pytest.approx(other["loss"], abs=0.05)
    # The state that was made once more is the one that a whole new benchmark comes by.
    path.write_text(yaml.safe_dump({**mapping, "dir": str(tmp_path / "new")}))
    new = result_of(path, tmp_path, "--jobs", 1)
    assert [(r["name"], r["loss"]) for r in new["runs"]] == [
        (r["name"], r["loss"]) for r in after["runs"]
    ]


@pytest.mark.slow
def test_a_benchmark_that_is_killed_leaves_no_worker_and_goes_on(data, tmp_path):
    mapping = settings(data, tmp_path / "runs") | {"seeds": [1, 2]}
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(mapping))
    words = [sys.executable, REPOSITORY / "launch/benchmark.py", "savings", "--config", path]
    for number in (signal.SIGKILL, signal.SIGTERM):
        before = len(logs_of(tmp_path / "runs"))
        process = subprocess.Popen(list(map(str, [*words, "--jobs", "2"])))
        while len(logs_of(tmp_path / "runs")) < before + 4:
            assert process.poll() is None
            time.sleep(0.05)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.wait()
        assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=20)[1]
    result = result_of(path, tmp_path, "--jobs", 1)
    path.write_text(yaml.safe_dump({**mapping, "dir": str(tmp_path / "undisturbed")}))
    whole = result_of(path, tmp_path, "--jobs", 1)
    assert result["complete"]
    for one, other in zip(result["runs"], whole["runs"], strict=True):
        assert (one["name"], one["seed"], one["loss"]) == (other["name"], other["seed"],
                                                           other["loss"])  # fmt: skip


def _under_a_launcher(comm, mapping):
    bench = campaigns.Campaign(parse(mapping), world=comm.world, vocab=320)
    done = campaigns.train(bench, comm=comm, jobs=1, until=None)
    return done, collect(bench) if comm.rank == 0 else None


def test_the_processes_of_a_launcher_train_together(data, tmp_path):
    mapping = settings(data, tmp_path / "runs")
    mapping |= {"seeds": [1], "sweep": {"lr": [0.02]}, "curve": {"points": 0}}
    [(done, result), (other, _)] = run_ranks(2, _under_a_launcher, mapping)
    assert done and other
    assert {run["name"] for run in result["runs"]} == {"scratch", "stack", "small_2x8"}
    assert result["bounds"] == []
    [directory] = (tmp_path / "runs/scratch").glob("lr_0.02-seed_1-*")
    log = log_of(None, f"run.dir={directory}/stable")
    assert [line["world"] for line in log if line["event"] == "run_start"] == [2]


def test_a_sweep_may_be_decided_by_several_seeds(data, tmp_path):
    """What is best with the first seed alone need not be."""
    mapping = settings(data, tmp_path)
    mapping["sweep"] = {"lr": [0.01, 0.02], "budgets": [1.0e7], "seeds": 2}
    bench = bench_of(mapping)
    swept = {(task.member.seed, task.member.point["optimizer.lr"]) for task in bench.missing()
             if task.member.name == "scratch"}  # fmt: skip
    assert swept == {(seed, lr) for seed in (1, 2) for lr in (0.01, 0.02)}
    # By the first seed 0.01 is better by 0.1, by the second worse by 0.3.
    losses = {(1, 0.01): 1.0, (1, 0.02): 1.1, (2, 0.01): 1.4, (2, 0.02): 1.1}
    pairs = [(task.member, branch) for task in bench.missing() for branch in task.wanted]
    for one, branch in pairs:
        loss = losses.get((one.seed, one.point["optimizer.lr"]), 2.0)
        point = Point(branch.budget, branch.budget, 10.0, 0.1, loss, 0.0, 0.0, loss)
        key = bench.key(one, branch)
        entry = {key: EndPoint(key, point, "0.0.9")}
        bench.known = replace(bench.known, points={**bench.known.points, **entry})
    assert bench.best("scratch", bench.budgets[0]) == {"optimizer.lr": 0.02}
    assert bench.loss("scratch", bench.budgets[0], {"optimizer.lr": 0.01}) == pytest.approx(1.2)
    assert bench.config.tuning_seeds == 2
    mapping["sweep"]["seeds"] = 4
    with pytest.raises(ConfigError, match=r"sweep\.seeds: 4 of 3 seeds"):
        parse(mapping)


# --- what files know ----------------------------------------------------------------------


def bench_of(mapping, *files, result=None, data="da7a"):
    return campaigns.Campaign(
        parse(mapping), world=1, vocab=320, data=data, known=read_known(result, files)
    )


def pretend(bench, *, worse=0.0, version="0.0.9", diverges=()):
    """Make everything missing known with a synthetic loss, as if trained; (name, seed) of each.

    The second seed of a name in `diverges` has no loss.
    """
    trained = []
    while tasks := bench.missing():
        for task in tasks:
            one = task.member
            for branch in task.wanted:
                key = bench.key(one, branch)
                loss = 9.0 - math.log10(branch.budget) + one.seed / 100 + worse
                loss += abs(one.point.get("optimizer.lr", 0.02) - 0.02)
                if one.name in diverges and one.seed == 2:
                    point = Point(branch.budget, branch.budget, math.nan, math.nan, math.inf, 0, 0)
                else:
                    point = Point(branch.budget, branch.budget + 1.0, 10.0, 0.1, loss, 0.01, 1.0,
                                  loss + 0.5)  # fmt: skip
                bench.known = replace(
                    bench.known,
                    points={**bench.known.points, key: EndPoint(key, point, version)},
                )
                trained.append((one.name, one.seed))
    return trained


def written(bench, file):
    file.write_text(json.dumps({**collect(bench)}, allow_nan=False))
    return json.loads(file.read_text())


@pytest.fixture
def known(data, tmp_path):
    """(settings, the file of a pretended benchmark with them, its result)."""
    mapping = settings(data, tmp_path / "runs") | {"seeds": [1, 2]}
    bench = bench_of(mapping)
    pretend(bench)
    return mapping, tmp_path / "known.json", written(bench, tmp_path / "known.json")


def test_what_is_known_is_not_trained_on_another_machine(data, tmp_path, capsys):
    """Trained, deleted, collected again from the file alone: the same numbers everywhere."""
    mapping = settings(data, tmp_path / "runs") | {"seeds": [1, 2]}
    mapping["sweep"]["lr"] = [0.02]
    path, runs, file = tmp_path / "bench.yaml", tmp_path / "runs", tmp_path / "result.json"
    path.write_text(yaml.safe_dump(mapping))
    before = result_of(path, tmp_path, "--jobs", 2)
    assert before["complete"] and before["from_files"]["points"] == 0
    assert len(before["known"]["points"]) == 12 and len(before["known"]["curves"]) == 3
    drawn = {name: (runs / name).read_bytes() for name in ("savings.svg", "losses.svg")}
    # Another decay is another result, though its directory is the same.
    other = bench_of({**mapping, "decay": 0.4})
    assert {t.member.name for t in other.missing()} == {"scratch", "small_2x8"}
    # Local runs take precedence, and differing known results are reported.
    wrong = json.loads(file.read_text())
    wrong["known"]["points"][0]["loss"] += 1.0
    file.write_text(json.dumps(wrong))
    capsys.readouterr()
    again = result_of(path, tmp_path)
    run = wrong["known"]["points"][0]["run"]
    assert f"{run}, decay over steps" in capsys.readouterr().out
    assert again["runs"] == before["runs"] and again["known"] == before["known"]

    file.rename(tmp_path / "known.json")
    shutil.rmtree(runs)
    after = result_of(path, tmp_path, "--known", tmp_path / "known.json")
    assert not logs_of(runs)
    said = capsys.readouterr().out
    assert "12 of 12 end points come from files (megagrow 0.1.0: 12)" in said
    assert "come from files" in (runs / "report.html").read_text()
    differs = {key for key in before if before[key] != after[key]}
    assert differs <= {"command", "time", "machine", "from_files"}
    assert drawn == {name: (runs / name).read_bytes() for name in drawn}
    # The file of --json is known by itself.
    assert result_of(path, tmp_path)["known"] == before["known"] and not logs_of(runs)


def test_a_new_seed_or_budget_trains_nothing_else(known):
    mapping, file, result = known
    assert not bench_of(mapping, file).missing()
    more = bench_of(mapping | {"seeds": [1, 2, 3]}, file)
    assert {task.member.seed for task in more.missing()} == {3}
    assert "known from files" in plan_text(more)
    assert set(pretend(more, version="0.2.0")) == {
        (name, 3) for name in ("scratch", "small_2x8", "stack")
    }
    found = collect(more)
    row = next(row for row in found["rows"] if row["name"] == "stack")
    assert found["complete"] and row["against_scratch"]["flops"]["seeds"] == 2
    assert found["from_files"]["versions"] == {"0.0.9": len(result["known"]["points"]),
                                               "0.2.0": 6}  # fmt: skip
    # A budget more: the others' decays stay.
    longer = mapping | {"budgets": [1.0e7, 2.0e7, 3.0e7]}
    assert {b.budget for task in bench_of(longer, file).missing() for b in task.wanted} == {3.0e7}


def test_a_changed_setting_never_meets_a_known_result(known):
    mapping, file, _ = known

    def trained(change=lambda m: None, data="da7a"):
        other = json.loads(json.dumps(mapping))
        change(other)
        return set(pretend(bench_of(other, file, data=data)))

    everything = {(name, seed) for name in ("scratch", "small_2x8", "stack") for seed in (1, 2)}
    assert trained() == set()
    assert trained(lambda m: m.update(decay=0.4)) == everything
    assert trained(lambda m: m.update(average=0.5)) == everything
    assert trained(lambda m: m["target"]["optimizer"].update(weight_decay=0.3)) == everything
    assert trained(lambda m: m["target"]["train"].update(validation_samples=9)) == everything
    assert trained(data="0ther") == everything
    stack = {(name, seed) for name, seed in everything if name == "stack"}
    later = {"flops": 5.0e6}
    assert trained(lambda m: m["variants"]["stack"]["stages"][0].update(until=later)) == stack
    # What no result depends on changes nothing: where the runs are, how often they log.
    assert trained(lambda m: m.update(dir="elsewhere")) == set()
    assert trained(lambda m: m["target"]["train"].update(log_every=3)) == set()


def test_nothing_that_is_known_is_lost(known, tmp_path):
    mapping, file, result = known
    less = mapping | {"seeds": [1]}
    less["sweep"] = {"lr": [0.02]}
    bench = bench_of(less, result=file)
    assert not bench.missing()
    found = written(bench, file)
    assert found["known"] == result["known"]
    assert found["from_files"]["points"] == 6 < len(result["known"]["points"])
    assert not bench_of(mapping, file).missing()


def test_of_two_files_the_first_counts_and_the_other_is_told_of(known, tmp_path):
    mapping, file, result = known
    other = bench_of(mapping)
    pretend(other, worse=1.0)
    second = written(other, tmp_path / "second.json")
    both = bench_of(mapping, tmp_path / "second.json", result=file)
    found = collect(both)
    assert found["runs"] == result["runs"] != second["runs"]
    told = origin(found)
    assert f"the one of {tmp_path / 'second.json'} is" in told[1]
    assert len(told) == 10 and "more such lines" in told[-1]
    assert len(found["from_files"]["notes"]) == len(result["known"]["points"])
    # The same file by both options is one.
    assert not read_known(file, [file]).notes


def test_a_run_that_diverged_is_known_as_such(data, tmp_path):
    mapping = settings(data, tmp_path / "runs") | {"seeds": [1, 2]}
    bench = bench_of(mapping)
    pretend(bench, diverges=("stack",))
    result = written(bench, tmp_path / "known.json")
    again = bench_of(mapping, tmp_path / "known.json")
    assert not again.missing()
    assert collect(again)["rows"] == result["rows"] and collect(again)["runs"] == result["runs"]
    row = next(row for row in result["rows"] if row["name"] == "stack")
    assert row["losses"]["2"] is None and "a run diverged" in row["why_not"][0]
    assert {one.name for one in fields(Point)} <= set(result["known"]["points"][0])


def test_an_older_result_is_taken_as_knowing_nothing(data, tmp_path, capsys):
    mapping = settings(data, tmp_path / "runs")
    path, file = tmp_path / "bench.yaml", tmp_path / "result.json"
    path.write_text(yaml.safe_dump(mapping))
    older = json.loads((REPOSITORY / "benchmarks/savings_2x48.json").read_text())
    older.pop("known", None)
    file.write_text(json.dumps(older))
    assert command(path, "--json", file, "--dry-run", "--collect") == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "older result" in line]
    assert str(file) in line and "knowing nothing" in line
    assert json.loads(file.read_text()) == older  # a plan writes nothing
    found = collect(bench_of(mapping, result=file))
    assert "older result" in table(found) and found["known"]["points"] == []


def entry(result):
    return result["known"]["points"][0]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda r: r.update(benchmark="growth"), "not a result of this.*a result of 'growth'"),
        (lambda r: r.pop("benchmark"), "not a result of this.*no benchmark's result"),
        (lambda r: r.pop("version"), "another version of the benchmark.*version 1.*version 2"),
        (lambda r: r.update(version=3), "another version of the benchmark.*version 3.*version 2"),
        (lambda r: r.update(known=None), "section 'known' is damaged"),
        (lambda r: r["known"].pop("curves"), "is damaged.*curves: missing"),
        (lambda r: entry(r).pop("loss"), r"is damaged.*points\[0\].loss: missing"),
        (lambda r: entry(r).update(loss="low"), r"points\[0\].loss: expected a valid number"),
        (lambda r: entry(r).update(loss=math.nan), r"points\[0\].loss"),
        (lambda r: entry(r).update(loss=-1.0), r"points\[0\].loss"),
        (lambda r: entry(r).update(los=1.0), r"points\[0\].los: unknown"),
        (lambda r: r["known"]["points"].append(entry(r)), "one is there twice"),
        (lambda r: r["known"]["curves"].append(
            {"run": "a/b", "data": "", "kind": "training", "samples": None, "version": "1",
             "flops": [1.0], "loss": [1.0, 2.0], "growths": []}), "is damaged"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_such_result_is_refused(known, damage, said):
    mapping, file, result = known
    damage(result)
    file.write_text(json.dumps(result))
    for option, files in (("--known", {"files": [file]}), ("--json", {"result": file})):
        with pytest.raises(ConfigError, match=f"(?s){option}.*{file.name}: .*{said}.*fix: "):
            bench_of(mapping, *files.get("files", ()), result=files.get("result"))


def test_a_file_that_cannot_be_read_is_refused_before_anything_is_trained(known, tmp_path, capsys):
    mapping, file, _ = known
    path, half = tmp_path / "bench.yaml", file.read_bytes()[:3000]
    path.write_text(yaml.safe_dump(mapping))
    file.write_bytes(half)
    for words, said in (
        (["--known", file], "is damaged, or no result"),
        (["--json", file], "is damaged, or no result"),
        (["--known", tmp_path / "none.json"], "No such file"),
        (["--known", tmp_path], "Is a directory"),
    ):
        assert command(path, *words) == 1
        told = capsys.readouterr().err
        assert said in told and "expected:" in told and "fix:" in told
    assert file.read_bytes() == half and not logs_of(tmp_path)


def test_seconds_that_were_measured_here_are_not_given_to_known_points(known):
    mapping, file, result = known
    bench = bench_of(mapping, file)
    bench.speeds = {"": 1.0}
    keys = bench.stage_keys(*bench.run("stack", 1, 2.0e7))
    bench.speeds = dict.fromkeys(keys, 1.0)
    assert len(keys) == 2
    found = collect(bench)
    assert found["runs"] == result["runs"] and found["rows"] == result["rows"]


# --- committed results --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["savings_cpu", "savings_cpu_deep", "savings_cpu_right_size"])
def test_results_of_the_first_version_are_said_to_be_such(name):
    """They were measured by other rules, and no claim is made from them."""
    result = json.loads((REPOSITORY / f"benchmarks/{name}.json").read_text())
    assert "version" not in result and result["claim"]["saving"] is None
    told = (REPOSITORY / "benchmarks/README.md").read_text(encoding="utf-8")
    assert f"`{name}.json`" in told and "of the first version" in told


def test_the_page_tells_what_the_result_holds():
    """Means and intervals of growth and control, and where the benchmark calls a saving."""
    result = json.loads((REPOSITORY / "benchmarks/savings_2x48_depth.json").read_text())
    page = (REPOSITORY / "docs/savings.md").read_text(encoding="utf-8")
    rows = [row for row in result["rows"] if row["name"] in ("depth", "small_1x48")]
    assert len(rows) == 6
    for row in rows:
        flops = row["against_scratch"]["flops"]
        mean, low, high = (100 * flops[key] for key in ("mean", "low", "high"))
        assert f"{mean:.1f} % ({low:.1f} to {high:.1f} %)" in page, row["name"]
        assert flops["seeds"] == 5
    called = [row["called"] for row in rows if row["kind"] == "variant"]
    assert called == [False, True, True]
    assert "calls the savings at 20 and at 40" in " ".join(page.split())
