"""Account for every name in a source: carried, derived from what is carried, or left out.

A reader passes every name it meets to `account`, so none can be forgotten; what is left out
is in the source's `left_out`, which every command that opens a source prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megagrow.checkpoint.interface.format import CheckpointSource, LeftOut
from megagrow.checkpoint.interface.sidecar_checksums import NAME as SEAL
from megagrow.checkpoint.io.files import READING, naming
from megagrow.state.catalog import slots_of

_SHOWN = 4  # names per line; the others are counted


def account(
    names: Iterable[str],
    *,
    carried: Iterable[str] = (),
    derived: Iterable[str] = (),
    left_out: Iterable[LeftOut] = (),
) -> tuple[LeftOut, ...]:
    """Check that every name of a source has exactly one fate; returns what is left out.

    Args:
        names: everything that the source holds, under its own names.
        carried: names whose values the reader provides.
        derived: names whose values follow from carried ones and were compared with them.
        left_out: the rest, each with its reason.

    Raises:
        AssertionError: a name has no fate, or a fate is given to a name that does not exist: a
            bug in the reader, never a fault of the file.
    """
    left = tuple(left_out)
    held, given = set(names), {*carried, *derived, *(item.name for item in left)}
    if held != given:
        odd = sorted(held ^ given)
        what = "has no fate" if odd[0] in held else "has a fate and is not in the source"
        raise AssertionError(f"{odd[0]!r} {what}, one of {len(odd)} such names")
    return left


def unread_files(path: Path, read: Iterable[str]) -> Iterator[LeftOut]:
    """Entries of a checkpoint's directory that no reader of its format opens.

    Args:
        read: the names of the files and directories that the reader opened.
    """
    known = {SEAL, *read}
    with naming(path, "cannot be read", READING):
        for entry in sorted(path.iterdir()):
            if entry.name not in known:
                yield LeftOut(entry.name, "no file that this format reads")


def summary(left_out: Sequence[LeftOut]) -> list[str]:
    """Summarise what is left out: names with the same reason together, long lists counted."""
    by_reason: dict[str, list[str]] = {}
    for item in left_out:
        by_reason.setdefault(item.reason, []).append(item.name[:200])
    return [f"{enumerated(names)} ({reason})" for reason, names in by_reason.items()]


def enumerated(names: Sequence[str]) -> str:
    """Names joined by commas; for long lists the first few and how many more there are."""
    more = len(names) - _SHOWN
    if more <= 1:
        return ", ".join(names)
    return f"{', '.join(names[:_SHOWN])} and {more:,} more"


def names_in(text: str) -> frozenset[str]:
    """The words of a text as a set: a compact way to write a list of names."""
    return frozenset(text.split())


def made_zeros(source: CheckpointSource, slots: Iterable[str]) -> tuple[str, ...]:
    """Those of some slots that a source lacks, fully or for some tensors: they become zeros."""
    held = {slot.name for slot in source.slots}
    made = []
    for slot in slots:
        if slot not in held:
            made.append(slot)
            continue
        made += [
            f"{slot} of {tensor.name}"
            for tensor in source.catalog
            if (tensor.name, slot) in source.zeros
            and slot in (s.name for s in slots_of(tensor, source.slots))
        ]
    return tuple(made)
