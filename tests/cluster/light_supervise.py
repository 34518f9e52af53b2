"""launch/supervise.py with launchers that are light."""

import importlib.util
import sys
from pathlib import Path

from megagrow.cluster import launchers

HERE = Path(__file__).parent


def supervise():
    """launch/supervise.py as a module."""
    path = HERE.parent.parent / "launch" / "supervise.py"
    spec = importlib.util.spec_from_file_location("megagrow_supervise", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    launchers._DEEPSPEED = launchers._TORCHRUN = (
        sys.executable, str(HERE / "light_launcher.py"),
    )  # fmt: skip
    sys.exit(supervise().main())
