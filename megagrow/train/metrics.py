"""The log that a run writes: `metrics.jsonl`, and its mirror for TensorBoard.

Rank 0 alone makes a `MetricsLog`.  The file's form and its reader are in
`megagrow.report.log`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megagrow.errors import ConfigError, TrainingError
from megagrow.report.log import encode_line, read_lines, read_metrics, write_atomically

__all__ = ["MetricsLog", "read_metrics"]

FILE_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends to `run_dir/metrics.jsonl`, one write a line; mirrors scalars for TensorBoard.

    Every line has `event` first and `time` (seconds since 1970) last.  `step`
    counts finished optimizer steps, `tokens` and `flops` add up from the start
    of the run, losses are in nats per token.  `growth_stage` of a growth line
    is the stage that the growth leads to.

    Args:
        run_dir: made if it is not there.
        tensorboard: also write `run_dir/tensorboard/`.
        resume_step: None begins a new log; one that is already there is kept
            under the name `metrics.N.jsonl`.  A number (the step of the
            checkpoint) goes on with the log that is there, after cutting off
            what a run that was killed later wrote beyond that step.
        resume_stage: the growth stage of that checkpoint.  A growth does not
            advance the step, so with it lines of later stages at `resume_step`
            itself are cut off too.

    Raises:
        DataError: the log to go on with is damaged before its last line.
        ConfigError: TensorBoard is wanted but not installed.
        TrainingError: a line cannot be written (disk full, say).
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        tensorboard: bool,
        resume_step: int | None = None,
        resume_stage: int | None = None,
    ) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            _set_aside(self.path)
        else:
            _cut(self.path, step=resume_step, stage=resume_stage)
        self._board = None
        if tensorboard:
            # Steps from here on replace those that an earlier, killed run left.
            first_step = 0 if resume_step is None else resume_step + 1
            self._board = _open_board(self.path.parent / "tensorboard", first_step)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    def step(
        self,
        *,
        step: int,
        tokens: int,
        flops: int,
        loss: float,
        lr: float,
        grad_norm: float,
        tokens_per_second: float,
        growth_stage: int,
    ) -> None:
        """One optimizer step."""
        scalars = {
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens_per_second,
            "growth_stage": growth_stage,
        }
        self._write({"event": "step", "step": step, "tokens": tokens, "flops": flops, **scalars})
        self._mirror("train", step, {"tokens": tokens, "flops": flops, **scalars})

    def validation(
        self, *, step: int, tokens: int, flops: int, val_loss: float, growth_stage: int
    ) -> None:
        """The loss of the fixed validation set after `step` steps."""
        self._write(
            {
                "event": "validation",
                "step": step,
                "tokens": tokens,
                "flops": flops,
                "val_loss": val_loss,
                "growth_stage": growth_stage,
            }
        )
        self._mirror("validation", step, {"loss": val_loss})

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
        """One growth; the two losses are of the same fixed validation batch.

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

    def event(self, name: str, **fields: Any) -> None:
        """Any other event (`run_start`, `checkpoint`, `resume`, `end`), safe on disk on return.

        A line without a `step` belongs to the step of the line before it.
        """
        self._write({"event": name, **fields})
        with self._naming_faults():
            os.fsync(self._file.fileno())
            if self._board is not None:
                self._board.flush()

    def close(self) -> None:
        """Close the files; may be called twice."""
        self._file.close()
        if self._board is not None:
            self._board.close()
            self._board = None

    def _write(self, line: dict[str, Any]) -> None:
        content = encode_line({**line, "time": round(time.time(), 3)})
        with self._naming_faults():
            written = self._file.write(content)
        if written != len(content):
            raise self._unwritable(f"{written} of {len(content)} bytes of a line written")

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
            expected="room on the disk and the right to write",
            mend="free space, then go on from the last checkpoint with --resume auto",
        )

    def _mirror(self, group: str, step: int, scalars: dict[str, float]) -> None:
        if self._board is not None:
            # Written by a thread of TensorBoard's, whose fault comes up in a later call.
            with self._naming_faults():
                for name, value in scalars.items():
                    self._board.add_scalar(f"{group}/{name}", float(value), step)


def _set_aside(path: Path) -> None:
    """Keep the log of an earlier run under the first free name `metrics.N.jsonl`."""
    if not path.exists():
        return
    if path.stat().st_size == 0:
        path.unlink()
        return
    number = 1
    while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(kept)


def _cut(path: Path, *, step: int, stage: int | None) -> None:
    """Leave the lines of at most `step` (and `stage`), byte for byte, and no half line."""
    if not path.exists():
        return
    kept = []
    at_step, at_stage = 0, 0
    for raw, line in read_lines(path):
        at_step = _whole(line.get("step"), at_step)
        at_stage = _whole(line.get("growth_stage"), at_stage)
        if at_step <= step and (stage is None or at_stage <= stage):
            kept.append(raw)
    content = b"".join(kept)
    if content != path.read_bytes():
        write_atomically(path, content)


def _whole(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) else otherwise


def _open_board(directory: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "train.tensorboard: TensorBoard is not installed",
            found=error,
            expected="the package `tensorboard`",
            mend="pip install tensorboard, or set train.tensorboard=false",
        ) from error
    return SummaryWriter(log_dir=str(directory), purge_step=first_step)
