"""Text from a model: tokens drawn one after the other.

Every token is computed from the whole context, without a cache of keys and values: the model is the
one that is trained, in any family and over tensor-parallel ranks. For a sample now and then that is
fast enough; to serve a model, export it (docs/exports.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megagrow.config import ModelConfig
from megagrow.data.tokenizer import Tokenizer
from megagrow.errors import ConfigError
from megagrow.models.transformer import Transformer

_STREAMS = 1_000_003  # distance of the seeds of two runs; each text of a run has its own


def _require(name: str, found: object, expected: str, *, holds: bool) -> None:
    """Refuse a setting that does not hold.

    Raises:
        ConfigError: naming the setting, what was found and what was expected.
    """
    if not holds:
        raise ConfigError(f"{name}: cannot be used to generate", found=found, expected=expected)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's distribution.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: draw among this many most probable tokens; None for all.
        top_p: draw among the fewest most probable tokens that have this probability together
            (nucleus sampling, Holtzman et al., arXiv 1904.09751); 1 for all.
        seed: of the random numbers.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        _require(
            "temperature",
            self.temperature,
            "a finite number of at least 0",
            holds=math.isfinite(self.temperature) and self.temperature >= 0,
        )
        _require(
            "top_k", self.top_k, "None or at least 1", holds=self.top_k is None or self.top_k >= 1
        )
        _require("top_p", self.top_p, "above 0, at most 1", holds=0 < self.top_p <= 1)
        _require("seed", self.seed, "at least 0", holds=self.seed >= 0)

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """A token, from logits [V] in fp32 on the CPU."""
        if self.temperature == 0:
            return int(logits.argmax())
        ordered, ids = (logits.double() / self.temperature).sort(descending=True, stable=True)
        if self.top_k is not None:
            ordered, ids = ordered[: self.top_k], ids[: self.top_k]
        shares = ordered.softmax(0)
        if self.top_p < 1:
            # A token is left out if those before it have the probability already.
            shares = shares.masked_fill(shares.cumsum(0) - shares >= self.top_p, 0)
        return int(ids[torch.multinomial(shares, 1, generator=generator)])


@dataclass(frozen=True)
class Text:
    """A prompt and what a model added to it.

    Attributes:
        prompt: the prompt.
        text: what was added, decoded.
        tokens: the same as ids, with the end token if it was drawn.
        ended: whether the text ended before the most tokens.
    """

    prompt: str
    text: str
    tokens: list[int]
    ended: bool


def continue_texts(
    model: Transformer,
    shape: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    tokens: int = 100,
    sampling: Sampling | None = None,
    through_ends: bool = False,
    batch: int = 8,
    device: torch.device | None = None,
    agree: Callable[[list[int]], list[int]] = lambda drawn: drawn,
    say: Callable[[str], object] = lambda line: None,
) -> list[Text]:
    """Continue texts; an empty one begins as a document does.

    Args:
        model, shape: in evaluation mode, with its configuration.
        tokenizer: the model's.
        prompts: the texts.
        tokens: the most tokens that are added to each.
        sampling: how tokens are drawn; plain draws by default.
        through_ends: go on after the end of a document.
        batch, device, agree: as for `generate`.
        say: called with a line if the model does not see the whole of a text.

    Raises:
        ConfigError: a prompt is not text in Unicode, or a number is out of range.
    """
    _require("tokens", tokens, "at least 1", holds=tokens >= 1)
    _require("batch", batch, "at least 1", holds=batch >= 1)
    for text in prompts:
        _require(
            "prompt", repr(text)[:60], "text without half surrogate pairs", holds=_is_text(text)
        )
    begin = [] if tokenizer.markers.bos is None else [tokenizer.markers.bos]
    ids = [begin + tokenizer.encode(text) or [tokenizer.start] for text in prompts]
    longest = max(map(len, ids), default=0) + tokens - 1
    if longest > shape.sequence:
        say(f"the model sees the last {shape.sequence} tokens of a text, of up to {longest}")
    end = None if through_ends else tokenizer.eod
    added = generate(
        model,
        ids,
        tokens=tokens,
        sequence=shape.sequence,
        vocabulary=tokenizer.vocab_size,
        sampling=sampling or Sampling(),
        end=end,
        batch=batch,
        device=device,
        agree=agree,
    )
    texts = []
    for prompt, new in zip(prompts, added, strict=True):
        ended = new[-1:] == [end]
        texts.append(Text(prompt, tokenizer.decode(new[:-1] if ended else new), new, ended))
    return texts


def _is_text(found: Any) -> bool:
    try:
        str.encode(found)
    except (TypeError, UnicodeEncodeError):
        return False
    return True


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    sequence: int,
    vocabulary: int,
    sampling: Sampling,
    end: int | None = None,
    batch: int = 8,
    device: torch.device | None = None,
    agree: Callable[[list[int]], list[int]] = lambda drawn: drawn,
) -> list[list[int]]:
    """Continue each prompt; a text depends neither on the batch size nor on the other prompts.

    Args:
        model: in evaluation mode; with tensor parallelism, every rank calls this with its part.
        prompts: token ids of each, at least one.
        tokens: the most tokens that are added to a prompt.
        sequence: the most tokens that the model sees: the last ones.
        vocabulary: tokens that may be drawn: ids below it.
        sampling: temperature and the like.
        end: a token after which a text ends; None: no text ends before `tokens`.
        batch: texts in a forward pass.
        device: the model's; the CPU by default.
        agree: returns what rank 0 drew, on all ranks.

    Returns:
        For each prompt the added tokens, with `end` if it was drawn.

    Raises:
        ValueError: a prompt is empty.
    """
    if not all(prompts):
        raise ValueError("a prompt needs at least one token to continue from")
    random = [
        torch.Generator().manual_seed((sampling.seed * _STREAMS + index) % 2**63)
        for index in range(len(prompts))
    ]
    texts = [list(prompt) for prompt in prompts]
    for first in range(0, len(texts), batch):
        going = list(range(first, min(first + batch, len(texts))))
        for _ in range(tokens):
            rows = [texts[index][-sequence:] for index in going]
            logits = _next_logits(model, rows, device)[:, :vocabulary]
            drawn = agree(
                [
                    sampling.draw(row, random[index])
                    for row, index in zip(logits, going, strict=True)
                ]
            )
            for index, token in zip(going, drawn, strict=True):
                texts[index].append(token)
            going = [i for i, token in zip(going, drawn, strict=True) if token != end]
            if not going:
                break
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _next_logits(
    model: Transformer, rows: Sequence[Sequence[int]], device: torch.device | None
) -> torch.Tensor:
    """Logits [B, V] of the token after each row, in fp32 on the CPU."""
    # Attention is causal, so what fills a row up behind its end changes nothing before it.
    width = max(map(len, rows))
    filled = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    with torch.no_grad():
        logits = model.logits(filled)
    last = torch.tensor([len(row) - 1 for row in rows], device=logits.device)
    return logits[torch.arange(len(rows), device=logits.device), last].float().cpu()
