"""Logs of any length are continued and reported in bounded memory."""

import subprocess
import sys

import pytest

from megagrow.errors import DataError
from megagrow.report.log import encode_line, last_line, read_metrics, tail_start
from megagrow.train.logging.metrics import MetricsLog

MiB = 1 << 20

# Not `ru_maxrss`, which a process inherits from its parent.
PEAK = """
import sys
from pathlib import Path

def peak():
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""
RESUME = """
from megagrow.train.logging import metrics
before = peak()
metrics._cut(Path(sys.argv[1]) / "metrics.jsonl", step=int(sys.argv[2]), stage=0)
print(peak() - before)
"""
REPORT = """
from megagrow.report import write_report
before = peak()
write_report(sys.argv[1])
print(peak() - before)
"""


def write_log(run_dir, steps):
    """Write a log with this many steps and a validation every 100; returns its path."""
    run_dir.mkdir()
    path = run_dir / "metrics.jsonl"
    with open(path, "w", encoding="ascii") as stream:
        stream.write(f'{{"event": "run_start", "total_steps": {steps}, "time": 1000.0}}\n')
        for step in range(1, steps + 1):
            at = f'"step": {step}, "tokens": {step * 100}, "flops": {step * 10_000}'
            stream.write(
                f'{{"event": "step", {at}, "loss": {2 + 1 / step}, "lr": 0.001, '
                f'"grad_norm": 0.{step % 7 + 1}, "tokens_per_second": 1000.5, "growth_stage": 0, '
                f'"time": {1000 + step}.123}}\n'
            )
            if step % 100 == 0:
                stream.write(
                    f'{{"event": "validation", {at}, "val_loss": 2.5, "growth_stage": 0, '
                    f'"time": {1000 + step}.5}}\n'
                )
    return path


def peak(program, *arguments):
    """The increase of a program's peak memory in bytes."""
    words = [sys.executable, "-c", PEAK + program, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024


@pytest.mark.parametrize("steps", [30_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_log_of_any_length_is_resumed_and_reported_in_bounded_memory(tmp_path, steps):
    path = write_log(tmp_path / "run", steps)
    size = path.stat().st_size
    # From shortly before its end, and from its very beginning.
    assert peak(RESUME, tmp_path / "run", steps - 1000) < 8 * MiB
    assert size - 400_000 < path.stat().st_size < size
    assert last_line(path)["step"] == steps - 1000
    assert peak(REPORT, tmp_path / "run") < 48 * MiB
    report = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "of every" in report and len(report) < 2 * MiB
    assert peak(RESUME, tmp_path / "run", 10) < 8 * MiB
    assert [line["step"] for line in read_metrics(path)[1:]] == list(range(1, 11))


def test_a_resume_reads_no_more_of_the_log_than_lies_behind_the_checkpoint(tmp_path, monkeypatch):
    path = write_log(tmp_path / "run", 30_000)
    start = tail_start(path, step=29_000, stage=0)
    content = path.read_bytes()
    assert content[start:].startswith(b'{"event": "step", "step": 29000,')
    # Damage far before it has no effect now, and is reported by a reader that gets there.
    damaged = bytearray(content)
    place = content.index(b'"step": 17,') - len(b'{"event": "step", ')
    damaged[place : place + 5] = b"oops!"
    path.write_bytes(damaged)
    log = MetricsLog(tmp_path / "run", resume_step=29_000, resume_stage=0)
    log.close()
    assert path.read_bytes() == bytes(damaged[: content.index(b'{"event": "step", "step": 29001,')])
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 18"):
        read_metrics(path)
    # Damage after it is reported with its line number.
    log_end = path.read_bytes() + b"oops\n"
    path.write_bytes(log_end)
    number = log_end.count(b"\n")
    with pytest.raises(DataError, match=rf"metrics\.jsonl, line {number}:"):
        MetricsLog(tmp_path / "run", resume_step=29_000, resume_stage=0)
    assert path.read_bytes() == log_end


@pytest.mark.parametrize("block", [7, 1 << 16])
def test_reading_from_the_end_finds_what_reading_from_the_start_does(tmp_path, monkeypatch, block):
    monkeypatch.setattr("megagrow.report.log._BLOCK", block)
    path = tmp_path / "metrics.jsonl"
    lines = [{"event": "run_start"}]
    for step in range(1, 10):
        stage = int(step > 5)
        if step == 6:
            lines.append({"event": "growth", "step": 5, "growth_stage": 1, "text": "é\r"})
        lines.append({"event": "step", "step": step, "growth_stage": stage})
        # An earlier step is saved in the background of later ones: its line comes late.
        lines.append({"event": "checkpoint", "step": max(step - 2, 0)})
    raws = [encode_line(line) for line in lines]
    for half in (b"", b'{"event": "st', raws[-1][:-1]):
        for step in range(11):
            for stage in (0, 1, None):
                path.write_bytes(b"".join(raws) + half)
                kept, at, of = [], 0, 0
                complete = [*raws, raws[-1]] if half == raws[-1][:-1] else raws
                for raw, line in zip(complete, [*lines, lines[-1]], strict=False):
                    at, of = line.get("step", at), line.get("growth_stage", of)
                    if at <= step and (stage is None or of <= stage):
                        kept.append(raw)
                MetricsLog(tmp_path, resume_step=step, resume_stage=stage).close()
                assert path.read_bytes() == b"".join(kept), (step, stage, half)


def test_the_last_line_is_read_from_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"")
    assert last_line(path) is None
    path.write_bytes(encode_line({"event": "a"}) + encode_line({"event": "end", "step": 3}))
    assert last_line(path) == {"event": "end", "step": 3}
    path.write_bytes(path.read_bytes() + b'{"event": "resu')
    assert last_line(path) == {"event": "end", "step": 3}
    path.write_bytes(path.read_bytes() + b"\n")
    assert last_line(path) is None


def test_a_line_without_an_end_is_damage_and_not_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("megagrow.report.log._LONGEST", 1000)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode_line({"event": "a"}) + b"x" * 5000 + b"\n")
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)
    with pytest.raises(DataError, match="line 2"):
        MetricsLog(tmp_path, resume_step=3)
