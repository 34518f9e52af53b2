"""Other destinations of a run's scalars: TensorBoard, Prometheus, Weights & Biases.

Each uses its own library, imported only if the configuration enables it.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megagrow.config import Config
from megagrow.errors import ConfigError
from megagrow.train.health.run_lock import run_id


class Mirror(Protocol):
    """A destination for scalars besides the log."""

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Record values of a step; `group` is train, validation, growth or pace."""
        ...

    def flush(self) -> None:
        """Flush everything to safe storage."""
        ...

    def close(self) -> None:
        """Close; no more values follow."""
        ...


def open_mirrors(config: Config, *, first_step: int) -> list[Mirror]:
    """The mirrors that a configuration enables.

    Args:
        first_step: steps from here on replace those that an earlier, interrupted run wrote.

    Raises:
        ConfigError: a library is not installed, or a port is in use.
    """
    wanted = config.train
    mirrors: list[Mirror] = []
    if wanted.tensorboard:
        mirrors.append(TensorBoard(Path(config.run.dir) / "tensorboard", first_step=first_step))
    if wanted.prometheus_port is not None:
        address = wanted.prometheus_address
        mirrors.append(Prometheus(wanted.prometheus_port, address=address))
        print(f"metrics: http://{address}:{wanted.prometheus_port}/metrics", file=sys.stderr)
    if wanted.wandb is not None:
        mirrors.append(WeightsAndBiases(config))
    return mirrors


class TensorBoard:
    """Event files in a directory."""

    def __init__(self, directory: Path, *, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("train.tensorboard", "tensorboard", "false", error) from error
        self._writer: Any = SummaryWriter(log_dir=str(directory), purge_step=first_step)

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Add a point to the curve of each value."""
        # Written by a thread of TensorBoard's, whose error appears in a later call.
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", float(value), step)

    def flush(self) -> None:
        """Write what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class Prometheus:
    """A text endpoint with the latest values, http://ADDRESS:port/metrics."""

    def __init__(self, port: int, *, address: str = "127.0.0.1") -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise _missing("train.prometheus_port", "prometheus-client", "null", error) from error
        self._registry = prometheus_client.CollectorRegistry()
        self._make = prometheus_client.Gauge
        self._gauges: dict[str, Any] = {}
        try:
            self._server, self._thread = prometheus_client.start_http_server(
                port, addr=address, registry=self._registry
            )
        except OSError as error:
            raise ConfigError(
                f"train.prometheus_port = {port}: cannot be listened on",
                found=f"{address}: {error.strerror or error}",
                expected="a free port, and an address (train.prometheus_address), of rank 0's host",
                fix="set train.prometheus_port to another, or to null",
            ) from error
        self._reported = False

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Set the gauge of each value, and of the step."""
        if not self._thread.is_alive() and not self._reported:
            self._reported = True
            print("warning: the thread that serves train.prometheus_port has ended; the run "
                  "continues without it", file=sys.stderr)  # fmt: skip
        for name, value in {"step": step, **values}.items():
            full = re.sub(r"\W", "_", f"megagrow_{group}_{name}")
            if full not in self._gauges:
                text = f"{name} of the last {group} line"
                self._gauges[full] = self._make(full, text, registry=self._registry)
            self._gauges[full].set(float(value))

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class WeightsAndBiases:
    """A Weights & Biases run; a resumed training run continues the same one."""

    def __init__(self, config: Config) -> None:
        settings = config.train.wandb
        assert settings is not None
        try:
            import wandb
        except ImportError as error:
            raise _missing("train.wandb", "wandb", "null", error) from error
        directory = Path(config.run.dir)
        self._run: Any = wandb.init(
            project=settings.project,
            name=settings.name,
            entity=settings.entity,
            mode=settings.mode,
            dir=str(directory),
            id=run_id(directory),
            resume="allow",
            config=config.model_dump(mode="json", by_alias=True),
        )

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Log the values at a step."""
        # No `step=` argument: W&B accepts steps in ascending order only, and a growth and a
        # validation belong to a step that was already logged.
        self._run.log({f"{group}/step": step, **{f"{group}/{k}": v for k, v in values.items()}})

    def flush(self) -> None:
        """W&B flushes on its own."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def require_libraries(config: Config) -> None:
    """Reject mirrors whose library is not installed, without importing any.

    Raises:
        ConfigError: names the package and the setting.
    """
    for wanted, key, module, package, off in (
        (config.train.tensorboard, "train.tensorboard", "tensorboard", "tensorboard", "false"),
        (config.train.prometheus_port, "train.prometheus_port", "prometheus_client",
         "prometheus-client", "null"),
        (config.train.wandb, "train.wandb", "wandb", "wandb", "null"),
    ):  # fmt: skip
        if wanted and importlib.util.find_spec(module) is None:
            error = ImportError(f"No module named {module!r}")
            raise _missing(key, package, off, error)


def _missing(key: str, package: str, off: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"{key}: {package} is not installed",
        found=error,
        expected=f"the package `{package}`",
        fix=f"pip install {package}, or set {key}={off}",
    )
