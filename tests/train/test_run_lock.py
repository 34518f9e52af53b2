"""A run's directory belongs to one job: a second is refused, and a job that loses it stops."""

import json
import os
import shutil
from pathlib import Path

import pytest

from megagrow.checkpoint import list_steps
from megagrow.errors import CheckpointError
from megagrow.lock import NAME, LockHolder, acquire
from megagrow.processes import started
from megagrow.report.log import read_metrics
from megagrow.train.checkpoints import is_saved
from megagrow.train.state import RunState
from tests.jobs import events, files_below, launch, settings, write_config


def test_a_second_job_is_refused_on_all_ranks_before_it_writes_anything(tmp_path, dataset):
    run = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", settings(dataset, run))
    first = acquire(run / NAME, of="run.dir")
    before = files_below(tmp_path)
    command = ["--config", config, "train.stop_after_steps=2"]
    patient, hasty = launch(2, [*command, "run.wait=0.5"], [*command, "run.wait=0"])
    for outcomes in (patient, hasty):
        assert [o.status for o in outcomes] == [1, 1]
        error = outcomes[0].err
        assert f"run.dir = {run}: another job is writing there" in error
        assert f"process {LockHolder.me().pid} on" in error and f"rm {run / NAME}" in error
        assert outcomes[1].err == ""
    assert "waiting up to 0.5 s" in patient[0].err and "waiting" not in hasty[0].err
    assert files_below(tmp_path) == before and not (run / "logs").exists()
    first.release()
    [outcomes] = launch(2, command)
    assert [o.status for o in outcomes] == [0, 0]
    assert not (run / NAME).exists() and (run / "run_id").exists()


def _lose(rank, run):
    """At the fourth step of each run something happens to its directory."""
    from megagrow.engine.engine import Engine

    train_step, calls, ways = Engine.train_step, [0], [_remove, _unlock, _take]

    def stepping(self, *args, **more):
        calls[0] += 1
        if calls[0] == 4:
            calls[0], way = 0, ways.pop(0)
            if rank == 0:
                way(run)
        return train_step(self, *args, **more)

    Engine.train_step = stepping


def _remove(run):
    shutil.rmtree(run)


def _unlock(run):
    (run / NAME).unlink()


def _take(run):
    pid = os.getppid()  # one that will be there
    other = {"token": "f" * 16, "host": "h7", "pid": pid, "started": started(pid)}
    (run / NAME).write_text(json.dumps(json.loads((run / NAME).read_text()) | other))


def test_a_job_that_loses_its_directory_stops_at_the_next_step_and_writes_no_more(
    tmp_path, dataset
):
    run = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", settings(dataset, run))
    removed, unlocked, taken, again = launch(
        2, *[["--config", config]] * 3, ["--config", config, "run.wait=0"], hook=(_lose, run)
    )
    for outcomes, why in (
        (removed, f"{run} was removed or renamed"),
        (unlocked, f"{run / NAME} was removed or renamed"),
        (taken, "on h7"),
    ):
        assert [o.status for o in outcomes] == [1, 1]
        assert "this job lost its lock and stops" in outcomes[0].err and why in outcomes[0].err
    # The removed one did not come back in part; the next run started fresh, the third resumed.
    assert "resuming" not in unlocked[0].err and "resuming from" in taken[0].err
    steps = [line["step"] for line in events(read_metrics(run / "metrics.jsonl"), "step")]
    assert steps[-1] == 6 and list_steps(run / "checkpoints")[-1] <= 6
    # The job that took it still has it.
    assert json.loads((run / NAME).read_text())["host"] == "h7"
    assert [o.status for o in again] == [1, 1] and "another job" in again[0].err


# --- "this step is saved" -----------------------------------------------------------------


@pytest.fixture(scope="module", name="saved")
def a_checkpoint(tmp_path_factory, dataset):
    base = tmp_path_factory.mktemp("saved")
    config = write_config(base / "run.yaml", settings(dataset, base / "run"))
    [outcomes] = launch(1, ["--config", config, "train.stop_after_steps=2"])
    assert outcomes[0].status == 0, outcomes[0].err
    path = base / "run" / "checkpoints" / "step_00000002"
    state = RunState.from_json(_body(path)["run_state"])
    return path, state, (base / "run" / "run_id").read_text().strip()


def _body(path):
    return json.loads((path / "manifest.json").read_text())["body"]


def test_a_step_counts_as_saved_where_the_checkpoint_is_of_this_run_and_state(saved):
    path, state, run = saved
    assert _body(path)["fingerprints"]["run"] == run
    assert is_saved(path, state, run=run, known=None)
    assert not is_saved(Path(f"{path}0"), state, run=run, known=None)
    # One that was copied here from elsewhere and resumed from is the run's own.
    assert is_saved(path, state, run="another", known=path)


def test_a_step_that_another_run_or_state_was_saved_under_is_refused(saved):
    from dataclasses import replace

    from megagrow.data.position import Position, Taken

    path, state, run = saved
    with pytest.raises(CheckpointError, match=f"(?s)not the state.*that of run {run}.*another"):
        is_saved(path, state, run="another", known=None)
    other = replace(state, position=Position((Taken(8, 99),)))
    with pytest.raises(CheckpointError, match=r"(?s)consumed_samples 16\b.*consumed_samples 99"):
        is_saved(path, other, run=run, known=None)
    with pytest.raises(CheckpointError, match="tokens"):
        is_saved(path, replace(state, tokens=1), run=run, known=path)
    # A run that went back to this checkpoint has skipped data since; its tensors are the same.
    assert is_saved(path, other, run=run, known=path)
