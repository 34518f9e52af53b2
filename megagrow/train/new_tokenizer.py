"""The tokenizer that a growth of the vocabulary brings: compared with the model's own by text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megagrow.checkpoint.interface.format import CheckpointSource
from megagrow.checkpoint.interface.own_tokenizer import own_tokenizer, tokenizer_at
from megagrow.checkpoint.interface.tokenizer_files import OwnTokenizer
from megagrow.config import GrowConfig
from megagrow.config.growths import GrowTarget
from megagrow.data.vocabularies import Vocabulary, matched, read_vocabulary
from megagrow.errors import CheckpointError, GrowthError, MegagrowError
from megagrow.growth.operators.vocabulary import TokenMap

_EXAMPLES = 8


@dataclass(frozen=True)
class NewTokenizer:
    """A tokenizer and what becomes of the old one's tokens.

    Attributes:
        sha256: of the new tokenizer's file.
        map: where each row comes from.
        lines: what a user should know of it.
    """

    sha256: str
    map: TokenMap
    lines: tuple[str, ...]


def sized(grow: GrowConfig) -> GrowConfig:
    """The section with `target.vocab` filled in from its tokenizer, if it names one.

    Raises:
        GrowthError: `target.vocab` is smaller than the tokenizer's vocabulary.
        DataError, CheckpointError: the tokenizer cannot be read.
    """
    if grow.tokenizer is None:
        return grow
    given = None if grow.target is None else grow.target.vocab
    try:
        path = _file(tokenizer_at(Path(grow.tokenizer)), grow.tokenizer)
        least = len(read_vocabulary(path).tokens)
    except MegagrowError:
        if given is not None and not Path(grow.tokenizer).exists():
            return grow  # the growth lies behind, and its size is known
        raise
    if given is not None and given < least:
        raise GrowthError(
            "grow.target.vocab: fewer rows than the tokenizer has tokens",
            found=given,
            expected=f"at least {least}, for {path}",
            fix="leave grow.target.vocab out",
        )
    target = grow.target or GrowTarget()
    return grow.model_copy(update={"target": target.model_copy(update={"vocab": given or least})})


def new_tokenizer(
    grow: GrowConfig, source: CheckpointSource, *, rows: tuple[int, int]
) -> NewTokenizer:
    """Compare the tokenizer of a growth with that of the model that it grows.

    Args:
        grow: the section, with `tokenizer`.
        source: the checkpoint, whose own tokenizer the old one is.
        rows: of the vocabulary, before and after.

    Raises:
        CheckpointError: the old tokenizer is not known, or is not the model's.
        GrowthError: tokens would be lost and `allow_dropped` is not set, or there are more tokens
            than rows.
        DataError: a tokenizer cannot be read.
    """
    assert grow.tokenizer is not None
    given = tokenizer_at(Path(grow.tokenizer))
    new = read_vocabulary(_file(given, grow.tokenizer))
    old, said = _old(grow, source)
    for vocabulary, count in zip((old, new), rows, strict=True):
        if len(vocabulary.tokens) > count:
            raise GrowthError(
                f"{vocabulary.path}: has more tokens than the model has rows",
                found=len(vocabulary.tokens),
                expected=f"at most {count}",
                fix="give the tokenizer of the weights as grow.old_tokenizer",
            )
    found = matched(old, new)
    if found.dropped and not grow.allow_dropped:
        raise GrowthError(
            f"{new.path}: does not have all tokens of {old.path}, whose rows would be lost",
            found=f"{len(found.dropped):,} of them: {_examples(old, found.dropped)}",
            fix="give a tokenizer that extends the old one, or set grow.allow_dropped=true",
        )
    before = (*found.free[0], *range(len(old.tokens), rows[0]))
    after = (*found.free[1], *range(len(new.tokens), rows[1]))
    padding = dict(zip(after, before, strict=False))
    carried = {**found.carried, **padding}
    lines = [
        f"tokens: {sum(t is not None for t in old.tokens):,} -> "
        f"{sum(t is not None for t in new.tokens):,}, compared by their texts with {said}; "
        f"{len(found.carried):,} keep their rows",
    ]
    if found.pieces:
        length = sum(map(len, found.pieces.values())) / len(found.pieces)
        lines.append(
            f"tokens: {len(found.pieces):,} are new, each the mean of the rows of its pieces "
            f"({length:.1f} on average): {_examples(new, tuple(found.pieces))}"
        )
    if found.unsplit:
        lines.append(
            f"tokens: {len(found.unsplit):,} are new and have fresh rows, since the old tokenizer "
            f"does not know their texts: {_examples(new, found.unsplit)}"
        )
    if found.dropped:
        lines.append(
            f"tokens: {len(found.dropped):,} are lost (grow.allow_dropped): "
            f"{_examples(old, found.dropped)}"
        )
    if after:
        lines.append(
            f"rows without a token: {len(before):,} -> {len(after):,}; {len(padding):,} keep their "
            f"values, {len(after) - len(padding):,} are fresh"
        )
    tokens = TokenMap.of(rows, carried.items(), found.pieces)
    return NewTokenizer(given.sha256, tokens, tuple(lines))


def _old(grow: GrowConfig, source: CheckpointSource) -> tuple[Vocabulary, str]:
    """The vocabulary of the weights, and what it was compared with."""
    try:
        given = None if grow.old_tokenizer is None else Path(grow.old_tokenizer)
        own = own_tokenizer(source, given)
    except CheckpointError as error:
        raise type(error)(f"grow.old_tokenizer: {error}") from error
    if isinstance(own, str) or own.file is None:
        raise CheckpointError(
            f"{source.path}: their tokenizer is not known, so rows cannot be matched",
            found=own if isinstance(own, str) else "files of a kind that megagrow does not read",
            fix="give its tokenizer.json or .model, or the dataset, as grow.old_tokenizer",
        )
    return read_vocabulary(own.file), own.said


def _file(found: OwnTokenizer, given: str) -> Path:
    if found.file is None:
        raise CheckpointError(
            f"grow.tokenizer: {given} has files of a tokenizer that megagrow does not read",
            expected="a tokenizer.json or .model, or a directory with one, or a prepared dataset",
        )
    return found.file


def _examples(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    shown = ", ".join(str(vocabulary.tokens[number]) for number in ids[:_EXAMPLES])
    return shown + (", ..." if len(ids) > _EXAMPLES else "")
