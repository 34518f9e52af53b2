"""Convert WikiText's tokenized text back to ordinary spelling.

WikiText puts spaces around every punctuation mark and joins numbers and hyphens by `@-@`, `@,@`
and `@.@`.  The rules and their order are those of the detokenizer behind published perplexities
(Megatron-LM, tasks/zeroshot_gpt/detokenizer.py; lm-evaluation-harness has the same), possessives
first, with three differences where it produces text that nobody writes:

* It attaches the apostrophe of `soldiers '` to its word, and then takes it for the opening quote
  of the next apostrophe.  Here a possessive is not a quote, and a quote needs a partner.
* It turns the word `N` into 1, a rule for another corpus.
* It leaves `does n't`; here it is `doesn't`.
"""

from __future__ import annotations

import re
from itertools import pairwise

_RULES: tuple[tuple[str, str], ...] = (
    (r" @([-,.])@ ", r"\1"),
    (r" ([.,:;!?])(?= |\n|$)", r"\1"),
    (r"\( (.*?) \)", r"(\1)"),
    (r"\[ (.*?) \]", r"[\1]"),
    (r"\{ (.*?) \}", r"{\1}"),
    (r'" (.*?) "', r'"\1"'),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" '(s|t|re|ve|ll|d|m)\b", r"'\1"),
    (r" n't\b", "n't"),
)


def wikitext_detokenized(text: str) -> str:
    """WikiText's tokenized text in ordinary spelling."""
    text = "\n".join(map(_apostrophes, text.split("\n")))
    for pattern, replacement in _RULES:
        text = re.sub(pattern, replacement, text)
    return text


def _apostrophes(line: str) -> str:
    """Attach each free-standing apostrophe to its word: a possessive, or one of two quotes.

    After a word ending in s it may be either; after any other word it is a quote.  If the number of
    quotes is odd, the missing partner is the ambiguous apostrophe that makes the quotes shortest.
    """
    words = line.split(" ")
    alone = [at for at, word in enumerate(words) if word == "'"]
    if not alone:
        return line
    doubtful = [at for at in alone if at and words[at - 1].endswith("s")]
    quotes = [at for at in alone if at not in doubtful]
    if len(quotes) % 2 and doubtful:
        quotes = min((sorted([*quotes, at]) for at in doubtful), key=_lengths)
    pairs = list(zip(quotes[::2], quotes[1::2], strict=False))
    opening = {first for first, _ in pairs}
    leaning = {last for _, last in pairs} | (set(doubtful) - set(quotes))
    joined = words[0]
    for (before, _), (at, word) in pairwise(enumerate(words)):
        joined += word if before in opening or at in leaning else f" {word}"
    return joined


def _lengths(quotes: list[int]) -> int:
    return sum(last - first for first, last in zip(quotes[::2], quotes[1::2], strict=True))
