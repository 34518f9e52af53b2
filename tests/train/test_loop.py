"""A whole run: its files, the cost of its growths, its schedules, its validation."""

import math
from itertools import pairwise

import pytest

from megagrow.checkpoint import NativeCheckpoint, list_steps, newest
from megagrow.config.load import load_config
from megagrow.data.dataset import open_dataset
from megagrow.models.catalog import build_catalog
from megagrow.train.run_plan import plan_run, with_vocabulary
from tests.jobs import (
    events,
    growths,
    launch,
    log_of,
    settings,
    stages,
    train,
    trajectory,
    write_config,
)


def plan_of(config, *overrides, world):
    loaded = load_config(config, [str(o) for o in overrides])
    return plan_run(loaded, world=world, vocabulary=open_dataset(loaded.data.path).vocab_size)


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset):
    """A run of two ranks with everything on: (configuration, run directory)."""
    base = tmp_path_factory.mktemp("run")
    mapping = settings(dataset, base / "run", train={"tensorboard": True})
    config = write_config(base / "run.yaml", mapping)
    train(2, config)
    return config, base / "run"


def test_the_run_directory(run):
    _, run_dir = run
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        "config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "report.html", "logs",
        "run_id",
    }  # fmt: skip
    assert list(run_dir.glob("tensorboard/events.out.tfevents.*"))
    # Saved before each growth (steps 3 and 7), at every second step, and at the end; 3 kept.
    assert list_steps(run_dir / "checkpoints") == [7, 8, 10]
    report = (run_dir / "report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "<svg" in report and "width" in report and "depth_stack" in report


def test_the_written_configuration_describes_the_same_run(run, tmp_path):
    config, run_dir = run
    written = load_config(run_dir / "config.yaml")
    # Resolved: the vocabulary is the tokenizer's, which the given configuration leaves open.
    assert load_config(config).model.vocab is None and written.model.vocab is not None
    assert written == with_vocabulary(load_config(config), written.model.vocab)
    again = train(2, run_dir / "config.yaml", f"run.dir={tmp_path / 'again'}")
    assert trajectory(again) == trajectory(log_of(config))
    assert growths(again) == growths(log_of(config))


STEP = {"step", "tokens", "flops", "loss", "lr", "grad_norm", "tokens_per_second", "growth_stage"}
GROWTH = {
    "event", "operator", "loss_before", "loss_after", "parameters_before", "parameters_after",
    "seconds", "bytes_moved", "peak_staging_bytes",
}  # fmt: skip


def test_the_log(run):
    config, run_dir = run
    lines = log_of(config)
    assert lines[0]["event"] == "run_start" and lines[0]["world"] == 2
    assert lines[-1]["event"] == "end" and lines[-1]["step"] == 10
    steps = events(lines, "step")
    assert [line["step"] for line in steps] == list(range(1, 11))
    assert all(set(line) == STEP | {"event", "time"} for line in steps)
    assert [line["growth_stage"] for line in steps] == [0] * 3 + [1] * 4 + [2] * 3
    for before, after in pairwise(steps):
        assert after["tokens"] - before["tokens"] == 8 * 8  # batch.global * sequence
        assert after["flops"] > before["flops"]
    # At the start, at every fourth step, and at the end of each stage.
    validations = events(lines, "validation")
    assert [line["step"] for line in validations] == [0, 3, 4, 7, 8, 10]
    assert validations[-1]["val_loss"] < validations[0]["val_loss"]
    assert abs(validations[0]["val_loss"] - math.log(320)) < 1  # nats per token, untrained
    for line in events(lines, "growth"):
        assert set(line) >= GROWTH
    saved = [line["path"] for line in events(lines, "checkpoint")]
    assert saved[-1] == str(newest(run_dir / "checkpoints")) and len(saved) == 7


def test_the_growths(run):
    config, _ = run
    lines = log_of(config)
    width, depth = events(lines, "growth")
    assert (width["operator"], width["step"], width["growth_stage"]) == ("width", 3, 1)
    assert (depth["operator"], depth["step"], depth["growth_stage"]) == ("depth_stack", 7, 2)
    models = [stage.model for stage in plan_of(config, world=2).stages]
    sizes = [build_catalog(model).parameters for model in models]
    assert [width["parameters_before"], width["parameters_after"]] == sizes[:2]
    assert [depth["parameters_before"], depth["parameters_after"]] == sizes[1:]
    assert models[1].hidden == 2 * models[0].hidden and models[2].layers == 2 * models[1].layers
    assert abs(width["loss_after"] - width["loss_before"]) < 1e-4
    # The loss before is that of the validation of the same step.
    values = {line["step"]: line["val_loss"] for line in events(lines, "validation")}
    assert width["loss_before"] == values[3] and depth["loss_before"] == values[7]
    for line in (width, depth):
        assert line["seconds"] > 0 and 0 < line["peak_staging_bytes"] <= 64 * 2**20
        least = line["bytes_between_ranks_least"]
        assert 0 < least <= line["bytes_between_ranks"] < line["bytes_moved"]


def test_a_tiny_staging_memory_changes_nothing_but_itself(run, tmp_path):
    config, _ = run
    limit = 0.01
    lines = train(2, config, f"run.dir={tmp_path / 'tiny'}", f"growth.staging_mib={limit}")
    assert trajectory(lines) == trajectory(log_of(config))
    assert growths(lines) == growths(log_of(config))
    for line in events(lines, "growth"):
        assert 0 < line["peak_staging_bytes"] <= limit * 2**20
    peaks = [line["peak_staging_bytes"] for line in events(log_of(config), "growth")]
    assert max(peaks) > limit * 2**20, "the limit was none"


SCHEDULES = ["schedule.name=wsd", "schedule.name=cosine", "schedule.name=linear"]


def test_the_learning_rate_is_the_plans(dataset, tmp_path):
    """Also where a growth with `reset` re-warms it, and with stages bounded by tokens or FLOPs."""
    bounds = [{"steps": 3}, {"tokens": 64 * 6.5}, {"flops": 5e7}]
    mapping = settings(dataset, tmp_path / "run", stages=stages(policy="reset", rewarm=3))
    for stage, until in zip(mapping["stages"], bounds, strict=True):
        stage["until"] = until
    config = write_config(tmp_path / "run.yaml", mapping)
    commands = [["--config", config, f"run.dir={tmp_path / s}", s] for s in SCHEDULES]
    assert all(o.status == 0 for [o] in launch(1, *commands))
    for command in commands:
        plan = plan_of(*command[1:], world=1)
        lines = log_of(*command[1:])
        steps = events(lines, "step")
        assert len(steps) == plan.total_steps
        assert [line["lr"] for line in steps] == [
            plan.learning_rate.at(step) for step in range(plan.total_steps)
        ]
        ends = [stage.plan.end_step for stage in plan.stages]
        assert [line["step"] for line in events(lines, "growth")] == ends[:2] == [3, 7]
        last = [steps[end - 1] for end in ends]
        assert [(s["tokens"], s["flops"]) for s in last] == [
            (stage.plan.end_tokens, stage.plan.end_flops) for stage in plan.stages
        ]
        # A third, two thirds, and all of the rate without the growth.
        calm = plan_of(*command[1:], "stages.1.grow.rewarm=0", world=1).learning_rate
        ratios = [steps[i]["lr"] / calm.at(i) for i in range(2, 7)]
        assert ratios == pytest.approx([1, 1 / 3, 2 / 3, 1, 1])


def test_ranks_and_zero_stages_do_not_show(dataset, tmp_path):
    """The layout law, with growths; validation on the same samples, whichever ranks read them.

    Ten validation samples in micro-batches of 2 or 3 do not divide evenly among the ranks.
    """
    mapping = settings(dataset, tmp_path / "run", batch={"global": 12, "micro": 3})
    config = write_config(tmp_path / "run.yaml", mapping)
    runs = {}
    for world, *others in ([1, 0], [2, 0, 1, 2], [4, 1]):
        names = {zero: tmp_path / f"{world}-{zero}" for zero in others}
        commands = [
            ["--config", config, f"run.dir={name}", f"layout.zero={zero}", "batch.micro=" + micro]
            for zero, name in names.items()
            for micro in ["3" if world != 2 else "2"]
        ]
        assert all(o.status == 0 for ranks in launch(world, *commands) for o in ranks)
        runs |= {(world, zero): log_of(config, f"run.dir={names[zero]}") for zero in others}
    alone = runs.pop((1, 0))
    for layout, lines in runs.items():
        for event, key in (("step", "loss"), ("validation", "val_loss"), ("growth", "loss_after")):
            mine, expected = events(lines, event), events(alone, event)
            assert [line["step"] for line in mine] == [line["step"] for line in expected]
            for a, b in zip(mine, expected, strict=True):
                assert a[key] == pytest.approx(b[key], rel=1e-5), (layout, event, b["step"])
        assert [x["grad_norm"] for x in events(lines, "step")] == pytest.approx(
            [x["grad_norm"] for x in events(alone, "step")], rel=1e-3
        )


def _note_samples(rank, directory):
    """Record the index of every training sample that this rank reads."""
    from megagrow.data.sampler import SampleIndex

    sample = SampleIndex.sample

    def noted(index, k):
        with open(directory / f"{rank}", "a", encoding="utf-8") as stream:
            stream.write(f"{k}\n")
        return sample(index, k)

    SampleIndex.sample = noted


def test_every_sample_is_taken_once_and_in_order(dataset, tmp_path):
    """By one rank, by two, and by a run that resumes with other numbers of ranks and batch."""
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run"))
    taken = []
    for world, *extra in [2, "train.stop_after_steps=4"], [1, "batch.micro=4"]:
        notes = tmp_path / f"notes-{world}"
        notes.mkdir()
        [outcomes] = launch(world, ["--config", config, *extra], hook=(_note_samples, notes))
        assert all(o.status == 0 for o in outcomes)
        taken.append([[int(k) for k in (notes / f"{r}").read_text().split()] for r in range(world)])
    (first, second), [alone] = taken
    # Micro-batches of 2, dealt to the ranks in turn: 8 samples per step, 4 steps.
    assert first == [k for k in range(32) if k % 4 < 2]
    assert second == [k for k in range(32) if k % 4 >= 2]
    assert alone == list(range(32, 80))


def test_a_stage_may_change_the_layout_alone_or_with_a_growth(dataset, tmp_path):
    mapping = settings(dataset, tmp_path / "run")
    mapping["stages"] = [
        {"until": {"steps": 2}},
        {"layout": {"zero": 2}, "until": {"steps": 4}},
        {**stages()[1], "layout": {"zero": 0}, "until": {"steps": 6}},
    ]
    config = write_config(tmp_path / "run.yaml", mapping)
    lines = train(2, config)
    relayout, growth = events(lines, "growth")
    assert relayout["operator"] == "layout" and relayout["layout"]["zero"] == 2
    assert relayout["loss_after"] == relayout["loss_before"]
    assert relayout["parameters_after"] == relayout["parameters_before"]
    assert growth["operator"] == "width" and growth["layout"]["zero"] == 0
    checkpoint = NativeCheckpoint.open(newest(tmp_path / "run" / "checkpoints"))
    assert (checkpoint.layout.zero, checkpoint.step) == (0, 6)


def test_stop_and_resume_at_the_end_and_beyond(dataset, tmp_path):
    """A finished run is left as it is; a stop beyond its end is no stop."""
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run"))
    long = ["--config", config, "train.stop_after_steps=99"]
    early = ["--config", config, "train.stop_after_steps=4"]
    outcomes = launch(1, long, ["--config", config], early)
    assert [o.status for [o] in outcomes] == [0, 0, 0]
    lines = log_of(config)
    assert [line["step"] for line in events(lines, "step")] == list(range(1, 11))
    assert events(lines, "end")[0]["reason"] == "all stages done"
    assert list_steps(tmp_path / "run" / "checkpoints") == [7, 8, 10]
