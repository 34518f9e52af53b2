import sys
from pathlib import Path

from jobs import dataset  # noqa: F401 - a fixture

sys.path.append(str(Path(__file__).parent.parent / "checkpoint"))  # its helper modules
