"""Runs on mixtures of datasets: resume, other mixtures in later stages, what is refused."""

import json
import math

import pytest

from megagrow.checkpoint import NativeCheckpoint, step_path
from megagrow.config.load import load_config
from megagrow.data.prepare import Request, prepare
from megagrow.data.run_data import open_data
from tests.jobs import (
    events,
    launch,
    log_of,
    main,
    make_dataset,
    settings,
    train,
    trajectory,
    write_config,
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two datasets with one tokenizer, and one with another."""
    home = tmp_path_factory.mktemp("mixture")
    first = make_dataset(home / "first")
    made = {"first": first, "other": make_dataset(home / "other", seed=1)}
    text = (home / "other.txt").read_text(encoding="utf-8")
    (home / "second.txt").write_text(text[: len(text) // 3], encoding="utf-8")
    prepare(
        Request(
            input=str(home / "second.txt"), output=home / "second", documents="paragraph",
            tokenizer=first / "tokenizer.model", validation_fraction=0.1,
        )
    )  # fmt: skip
    return {name: str(path) for name, path in {**made, "second": home / "second"}.items()}


def mapping(paths, run_dir, **changes):
    """Three stages: a mixture, the same with another model, another mixture of longer samples."""
    both = [{"path": paths["first"], "weight": 3.0}, {"path": paths["second"], "weight": 1.0}]
    most = [{"path": paths["second"], "weight": 2.0}, {"path": paths["first"], "weight": 1.0}]
    stages = [
        {"until": {"steps": 3}, "sequence": 4},
        {"until": {"steps": 6}, "grow": {"operator": "width", "factor": 2}},
        {"until": {"steps": 10}, "data": {"sources": most}, "sequence": 8},
    ]
    made = settings(paths["first"], run_dir, **{"stages": stages, **changes})
    made["data"] = {"sources": both}
    return made


def test_a_run_on_mixtures_is_resumed_bit_for_bit_and_counts_what_it_saw(paths, tmp_path):
    config = write_config(tmp_path / "run.yaml", mapping(paths, tmp_path / "run"))
    straight, chain = (["--config", config, f"run.dir={tmp_path / n}"] for n in ("one", "two"))
    stops = [[*chain, f"train.stop_after_steps={n}"] for n in (2, 6, 8)]
    outcomes = launch(2, straight, *stops, chain, timeout=300.0)
    assert [ranks[0].status for ranks in outcomes] == [0] * 5, outcomes
    one, two = (log_of(config, f"run.dir={tmp_path / n}") for n in ("one", "two"))
    assert trajectory(one) == trajectory(two) and len(trajectory(one)) == 10
    last = events(one, "validation")[-1]
    assert set(last["losses"]) == {"first", "second"}
    tokens = last["tokens_by_source"]
    assert sum(tokens.values()) == last["tokens"] == 6 * 8 * 4 + 4 * 8 * 8
    assert abs(tokens["first"] - (6 * 32 * 0.75 + 4 * 64 / 3)) <= 8
    # 10 samples: 7.5 and 2.5, as 8 and 2 or 7 and 3.
    shares = [
        (n * last["losses"]["first"] + (10 - n) * last["losses"]["second"]) / 10 for n in (7, 8)
    ]
    assert any(last["val_loss"] == pytest.approx(mean, rel=1e-6) for mean in shares)
    # One process reads the same samples.
    write_config(tmp_path / "alone.yaml", mapping(paths, tmp_path / "alone"))
    alone = train(1, tmp_path / "alone.yaml")
    for a, b in zip(events(one, "step"), events(alone, "step"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_a_stage_goes_on_with_its_mixture(paths, tmp_path):
    made = mapping(paths, tmp_path / "run")
    config = write_config(tmp_path / "run.yaml", made)
    train(1, config, "train.stop_after_steps=4")
    changed = json.dumps(
        [{"path": paths["first"], "weight": 1.0}, {"path": paths["second"], "weight": 1.0}]
    )
    outcomes = launch(
        1,
        ["--config", config, f"data.sources={changed}"],
        ["--config", config, "data=" + json.dumps({"path": paths["first"]})],
        ["--config", config, "stages.2.data.sources=" + changed],
    )
    weights, single, later = (ranks[0] for ranks in outcomes)
    assert weights.status == single.status == 1
    assert "was trained on another data" in weights.err or "another mixture" in weights.err
    assert later.status == 0, later.err  # what has not begun may change


def test_the_dry_run_says_how_often_each_is_seen(paths, tmp_path):
    made = mapping(paths, tmp_path / "run")
    config = write_config(tmp_path / "run.yaml", made)
    outcome = main(["--config", config, "--dry-run"])
    assert outcome.status == 0, outcome.err
    lines = [line for line in outcome.out.splitlines() if "to train on" in line]
    assert len(lines) == 2 and "first: " in lines[0] and "second: " in lines[1]
    assert all("in stage 2" in line for line in lines)
    made["data"]["sources"][1]["epochs"] = 0.005
    config = write_config(tmp_path / "run.yaml", made)
    outcome = main(["--config", config, "--dry-run"])
    assert outcome.status == 1 and "second is over" in outcome.err and "at_end: drop" in outcome.err


def test_every_rank_knows_that_a_source_is_over(paths, tmp_path):
    """The middle of a pipeline reads no sample; in the next stage it does, from there on."""
    pipeline = {"layout": {"pipeline": 3}, "batch": {"global": 6, "micro": 2}}
    wide = {"layout": {"pipeline": 1}, "until": {"steps": 7}}
    runs = []
    for world, first, second in ((3, pipeline, wide), (1, {}, {"until": {"steps": 7}})):
        stages = [{"until": {"steps": 4}, **({"layout": first["layout"]} if first else {})}, second]
        made = mapping(paths, tmp_path / f"run{world}", stages=stages, batch=pipeline["batch"],
                       train={"validation_samples": 6})  # fmt: skip
        made["data"]["sources"][1] |= {"epochs": 0.004, "at_end": "drop"}
        lines = train(world, write_config(tmp_path / f"{world}.yaml", made))
        runs.append([line["loss"] for line in events(lines, "step")])
        assert events(lines, "validation")[-1]["tokens_by_source"]["second"] < 40
    assert len(runs[0]) == 7 and runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_weights_and_paths_are_written_as_in_megatron(paths, tmp_path):
    made = mapping(paths, tmp_path / "run", stages=[{"until": {"steps": 2}}])
    made["data"] = {"path": f"3 {paths['first']} 1e0 {paths['second']}"}
    config = write_config(tmp_path / "run.yaml", made)
    [step, _] = events(train(1, config), "step")
    made = mapping(paths, tmp_path / "run2", stages=[{"until": {"steps": 2}}])
    config = write_config(tmp_path / "run2.yaml", made)
    assert events(train(1, config), "step")[0]["loss"] == step["loss"]


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        (["first", "other"], "tokenizer_sha256 differs from that of"),
        (["first", "first"], "twice"),
        ([], "data"),
    ],
)
def test_sources_that_do_not_go_together_are_refused(paths, tmp_path, sources, said):
    made = mapping(paths, tmp_path / "run", stages=[{"until": {"steps": 2}}])
    made["data"] = {"sources": [{"path": paths[name], "weight": 1.0} for name in sources]}
    outcome = main(["--config", write_config(tmp_path / "run.yaml", made), "--dry-run"])
    assert outcome.status == 1 and said in outcome.err, outcome.err


def test_further_sets_are_validated_on_by_name_and_not_in_the_mean(paths, tmp_path):
    made = mapping(paths, tmp_path / "run", stages=[{"until": {"steps": 4}}])
    made["data"] = {"path": paths["first"], "validation": {"held": paths["second"]}}
    lines = train(1, write_config(tmp_path / "run.yaml", made))
    last = events(lines, "validation")[-1]
    assert set(last["losses"]) == {"held"} and set(last["bits_per_byte"]) == {"held", "first"}
    made["data"] = {"path": paths["first"]}
    made["run"]["dir"] = str(tmp_path / "alone")
    alone = events(train(1, write_config(tmp_path / "alone.yaml", made)), "validation")[-1]
    assert alone["val_loss"] == last["val_loss"] and "losses" not in alone
    # The text's bytes are those that the tokenizer makes of the labels.
    data = open_data(load_config(tmp_path / "run.yaml"))
    [samples] = data.validation_sets(sequence=8, count=10).values()
    labels = samples[:, 1:]
    text = [
        data.tokenizer.decode([t for t in row if t != data.first.eod]) for row in labels.tolist()
    ]
    bits = last["val_loss"] / math.log(2) * labels.size / sum(len(t.encode()) for t in text)
    assert last["bits_per_byte"]["first"] == pytest.approx(bits)
    long = {**made, "model": {**made["model"], "sequence": 900}}
    long["data"] = {"path": paths["first"], "validation": {"held": paths["second"]}}
    outcome = main(["--config", write_config(tmp_path / "long.yaml", long), "--dry-run"])
    assert outcome.status == 1 and "too few tokens for one sample" in outcome.err
    for name, path, said in (("first", "second", "is the name of a dataset"),
                             ("x", "other", "data.validation.x")):  # fmt: skip
        made["data"] = {"path": paths["first"], "validation": {name: paths[path]}}
        outcome = main(["--config", write_config(tmp_path / "bad.yaml", made), "--dry-run"])
        assert outcome.status == 1 and said in outcome.err


def test_a_run_on_one_dataset_stores_its_position_as_before(paths, tmp_path):
    made = mapping(paths, tmp_path / "run", stages=[{"until": {"steps": 2}}])
    made["data"] = {"path": paths["first"]}
    train(1, write_config(tmp_path / "run.yaml", made))
    state = NativeCheckpoint.open(step_path(tmp_path / "run" / "checkpoints", 2)).run_state
    assert state["taken"] == [[8, 16]] and "mixtures" not in state


def test_a_dataset_alone_and_then_in_a_mixture_goes_on_where_it_was(paths, tmp_path):
    stages = [
        {"until": {"steps": 3}},
        {"until": {"steps": 6}, "data": {"path": f"1 {paths['first']} 1 {paths['second']}"}},
        {"until": {"steps": 8}, "data": {"path": paths["first"]}},
    ]
    made = mapping(paths, tmp_path / "run", stages=stages)
    made["data"] = {"path": paths["first"]}
    config = write_config(tmp_path / "run.yaml", made)
    lines = train(1, config)
    assert events(lines, "validation")[-1]["tokens_by_source"] == {
        "first": 8 * 8 * (3 + 1.5 + 2),
        "second": 8 * 8 * 1.5,
    }
