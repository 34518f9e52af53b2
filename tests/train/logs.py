"""Log lines of a run, for tests of the log and its mirrors."""

from megagrow.report.step_facts import StepFacts
from megagrow.train.logging.metrics import MetricsLog


def log_step(log: MetricsLog, step: int, stage: int = 0, loss: float = 3.0) -> None:
    log.step(
        StepFacts(
            step=step,
            tokens=step * 100,
            flops=step * 10_000,
            loss=loss,
            lr=1e-3,
            grad_norm=0.5,
            tokens_per_second=1000.0,
            growth_stage=stage,
        )
    )


def log_growth(log: MetricsLog, step: int, stage: int) -> None:
    log.growth(
        step=step,
        tokens=step * 100,
        flops=step * 10_000,
        operator="width",
        state_policy="exact",
        loss_before=3.0,
        loss_after=3.0,
        parameters_before=10,
        parameters_after=40,
        seconds=0.1,
        bytes_moved=480,
        peak_staging_bytes=64,
        growth_stage=stage,
        model={"layers": 2},
    )
