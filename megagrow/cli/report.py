"""Make the report of a run again: report.html in its run directory."""

from __future__ import annotations

import sys

from megagrow.cli import Parser, as_path
from megagrow.errors import MegagrowError
from megagrow.report import write_report


def main(arguments: list[str] | None = None) -> int:
    """Write the report and print its path; the exit status is 0 only on success."""
    parser = Parser(description=__doc__, examples="  python launch/report.py runs/quickstart\n")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=as_path, help="directory of the run")
    try:
        path = write_report(parser.parse_args(arguments).run_dir)
    except MegagrowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
