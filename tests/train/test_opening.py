"""What is reported before DeepSpeed is imported; it need not even be importable."""

import json
import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from megagrow.checkpoint import list_steps, newest, step_path
from megagrow.checkpoint.native.retention import size_of
from megagrow.config.load import load_config
from megagrow.data.run_data import open_data
from megagrow.errors import TrainingError
from megagrow.train import ready
from megagrow.train.opening import checkpoint_bytes, require_disk
from megagrow.train.run_plan import plan_run, with_vocabulary
from tests.jobs import PRETRAIN, REPOSITORY, files_below, settings, train, write_config

# DeepSpeed cannot be imported here, nor can Weights & Biases; every command is still
# answered.
WITHOUT_DEEPSPEED = """
import json, sys
sys.modules["deepspeed"] = sys.modules["wandb"] = None
from tests.jobs import main
for command in json.loads(sys.argv[1]):
    outcome = main(command)
    print(json.dumps([outcome.status, outcome.out, outcome.err]))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, dataset):
    """A finished run: (configuration, run directory)."""
    base = tmp_path_factory.mktemp("finished")
    config = write_config(base / "run.yaml", settings(dataset, base / "run"))
    train(1, config)
    return config, base / "run"


def answers(*commands):
    """(status, stdout, stderr) of each command."""
    text = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEEPSPEED, text],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(commands), done.stderr
    return found


def test_a_finished_run_says_so_and_errors_of_files_are_reported_before_deepspeed_starts(
    finished, tmp_path
):
    config, run_dir = finished
    used = tmp_path / "run"
    shutil.copytree(run_dir, used)
    with open(used / "metrics.jsonl", "ab") as log:
        log.write(b"oops\n")
    (tmp_path / "file").write_text("mine")
    before, again = files_below(run_dir), ["--config", config]
    refused = {
        "already holds checkpoints": [*again, "--resume", "never"],
        "no such checkpoint": [*again, "--resume", tmp_path / "absent"],
        "run.seed differs": [*again, "run.seed=6"],
        "holds another model": [*again, "model.ffn=24"],
        "too few tokens for one sample": [*again, f"run.dir={tmp_path / 'new'}",
                                          "model.sequence=100000"],
        "is not a directory": [*again, f"run.dir={tmp_path / 'file' / 'below'}"],
        "metrics.jsonl, line": [*again, f"run.dir={used}"],
        "wandb is not installed": [*again, "train.wandb.project=mine"],
    }  # fmt: skip
    over, stopped, *errors = answers(
        again, [*again, "train.stop_after_steps=10"], *refused.values()
    )
    for status, out, err in (over, stopped):
        assert (status, out) == (0, "") and "nothing is left to train" in err
        assert str(newest(run_dir / "checkpoints")) in err and "report.html" in err
    assert f"{run_dir} is finished: step 10 of 10" in over[2] and "stages.2.until" in over[2]
    for says, (status, out, err) in zip(refused, errors, strict=True):
        assert (status, out) == (1, "") and err.count("error: ") == 1
        assert says in err, (says, err)
    assert files_below(run_dir) == before
    assert not (tmp_path / "new").exists()


def test_a_directory_that_comes_meanwhile_is_not_refused(tmp_path):
    """Another rank, or another job, may create run.dir at any moment."""
    place, done = tmp_path / "run", threading.Event()

    def come_and_go():
        while not done.is_set():
            place.mkdir()
            place.rmdir()

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        for _ in range(20_000):
            ready._require_directory(place)
    finally:
        done.set()
        other.join()


def test_a_rank_that_is_refused_alone_says_so_itself(tmp_path):
    """Before the processes have joined, rank 0 cannot report for it."""
    command = [sys.executable, str(PRETRAIN), "--config", str(tmp_path / "absent.yaml")]
    environment = {**os.environ, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("rank 3: error: ") and "absent.yaml" in done.stderr


def test_a_run_that_was_killed_after_its_last_save_is_brought_to_its_end(finished, tmp_path):
    """Its log has no last line: it is not called finished, and gets one."""
    config, run_dir = finished
    used = tmp_path / "run"
    shutil.copytree(run_dir, used)
    log = used / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    assert b'"event": "end"' in lines[-1]
    log.write_bytes(b"".join(lines[:-1]))
    again = train(1, config, f"run.dir={used}")
    assert again[-1]["event"] == "end" and again[-1]["reason"] == "all stages done"
    assert again[-1]["total_steps"] == 10


def test_a_disk_that_old_checkpoints_fill_is_reported_with_their_names_unless_a_save_would_free_it(
    finished, monkeypatch
):
    config = load_config(finished[0])
    data = open_data(config)
    config = with_vocabulary(config, data.vocab_size)
    plan = plan_run(config, world=1, vocabulary=data.vocab_size)
    root = finished[1] / "checkpoints"
    oldest = size_of(step_path(root, list_steps(root)[0]))
    lacking = checkpoint_bytes(plan)

    def free(count):
        usage = SimpleNamespace(total=10**9, used=0, free=count)
        monkeypatch.setattr("megagrow.train.opening.shutil.disk_usage", lambda path: usage)

    # checkpoint.keep = 3: of the three existing ones, one is deleted when the next is written.
    free(lacking - oldest)
    require_disk(config, plan)
    free(lacking - oldest - 1)
    with pytest.raises(TrainingError) as caught:
        require_disk(config, plan)
    for step in list_steps(root):
        assert f"{step_path(root, step).name} (" in str(caught.value)
    assert "lower checkpoint.keep" in str(caught.value)
