"""The summary of a data preparation for the terminal, including everything that was left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megagrow.data.prepare import Preparation

_NAMES = 4


def summary(outcome: Preparation) -> Iterator[str]:
    """The lines of the summary, for a new or an existing dataset."""
    data = outcome.data
    made, content = data.made, data.content
    yield f"{data.path}: " + ("prepared" if outcome.fresh else "already prepared")
    if outcome.outdated:
        yield "  by an earlier version, which split whole documents; --overwrite rebuilds it"
    share = content.validation.tokens / (content.train.tokens + content.validation.tokens)
    asked = made["arguments"]["validation_fraction"]
    for name, split, more in (
        ("train", content.train, ""),
        ("validation", content.validation, f", {share:.3%} of all (asked for: {asked:.3%})"),
    ):
        yield _line(name, split.documents, f"documents {split.tokens:>16,} tokens{more}")
    yield _line("vocabulary", data.vocab_size, f"tokens, {content.tokenizer_file}")
    if "markers" in made:
        marks = made["markers"]
        begin = "no token" if marks["bos"] is None else repr(marks["bos"])
        yield (f"  {'documents':<12}end with {marks['eod']!r} ({marks['why']}), begin with {begin}")
    for what, group in made.get("formats", {}).items():
        yield _line("read", group["files"], f"files as {what}: {_examples(group)}")
    counts = (
        ("cut", "cut_documents", "long documents: their ends validate, the rest is trained on"),
        ("copies", "copies", "documents with exact copies, trained on"),
        ("warning", "shared_documents", "validation documents may be in the training set too: "
         "almost all documents have copies"),
        ("left out", "empty_documents", "documents without text"),
    )  # fmt: skip
    for name, key, words in counts:
        if made.get(key):
            yield _line(name, made[key], words)
    for why, group in made.get("left_out", {}).items():
        yield _line("left out", group["files"], f"{why}: {_examples(group)}")
    if made["unreadable_files"]:
        names = made["unreadable_examples"]
        group = {"files": made["unreadable_files"], "names": names}
        yield _line("left out", group["files"], f"files that are not UTF-8: {_examples(group)}")


def _line(name: str, count: int, words: str) -> str:
    return f"  {name:<12}{count:>12,} {words}"


def _examples(group: dict[str, Any]) -> str:
    shown = group["names"][:_NAMES]
    left = group["files"] - len(shown)
    return ", ".join(shown) + (f" and {left:,} more" if left else "")
