"""Metrics of a model: word-level perplexity, last-word accuracy, bits per byte.

Word perplexity, as for WikiText (Radford et al., "Language Models are Unsupervised Multitask
Learners", 2019: the log probability of the text divided by its canonical units): the text is
detokenized to ordinary spelling, every token of it is predicted, the first from the end-of-document
token, and

    word perplexity = exp(-log p(text) / words of the published file, split at white space)

so it does not depend on the tokenizer.  Long texts are read in windows of the model's sequence
length; with a smaller stride each token has at least `sequence - stride` tokens of context.

LAMBADA (Paperno et al., arXiv 1606.06031): a passage is correct if every token of its last word
is the most probable one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megagrow.data.tokenizer import Tokenizer
from megagrow.errors import ConfigError, DataError
from megagrow.evaluation.detokenizer import wikitext_detokenized
from megagrow.models.transformer import Transformer


@dataclass(frozen=True)
class Scorer:
    """A model that scores token ids.

    Attributes:
        model: on any device.
        sequence: the maximum input length.
        device: the model's.
        batch: number of windows per forward pass.
        track: wraps an iterable, e.g. to show progress (such as tqdm).
    """

    model: Transformer
    sequence: int
    device: torch.device
    batch: int = 8
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter

    def loss(self, ids: Sequence[int], *, context: int, stride: int) -> float:
        """-log p of a text in nats: every id is predicted, the first from `context` alone."""
        tokens = torch.tensor([context, *ids])
        windows: dict[tuple[int, int], list[int]] = {}
        done = 0
        while done < len(ids):
            # The first window predicts as many ids as it can, each later one `stride` more.
            end = min(len(ids), done + (self.sequence if done == 0 else stride))
            begin = max(0, end - self.sequence)
            windows.setdefault((end - begin, end - done), []).append(begin)
            done = end
        batches = [
            (length, scored, starts[first : first + self.batch])
            for (length, scored), starts in windows.items()
            for first in range(0, len(starts), self.batch)
        ]
        total = 0.0
        for length, scored, starts in self.track(batches):
            rows = torch.stack([tokens[at : at + length + 1] for at in starts])
            total += float(self._losses(rows)[:, -scored:].double().sum())
        return total

    def last_word(self, before: Sequence[int], word: Sequence[int]) -> tuple[float, bool]:
        """(-log p of a word in nats, whether greedy decoding produces it)."""
        row = torch.tensor([[*before, *word]])[:, -(self.sequence + 1) :]
        with torch.no_grad():
            logits = self.model.logits(row[:, :-1].to(self.device))[0, -len(word) :].float()
        wanted = row[0, -len(word) :].to(self.device)
        loss = F.cross_entropy(logits, wanted, reduction="sum")
        return float(loss), bool((logits.argmax(-1) == wanted).all())

    def _losses(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, S + 1] ids -> [rows, S] losses in nats."""
        rows = rows.to(self.device)
        with torch.no_grad():
            logits = self.model.logits(rows[:, :-1]).float()
        return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")


@dataclass(frozen=True)
class TextScore:
    """The loss of a text in several units.

    Attributes:
        nats: -log p of the whole text.
        tokens, words, bytes: counts; words and bytes are those of the published file.
    """

    nats: float
    tokens: int
    words: int
    bytes: int

    @property
    def word_perplexity(self) -> float:
        """Exp of the loss per word."""
        return _exp(self.nats / self.words)

    @property
    def token_perplexity(self) -> float:
        """Exp of the loss per token: depends on the tokenizer."""
        return _exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of UTF-8."""
        return self.nats / math.log(2) / self.bytes


@dataclass(frozen=True)
class LastWords:
    """LAMBADA: the number of correct last words, and their perplexity."""

    passages: int
    right: int
    perplexity: float

    @property
    def accuracy(self) -> float:
        """Fraction of passages that are correct."""
        return self.right / self.passages


def choose_device(name: str | None) -> torch.device:
    """The device of this name; by default a GPU if there is one.

    Raises:
        ConfigError: unknown name, or no such GPU.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if there else "cpu")
    found = re.fullmatch(r"cpu|cuda(?::([0-9]{1,3}))?", name)
    if found is None:
        raise ConfigError("--device: not known", found=name, expected="cpu, cuda or cuda:N")
    if name != "cpu" and int(found[1] or 0) >= there:
        raise ConfigError(
            f"--device {name}: no such GPU",
            found=f"{there} GPUs that PyTorch can use",
            fix="give --device cpu, or leave --device out",
        )
    return torch.device(name)


def score_text(
    scorer: Scorer,
    tokenizer: Tokenizer,
    text: str,
    *,
    where: str,
    stride: int,
    detokenize: bool,
) -> TextScore:
    """Score a text.

    Args:
        scorer: the model.
        tokenizer: the model's own.
        text: as published.
        where: its file, for errors.
        stride: number of new tokens per window, at most the model's sequence length.
        detokenize: undo WikiText's tokenization first (words and bytes stay the file's).

    Raises:
        DataError: the text is empty.
        ConfigError: the stride is longer than the model's sequence length.
    """
    if stride > scorer.sequence:
        raise ConfigError(
            "--stride: more new tokens than a window has",
            found=stride,
            expected=f"at most the model's sequence, {scorer.sequence}",
            fix=f"--stride {scorer.sequence}, or less for more context",
        )
    words = len(text.split())
    if words == 0:
        raise DataError(f"{where}: no text to evaluate on", expected="at least one word")
    ids = tokenizer.encode(wikitext_detokenized(text) if detokenize else text)
    nats = scorer.loss(ids, context=tokenizer.start, stride=stride)
    return TextScore(nats, len(ids), words, len(text.encode()))


def score_lambada(scorer: Scorer, tokenizer: Tokenizer, passages: Sequence[str]) -> LastWords:
    """Score passages by their last words.

    Raises:
        DataError: a passage has fewer than two words, or a last word longer than the window.
    """
    nats, right = 0.0, 0
    for number, passage in enumerate(scorer.track(passages), start=1):
        before, _, word = passage.rstrip().rpartition(" ")
        if not before.strip():
            raise DataError(f"passage {number} has no word before the last", found=passage[:80])
        ids, start = tokenizer.encode(f"{before} {word}"), tokenizer.encode(before)
        # Tokens that differ from the tokenization of the preceding text belong to the word.
        same = next(
            (i for i, (a, b) in enumerate(zip(ids, start, strict=False)) if a != b),
            min(len(ids), len(start)),
        )
        target = ids[same:]
        if len(target) > scorer.sequence:
            raise DataError(f"passage {number}: its last word is longer than the model's sequence")
        loss, correct = scorer.last_word([tokenizer.start, *ids[:same]], target)
        nats, right = nats + loss, right + correct
    return LastWords(len(passages), right, _exp(nats / len(passages)))


def read_text(path: Path) -> str:
    """Read a UTF-8 file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read", found=error, expected="a text file in UTF-8"
        ) from error


def read_lambada(path: Path) -> list[str]:
    """Read passages as published: one per line, plain or as JSON with a key `text`.

    Raises:
        DataError: the file cannot be read, a line is not a passage, or there is none.
    """
    passages = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        if line.lstrip().startswith("{"):
            try:
                passages.append(str(json.loads(line)["text"]))
            except (ValueError, KeyError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number}: not a passage",
                    found=line[:80],
                    expected='{"text": "..."}, or the plain passage',
                ) from error
        else:
            passages.append(line)
    if not passages:
        raise DataError(f"{path}: holds no passage", expected="one passage a line")
    return passages


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
