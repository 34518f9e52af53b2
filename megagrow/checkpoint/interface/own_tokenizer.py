"""Find the tokenizer that a model was trained with, and check that it is the right one.

A run's checkpoint holds the SHA-256 of its tokenizer and the path of its dataset; a Hugging Face
directory has the tokenizer with the weights.  The tokenizer found is compared with the recorded
SHA-256 and refused if it differs, since its ids would mean other texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megagrow.checkpoint.interface.format import CheckpointSource
from megagrow.checkpoint.interface.tokenizer_files import COMPANIONS, FILES, LIMIT, OwnTokenizer
from megagrow.checkpoint.io.files import read_small
from megagrow.data.dataset import MANIFEST, read_manifest
from megagrow.errors import CheckpointError, DataError

OVERRIDE = "--allow-other-tokenizer"
NO_TOKENIZER = Path("none")


def fingerprints_beside(path: Path) -> dict[str, str]:
    """The SHA-256 of each tokenizer file in a directory, under its key in `fingerprints`."""
    return {name: _sha256(path / name) for name in FILES if (path / name).is_file()}


def own_tokenizer(
    source: CheckpointSource, given: Path | None = None, *, allow_other: bool = False
) -> OwnTokenizer | str:
    """The tokenizer of a checkpoint's model: the given one, or its own; or why there is none.

    Args:
        source: the checkpoint.
        given: a tokenizer file, or a directory with one (a dataset or Hugging Face model); or
            `none`.
        allow_other: accept `given` even if the checkpoint holds the SHA-256 of another.

    Raises:
        CheckpointError: there is no tokenizer at `given`, or it is not the model's.
    """
    if given == NO_TOKENIZER:
        return "--tokenizer none"
    own = _own(source)
    if given is None:
        return own
    held = held_tokenizers(source)
    found = _at(given, held)
    if found is None:
        raise CheckpointError(
            f"--tokenizer {given}: no tokenizer",
            expected=f"a tokenizer.json or .model, or a directory with one of "
            f"{', '.join((*FILES, *COMPANIONS[:5]))}, or a prepared dataset",
        )
    file, companions, sha256, (eod, bos) = found
    if not held or not sha256:
        why = "cannot be compared" if held else f"{source.path} does not record which is its own"
        said = f"{file or given} (not compared: {why})"
    elif sha256 in held:
        said = f"{file} (the model's own, by its SHA-256)"
        if eod is None and isinstance(own, OwnTokenizer):
            eod, bos = own.eod, own.bos
    elif allow_other:
        said = f"{file} (NOT the model's own: {OVERRIDE})"
    else:
        raise CheckpointError(
            f"{file}: is not the tokenizer of this model",
            found=f"SHA-256 {sha256}",
            expected=f"{' or '.join(held)}, which {source.path} holds",
            fix=(f"leave --tokenizer out: {own.file} is the model's own"
                  if isinstance(own, OwnTokenizer) else "give its own with --tokenizer")
            + f"; {OVERRIDE} takes another all the same",
        )  # fmt: skip
    return OwnTokenizer(file, companions, sha256, eod, said, bos)


def tokenizer_at(place: Path) -> OwnTokenizer:
    """The tokenizer at a path: a file, a prepared dataset or a Hugging Face directory.

    Raises:
        CheckpointError, DataError: there is none, or the dataset is damaged.
    """
    found = _at(place, ())
    if found is None:
        raise CheckpointError(
            f"{place}: no tokenizer",
            expected="a tokenizer.json or .model, or a directory with one, or a prepared dataset",
        )
    file, companions, sha256, (eod, bos) = found
    return OwnTokenizer(file, companions, sha256, eod, str(file or place), bos)


def require_own_tokenizer(
    source: CheckpointSource, fingerprints: Mapping[str, str], *, override: str = OVERRIDE
) -> None:
    """Check that a run's tokenizer is that of the weights it will start from.

    Args:
        source: the weights.
        fingerprints: the run's.
        override: the option that accepts another, for the error.

    Raises:
        CheckpointError: the source holds the SHA-256 of another.
    """
    held, wanted = held_tokenizers(source), fingerprints.get("tokenizer")
    if held and wanted is not None and wanted not in held:
        raise CheckpointError(
            f"{source.path}: these weights were trained with another tokenizer than the run's data",
            found=f"SHA-256 {wanted} in the dataset of the run",
            expected=" or ".join(held),
            fix="prepare the data with the weights' own: launch/prepare_data.py --tokenizer; "
            f"{override} takes the other all the same",
        )


def _own(source: CheckpointSource) -> OwnTokenizer | str:
    """The model's own tokenizer, found automatically; or why there is none."""
    held, reasons = held_tokenizers(source), []
    for place in _places(source):
        try:
            found = _at(place, held)
        except DataError as error:
            reasons.append(str(error).splitlines()[0])
            continue
        if found is None:
            if place != source.path:
                reasons.append(f"nothing is at {place}")
            continue
        file, companions, sha256, (eod, bos) = found
        if held and sha256 not in held:
            reasons.append(f"{file or place} is not the model's: its SHA-256 differs")
            continue
        compared = "the model's own, by its SHA-256" if held else "next to the weights"
        said = f"{file or place} ({compared})"
        return OwnTokenizer(file, companions, sha256, eod, said, bos)
    return "; ".join(reasons) or f"{source.path} does not record its tokenizer"


def _places(source: CheckpointSource) -> Iterator[Path]:
    yield source.path
    data: Any = source.config.get("data")
    if isinstance(data, Mapping):
        for key in ("path", "tokenizer"):
            if data.get(key):
                yield Path(str(data[key]))


def _at(
    place: Path, held: Sequence[str]
) -> tuple[Path | None, tuple[Path, ...], str, tuple[int | None, int | None]] | None:
    """The tokenizer at a path: (file, companions, SHA-256, (eod, bos)), or None."""
    if place.is_file():
        return place, (), _sha256(place), (None, None)
    if (place / MANIFEST).is_file():
        content = read_manifest(place)[0]
        file = place / content.tokenizer_file
        return file, (), _sha256(file), (content.eod, content.bos)
    here = [place / name for name in (*FILES, *COMPANIONS) if (place / name).is_file()]
    if not here:
        return None
    sums = {path: _sha256(path) for path in here if path.name in FILES}
    # If a tokenizer is there in two forms, take the one that the model was trained with.
    chosen = next((path for path in sums if sums[path] in held), next(iter(sums), None))
    others = tuple(path for path in here if path != chosen)
    return chosen, others, sums[chosen] if chosen else "", (None, None)


def held_tokenizers(source: CheckpointSource) -> list[str]:
    """Every tokenizer SHA-256 that the checkpoint holds."""
    return [v for key, v in source.fingerprints.items() if key.split(".")[0] == "tokenizer"]


def _sha256(path: Path) -> str:
    return hashlib.sha256(read_small(path, LIMIT)).hexdigest()
