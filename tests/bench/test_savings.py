"""The savings benchmark: its arithmetic by hand, and a whole one in miniature."""

import importlib.util
import json
import math

import pytest
import yaml
from jobs import REPOSITORY, log_of, make_dataset
from ranks import run_ranks

from megagrow.bench.savings import campaign as campaigns
from megagrow.bench.savings.config import SavingsConfig, check, member
from megagrow.bench.savings.page import table
from megagrow.bench.savings.results import Point, Saving, cost_at, interval, saving
from megagrow.bench.savings.summary import claim, derived, summarised
from megagrow.config.load import parse_settings
from megagrow.errors import ConfigError
from megagrow.train.plan import plan_run


def point(budget, loss, *, growth=0.0):
    return Point(budget, budget + growth, budget / 10, budget / 100, loss, 0.0, growth)


def curve(*losses, growth=0.0):
    return [point(budget, loss, growth=growth) for budget, loss in zip((1e3, 2e3, 4e3), losses,
                                                                       strict=False)]  # fmt: skip


# --- arithmetic ---------------------------------------------------------------------------


def test_saving_where_growth_is_better():
    """Both curves are powers of C with known factors, so every interpolation is exact."""
    scratch = curve(*(8 * c**-0.1 for c in (1e3, 2e3, 4e3)))
    grown = curve(*(8 * (c / 0.6) ** -0.1 for c in (1e3, 2e3, 4e3)))  # as far with 60 %
    for cost in ("flops", "tokens", "seconds"):
        found = saving(scratch, grown, cost)
        assert found.value == pytest.approx(0.4) and found.bound == ""
        assert found.loss == scratch[-1].loss
    back = saving(grown, scratch, "flops")
    assert back.value == pytest.approx(1 - 1 / 0.6) and back.loss == scratch[-1].loss


def test_what_the_budgets_do_not_reach_is_bounded():
    scratch, grown = curve(4.0, 3.8, 3.6), curve(3.5, 3.2, 3.0)
    found = saving(scratch, grown, "flops")
    assert (found.bound, found.value) == (">=", 1 - 1e3 / 4e3)
    found = saving(grown, scratch, "flops")
    assert (found.bound, found.value) == ("<=", 1 - 4e3 / 1e3)
    assert cost_at(scratch, 3.0, "flops") is None and saving([], grown, "flops") is None


def test_growths_are_charged():
    scratch = curve(4.0, 3.8, 3.6)
    free, charged = (saving(scratch, curve(4.0, 3.6, 3.4, growth=g), "flops") for g in (0, 100))
    assert (free.grown, charged.grown) == pytest.approx((2000, 2100))


def test_interval_over_seeds():
    found = interval([0.30, 0.34, 0.38])
    # Student's t, 2 degrees of freedom: 4.3027 standard errors.
    half = 4.30265 * 0.04 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.34 - half, 0.34 + half), rel=1e-5)
    alone = interval([0.3])
    assert (alone.mean, alone.low, alone.high, alone.seeds) == (0.3, None, None, 1)


# --- configuration ------------------------------------------------------------------------


def settings(data, directory):
    return {
        "dir": str(directory),
        "target": {
            "model": {"layers": 4, "hidden": 8, "heads": 2, "ffn": 16, "sequence": 8},
            "layout": {"zero": 0}, "data": {"path": str(data)}, "schedule": {"warmup": 2},
            "batch": {"global": 4, "micro": 2},
            "train": {"validate_every": 1000, "validation_samples": 8, "tensorboard": False},
            "checkpoint": {"every": 1000},
        },
        "budgets": [1.0e7, 2.0e7],
        "decay": 0.25,
        "sweep": {"lr": [0.001, 0.02], "budget": 1.0e7},
        "seeds": [1, 2],
        "variants": {
            "stack": {
                "model": {"layers": 2},
                "stages": [{"until": {"flops": 3.0e6}}, {"grow": {"operator": "depth_stack"}}],
            }
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "toy")


def parse(mapping):
    return parse_settings(SavingsConfig, mapping, source="test")


def test_branches_share_a_stable_run_and_decay_alike(data, tmp_path):
    config = parse(settings(data, tmp_path))
    check(config, world=1, vocab=320)
    for name in ("scratch", "stack", "small_stack"):
        one = member(config, name, lr=0.01, seed=1)
        branches = one.branches(config.budgets, decay=config.decay, world=1, vocab=320)
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


def test_an_operator_that_scales_the_norms_eps_reaches_the_target(data, tmp_path):
    mapping = settings(data, tmp_path)
    stack = mapping["variants"]["stack"]
    stack["model"] = {"hidden": 4, "heads": 1, "ffn": 8}
    stack["stages"][1]["grow"]["operator"] = "width_fresh"
    assert set(check(parse(mapping), world=1, vocab=320)) == {"scratch", "stack", "small_stack"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.update(budgets=[2e7, 1e7]), "budgets: must rise"),
        (lambda s: s["sweep"].update(budget=3e6), "sweep.budget: must be one of"),
        (lambda s: s["target"].update(stages=[]), "target.stages: the benchmark sets it"),
        (lambda s: s["variants"]["stack"]["stages"][0].pop("until"), "say when the stage ends"),
        (lambda s: s["variants"]["stack"]["model"].update(layers=1), "does not grow to the target"),
        (lambda s: s["variants"]["stack"]["stages"][0]["until"].update(flops=9e6), "no room"),
        (lambda s: s.update(seeds=[1, 1]), "seeds: names a value twice"),
        (lambda s: s.update(budgetz=1), "did you mean budgets"),
        (lambda s: s["target"]["model"].update(hiden=8), "did you mean model.hidden"),
    ],
)
def test_what_cannot_be_is_refused(data, tmp_path, change, said):
    mapping = settings(data, tmp_path)
    change(mapping)
    with pytest.raises(ConfigError, match=said):
        check(parse(mapping), world=1, vocab=320)


# --- a whole benchmark --------------------------------------------------------------------


def command(path, *more):
    file = REPOSITORY / "launch/benchmark.py"
    spec = importlib.util.spec_from_file_location("megagrow_benchmark", file)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark.main(["savings", "--config", str(path), "--workers", "1", *map(str, more)])


@pytest.mark.slow
def test_a_benchmark_in_miniature(data, tmp_path, capsys):
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(settings(data, tmp_path / "runs")))
    assert command(path, "--dry-run") == 0
    assert not (tmp_path / "runs").exists()
    assert command(path, "--minutes", 0) == 0
    assert "not finished" in capsys.readouterr().out

    assert command(path, "--json", tmp_path / "a.json") == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["complete"] and result["sweep"]["best"] == 0.02
    runs = {(run["name"], run["seed"]): run["points"] for run in result["runs"]}
    assert set(runs) == {
        ("scratch", 1), ("scratch", 2), ("stack", 1), ("stack", 2), ("small_stack", 1)
    }  # fmt: skip
    assert all(len(points) == 2 for points in runs.values())
    # What is charged is what the runs logged, and the growth on top.
    for (name, seed), points in runs.items():
        directory = tmp_path / "runs" / name / f"lr_0.02-seed_{seed}"
        log = log_of(path, f"run.dir={directory / 'budget_2.000e+07'}")
        steps = [line for line in log if line["event"] == "step"]
        final = [line for line in log if line["event"] == "validation"][-1]
        assert points[1]["loss"] == final["val_loss"] and points[1]["tokens"] == steps[-1]["tokens"]
        grown = points[1]["growth_flops"]
        assert points[1]["flops"] == pytest.approx(steps[-1]["flops"] + grown)
        assert (grown > 0) == (name == "stack")
    flops = result["variants"]["stack"]["flops"]
    assert flops["seeds"] == 2 and flops["low"] < flops["mean"] < flops["high"]
    assert set(result["variants"]["stack"]) == {"flops", "tokens", "seconds"}
    control = result["controls"]["small_stack"]
    assert control["beaten_at_the_largest_budget"] in (True, False)
    page = (tmp_path / "runs/report.html").read_text()
    assert "small_stack" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert (tmp_path / "runs/savings.svg").read_text().startswith("<svg")

    # Speeds measured in turns: every step of a stage then costs the same, in every run.
    assert command(path, "--collect", "--clock", "--json", tmp_path / "a.json") == 0
    timed = json.loads((tmp_path / "a.json").read_text())
    speeds = {json.loads(key)["layers"]: speed for key, speed in
              timed["tokens_per_second"].items()}  # fmt: skip
    assert set(speeds) == {2, 4}
    for run in timed["runs"]:
        layers = {"scratch": 4, "small_stack": 2}.get(run["name"])
        if layers:
            last = run["points"][-1]
            assert last["seconds"] == pytest.approx(last["tokens"] / speeds[layers])

    # Again: nothing is trained.  Without a branch: it alone is.
    logs = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("metrics.jsonl")}
    assert command(path, "--json", tmp_path / "b.json") == 0
    assert {p: p.read_bytes() for p in logs} == logs
    lost = tmp_path / "runs/stack/lr_0.02-seed_2/budget_2.000e+07"
    again = {p: content for p, content in logs.items() if p.parent != lost}
    (lost / "metrics.jsonl").unlink()
    for file in sorted(lost.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    assert command(path, "--collect", "--json", tmp_path / "c.json") == 0
    assert not json.loads((tmp_path / "c.json").read_text())["complete"]
    assert command(path, "--json", tmp_path / "d.json") == 0
    assert {p: p.read_bytes() for p in again} == again
    redone = json.loads((tmp_path / "d.json").read_text())
    assert redone["variants"]["stack"]["flops"]["seeds"] == 2
    for a, b in zip(redone["runs"], result["runs"], strict=True):
        assert [p["loss"] for p in a["points"]] == [p["loss"] for p in b["points"]]


def _under_a_launcher(comm, mapping):
    bench = campaigns.Campaign(parse(mapping), world=comm.world, vocab=320)
    done = campaigns.train(bench, comm=comm, workers=1, until=None)
    return done, bench.result() if comm.rank == 0 else None


def test_the_processes_of_a_launcher_train_together(data, tmp_path):
    mapping = settings(data, tmp_path / "runs")
    mapping |= {"seeds": [1], "sweep": {"lr": [0.02], "budget": 1.0e7}}
    [(done, result), (other, _)] = run_ranks(2, _under_a_launcher, mapping)
    assert done and other
    assert {run["name"] for run in result["runs"]} == {"scratch", "stack", "small_stack"}
    log = log_of(None, f"run.dir={tmp_path}/runs/scratch/lr_0.02-seed_1/stable")
    assert [line["world"] for line in log if line["event"] == "run_start"] == [2]


# --- what is said of them -----------------------------------------------------------------

FALLING = {bound: Saving(1.0, grown, 10.0, bound) for bound, grown in (("", 6), (">=", 5),
                                                                      ("<=", 12))}  # fmt: skip


def test_the_seed_that_chose_is_in_neither_mean_nor_interval():
    one, two, three = (Saving(1.0, grown, 10.0) for grown in (4.0, 8.0, 9.0))
    found = summarised({1: one, 2: two, 3: three}, chosen_by=1)
    assert found.mean == pytest.approx(0.15) and (found.seeds, found.chosen_by) == (2, 1)
    fresh = interval([0.2, 0.1])
    assert (found.low, found.high) == pytest.approx((fresh.low, fresh.high))
    every = summarised({1: one, 2: two, 3: three}, chosen_by=None)
    assert every.mean == pytest.approx(0.3) and (every.seeds, every.chosen_by) == (3, None)
    alone = summarised({1: one}, chosen_by=1)  # nothing else ran: shown, but not fresh
    assert (alone.mean, alone.seeds, alone.chosen_by) == (pytest.approx(0.6), 1, None)


def test_bounds_are_never_averaged_as_values():
    value, least, most = (FALLING[bound] for bound in ("", ">=", "<="))
    found = summarised({1: value, 2: least, 3: least}, chosen_by=None)
    assert (found.bound, found.low, found.high) == (">=", None, None)
    assert found.mean == pytest.approx((0.4 + 0.5 + 0.5) / 3)
    assert summarised({1: value, 2: most}, chosen_by=None).bound == "<="
    both = summarised({1: value, 2: least, 3: most}, chosen_by=None)
    assert (both.mean, both.low, both.bound) == (None, None, "<=/>=")
    # A bound of the seed that chose does not make one of the others.
    assert summarised({1: least, 2: value}, chosen_by=1).bound == ""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, []),
        ({"best_at_an_edge": True}, ["the baseline's best learning rate is at an edge"]),
        ({"seeds": [1]}, ["no seed but the one that chose"]),
        ({"small": (3.9, 3.7, 3.0)}, ["the small model alone is better"]),
        ({"bounds": True}, ["some seeds have a lower bound alone"]),
    ],
)
def test_a_saving_is_claimed_only_where_nothing_speaks_against_it(change, why):
    seeds = change.get("seeds", [1, 2, 3])
    points = {("scratch", seed): curve(4.0, 3.8, 3.6) for seed in seeds}
    points |= {("a", seed): curve(3.9, 3.7, 3.5) for seed in seeds}
    points |= {("b", 1): curve(4.0, 3.8, 3.6)}
    points["small_a", 1] = curve(*change.get("small", (4.0, 3.9, 3.8)))
    if change.get("bounds"):
        points["a", 2] = curve(3.5, 3.4, 3.3)  # better at its smallest budget
        points["a", 3] = curve(4.4, 4.3, 4.2)  # worse at its largest
    result = derived(points, variants=["a", "b"], seeds=seeds) | {
        "config": {"variants": {"a": {}, "b": {}}, "seeds": seeds},
        "sweep": {"best_at_an_edge": change.get("best_at_an_edge", False)},
    }
    found = claim(result, points)
    assert found["variant"] == "a" and len(found["why_not"]) == len(why)
    assert all(text.startswith(start) for text, start in zip(found["why_not"], why, strict=True))
    assert (found["saving"] is None) == bool(why)


@pytest.mark.parametrize("name", ["savings_cpu", "savings_cpu_deep", "savings_cpu_right_size"])
def test_committed_results_and_the_readme_say_what_their_points_say(name):
    result = json.loads((REPOSITORY / f"benchmarks/{name}.json").read_text())
    points = {
        (run["name"], run["seed"]): [Point(**one) for one in run["points"]]
        for run in result["runs"]
    }
    config = result["config"]
    again = derived(points, variants=list(config["variants"]), seeds=config["seeds"])
    assert {key: result[key] for key in again} == again
    assert result["claim"] == claim(result, points) and result["claim"]["saving"] is None
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    if name == "savings_cpu":
        flops = result["variants"]["depth_stack_late"]["flops"]
        mean, low, high = (100 * flops[key] for key in ("mean", "low", "high"))
        assert f"| {flops['seeds']} | {mean:.1f} % (95 %: {low:.1f} to {high:.1f} %)" in readme
    if name == "savings_cpu_deep":
        assert result["sweep"]["best_at_an_edge"]
        assert f"{result['sweep']['best']}, is the highest that was tried" in readme
    assert "no saving is claimed" in table(result)
