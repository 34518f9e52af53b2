"""launch/supervise.py with lightweight launchers."""

import sys
from pathlib import Path

from megagrow.cli import supervise
from megagrow.cluster import launchers

HERE = Path(__file__).parent


if __name__ == "__main__":
    launchers._DEEPSPEED = launchers._TORCHRUN = (
        sys.executable, str(HERE / "light_launcher.py"),
    )  # fmt: skip
    sys.exit(supervise.main())
