"""Causal attention of queries that are at hand: windows, documents, caps, grouped queries.

Shapes: B batch, S sequence, G key/value heads, Q queries per key/value head, D head_dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from megagrow.models.common.documents import Documents, flex


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
) -> torch.Tensor:
    """Attend: q [B, S, G, Q, D], k and v [B, S, G, 1, D] -> [B, S, G * Q * D].

    Args:
        q, k, v: queries, keys and values, with positions applied.
        scale: factor of the scores; None for 1 / sqrt(D).
        window: tokens that a token attends to, itself and those before it; None for all.
        softcap: c: a score x becomes c tanh(x / c) (Gemma 2, arXiv 2408.00118); None: no cap.
        dropout: of the attention weights.
        documents: of the samples, if they do not see each other; positions must restart in each.
    """
    sequence = q.shape[1]
    mask = None
    if documents is not None and documents.lengths is not None:
        return _one_by_one(
            q, k, v, documents.lengths, scale=scale, window=window, softcap=softcap, dropout=dropout
        )
    if documents is not None:
        mask = documents.masks[window]
        if not isinstance(mask, torch.Tensor):
            heads = (x.flatten(2, 3).transpose(1, 2) for x in (q, k, v))
            y = flex(*heads, mask=mask, scale=scale, softcap=softcap)
            return y.transpose(1, 2).flatten(2, 3)
    elif window is not None and window < sequence:
        mask = _window_mask(sequence, window, q.device)
    if softcap is not None:
        return _capped(q, k, v, scale, softcap, mask, dropout)
    y = F.scaled_dot_product_attention(
        q.flatten(2, 3).transpose(1, 2),
        k.squeeze(3).transpose(1, 2),
        v.squeeze(3).transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[3] > 1,
    )
    return y.transpose(1, 2).flatten(2, 3)


def _one_by_one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> torch.Tensor:
    """Attention of each document by itself."""
    parts = (x.flatten(0, 1).unsqueeze(0).split(lengths, dim=1) for x in (q, k, v))
    found = [
        causal_attention(*part, scale=scale, window=window, softcap=softcap, dropout=dropout)
        for part in zip(*parts, strict=True)
    ]
    return torch.cat(found, dim=1).view(*q.shape[:2], -1)


def _capped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    cap: float,
    mask: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Attention with a cap, which PyTorch's fused attention lacks: the scores are materialised."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bsgqd,btgd->bgqst", q, k.squeeze(3)) * scale
    scores = cap * torch.tanh(scores / cap)
    if mask is None:
        mask = _window_mask(q.shape[1], q.shape[1], q.device)
    # [S, S], or of each sample: [B, 1, S, S].
    mask = mask if mask.dim() == 2 else mask.unsqueeze(1)
    scores = scores.masked_fill(~mask, float("-inf"))
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = F.softmax(scores, dim=-1, dtype=high).to(q.dtype)
    weights = F.dropout(weights, dropout) if dropout else weights
    return torch.einsum("bgqst,btgd->bsgqd", weights, v.squeeze(3)).flatten(2)


@lru_cache(maxsize=8)
def _window_mask(sequence: int, window: int, device: torch.device) -> torch.Tensor:
    """[S, S]: whether a token (row) attends to another (column)."""
    with torch.inference_mode(False):
        place = torch.arange(sequence, device=device)
        distance = place[:, None] - place[None, :]
        return (distance >= 0) & (distance < window)
