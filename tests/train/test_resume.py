"""The resume law: stopped or killed at any moment, a run continues as if undisturbed."""

import random
import shutil

import pytest
import torch

from megagrow.checkpoint import NativeCheckpoint, list_steps, step_path
from megagrow.checkpoint.convert.run import Job, convert
from megagrow.config import GrowConfig
from megagrow.errors import CheckpointError
from megagrow.state.layout import Layout
from megagrow.train.grow_offline import plan_offline, write_offline
from tests.jobs import (
    events,
    growths,
    killed_launch,
    launch,
    log_of,
    settings,
    stages,
    train,
    trajectory,
    write_config,
)
from tests.train.runs import same_tensors

# Sparkling leaves new blocks, reset restarts the step count, exact leaves factors.
POLICIES = ["sparkling", "reset", "exact"]


def same_run(lines, straight):
    assert trajectory(lines) == trajectory(straight)
    assert growths(lines) == growths(straight)
    values = {line["step"]: line["val_loss"] for line in events(straight, "validation")}
    for line in events(lines, "validation"):
        assert line["val_loss"] == values.get(line["step"], line["val_loss"])


@pytest.mark.parametrize(
    ("policy", "zero", "stops"),
    [("sparkling", 1, range(1, 10)), ("reset", 2, (2, 3, 4, 8)), ("exact", 0, (3, 5, 7))],
)
def test_stopped_and_resumed_again_and_again(tmp_path, dataset, policy, zero, stops):
    """Growths come after steps 3 and 7; the uninterrupted run is the first of the same job."""
    mapping = settings(dataset, tmp_path / "chain", stages=stages(policy=policy))
    config = write_config(tmp_path / "run.yaml", {**mapping, "layout": {"zero": zero}})
    straight = ["--config", config, f"run.dir={tmp_path / 'straight'}"]
    chain = [["--config", config, f"train.stop_after_steps={n}"] for n in stops]
    outcomes = launch(2, straight, *chain, ["--config", config])
    assert all(o.status == 0 for ranks in outcomes for o in ranks), outcomes
    lines = log_of(config)
    assert len(events(lines, "resume")) == len(stops)
    same_run(lines, log_of(config, straight[-1]))
    same_tensors(*(step_path(tmp_path / d / "checkpoints", 10) for d in ("chain", "straight")))


@pytest.mark.parametrize("policy", POLICIES)
def test_resumed_in_other_worlds_and_zero_stages(tmp_path, dataset, policy):
    """Two ranks, ZeRO 1, to step 2; one rank, ZeRO 0, over the growth; two ranks, ZeRO 2."""
    mapping = settings(dataset, tmp_path / "moved", stages=stages(policy=policy))
    config = write_config(tmp_path / "run.yaml", mapping)
    straight = ["--config", config, f"run.dir={tmp_path / 'straight'}", "layout.zero=0"]
    train(2, config, "layout.zero=1", "train.stop_after_steps=2")
    outcomes = launch(
        1, straight, ["--config", config, "layout.zero=0", "train.stop_after_steps=5"]
    )
    assert [o.status for [o] in outcomes] == [0, 0]
    moved = train(2, config, "layout.zero=2")
    alone = events(log_of(config, straight[2]), "step")
    assert [line["step"] for line in events(moved, "step")] == list(range(1, 11))
    for mine, other in zip(events(moved, "step"), alone, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5), mine["step"]
        assert mine["lr"] == other["lr"] and mine["flops"] == other["flops"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, dataset):
    """An undisturbed run: (its configuration, its log)."""
    base = tmp_path_factory.mktemp("straight")
    mapping = settings(dataset, base / "run", checkpoint={"every": 1, "keep": 2})
    config = write_config(base / "run.yaml", mapping)
    return config, train(2, config)


# Where rank 0 is killed, in turn: (function of megagrow, which of its calls since the start),
# and the checkpoint that is left.  With a checkpoint per step, and a growth after step 3.
MOMENTS = [
    ("train_step", 2, 1),
    ("_save", 2, 2),  # before the state to grow from is saved
    ("_next_stage", 1, 3),  # and after
    ("close", 2, 3),  # of the old engine; the first is the log's
    ("transfer_between_ranks", 1, 3),
    ("growth", 1, 3),  # grown, but not logged
    ("train_step", 1, 3),  # logged, but no step taken
    ("write_shard", 1, 3),
    ("commit", 1, 3),
    ("retire", 1, 4),  # committed, but not logged
    ("load_run", 1, 4),
    ("_cut", 1, 4),  # of the log
]


def test_killed_at_one_chosen_moment_after_the_other(tmp_path, straight):
    config, undisturbed = straight
    command = ["--config", config, f"run.dir={tmp_path / 'run'}"]
    root = tmp_path / "run" / "checkpoints"
    for name, count, saved in MOMENTS:
        assert killed_launch(2, command, counts={0: count}, name=name), name
        assert list_steps(root)[-1] == saved, name
        NativeCheckpoint.open(step_path(root, saved)).verify()
    same_run(train(2, config, command[-1]), undisturbed)


def chain_of_kills(tmp_path, straight, *, kills, seed, longest):
    """Kill one rank or both at random calls, resume, kill again; then let it finish."""
    config, undisturbed = straight
    rng = random.Random(seed)
    run_dir = tmp_path / "run"
    happened = 0
    for _ in range(kills):
        ranks = rng.choice([(0,), (1,), (0, 1)])
        counts = {rank: rng.randint(1, longest) for rank in ranks}
        happened += killed_launch(2, ["--config", config, f"run.dir={run_dir}"], counts=counts)
        for step in list_steps(run_dir / "checkpoints"):
            NativeCheckpoint.open(step_path(run_dir / "checkpoints", step)).verify()
    same_run(train(2, config, f"run.dir={run_dir}"), undisturbed)
    assert not list((run_dir / "checkpoints").glob("*.tmp-*"))
    shutil.rmtree(run_dir)
    return happened


def test_killed_at_random_moments(tmp_path, straight):
    assert chain_of_kills(tmp_path, straight, kills=6, seed=1, longest=150_000) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_many_random_moments(tmp_path, straight, seed):
    assert chain_of_kills(tmp_path, straight, kills=8, seed=100 + seed, longest=200_000) >= 3


def test_a_run_is_resumed_with_its_own_optimizer_alone(tmp_path, dataset):
    lion = {"name": "lion", "lr": 1e-3, "betas": [0.9, 0.99]}
    mapping = settings(dataset, tmp_path / "chain", optimizer=lion)
    config = write_config(tmp_path / "run.yaml", mapping)
    straight, chain = (["--config", config, f"run.dir={tmp_path / n}"] for n in ("one", "two"))
    outcomes = launch(
        2, straight, [*chain, "train.stop_after_steps=5"],
        [*chain, "optimizer.name=adamw"], chain,
    )  # fmt: skip
    assert [ranks[0].status for ranks in outcomes] == [0, 0, 1, 0], outcomes
    assert "no state of this optimizer" in outcomes[2][0].err
    one, two = (trajectory(log_of(config, f"run.dir={tmp_path / n}")) for n in ("one", "two"))
    assert one == two and len(one) == 10


def test_muons_run_is_resumed_bit_for_bit(tmp_path, dataset):
    """Stopped before, between and after its growths; slots differ from tensor to tensor."""
    muon = {"name": "muon", "lr": 5e-3, "muon_lr": 1e-2}
    mapping = settings(dataset, tmp_path / "chain", optimizer=muon)
    config = write_config(tmp_path / "run.yaml", mapping)
    straight, chain = (["--config", config, f"run.dir={tmp_path / n}"] for n in ("one", "two"))
    stops = [[*chain, f"train.stop_after_steps={n}"] for n in (2, 5, 8)]
    other = [*chain, "optimizer.name=adamw", "optimizer.muon_lr=null"]
    outcomes = launch(2, straight, *stops, other, chain)
    assert [ranks[0].status for ranks in outcomes] == [0, 0, 0, 0, 1, 0], outcomes
    one, two = (trajectory(log_of(config, f"run.dir={tmp_path / n}")) for n in ("one", "two"))
    assert one == two and len(one) == 10
    assert "exp_avg_sq (not of matrices)" in outcomes[4][0].err
    paths = [step_path(tmp_path / n / "checkpoints", 10) for n in ("one", "two")]
    same_tensors(*paths)
    kept = NativeCheckpoint.open(paths[0])
    assert kept.dtype("layers.0.mlp.up.weight", "exp_avg") == torch.float32
    with pytest.raises(CheckpointError, match=r"no tensor layers\.0\.mlp\.up\.weight with"):
        kept.dtype("layers.0.mlp.up.weight", "exp_avg_sq")
    convert(Job(paths[0], tmp_path / "dcp", "dcp"), verify=True)
    convert(Job(tmp_path / "dcp", tmp_path / "back", "native", layout=Layout(data=3, zero=1)))
    same_tensors(paths[0], tmp_path / "back")
    with pytest.raises(CheckpointError, match=r"(?s)no exp_avg_sq \(optimizer muon\).*to native"):
        convert(Job(paths[0], tmp_path / "deepspeed", "deepspeed"))
    grown = NativeCheckpoint.open(
        write_offline(plan_offline(paths[0], GrowConfig(operator="width")), tmp_path / "grown")
    )
    grown.verify()
    assert grown.slots == kept.slots
    assert grown.catalog.parameters > 2 * kept.catalog.parameters
