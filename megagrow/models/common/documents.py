"""The documents of samples that do not see each other (`data.documents: mask`).

A document begins at the start of a sample, and after every end token, which belongs to the document
that it ends. Tokens attend to earlier ones of their own document alone, and positions count from
its first token; a document that a sample's border cuts is two. So logits and gradients are those of
each document by itself.

Three ways compute the same attention:

* `each`: one call for each document; on a CPU, where it saves what the documents do not attend to;
* `flex`: PyTorch's flex attention with a block mask (Dong et al., arXiv 2412.05496), which skips
  blocks outside of the documents; on a GPU;
* `dense`: all scores of a sample, with a boolean mask.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch

from megagrow.config import ModelConfig

Way = Literal["each", "flex", "dense"]
_FLEX_HEAD_DIM = 16  # the least that its kernels take


@dataclass(frozen=True)
class Documents:
    """The documents of a micro-batch.

    Attributes:
        positions: [B, S], the place of each token in its document.
        lengths: of all documents, sample after sample, if they attend one by one.
        masks: else what tokens attend to, by the layers' windows: [B, 1, S, S] or a block mask.
    """

    positions: torch.Tensor
    lengths: tuple[int, ...] | None
    masks: Mapping[int | None, Any]


@dataclass(frozen=True)
class Separator:
    """Finds the documents of token ids [B, S].

    Attributes:
        eod: id of the token that ends a document.
        windows: of the model's layers.
        way: how they attend.
    """

    eod: int
    windows: frozenset[int | None]
    way: Way

    @staticmethod
    def of(
        model: ModelConfig, eod: int | None, *, device: torch.device, dtype: torch.dtype
    ) -> Separator | None:
        """The one of a model with these parameters; None without an end token."""
        if eod is None:
            return None
        windows = frozenset(model.layer_kind(layer).window for layer in range(model.layers))
        way, _ = choose_way(model, gpu=device.type == "cuda", fp64=dtype == torch.float64)
        return Separator(eod, windows, way)

    def __call__(self, tokens: torch.Tensor) -> Documents:
        """The documents of token ids [B, S]."""
        sequence = tokens.shape[1]
        begins = torch.ones_like(tokens, dtype=torch.bool)
        begins[:, 1:] = tokens[:, :-1] == self.eod
        place = torch.arange(sequence, device=tokens.device)
        first = torch.where(begins, place, 0).cummax(dim=1).values
        if self.way == "each":
            starts = [*begins.view(-1).nonzero().view(-1).tolist(), tokens.numel()]
            lengths = tuple(b - a for a, b in pairwise(starts))
            return Documents(place - first, lengths, {})
        make = _block_mask if self.way == "flex" else _dense_mask
        return Documents(place - first, None, {w: make(first, w) for w in self.windows})


def choose_way(model: ModelConfig, *, gpu: bool, fp64: bool = False) -> tuple[Way, str]:
    """How a model's documents attend, and why, in words.

    Args:
        model: the model.
        gpu: whether it is on a GPU.
        fp64: whether its parameters are.
    """
    if not gpu:
        if model.compile:
            return "dense", "all scores with a mask: model.compile has no shapes that vary"
        return "each", "one document after the other"
    lacks = [
        what
        for what, there in (
            ("dropout", model.dropout > 0),
            ("fp64", fp64),
            (f"heads of fewer than {_FLEX_HEAD_DIM} features", model.head_dim < _FLEX_HEAD_DIM),
        )
        if there
    ]
    if lacks:
        return "dense", f"all scores with a mask: flex attention has no {lacks[0]}"
    if importlib.util.find_spec("triton") is None:
        return "dense", "all scores with a mask: flex attention needs Triton, which is missing"
    return "flex", "flex attention, blocks outside of a document skipped"


def _dense_mask(first: torch.Tensor, window: int | None) -> torch.Tensor:
    """[B, 1, S, S]: whether a token (row) attends to another (column)."""
    place = torch.arange(first.shape[1], device=first.device)
    since = first if window is None else torch.maximum(first, place - window + 1)
    return ((place >= since[:, :, None]) & (place <= place[:, None]))[:, None]


def _block_mask(first: torch.Tensor, window: int | None) -> Any:
    """Flex attention's mask of the same."""
    from torch.nn.attention.flex_attention import create_block_mask

    place = torch.arange(first.shape[1], device=first.device)
    since = first if window is None else torch.maximum(first, place - window + 1)

    def sees(b: Any, head: Any, row: Any, column: Any) -> Any:
        return (column <= row) & (column >= since[b, row])

    batch, sequence = first.shape
    # Compiled on a GPU, it does not materialise all scores.
    make: Any = _compiled(create_block_mask) if first.is_cuda else create_block_mask
    return make(sees, batch, None, sequence, sequence, device=first.device)


def flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: Any,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Flex attention: q [B, H, S, D], k and v [B, G, S, D] -> [B, H, S, D]."""
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = _compiled(flex_attention) if q.is_cuda else flex_attention
    found: torch.Tensor = attend(
        q,
        k,
        v,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return found


@lru_cache(maxsize=4)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


@lru_cache(maxsize=4)
def _capped(cap: float) -> Callable[..., torch.Tensor]:
    """The same function for all layers, which therefore share a kernel."""

    def capped(score: torch.Tensor, b: Any, head: Any, row: Any, column: Any) -> torch.Tensor:
        return cap * torch.tanh(score / cap)

    return capped
