"""The layers of plain pre-norm transformers, configured by the family's architecture.

A layer is a function of one tensor. Its `tensor_prefix` plus a parameter's name is the name in the
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
from megagrow.models.common.layers import (
    AddLayerNorm,
    AddRMSNorm,
    ColumnParallelLinear,
    Dropout,
    LayerNorm,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelOutput,
)
from megagrow.models.common.parallel import (
    SERIAL,
    TensorParallel,
    random_numbers_of_this_rank,
    scatter_to_sequence_parallel_region,
)
from megagrow.models.common.rotary import rotate, rotate_packed_


class Embedding(VocabParallelEmbedding):
    """Token embedding plus learned positions, if any: [B, S] token ids -> [B, s, E]."""

    def __init__(self, model: ModelConfig, parallel: TensorParallel = SERIAL, place: int = 0):
        super().__init__(model.vocabulary, model.hidden, parallel=parallel)
        self.tensor_prefix = "embedding"
        learned = model.architecture.positions == "learned"
        self.position = nn.Parameter(torch.empty(model.sequence, model.hidden)) if learned else None
        self.dropout = Dropout(model.dropout, parallel=parallel)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed token ids."""
        x = super().forward(tokens)
        if self.position is not None:
            position = self.position[None, : tokens.shape[1]]
            if self._parallel.sequence:
                position = scatter_to_sequence_parallel_region(position, self._parallel)
            x = x + position
        return self.dropout(x)


class Attention(nn.Module):
    """Pre-norm causal self-attention: [B, s, E] -> [B, s, E], without the residual."""

    def __init__(self, model: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        self.head_dim = model.head_dim
        self.groups, self.queries = model.kv_groups // parallel.size, model.heads // model.kv_groups
        rotary = model.architecture.positions == "rotary"
        self.theta = model.rope_theta if rotary else None
        self.dropout, self.parallel = model.dropout, parallel
        self.recompute = model.activation_checkpointing == "selective"
        qkv = (self.groups, self.queries + 2, self.head_dim)
        heads = (self.groups, self.queries, self.head_dim)
        bias = model.architecture.biases
        self.norm = _norm(model, parallel)
        self.qkv = ColumnParallelLinear(qkv, (model.hidden,), bias=bias, parallel=parallel)
        self.out = RowParallelLinear((model.hidden,), heads, bias=bias, parallel=parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend."""
        qkv = self.qkv(self.norm(x))
        qkv = qkv.view(*qkv.shape[:2], self.groups, self.queries + 2, self.head_dim)
        theta = self.theta
        if theta is not None and ops.own("rotary", qkv):
            # In place, so it must not be recomputed; safe, since nothing else keeps qkv.
            qkv, theta = rotate_packed_(qkv, theta, turned=self.queries + 1), None
        if self.recompute and self.training:
            return self.out(checkpoint(self._core, qkv, theta, use_reentrant=False))
        return self.out(self._core(qkv, theta))

    def _core(self, qkv: torch.Tensor, theta: float | None) -> torch.Tensor:
        """Attention of all heads: [B, S, G, Q + 2, D] -> [B, S, G * Q * D].

        Positions are rotary with base `theta`; None if there are none, or if already applied.
        """
        q, k, v = qkv.split((self.queries, 1, 1), dim=3)
        if theta is not None:
            q, k = rotate(q, theta), rotate(k, theta)
        dropout = self.dropout if self.training else 0.0
        with random_numbers_of_this_rank(self.parallel if dropout else SERIAL, qkv.device):
            y = F.scaled_dot_product_attention(
                q.flatten(2, 3).transpose(1, 2),
                k.squeeze(3).transpose(1, 2),
                v.squeeze(3).transpose(1, 2),
                dropout_p=dropout,
                is_causal=True,
                enable_gqa=self.queries > 1,
            )
        return y.transpose(1, 2).flatten(2, 3)


class MLP(nn.Module):
    """Pre-norm MLP, gated or plain, of a sum: x and residual [B, s, E] each.

    Returns [B, s, E], without the residual, and the sum x + residual.
    """

    def __init__(self, model: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        ffn = model.ffn // parallel.size
        made = model.architecture
        self.gated, self.activation = made.gated, made.activation
        up, bias = ((2, ffn) if made.gated else (ffn,)), made.biases
        add_norm = AddLayerNorm if made.norm == "layer" else AddRMSNorm
        fused = made.activation == "gelu" and not made.gated
        self.norm = add_norm(model.hidden, model.norm_eps, parallel=parallel)
        self.up = ColumnParallelLinear(
            up, (model.hidden,), bias=bias, gelu=fused, parallel=parallel
        )
        self.down = RowParallelLinear((model.hidden,), (ffn,), bias=bias, parallel=parallel)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply."""
        y, z = self.norm(x, residual)
        return self.down(self._activated(self.up(y))), z

    def _activated(self, y: torch.Tensor) -> torch.Tensor:
        if self.gated and self.activation == "silu":
            return ops.swiglu(y)
        if self.gated:
            gate, up = y.chunk(2, dim=-1)
            return F.gelu(gate, approximate="tanh") * up
        return F.silu(y) if self.activation == "silu" else y  # GELU is in `up`


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream [B, s, E]."""

    def __init__(self, model: ModelConfig, parallel: TensorParallel = SERIAL, place: int = 1):
        super().__init__()
        self.tensor_prefix = f"layers.{place - 1}"
        self.attention = Attention(model, parallel)
        self.mlp = MLP(model, parallel)
        self.dropout = Dropout(model.dropout, parallel=parallel)
        self.recompute = model.activation_checkpointing == "full"
        if model.compile:
            self.compile(dynamic=False)  # a run has few shapes, each worth its own compilation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply."""
        if self.recompute and self.training:
            return checkpoint(self._apply_layers, x, use_reentrant=False)
        return self._apply_layers(x)

    def _apply_layers(self, x: torch.Tensor) -> torch.Tensor:
        y, x = self.mlp(self.dropout(self.attention(x)), x)
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
        self.tied = model.tie_embeddings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply."""
        return (self.embedding if self.tied else self.output)(self.final_norm(x))


class Layer(Protocol):
    """The constructor of an entry of the layer list; `place` is its position in the list."""

    def __call__(self, model: ModelConfig, parallel: TensorParallel, place: int) -> nn.Module:
        """Build it."""


def layer_types(model: ModelConfig) -> list[Layer]:
    """The kinds of layer, in order: entry `place` is built as `kind(model, parallel, place)`."""
    return [Embedding, *[Block] * model.layers, Head]


def _norm(model: ModelConfig, parallel: TensorParallel) -> LayerNorm | RMSNorm:
    kind = LayerNorm if model.architecture.norm == "layer" else RMSNorm
    return kind(model.hidden, model.norm_eps, parallel=parallel)
