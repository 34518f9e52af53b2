"""Errors that a user can fix.

Each says what is wrong where, what was found, what was expected and which command or setting fixes
it. Any other exception is a defect of megagrow itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


class MegagrowError(Exception):
    """An error that the user can fix.

    Args:
        where: the file, setting or object at fault, and what is wrong with it.
        found: what was there.
        expected: what should have been there.
        fix: the command or the setting that fixes it.
    """

    def __init__(
        self,
        where: str,
        *,
        found: object | None = None,
        expected: object | None = None,
        fix: str | None = None,
    ) -> None:
        parts = [where]
        if found is not None:
            parts.append(f"  found:    {found}")
        if expected is not None:
            parts.append(f"  expected: {expected}")
        if fix is not None:
            parts.append(f"  fix:      {fix}")
        super().__init__("\n".join(parts))

    def within(self, place: str, *, setting: str) -> MegagrowError:
        """The same error with an outer location: `place.setting...`, or else "in `place`"."""
        dot = "." if str(self).startswith(f"{setting}.") else ": "
        return type(self)(f"{place}{dot}{self}")

    def or_fix(self, other: str) -> MegagrowError:
        """The same error with an alternative fix appended."""
        return type(self)(f"{self}\n            or {other}")


class ConfigError(MegagrowError):
    """The configuration asks for something impossible."""


class DataError(MegagrowError):
    """A corpus, tokenizer or indexed dataset is missing, damaged or does not fit."""


class CheckpointError(MegagrowError):
    """A checkpoint is missing, damaged, incomplete or from another run."""


class GrowthError(MegagrowError):
    """A growth operator or state policy cannot do what it was asked."""


class LockError(MegagrowError):
    """Another job holds a directory, or took it over from this one."""


class TrainingError(MegagrowError):
    """Training had to stop, for instance on a loss that is not finite."""


def exit_status(work: Callable[[], object]) -> int:
    """Run a command: returns 0, or 1 after printing an error that the user can fix."""
    try:
        work()
    except MegagrowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
