"""The layers of transformers, configured by the family's architecture.

A layer is a function of one tensor, and of `documents` where those of a sample do not see each
other. Its `tensor_prefix` plus a parameter's name is the name in the
catalog.

Shapes: B batch, S sequence, s a rank's part of the sequence with sequence parallelism, else S, E
embed; G key/value heads, Q queries per key/value head, D head_dim.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from megagrow import ops
from megagrow.config import ModelConfig
from megagrow.models.common.attention import causal_attention
from megagrow.models.common.documents import Documents
from megagrow.models.common.layers import (
    AddLayerNorm,
    AddRMSNorm,
    AllHeadsNorm,
    ColumnParallelLinear,
    Dropout,
    HeadNorm,
    LayerNorm,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelOutput,
    replicated,
)
from megagrow.models.common.parallel import (
    SERIAL,
    TensorParallel,
    random_numbers_of_this_rank,
    scatter_to_sequence_parallel_region,
)
from megagrow.models.common.rotary import Rotary, rotate, rotate_packed_


class Embedding(VocabParallelEmbedding):
    """Token embedding plus learned positions, if any: [B, S] token ids -> [B, s, E]."""

    def __init__(self, model: ModelConfig, parallel: TensorParallel = SERIAL, place: int = 0):
        super().__init__(model.vocabulary, model.hidden, parallel=parallel)
        self.tensor_prefix = "embedding"
        learned = model.architecture.positions == "learned"
        self.position = nn.Parameter(torch.empty(model.sequence, model.hidden)) if learned else None
        self.scale = model.hidden**0.5 if model.architecture.scaled_embedding else None
        self.dropout = Dropout(model.dropout, parallel=parallel)

    def forward(self, tokens: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
        """Embed token ids; positions count from the start of each document, if these are given."""
        x = super().forward(tokens)
        if self.scale is not None:
            x = x * torch.tensor(self.scale, dtype=x.dtype)  # rounded, as Gemma does
        if self.position is not None and documents is not None:
            places = documents.positions
            if self._parallel.sequence:
                places = scatter_to_sequence_parallel_region(places, self._parallel)
            x = x + F.embedding(places, replicated(self.position, self._parallel))
        elif self.position is not None:
            position = self.position[None, : tokens.shape[1]]
            if self._parallel.sequence:
                position = scatter_to_sequence_parallel_region(position, self._parallel)
            x = x + position
        return self.dropout(x)


class Attention(nn.Module):
    """Causal self-attention with its norms: [B, s, E] -> [B, s, E], without the residual."""

    def __init__(self, model: ModelConfig, parallel: TensorParallel, layer: int = 0) -> None:
        super().__init__()
        made, kind = model.architecture, model.layer_kind(layer)
        self.head_dim = model.head_dim
        self.groups, self.queries = model.kv_groups // parallel.size, model.heads // model.kv_groups
        self.rotary = Rotary.of(model) if kind.rotary else None
        self.scale, self.softcap = model.attention_scale, model.attention_softcap
        self.window = kind.window
        self.dropout, self.parallel = model.dropout, parallel
        self.recompute = model.activation_checkpointing == "selective"
        qkv = (self.groups, self.queries + 2, self.head_dim)
        heads = (self.groups, self.queries, self.head_dim)
        self.norm = _norm(model, parallel) if made.block_norms != "after" else None
        self.qkv = ColumnParallelLinear(
            qkv, (model.hidden,), bias=made.biases != "none", parallel=parallel
        )
        if made.head_norm is not None:
            norm = HeadNorm if made.head_norm == "each" else AllHeadsNorm
            eps = model.head_norm_eps or model.norm_eps
            self.query_norm = norm(heads, eps, parallel=parallel)
            self.key_norm = norm((self.groups, self.head_dim), eps, parallel=parallel)
        self.normed_heads = made.head_norm is not None
        self.out = RowParallelLinear(
            (model.hidden,), heads, bias=made.biases == "all", parallel=parallel
        )
        self.post_norm = _norm(model, parallel) if made.block_norms != "before" else None

    def forward(self, x: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
        """Attend."""
        qkv = self.qkv(x if self.norm is None else self.norm(x))
        qkv = qkv.view(*qkv.shape[:2], self.groups, self.queries + 2, self.head_dim)
        rotary = self.rotary
        packed = rotary is not None and rotary.dim == self.head_dim and not self.normed_heads
        if rotary is not None and packed and ops.own("rotary", qkv):
            # In place, so it must not be recomputed; safe, since nothing else keeps qkv.
            positions = None if documents is None else documents.positions
            qkv = rotate_packed_(qkv, rotary, turned=self.queries + 1, positions=positions)
            rotary = None
        q, k, v = qkv.split((self.queries, 1, 1), dim=3)
        if self.normed_heads:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.recompute and self.training:
            y = self.out(checkpoint(self._core, q, k, v, rotary, documents, use_reentrant=False))
        else:
            y = self.out(self._core(q, k, v, rotary, documents))
        return y if self.post_norm is None else self.post_norm(y)

    def _core(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rotary: Rotary | None,
        documents: Documents | None = None,
    ) -> torch.Tensor:
        """Attention: q [B, S, G, Q, D], k and v [B, S, G, 1, D] -> [B, S, G * Q * D].

        `rotary` is None if there are no rotary positions, or if they are applied already.
        """
        if rotary is not None:
            positions = None if documents is None else documents.positions
            q, k = rotate(q, rotary, positions), rotate(k, rotary, positions)
        dropout = self.dropout if self.training else 0.0
        with random_numbers_of_this_rank(self.parallel if dropout else SERIAL, q.device):
            return causal_attention(
                q,
                k,
                v,
                scale=self.scale,
                window=self.window,
                softcap=self.softcap,
                dropout=dropout,
                documents=documents,
            )


class MLP(nn.Module):
    """MLP with its norms, gated or plain, of a sum: x and residual [B, s, E] each.

    Returns [B, s, E], without the residual, and the sum x + residual. In a parallel block there is
    no residual: x is the sum.
    """

    def __init__(self, model: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        ffn = model.ffn // parallel.size
        made = model.architecture
        self.gated, self.activation = made.gated, made.activation
        up, bias = ((2, ffn) if made.gated else (ffn,)), made.biases == "all"
        fused = made.activation == "gelu" and not made.gated
        self.norm: nn.Module | None = None
        if made.block_norms != "after" and not made.parallel:
            self.norm = _norm(model, parallel, adds=True)
        elif made.block_norms != "after":
            self.norm = _norm(model, parallel)
        self.up = ColumnParallelLinear(
            up, (model.hidden,), bias=bias, gelu=fused, parallel=parallel
        )
        self.down = RowParallelLinear((model.hidden,), (ffn,), bias=bias, parallel=parallel)
        self.post_norm = _norm(model, parallel) if made.block_norms != "before" else None

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply."""
        if residual is None:
            z = x
            y = z if self.norm is None else self.norm(z)
        elif self.norm is None:
            y = z = residual + x
        else:
            y, z = self.norm(x, residual)
        y = self.down(self._activated(self.up(y)))
        return (y if self.post_norm is None else self.post_norm(y)), z

    def _activated(self, y: torch.Tensor) -> torch.Tensor:
        if self.gated and self.activation == "silu":
            return ops.swiglu(y)
        form = "none" if self.activation == "gelu_exact" else "tanh"
        if self.gated:
            gate, up = y.chunk(2, dim=-1)
            return F.gelu(gate, approximate=form) * up
        if self.activation == "gelu_exact":
            return F.gelu(y)
        return F.silu(y) if self.activation == "silu" else y  # GELU's tanh form is in `up`


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream [B, s, E]."""

    def __init__(self, model: ModelConfig, parallel: TensorParallel = SERIAL, place: int = 1):
        super().__init__()
        self.tensor_prefix = f"layers.{place - 1}"
        self.attention = Attention(model, parallel, place - 1)
        self.mlp = MLP(model, parallel)
        self.dropout = Dropout(model.dropout, parallel=parallel)
        self.parallel = model.architecture.parallel
        self.recompute = model.activation_checkpointing == "full"
        if model.compile:
            self.compile(dynamic=False)  # a run has few shapes, each worth its own compilation

    def forward(self, x: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
        """Apply."""
        given = (x,) if documents is None else (x, documents)  # kept for the recomputation
        if self.recompute and self.training:
            return checkpoint(self._apply_layers, *given, use_reentrant=False)
        return self._apply_layers(*given)

    def _apply_layers(self, x: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
        if self.parallel:
            y, _ = self.mlp(x)
            return x + self.dropout(self.attention(x, documents)) + self.dropout(y)
        y, x = self.mlp(self.dropout(self.attention(x, documents)), x)
        return x + self.dropout(y)


class Head(nn.Module):
    """Final norm and output head: [B, s, E] -> logits [B, S, v] of this rank's vocabulary.

    A tied head has a weight with the embedding's name; the caller that builds both must tie them.
    """

    def __init__(self, model: ModelConfig, parallel: TensorParallel = SERIAL, place: int = -1):
        super().__init__()
        self.tensor_prefix = ""
        self.final_norm = _norm(model, parallel)
        make = partial(VocabParallelOutput, model.vocabulary, model.hidden, parallel=parallel)
        if model.tie_embeddings:
            self.embedding = make(name="token")
        else:
            self.output = make(name="weight")
        self.tied, self.softcap = model.tie_embeddings, model.logit_softcap

    def forward(self, x: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
        """Apply; documents make no difference."""
        logits = (self.embedding if self.tied else self.output)(self.final_norm(x))
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


class Layer(Protocol):
    """The constructor of an entry of the layer list; `place` is its position in the list."""

    def __call__(self, model: ModelConfig, parallel: TensorParallel, place: int) -> nn.Module:
        """Build it."""


def layer_types(model: ModelConfig) -> list[Layer]:
    """The kinds of layer, in order: entry `place` is built as `kind(model, parallel, place)`."""
    return [Embedding, *[Block] * model.layers, Head]


def _norm(
    model: ModelConfig, parallel: TensorParallel, *, adds: bool = False
) -> LayerNorm | RMSNorm:
    """A norm of the residual stream; `adds`: of a sum of two tensors."""
    if model.architecture.norm == "layer":
        layer = AddLayerNorm if adds else LayerNorm
        return layer(model.hidden, model.norm_eps, parallel=parallel)
    rms = AddRMSNorm if adds else RMSNorm
    unit = model.architecture.unit_gain
    return rms(model.hidden, model.norm_eps, unit=unit, parallel=parallel)
