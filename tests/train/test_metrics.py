import errno
import json
import math
import shutil

import pytest

from megagrow.errors import DataError, TrainingError
from megagrow.train.logging.metrics import MetricsLog, read_metrics
from tests.train.logs import log_growth, log_step


def first_run(run_dir, steps=9):
    log = MetricsLog(run_dir)
    log.event("run_start", parameters=10)
    for step in range(1, steps + 1):
        log_step(log, step)
        if step % 3 == 0:
            log.validation(step=step, tokens=1, flops=2, val_loss=3.5, growth_stage=0)
            log.event("checkpoint", path="checkpoints/x")
    log.close()
    return run_dir / "metrics.jsonl"


def steps_of(path):
    return [line["step"] for line in read_metrics(path) if line["event"] == "step"]


def test_lines_have_the_promised_keys_and_are_there_at_once(tmp_path):
    log = MetricsLog(tmp_path / "new" / "run")
    log_step(log, 1)
    log.validation(step=1, tokens=100, flops=10_000, val_loss=3.5, growth_stage=0)
    log_growth(log, 1, 1)
    log.event("end", reason="done")
    step, validation, growth, end = read_metrics(log.path)  # not closed yet
    log.close()
    log.close()
    at, end_of_line = ["event", "step", "tokens", "flops"], ["growth_stage", "time"]
    measured = ["loss", "lr", "grad_norm", "tokens_per_second"]
    assert list(step) == at + measured + end_of_line
    assert list(validation) == [*at, "val_loss", *end_of_line]
    assert growth["operator"] == "width" and growth["peak_staging_bytes"] == 64
    assert growth["model"] == {"layers": 2}
    assert end["reason"] == "done"


def test_a_resumed_run_has_each_step_once_and_keeps_the_lines_before_byte_for_byte(tmp_path):
    path = first_run(tmp_path, steps=9)
    before = path.read_bytes().splitlines(keepends=True)
    log = MetricsLog(tmp_path, resume_step=6)
    log.event("resume", step=6)
    for step in range(7, 13):
        log_step(log, step, loss=1.0)
    log.close()
    assert steps_of(path) == list(range(1, 13))
    # run_start, steps 1 to 6, two validations, two checkpoints (these carry no step of their own)
    assert path.read_bytes().splitlines(keepends=True)[:11] == before[:11]
    lines = read_metrics(path)
    assert lines[10]["event"] == "checkpoint" and lines[11]["event"] == "resume"
    assert [line["event"] for line in lines].count("checkpoint") == 2
    assert [line["step"] for line in lines if line["event"] == "validation"] == [3, 6]
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("resume_step", [0, 1, 8, 9, 100])
def test_the_cut_is_exact_anywhere(tmp_path, resume_step):
    path = first_run(tmp_path, steps=9)
    MetricsLog(tmp_path, resume_step=resume_step).close()
    assert steps_of(path) == list(range(1, min(resume_step, 9) + 1))
    assert read_metrics(path)[0]["event"] == "run_start"


@pytest.mark.parametrize(
    "half", [b'{"event": "step", "st', b"\xc3", b'{"event": "step", "step": 5}']
)
def test_a_half_line_does_not_spoil_the_next_one(tmp_path, half):
    path = first_run(tmp_path, steps=4)
    with open(path, "ab") as file:
        file.write(half)  # killed within a write
    log = MetricsLog(tmp_path, resume_step=4)
    log_step(log, 5)
    log.close()
    assert steps_of(path) == [1, 2, 3, 4, 5]


def test_a_growth_after_the_checkpoint_of_its_own_step_is_cut_off(tmp_path):
    path = first_run(tmp_path, steps=3)
    log = MetricsLog(tmp_path, resume_step=3, resume_stage=0)
    log_growth(log, 3, 1)
    log.validation(step=3, tokens=1, flops=2, val_loss=3.0, growth_stage=1)
    log_step(log, 4, stage=1)
    log.close()

    # Killed there; the checkpoint of step 3 was saved after the growth: it stays.
    content = path.read_bytes()
    MetricsLog(tmp_path, resume_step=3, resume_stage=1).close()
    events = [line["event"] for line in read_metrics(path)]
    assert events[-2:] == ["growth", "validation"]

    # The checkpoint was saved before the growth, which will be done again: it goes.
    path.write_bytes(content)
    MetricsLog(tmp_path, resume_step=3, resume_stage=0).close()
    events = [line["event"] for line in read_metrics(path)]
    assert "growth" not in events and events[-2:] == ["validation", "checkpoint"]


def test_a_cut_that_fails_loses_nothing(tmp_path, monkeypatch):
    path = first_run(tmp_path)
    content = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        MetricsLog(tmp_path, resume_step=2)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_log_is_named_and_left_alone(tmp_path):
    path = first_run(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[4] = b"oops\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 5"):
        MetricsLog(tmp_path, resume_step=2)
    assert path.read_bytes() == b"".join(lines)


def test_a_new_run_keeps_the_log_of_an_old_one(tmp_path):
    for number in range(3):
        log = MetricsLog(tmp_path)
        log.event("run_start", number=number)
        log.close()
    kept = {path.name: read_metrics(path)[0]["number"] for path in tmp_path.iterdir()}
    assert kept == {"metrics.1.jsonl": 0, "metrics.2.jsonl": 1, "metrics.jsonl": 2}


def test_losses_that_are_not_finite(tmp_path):
    log = MetricsLog(tmp_path)
    for step, loss in enumerate((math.nan, math.inf, -math.inf), start=1):
        log_step(log, step, loss=loss)
    log.close()
    raw = [json.loads(line)["loss"] for line in log.path.read_text().splitlines()]
    assert raw == ["nan", "inf", "-inf"]
    back = [line["loss"] for line in read_metrics(log.path)]
    assert math.isnan(back[0]) and back[1:] == [math.inf, -math.inf]


def test_a_full_disk_does_not_stop_a_run(tmp_path, capsys):
    """Lines wait for space, with one warning, and closing says what is lost."""
    log = MetricsLog(tmp_path)
    log_step(log, 1)
    real = log._file
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 - closed below
    log_step(log, 2)
    log_step(log, 3)
    stated = capsys.readouterr().err
    assert stated.count("warning: ") == 1 and str(log.path) in stated and "free space" in stated
    assert [line["step"] for line in read_metrics(log.path)] == [1]
    log._file.close()
    log._file = real
    log_step(log, 4)
    assert [line["step"] for line in read_metrics(log.path)] == [1, 2, 3, 4]
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 - closed by log
    real.close()
    log_step(log, 5)
    with pytest.raises(TrainingError, match="do not fit on the disk") as caught:
        log.close()
    assert str(log.path) in str(caught.value)
    log.close()


@pytest.mark.parametrize("how", ["removed", "directory removed", "replaced"])
def test_a_log_that_nobody_will_find_stops_the_run(tmp_path, how):
    log = MetricsLog(tmp_path / "run")
    log_step(log, 1)
    if how == "directory removed":
        shutil.rmtree(log.path.parent)
    else:
        log.path.unlink()
    if how == "replaced":
        other = MetricsLog(tmp_path / "run")
        log_step(other, 7)
        other.close()
    with pytest.raises(TrainingError, match=r"metrics\.jsonl is gone") as caught:
        log_step(log, 2)
    assert ("second job" if how == "replaced" else "removed") in str(caught.value)
    log.close()
    assert log.path.exists() == (how == "replaced")
    if how == "replaced":
        assert steps_of(log.path) == [7]


def test_a_log_that_may_not_be_written_stops_the_run(tmp_path):
    log = MetricsLog(tmp_path)
    log._file.close()
    log._file = open(log.path, "rb", buffering=0)  # noqa: SIM115 - closed by log
    with pytest.raises((TrainingError, OSError)):
        log_step(log, 1)
    log._pending.clear()
    log.close()
