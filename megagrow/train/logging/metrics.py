"""The log that a run writes: `metrics.jsonl`, and its mirror for TensorBoard.

Only rank 0 creates a `MetricsLog`.  The file's format and its reader are in
`megagrow.report.log`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from megagrow.errors import TrainingError
from megagrow.files import free_name, write_atomically
from megagrow.report.log import encode_line, read_lines, read_metrics, tail_start
from megagrow.report.step_facts import StepFacts
from megagrow.train.logging.telemetry import Mirror

__all__ = ["MetricsLog", "read_metrics"]

FILE_NAME = "metrics.jsonl"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class MetricsLog:
    """Appends to `run_dir/metrics.jsonl`, one write per line; mirrors scalars.

    Every line has `event` first and `time` (seconds since 1970) last.  `step`
    counts finished optimizer steps, `tokens` and `flops` accumulate from the start
    of the run, losses are in nats per token.  `growth_stage` of a growth line
    is the stage that the growth leads to.

    Args:
        run_dir: created if it does not exist.
        mirrors: other destinations of scalars.
        resume_step: None starts a new log and keeps an existing one as
            `metrics.N.jsonl`.  A number (the step of the checkpoint) continues
            the existing log, after truncating what an interrupted run wrote
            beyond that step.
        resume_stage: the growth stage of that checkpoint.  A growth does not
            advance the step, so lines of later stages at `resume_step` itself
            are truncated too.

    Raises:
        DataError: the existing log is damaged before its last line, after the last step of at
            most `resume_step`; earlier lines are not read (`launch/report.py` reads all).
        TrainingError: a line cannot be written.  On a full disk lines are kept in memory until
            there is space again; `close` raises if there still is none.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        mirrors: Sequence[Mirror] = (),
        resume_step: int | None = None,
        resume_stage: int | None = None,
    ) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            _set_aside(self.path)
        else:
            _cut(self.path, step=resume_step, stage=resume_stage)
        self._mirrors = mirrors
        self._pending = bytearray()  # lines that did not fit on a full disk
        self._reported = False
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._opened = os.fstat(self._file.fileno())

    def step(self, facts: StepFacts) -> None:
        """One optimizer step."""
        numbers = facts.to_json()
        self._write({"event": "step", **numbers})
        del numbers["step"]
        self._mirror("train", facts.step, numbers)

    def validation(
        self,
        *,
        step: int,
        tokens: int,
        flops: int,
        val_loss: float,
        growth_stage: int,
        losses: Mapping[str, float] | None = None,
        bits_per_byte: Mapping[str, float] | None = None,
        tokens_by_source: Mapping[str, int] | None = None,
    ) -> None:
        """The loss of the fixed validation samples after `step` steps.

        Args:
            losses: by dataset, if there are several.
            bits_per_byte: by dataset; of its text, end tokens apart.
            tokens_by_source: trained on so far, if there are several datasets.
        """
        by_set: dict[str, Any] = {"losses": dict(losses)} if losses else {}
        if bits_per_byte:
            by_set["bits_per_byte"] = dict(bits_per_byte)
        if tokens_by_source:
            by_set["tokens_by_source"] = dict(tokens_by_source)
        self._write(
            {
                "event": "validation",
                "step": step,
                "tokens": tokens,
                "flops": flops,
                "val_loss": val_loss,
                "growth_stage": growth_stage,
                **by_set,
            }
        )
        self._mirror(
            "validation",
            step,
            {
                "loss": val_loss,
                **{f"loss/{name}": value for name, value in (losses or {}).items()},
                **{f"bits_per_byte/{name}": value for name, value in (bits_per_byte or {}).items()},
            },
        )

    def growth(
        self,
        *,
        step: int,
        tokens: int,
        flops: int,
        operator: str,
        state_policy: str,
        loss_before: float,
        loss_after: float,
        parameters_before: int,
        parameters_after: int,
        seconds: float,
        bytes_moved: int,
        peak_staging_bytes: int,
        growth_stage: int,
        **more: Any,
    ) -> None:
        """Record a growth; the two losses are of the same fixed validation batch.

        `more` may hold `model` and `layout`: the resolved sections of the new stage.
        """
        self._write(
            {
                "event": "growth",
                "step": step,
                "tokens": tokens,
                "flops": flops,
                "operator": operator,
                "state_policy": state_policy,
                "loss_before": loss_before,
                "loss_after": loss_after,
                "parameters_before": parameters_before,
                "parameters_after": parameters_after,
                "seconds": seconds,
                "bytes_moved": bytes_moved,
                "peak_staging_bytes": peak_staging_bytes,
                "growth_stage": growth_stage,
                **more,
            }
        )
        scalars = {
            "loss_jump": loss_after - loss_before,
            "parameters": parameters_after,
            "seconds": seconds,
            "bytes_moved": bytes_moved,
            "peak_staging_bytes": peak_staging_bytes,
        }
        self._mirror("growth", step, scalars)

    def diagnostics(self, *, step: int, tokens: int, found: Mapping[str, float]) -> None:
        """Record the diagnostics of an update of a grown model."""
        self._write({"event": "growth_diagnostics", "step": step, "tokens": tokens, **found})
        self._mirror("growth_diagnostics", step, dict(found))

    def mixing(self, *, step: int, mixing_tokens: int, **more: Any) -> None:
        """Record the end of a growth's mixing time."""
        self._write({"event": "mixing", "step": step, "mixing_tokens": mixing_tokens, **more})
        self._mirror("growth", step, {"mixing_tokens": mixing_tokens})

    def pace(self, *, step: int, rank: int, host: str, ratio: float) -> None:
        """Record the slowest rank, and how much longer it is busy than the median one."""
        self._write({"event": "pace", "step": step, "rank": rank, "host": host, "ratio": ratio})
        self._mirror("pace", step, {"slowest_rank": rank, "slowest_ratio": ratio})

    def event(self, name: str, **fields: Any) -> None:
        """Record another event (`run_start`, `checkpoint`, `resume`, `end`); returns once on disk.

        A line without a `step` belongs to the step of the previous line.
        """
        self._write({"event": name, **fields})
        with self._naming_faults():
            os.fsync(self._file.fileno())
            for mirror in self._mirrors:
                mirror.flush()

    def close(self) -> None:
        """Close the files; may be called twice."""
        if not self._file.closed:
            try:
                self._empty_pending()
                if self._pending:
                    raise self._unwritable(
                        f"{len(self._pending):,} bytes that do not fit on the disk"
                    )
            finally:
                self._file.close()
                for mirror in self._mirrors:
                    mirror.close()
                self._mirrors = ()

    def _write(self, line: dict[str, Any]) -> None:
        self._pending += encode_line({**line, "time": round(time.time(), 3)})
        self._empty_pending()

    def _empty_pending(self) -> None:
        """Write what is possible; on a full disk the run continues, with one warning."""
        if self._pending:
            self._require_place()
        try:
            with self._naming_faults():
                while self._pending:
                    del self._pending[: self._file.write(self._pending)]
        except TrainingError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in FULL:
                raise
            if not self._reported:
                print(
                    f"warning: {error}\nLines are kept in memory until there is.", file=sys.stderr
                )
            self._reported = True
        else:
            self._reported = False

    def _require_place(self) -> None:
        """Raise if the file is no longer reachable under its path.

        Raises:
            TrainingError: the file was removed or replaced.
        """
        try:
            there = os.path.samestat(os.stat(self.path), self._opened)
            found = "another file in its place: a second job may write to this directory"
        except FileNotFoundError:
            there, found = False, "no such file: it was removed or renamed"
        except OSError:
            return  # the write itself will fail
        if not there:
            self._pending.clear()
            raise TrainingError(
                f"the run's log {self.path} is gone",
                found=found,
                expected="the file that this job has open",
                fix="leave run.dir alone while its run trains; resume from the last "
                "checkpoint with --resume auto",
            )

    @contextlib.contextmanager
    def _naming_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unwritable(error.strerror or error) from error

    def _unwritable(self, found: object) -> TrainingError:
        return TrainingError(
            f"cannot write the run's log {self.path}",
            found=found,
            expected="free disk space and write permission",
            fix="free space, then resume from the last checkpoint with --resume auto",
        )

    def _mirror(self, group: str, step: int, scalars: Mapping[str, float]) -> None:
        with self._naming_faults():
            for mirror in self._mirrors:
                mirror.scalars(group, step, scalars)


def _set_aside(path: Path) -> None:
    """Rename the log of an earlier run to the first free name `metrics.N.jsonl`."""
    if not path.exists():
        return
    if path.stat().st_size == 0:
        path.unlink()
        return
    path.rename(free_name(path))


def _cut(path: Path, *, step: int, stage: int | None) -> None:
    """Keep the lines up to `step` (and `stage`), byte for byte, without a partial line.

    The log is read backwards from its end to the step, and only what was read is checked.
    """
    if not path.exists():
        return
    size, end = path.stat().st_size, tail_start(path, step=step, stage=stage)
    behind: list[bytes] = []  # later lines to keep after one that is removed
    at_step, at_stage, cut = 0, 0, False
    for raw, line in read_lines(path, start=end):
        at_step = _whole(line.get("step"), at_step)
        at_stage = _whole(line.get("growth_stage"), at_stage)
        if at_step > step or (stage is not None and at_stage > stage):
            cut = True
        elif cut or end + len(raw) > size:  # the latter has no newline in the file
            cut = True
            behind.append(raw)
        else:
            end += len(raw)
    if end < size or behind:
        write_atomically(path, chain(_beginning(path, end), behind))


def _beginning(path: Path, size: int) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        while size > 0 and (data := stream.read(min(size, 1 << 20))):
            size -= len(data)
            yield data


def _whole(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) else otherwise
