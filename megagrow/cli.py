"""What the command lines of `launch/` share: numbers with a range, and errors that help."""

from __future__ import annotations

import argparse
import math
import re
from typing import Any, NoReturn

_SETTING = re.compile(r"^--([A-Za-z_]\w*(?:\.\w+)+)(=.*)?$", re.DOTALL)
_SHOWN = 60  # characters of a wrong value


class Parser(argparse.ArgumentParser):
    """A parser with examples below its options, which knows how settings are given.

    Args:
        examples: lines that follow the heading "examples:".
        options: those of `argparse.ArgumentParser`.
    """

    def __init__(self, *, examples: str = "", **options: Any) -> None:
        if examples:
            options |= {
                "epilog": f"examples:\n{examples}",
                "formatter_class": argparse.RawDescriptionHelpFormatter,
            }
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with status 2."""
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            for word in unknown.split():
                setting = _SETTING.match(word)
                if setting is not None:
                    key, value = setting[1], setting[2] or "=VALUE"
                    message += f"\n  mend:     settings have no dashes: {key}{value}"
        super().error(message)


def whole(least: int, most: int = 2**63 - 1) -> Any:
    """An argparse type: a whole number in a range."""
    return _number(int, least, most, f"a whole number of {_range(least, most)}")


def number(*, above: float | None = None, least: float | None = None) -> Any:
    """An argparse type: a finite number above a bound, or at least one."""
    lowest = least if least is not None else above
    assert lowest is not None
    words = f"of at least {lowest:g}" if least is not None else f"above {lowest:g}"
    bound = lowest if least is not None else math.nextafter(lowest, math.inf)
    return _number(float, bound, 1.7e308, f"a number {words}")


def _range(least: int, most: int) -> str:
    return f"at least {least}" if most >= 2**63 - 1 else f"{least} to {most}"


def _number(kind: type, least: float, most: float, expected: str) -> Any:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not least <= value <= most:
            shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
            raise argparse.ArgumentTypeError(f"{shown!r} is not {expected}")
        return value

    return read


def sections(text: str, *, name: str) -> str:
    """Of examples in paragraphs, those whose command is `name` (its first argument)."""
    wanted = re.compile(rf"^  \S.*launch/\w+\.py {re.escape(name)}\b", re.MULTILINE)
    return (
        "\n\n".join(part for part in text.strip("\n").split("\n\n") if wanted.search(part)) + "\n"
    )
