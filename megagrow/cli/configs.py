"""List the configurations that come with megagrow, or print one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megagrow.arguments import Parser, as_path_text
from megagrow.errors import ConfigError, exit_status
from megagrow.files import SHIPPED

EXAMPLES = """\
  megagrow configs
  megagrow configs configs/quickstart.yaml > mine.yaml

--config, --machine and --tokenizer take these names as they are: where no such file is found from
the working directory, the one that comes with megagrow is read.
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, examples=EXAMPLES)
    parser.add_argument("name", type=as_path_text, nargs="?", help="of one that is to be printed")
    return parser.parse_args(arguments)


def names() -> list[str]:
    """Names of the bundled configurations, as `--config` accepts them."""
    return sorted(f"configs/{path}" for path in _below(SHIPPED / "configs"))


def _below(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*.*") if p.is_file()]


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    if options.name is None:
        print("\n".join(names()))
        return
    name = f"configs/{options.name.removeprefix('configs/')}"
    if name not in names():
        raise ConfigError(
            f"{options.name}: no such configuration comes with megagrow",
            expected="one of those that are listed without a name",
            fix="see which there are: megagrow configs",
        )
    sys.stdout.write((SHIPPED / name).read_text(encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, then list or print; returns the exit status."""
    options = parse(arguments)
    return exit_status(lambda: run(options))
