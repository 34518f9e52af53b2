"""What the datasets of a run must have in common, and what its settings need of them."""

from __future__ import annotations

from megagrow.data.dataset import Content, PreparedData
from megagrow.data.token_files import TokenRanges
from megagrow.errors import DataError


def require_same_tokenizer(path: str, found: Content, first: str, expected: Content) -> None:
    """Require that a dataset has the tokenizer of the first one.

    Raises:
        DataError: another tokenizer, or other tokens that end or begin a document.
    """
    for what in ("tokenizer_sha256", "vocab_size", "eod", "bos"):
        if getattr(found, what) != getattr(expected, what):
            raise DataError(
                f"{path}: {what} differs from that of {first}",
                found=getattr(found, what),
                expected=getattr(expected, what),
                fix=f"prepare it again with --tokenizer {first}/{expected.tokenizer_file}",
            )


def require_ends(data: PreparedData) -> None:
    """Require that a dataset's documents end with its end token, for `documents: mask`.

    Those of datasets made from text do. Tokens that were taken as they are may have none; they are
    read up to the first.

    Raises:
        DataError: there is no such token.
    """
    tokens = data.train
    if not isinstance(tokens, TokenRanges) or any(
        (chunk == data.eod).any() for chunk in tokens.chunks()
    ):
        return
    raise DataError(
        f"{data.path}: data.documents is mask, but no document ends",
        found=f"{tokens.total_tokens:,} training tokens, none of them the end token, id {data.eod}",
        expected="an end token after each document",
        fix="take the tokens again with --eod NAME, if another token ends them; "
        "or set data.documents=packed",
    )
