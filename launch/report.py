"""Make the report of a run again: report.html in its run directory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megagrow.errors import MegagrowError
from megagrow.report import write_report


def main(arguments: list[str] | None = None) -> int:
    """Write the report and print its path; the exit status is 0 only on success."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python launch/report.py runs/quickstart",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="directory of the run")
    try:
        path = write_report(parser.parse_args(arguments).run_dir)
    except MegagrowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
