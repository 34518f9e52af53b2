"""The family of a foreign checkpoint's model, when its files do not name it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TypeVar

from megagrow.config import ModelConfig
from megagrow.errors import CheckpointError, ConfigError
from megagrow.models.registry import FAMILIES

Found = TypeVar("Found")


def one_family(
    fitting: Mapping[str, Found], *, where: str, family: str | None = None
) -> Found | None:
    """What belongs to the one family that a checkpoint fits; None if it fits none.

    Of families that differ only in settings which a model may have, such as Mistral's window, it is
    the one with the fewest: the files have no such settings, and without them the models compute
    the same.

    Args:
        fitting: by the name of each family that it fits.
        where: the checkpoint, for errors.
        family: its family, if the user says it.

    Raises:
        ConfigError: there is no family of the given name.
        CheckpointError: it fits several families and none is given, or it does not fit the given.
    """
    if family is not None:
        if family not in FAMILIES:
            raise ConfigError(
                "--family: no such family", found=family, expected=", ".join(FAMILIES)
            )
        if family not in fitting:
            raise CheckpointError(
                f"{where}: does not fit family {family}",
                found=" or ".join(fitting) or "no family that megagrow has",
                fix="leave --family out",
            )
        return fitting[family]
    fitting = {name: found for name, found in fitting.items() if not _has_plainer(name, fitting)}
    if len(fitting) > 1:
        raise CheckpointError(
            f"{where}: fits several families, which compute different functions",
            found=", ".join(fitting),
            fix=f"say which with --family, for instance --family {next(iter(fitting))}",
        )
    return next(iter(fitting.values()), None)


def _has_plainer(name: str, fitting: Collection[str]) -> bool:
    """Whether another family is the same but for settings that it lacks."""
    mine = FAMILIES[name].architecture
    return any(
        replace(other, settings=mine.settings) == mine and other.settings < mine.settings
        for other in (FAMILIES[one].architecture for one in fitting)
    )


def require_family(model: ModelConfig, *, where: str, family: str | None) -> None:
    """Check a family that the user says against the one that the files name; see `one_family`."""
    one_family({model.family: model}, where=where, family=family)
