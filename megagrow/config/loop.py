"""The sections of a run's course: its directory, validation and logs, checkpoints, recovery."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megagrow.config.section import PathText, Positive, Section
from megagrow.files import is_url


def _store(text: str) -> str:
    if not is_url(text) or text.endswith("://"):
        raise ValueError("not the URL of an object store; write one such as s3://bucket/run")
    return text


class RunConfig(Section):
    """The run's directory and seed."""

    dir: PathText = "runs/default"
    """Directory of the run: log, checkpoints, TensorBoard, report."""
    wait: Annotated[float, Field(ge=0)] = 90.0
    """Seconds to wait for another job to release `dir` before this one fails."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """Decides fresh weights and the order of the data, whatever the layout."""


class WandbConfig(Section):
    """Weights & Biases settings, named as in `wandb.init`."""

    project: str
    """Name of the project."""
    name: str | None = None
    """Name of the run; null: chosen by Weights & Biases."""
    entity: str | None = None
    """User or team; null: the default of the account."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """Whether to send, to write for a later `wandb sync`, or neither."""


class AverageConfig(Section):
    """The average of the weights over the last steps of a run, validated along with the weights.

    It is kept in host memory, as an fp32 copy of each rank's shard; checkpoints hold the weights
    themselves.
    """

    last: Annotated[float, Field(gt=0.0, le=1.0)]
    """Fraction of all steps that is averaged, for instance a tenth of the decay."""


class TrainConfig(Section):
    """The loop: validation, logging, early stop."""

    validate_every: Positive = 100
    """Steps between validations."""
    validation_samples: Positive = 64
    """Samples of a validation: the same ones each time, spread over the validation set."""
    log_every: Positive = 10
    """Steps between lines of progress."""
    stop_after_steps: Positive | None = None
    """Save and stop after this step, counted from the start of the run; null: at the end."""
    growth_diagnostics: Positive | None = None
    """Steps between looks at a growth's progress (docs/diagnostics.md); null: none."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    prometheus_port: Annotated[int, Field(gt=0, lt=65536)] | None = None
    """Port on rank 0's host that answers Prometheus; null: none."""
    prometheus_address: str = "127.0.0.1"
    """Address it listens on: this host only by default; with 0.0.0.0 anyone who can reach it."""
    wandb: WandbConfig | None = None
    """Scalars go to Weights & Biases as well."""
    threads: Positive | None = None
    """CPU threads of each rank; null: cores / ranks of the host."""
    average: AverageConfig | None = None
    """The average of the last weights; null: none."""


class CheckpointConfig(Section):
    """When to save, where to, and how many checkpoints to keep."""

    every: Positive = 500
    """Steps between checkpoints. One is saved at each growth and at the end as well."""
    keep: Positive = 2
    """Number of checkpoints that are kept, the newest ones."""
    asynchronous: bool | None = None
    """Write beside the next steps, from a copy of each rank's state in host memory; null: on GPUs,
    whose hosts have memory and cores to spare, not on CPUs."""
    remote: Annotated[str, AfterValidator(_store)] | None = None
    """An object store that each checkpoint is copied to, such as s3://bucket/run
    (docs/object-stores.md); null: none."""
    memory_every: Positive | None = None
    """Steps between copies of the state to the hosts' memory, each host's share to the next host's
    too; a restart then reads memory, not `run.dir` (docs/cluster.md). Null: no copies."""


class WatchConfig(Section):
    """Seconds without progress of a rank after which the job is ended."""

    stall: Annotated[float, Field(gt=0)] = 60.0
    """In training steps, after the first one."""
    slow: Annotated[float, Field(gt=0)] = 600.0
    """While starting, validating, growing and saving."""


class RecoveryConfig(Section):
    """Automatic recovery from non-finite losses and gradients, and from loss spikes."""

    skip: Annotated[int, Field(ge=0)] = 3
    """Consecutive bad steps whose update is not applied."""
    rollback: Annotated[int, Field(ge=0)] = 1
    """Rollbacks to the last checkpoint after that; then the run stops."""
    spike: Annotated[float, Field(gt=1.0)] | None = None
    """A loss above this multiple of the recent median is bad as well; null: no limit."""
