"""Runs in every kind of layout: the same curve, even if a resume or a growth changes it."""

import json

import numpy as np
import pytest

from tests.jobs import DEPTH, WIDTH, events, growths, launch, log_of, settings, train, write_config
from tests.toys import FAMILIES

# (tensor, pipeline, ZeRO) of four processes; each is resumed in the next one.
LAYOUTS = [
    (1, 1, 1), (2, 1, 1), (1, 2, 0), (2, 2, 1), (1, 1, 3), (2, 1, 2), (1, 1, 0), (2, 1, 3),
    (1, 2, 1),
]  # fmt: skip
STOP = 5  # between the growths, while the first one's new blocks are young


def losses(lines):
    return np.array([line["loss"] for line in events(lines, "step")])


def layout_keys(layout):
    return [
        f"layout.{key}={value}"
        for key, value in zip(("tensor", "pipeline", "zero"), layout, strict=True)
    ]


def in_four(dataset, tmp_path, name, **changes):
    """A run whose batches and validation samples divide evenly over any grid of four processes."""
    changes.setdefault(
        "train", {"validate_every": 4, "validation_samples": 8, "tensorboard": False}
    )
    mapping = settings(dataset, tmp_path / name, **changes)
    return write_config(tmp_path / f"{name}.yaml", mapping)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.mark.parametrize(
    ("family", "count"),
    [("gpt2", 9), ("llama", 2), pytest.param("llama", 9, marks=pytest.mark.slow)],
)
def test_a_checkpoint_of_one_layout_goes_on_in_another(tmp_path, dataset, family, count):
    model = {"family": family, "tie_embeddings": family == "gpt2"}
    alone = losses(train(1, in_four(dataset, tmp_path, "alone", model=model)))
    config = in_four(dataset, tmp_path, "first", model=model)
    pairs = list(zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], strict=True))[-count:]
    commands = []
    for number, (before, after) in enumerate(pairs):
        command = ["--config", config, f"run.dir={tmp_path / str(number)}"]
        commands.append([*command, *layout_keys(before), f"train.stop_after_steps={STOP}"])
        commands.append([*command, *layout_keys(after)])
    outcomes = launch(4, *commands, timeout=500)
    assert all(o.status == 0 for ranks in outcomes for o in ranks), outcomes
    for number, pair in enumerate(pairs):
        found = losses(log_of(config, f"run.dir={tmp_path / str(number)}"))
        np.testing.assert_allclose(found, alone, rtol=1e-5, err_msg=str(pair))


def test_a_growth_takes_more_tensor_and_pipeline_parallelism(tmp_path, dataset, family):
    def run(spread):
        return [
            {"until": {"steps": 3}, "layout": spread[0]},
            {"until": {"steps": 7}, "layout": spread[1], "grow": {**WIDTH, "rewarm": 3}},
            {"until": {"steps": 10}, "layout": spread[2], "grow": DEPTH},
        ]

    model = {"family": family}
    one = run([{"zero": 0}] * 3)
    alone = train(1, in_four(dataset, tmp_path, "alone", model=model, stages=one))
    spread = run(
        [
            {"zero": 3},
            {"tensor": 2, "zero": 2, "sequence_parallel": True},
            {"tensor": 2, "pipeline": 2, "zero": 1, "partition": "flops"},
        ]
    )
    lines = train(4, in_four(dataset, tmp_path, "spread", model=model, stages=spread))
    np.testing.assert_allclose(losses(lines), losses(alone), rtol=1e-5)
    for ours, theirs in zip(growths(lines), growths(alone), strict=True):
        assert ours["loss_after"] == pytest.approx(theirs["loss_after"], rel=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_resumes_bit_for_bit_across_a_growth(tmp_path, dataset, dtype):
    """With fp16 the first steps overflow, so the loss scale and the update count matter."""
    precision = {"dtype": dtype, "initial_scale_power": 24, "window": 2}
    config = in_four(dataset, tmp_path, "run", precision=precision)
    straight = ["--config", config, f"run.dir={tmp_path / 'straight'}"]
    outcomes = launch(
        2,
        straight,
        ["--config", config, "train.stop_after_steps=2"],
        ["--config", config, "train.stop_after_steps=5"],
        ["--config", config],
        timeout=300,
    )
    assert all(o.status == 0 for ranks in outcomes for o in ranks), outcomes
    said = f"precision: matrix products {dtype}, gradients summed over micro-batches fp32"
    assert said in outcomes[0][0].out + outcomes[0][0].err
    found, expected = log_of(config), log_of(config, f"run.dir={tmp_path / 'straight'}")
    assert losses(found).tolist() == losses(expected).tolist()
    # Averaged over three steps: samples differ more than a few updates gain.
    assert np.isfinite(losses(found)).all()
    assert losses(found)[-3:].mean() < losses(found)[:3].mean()
    manifest = json.loads(
        (tmp_path / "run" / "checkpoints" / "step_00000010" / "manifest.json").read_text()
    )
    text = json.dumps(manifest)
    assert ("cur_scale" in text) == (dtype == "fp16")


def test_offloaded_state_gives_the_same_run(tmp_path, dataset):
    config = in_four(dataset, tmp_path, "run")
    here = ["--config", config, f"run.dir={tmp_path / 'here'}"]
    there = ["--config", config, f"run.dir={tmp_path / 'there'}", "optimizer.offload=cpu"]
    assert all(o.status == 0 for ranks in launch(2, here, there) for o in ranks)
    np.testing.assert_allclose(
        losses(log_of(config, there[-2])), losses(log_of(config, here[-1])), rtol=1e-6
    )
