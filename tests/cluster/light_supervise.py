"""launch/supervise.py with lightweight launchers."""

import sys
from pathlib import Path

from megagrow.cli import supervise
from megagrow.cluster import launchers

HERE = Path(__file__).parent


if __name__ == "__main__":
    light = (
        sys.executable, str(HERE / "light_launcher.py"),
    )  # fmt: skip
    setattr(launchers, "_DEEPSPEED", light)  # noqa: B010
    setattr(launchers, "_TORCHRUN", light)  # noqa: B010
    sys.exit(supervise.main())
