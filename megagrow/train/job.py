"""Run one or several trainings on the processes of one job: join, train, leave."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megagrow.cluster import lifeline
from megagrow.cluster.environment import job_of_one
from megagrow.processes import start_up
from megagrow.train.health.signals import StopRequest

if TYPE_CHECKING:
    from megagrow.train.ready import Ready


@dataclass(frozen=True)
class Outcome:
    """How a job ended without an error.

    Attributes:
        checkpoint: the newest one, from which the run can resume; None if it saved none.
        signal: the signal that asked it to stop before the last step, or 0.
    """

    checkpoint: Path | None
    signal: int = 0


class LostContactError(Exception):
    """A collective failed because another process died.

    Attributes:
        found: what this process saw, and which rank is the cause.
        reported: whether another rank already reports it.
    """

    def __init__(self, error: RuntimeError, cause: str, *, reported: bool) -> None:
        self.found = "; ".join(filter(None, [cause, str(error).splitlines()[0]]))
        self.reported = reported
        super().__init__(self.found)


@job_of_one()
def run_job(found: Ready, *, resume: str, stop: StopRequest) -> Outcome:
    """Train a run on the processes that a launcher started, or on this one alone.

    The process stays in the job and may train again in it; `leave_job` ends that.

    Args:
        found: the result of `ready`; with data.
        resume: as for `Trainer`.
        stop: the stop request.

    Raises:
        MegagrowError: on all ranks, for anything that the user can fix.
        LostContactError: another rank died.
    """
    start_up.ends("checks")
    # DeepSpeed takes seconds to import, so first reject everything that can be rejected.
    from megagrow.engine import comm
    from megagrow.train.health.run_lock import holding_run
    from megagrow.train.health.watch import watching
    from megagrow.train.loop import Trainer

    config, data = found.config, found.data
    assert data is not None
    try:
        ranks = comm.start(config.watch.slow)
    except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
        cause = f"not all ranks came within watch.slow = {config.watch.slow:g} s"
        raise LostContactError(error, cause, reported=False) from error
    with holding_run(config, ranks) as lock, watching(ranks, config) as watch:
        try:
            stop.deferring = True
            trainer = Trainer(
                config=config,
                plan=found.plan,
                data=data,
                comm=ranks,
                resume=resume,
                watch=watch,
                stop=stop,
                lock=lock,
            )
            signal = trainer.run()
            return Outcome(trainer.last_saved, signal)
        except RuntimeError as error:
            if not _lost_contact(error):
                raise
            reported = not watch.speaks_first()
            # A supervisor knows the cause by itself, and waits for this rank's last word.
            cause = "" if lifeline.connected() else watch.explain()
            raise LostContactError(error, cause, reported=reported) from error


def leave_job() -> None:
    """Leave the job that `run_job` joined, for good: DeepSpeed cannot join a second one."""
    from megagrow.engine import comm

    comm.stop()


def _lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed because another process died."""
    text = str(error)
    return any(sign in text for sign in ("by peer", "gloo/transport", "NCCL", "Broken pipe"))
