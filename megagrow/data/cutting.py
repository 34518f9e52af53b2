"""Split a long text into parts whose concatenated token ids are those of the whole text.

A tokenizer needs many times the size of its text in memory (SentencePiece 30 times, `tokenizers`
more than a hundred), so a long document is encoded in parts where these are known to give the same
ids. This holds between two lines if the tokenizer splits text there anyway, in any context:

* A SentencePiece model as trained by megagrow has no piece across a line end.
* A ``tokenizer.json`` without normalization that splits by one of the patterns below ends a word at
  a single line end between two visible characters: each pattern matches from left to right, none
  looks behind, and none matches a line end together with what follows it, unless that is blank.

Any other tokenizer encodes a document at once, with the memory that this needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_CHARACTERS = 1 << 18
# A line end between two characters that no tokenizer treats as white space.
_BORDER = re.compile(r"(?<=[\w!-~])\n(?=[\w!-~])")
_PATTERNS = {
    # GPT-2's, which is built into ByteLevel.
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # OpenAI's cl100k, with LLaMA 3.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen 2.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def at_line_ends(text: str) -> Iterator[str]:
    """Split after any line end, into parts of some hundred thousand characters."""
    start = 0
    while len(text) - start > _CHARACTERS:
        end = text.find("\n", start + _CHARACTERS)
        if end < 0:
            break
        yield text[start : end + 1]
        start = end + 1
    yield text[start:]


def between_words(text: str) -> Iterator[str]:
    """The same, but only at a single line end between visible characters."""
    start = 0
    while len(text) - start > _CHARACTERS:
        border = _BORDER.search(text, start + _CHARACTERS)
        if border is None:
            break
        yield text[start : border.end()]
        start = border.end()
    yield text[start:]


def splits_between_words(tokenizer_json: str) -> bool:
    """Whether a ``tokenizer.json`` is known to split wherever `between_words` does."""
    parts: dict[str, Any] = json.loads(tokenizer_json)
    splitter = parts.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    across = any("\n" in t["content"] for t in parts["added_tokens"] if not t["special"])
    return (
        parts.get("normalizer") is None
        and not across
        and all(map(_leaves_lines_alone, steps))
        and any(map(_splits_lines, steps))
    )


def _leaves_lines_alone(step: dict[str, Any]) -> bool:
    if step.get("type") == "ByteLevel":
        return not step.get("add_prefix_space", True)
    return step.get("type") == "Digits" or _splits_lines(step)


def _splits_lines(step: dict[str, Any]) -> bool:
    if step.get("type") == "ByteLevel":
        return bool(step.get("use_regex", True))
    return (
        step.get("type") == "Split"
        and step.get("pattern", {}).get("Regex") in _PATTERNS
        and step.get("behavior") == "Isolated"
        and not step.get("invert")
    )
