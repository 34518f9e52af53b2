"""The marker tokens of a document: the one that ends it, and optionally one that begins it.

Text must never encode to such a token, or it could end a document. So only tokens that a tokenizer
marks as special (Hugging Face) or as control symbols (SentencePiece) are allowed, whatever their
names. The first of these sources that has an answer is used:

1. the caller (``--eod``, ``--bos``);
2. the prepared dataset that contains the tokenizer (``dataset.json``);
3. ``eos_token``, ``bos_token`` and ``add_bos_token`` of the ``tokenizer_config.json`` next to it;
4. the tokenizer itself: SentencePiece's end token, or the tokens that its post-processor adds;
5. the one special token with a name that is used for nothing else.

A document begins with a marker only if the tokenizer itself would add one, or the caller asks for
it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
_END_NAMES = (
    END_OF_DOCUMENT,
    "<eod>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",  # DeepSeek's, with fullwidth bars
)
NONE = "none"  # for --bos: documents begin without a marker


@dataclass(frozen=True)
class Markers:
    """The tokens around a document.

    Attributes:
        eod: id of the token that ends it.
        bos: id of the token that begins it, or None.
        why: a description of the source of this choice.
    """

    eod: int
    bos: int | None = None
    why: str = ""


@dataclass(frozen=True)
class Candidates:
    """The candidate tokens of a tokenizer.

    Attributes:
        path: its file.
        special: the tokens that text never encodes to, by name.
        ids: function from the name of any token to its id, or None.
        own: (begin, end) tokens that the tokenizer adds by itself, each may be None.
        makes: whether the text of this name encodes to this token, which is not allowed.
    """

    path: Path
    special: Mapping[str, int]
    ids: Callable[[str], int | None]
    own: tuple[int | None, int | None]
    makes: Callable[[str, int], bool]

    def named(self, name: str, asked: str) -> int:
        """The id of a token given by name.

        Raises:
            DataError: there is no such token, or text could encode to it.
        """
        found = self.special.get(name)
        if found is not None:
            return found
        token = self.ids(name)
        if token is not None and asked.startswith("eos_token") and not self.makes(name, token):
            return token  # the configuration marks it as special
        raise DataError(
            f"{self.path}: {asked} {name!r} cannot mark the borders of documents",
            found="an ordinary token, which text can contain" if token is not None else "no token",
            expected=f"one of its special tokens: {_listed(self.special)}",
            fix="--eod NAME and --bos NAME choose among them",
        )


def choose(
    candidates: Candidates, *, eod: str | int | None = None, bos: str | int | None = None
) -> Markers:
    """The tokens around a document.

    Args:
        candidates: the tokenizer's tokens.
        eod: the name or id chosen by the caller; None: as described above.
        bos: likewise for the token that begins a document; ``none`` for no such token.

    Raises:
        DataError: there is no answer, or it is not allowed.
    """
    recorded = _recorded(candidates.path)
    settings = _configuration(candidates.path)
    end, why = _end(candidates, eod, recorded, settings)
    begin = _begin(candidates, bos, recorded, settings)
    return Markers(end, begin, why)


def _end(
    candidates: Candidates,
    asked: str | int | None,
    recorded: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> tuple[int, str]:
    if isinstance(asked, int):
        return asked, "as told"
    if asked is not None:
        return candidates.named(asked, "--eod"), "--eod"
    if isinstance(recorded.get("eod"), int):
        return recorded["eod"], "of the dataset"
    name = _name(settings.get("eos_token"))
    if name is not None:
        return candidates.named(name, "eos_token of tokenizer_config.json"), (
            "eos_token of tokenizer_config.json"
        )
    if candidates.own[1] in candidates.special.values():
        return int(candidates.own[1] or 0), "the tokenizer's own"
    known = [known for known in _END_NAMES if known in candidates.special]
    if len(known) == 1:
        return candidates.special[known[0]], "its only special token with such a name"
    raise DataError(
        f"{candidates.path}: does not define which token ends a document",
        found=f"special tokens {_listed(candidates.special)}",
        expected="eos_token in a tokenizer_config.json next to it, or one special token of the "
        f"names {', '.join(_END_NAMES)}",
        fix="--eod NAME says which of its special tokens it is"
        if candidates.special
        else "add a special token to the tokenizer",
    )


def _begin(
    candidates: Candidates,
    asked: str | int | None,
    recorded: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> int | None:
    if asked == NONE:
        return None
    if isinstance(asked, int):
        return asked
    if asked is not None:
        return candidates.named(asked, "--bos")
    if recorded:
        found = recorded.get("bos")
        return found if isinstance(found, int) else None
    adds, name = settings.get("add_bos_token"), _name(settings.get("bos_token"))
    if adds is False:
        return None
    if adds is True and name is not None:
        return candidates.named(name, "bos_token of tokenizer_config.json")
    own = candidates.own[0]
    return own if own in candidates.special.values() else None


def _recorded(path: Path) -> Mapping[str, Any]:
    """The manifest's content if this is the tokenizer of a prepared dataset."""
    content = _json(path.parent / "dataset.json").get("content")
    ours = isinstance(content, dict) and content.get("tokenizer_file") == path.name
    return content if ours else {}  # type: ignore[return-value]


def _configuration(path: Path) -> Mapping[str, Any]:
    return _json(path.parent / "tokenizer_config.json")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: cannot be read, but it describes the tokenizer next to it",
            found=str(error),
            fix="fix the file, or move the tokenizer away from it",
        ) from error
    return found if isinstance(found, dict) else {}


def _name(value: Any) -> str | None:
    """A token's name, which may be inside a record."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _listed(special: Mapping[str, int]) -> str:
    names = list(special)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(names[:20]) + more) if names else "none"
