"""launch/supervise.py; with LIGHT_LAUNCHER, a launcher of light ranks stands for DeepSpeed's."""

import os
import sys
from pathlib import Path

from megagrow.cli import supervise
from megagrow.cluster import hosts
from megagrow.cluster.hosts import Order, Workers

HERE = Path(__file__).parent


class ByLauncher(hosts.Ranks):
    """Ranks that a launcher starts, as over ssh, but on this machine."""

    def prepare(self, order: Order) -> Workers:
        workers = super().prepare(order)
        launch = [sys.executable, str(HERE / "light_launcher.py"), str(self._ranks)]
        return Workers([*launch, *workers.words], 1, workers.environ, launcher=True)


if __name__ == "__main__":
    if "LIGHT_LAUNCHER" in os.environ:
        setattr(supervise, "Ranks", ByLauncher)  # noqa: B010
    sys.exit(supervise.main())
