"""Shared by all command lines: argument types with ranges, examples, and helpful errors."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from megagrow.files import is_url, or_shipped

_SETTING = re.compile(r"^--([A-Za-z_]\w*(?:\.\w+)+)(=.*)?$", re.DOTALL)
_NO_VALUE = re.compile(r"^--[a-z][\w-]*=--$")
_LONGEST_NAME = 255  # bytes, on Linux file systems
_SHOWN = 60  # characters of a wrong value that are shown
_INSTALLED = {"pretrain": "train", "prepare_data": "prepare"}  # the others have the same name


class Parser(argparse.ArgumentParser):
    """An argument parser with examples, and with hints about how settings are given.

    Args:
        examples: lines below the heading "examples:", written for the scripts of `launch/`; under
            the command `megagrow` they are shown in its syntax.
        options: options of `argparse.ArgumentParser`.
    """

    def __init__(self, *, examples: str = "", **options: Any) -> None:
        if examples:
            options |= {
                "epilog": f"examples:\n{examples}",
                "formatter_class": argparse.RawDescriptionHelpFormatter,
            }
        super().__init__(**options)
        self.register("action", None, _Once)
        self.register("action", "store", _Once)
        self.given: set[str] = set()
        if self.epilog and self.prog.startswith("megagrow "):
            self.epilog = as_installed(self.epilog)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, but `--option=--` is a wrong value and not an empty list."""
        for word in sys.argv[1:] if args is None else args:
            if _NO_VALUE.match(word):
                self.error(f"argument {word.partition('=')[0]}: '--' is no value")
        self.given = set()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with status 2."""
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            for word in unknown.split():
                setting = _SETTING.match(word)
                if setting is not None:
                    key, value = setting[1], setting[2] or "=VALUE"
                    message += f"\n  fix:      settings have no dashes: {key}{value}"
        super().error(message)


class _Once(argparse._StoreAction):
    """Stores a value; an option that is given twice is an error, not its last value."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        if option is not None and self.dest in parser.given:
            several = " (give all values after one)" if self.nargs in ("+", "*") else ""
            raise argparse.ArgumentError(self, f"given twice{several}")
        parser.given.add(self.dest)
        super().__call__(parser, namespace, values, option)


def whole(least: int, most: int = 2**63 - 1) -> Any:
    """An argparse type: a whole number in a range."""
    return _number(int, least, most, f"a whole number of {_range(least, most)}")


def number(*, above: float | None = None, least: float | None = None, most: float = 1e18) -> Any:
    """An argparse type: a number with a lower bound (exclusive or inclusive) and an upper bound."""
    assert (above is None) != (least is None)
    words = f"above {above:g}" if least is None else f"of at least {least:g}"
    return _number(float, least, most, f"a number {words}, at most {most:g}", above=above)


def as_path(text: str) -> Path:
    """An argparse type: a valid path, whether it exists or not."""
    shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{shown!r} is not a path")
    try:
        longest = max(len(part.encode()) for part in text.split("/"))
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{shown!r} is not a path in UTF-8") from error
    if "\0" in text or longest > _LONGEST_NAME:
        raise argparse.ArgumentTypeError(
            f"{shown!r} is not a path: a name in it is longer than {_LONGEST_NAME} bytes"
        )
    return Path(text)


def as_output(text: str) -> Path:
    """An argparse type: the path of a file that can be written; its directory may not exist yet."""
    path = as_path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory, not a file to write")
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r}: {above} is not a writable directory")
    return path


def as_path_or_url(text: str) -> Path | str:
    """An argparse type: a path, or the URL of an object store, such as s3://bucket/run."""
    as_path(text)
    return text if is_url(text) else Path(text)


def as_path_text(text: str) -> str:
    """The same, as a string."""
    as_path(text)
    return text


def as_file(text: str) -> Path:
    """An argparse type: the path of a file, or the name of one that ships with megagrow."""
    return or_shipped(as_path(text))


def _range(least: int, most: int) -> str:
    return f"at least {least}" if most >= 2**63 - 1 else f"{least} to {most}"


def _number(
    kind: type, least: float | None, most: float, expected: str, *, above: float | None = None
) -> Any:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = None
        inside = (
            value is not None
            and value <= most
            and (least is None or value >= least)
            and (above is None or value > above)
        )
        if not inside:
            shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
            raise argparse.ArgumentTypeError(f"{shown!r} is not {expected}")
        return value

    return read


def sections(text: str, *, name: str) -> str:
    """The paragraphs of examples whose command (the first argument) is `name`."""
    wanted = re.compile(rf"^  \S.*launch/\w+\.py {re.escape(name)}\b", re.MULTILINE)
    return (
        "\n\n".join(part for part in text.strip("\n").split("\n\n") if wanted.search(part)) + "\n"
    )


def as_installed(examples: str) -> str:
    """Rewrite examples for the scripts of `launch/` in the syntax of the command `megagrow`."""
    parts = []
    for part in examples.split("\n\n"):
        # `supervise` takes a command instead of a script; other launchers start a module.
        train = "train" if "supervise.py" in part else "--module megagrow train"
        part = re.sub(
            r"python launch/(\w+)\.py",
            lambda found: f"megagrow {_INSTALLED.get(found[1], found[1])}",
            part,
        )
        parts.append(part.replace("launch/pretrain.py", train))
    return "\n\n".join(parts)
