"""The transformer: plain pre-norm blocks, in the GPT-2 and LLaMA families.

The model is a list of layers, [Embedding, Block x L, Head], each a function of one tensor;
`Transformer` runs them in one process, a pipeline can spread them over several.  Parameter
names under a layer's `tensor_prefix` are the catalog's.

Shapes: B batch, S sequence, s a rank's part of the sequence where sequence parallelism splits
it, else the whole of it, E embed; G key/value heads and Q queries to each, D their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from megagrow.models.common.loss import vocab_parallel_cross_entropy
from megagrow.models.common.parallel import (
    SERIAL,
    TensorParallel,
    gather_from_tensor_parallel_region,
    random_numbers_of_this_rank,
    require_tensor_parallel,
    scatter_to_sequence_parallel_region,
)
from megagrow.models.common.rotary import rotate, rotate_packed_
from megagrow.state.layout import even_split


class Embedding(VocabParallelEmbedding):
    """Token embedding, in GPT-2 plus a learned position: [B, S] token ids -> [B, s, E]."""

    def __init__(self, model: ModelConfig, parallel: TensorParallel = SERIAL, place: int = 0):
        super().__init__(model.vocabulary, model.hidden, parallel=parallel)
        self.tensor_prefix = "embedding"
        learned = model.family == "gpt2"
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
        self.theta = model.rope_theta if model.family == "llama" else None
        self.dropout, self.parallel = model.dropout, parallel
        self.recompute = model.activation_checkpointing == "selective"
        qkv = (self.groups, self.queries + 2, self.head_dim)
        heads = (self.groups, self.queries, self.head_dim)
        bias = model.biases
        self.norm = _norm(model, parallel)
        self.qkv = ColumnParallelLinear(qkv, (model.hidden,), bias=bias, parallel=parallel)
        self.out = RowParallelLinear((model.hidden,), heads, bias=bias, parallel=parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend."""
        qkv = self.qkv(self.norm(x))
        qkv = qkv.view(*qkv.shape[:2], self.groups, self.queries + 2, self.head_dim)
        theta = self.theta
        if theta is not None and ops.own("rotary", qkv):
            # In place, so it must not be recomputed, and cannot hurt: nothing else keeps qkv.
            qkv, theta = rotate_packed_(qkv, theta, turned=self.queries + 1), None
        if self.recompute and self.training:
            return self.out(checkpoint(self._core, qkv, theta, use_reentrant=False))
        return self.out(self._core(qkv, theta))

    def _core(self, qkv: torch.Tensor, theta: float | None) -> torch.Tensor:
        """[B, S, G, Q + 2, D] -> [B, S, G * Q * D], every head on its own.

        Positions are rotary with base `theta`; None where there are none, or they are in.
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
    """Pre-norm perceptron, GELU or SwiGLU, of a sum: x and residual [B, s, E] each.

    Returns [B, s, E], without the residual, and the sum x + residual.
    """

    def __init__(self, model: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        ffn = model.ffn // parallel.size
        self.gated = model.family == "llama"
        up, bias = ((2, ffn) if self.gated else (ffn,)), model.biases
        add_norm = AddLayerNorm if model.family == "gpt2" else AddRMSNorm
        self.norm = add_norm(model.hidden, model.norm_eps, parallel=parallel)
        self.up = ColumnParallelLinear(
            up, (model.hidden,), bias=bias, gelu=not self.gated, parallel=parallel
        )
        self.down = RowParallelLinear((model.hidden,), (ffn,), bias=bias, parallel=parallel)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply."""
        y, z = self.norm(x, residual)
        y = self.up(y)
        return self.down(ops.swiglu(y) if self.gated else y), z


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
            self.compile(dynamic=False)  # a run has few shapes, and each is worth its own code

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

    A tied head has a weight named as the embedding's, which whoever builds both must tie.
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
    """What makes one entry of the layer list; `place` is its position there."""

    def __call__(self, model: ModelConfig, parallel: TensorParallel, place: int) -> nn.Module:
        """Build it."""


def layer_types(model: ModelConfig) -> list[Layer]:
    """The kinds of layer, in order: entry `place` is built as `kind(model, parallel, place)`."""
    return [Embedding, *[Block] * model.layers, Head]


def layer_list(model: ModelConfig, parallel: TensorParallel = SERIAL) -> list[nn.Module]:
    """All layers of a model, tied where it says so.

    Raises:
        ConfigError: the model cannot be cut over the tensor-parallel ranks.
    """
    require_tensor_parallel(model, tensor=parallel.size, sequence=parallel.sequence)
    layers = [kind(model, parallel, place) for place, kind in enumerate(layer_types(model))]
    first, last = layers[0], layers[-1]
    if model.tie_embeddings and isinstance(first, Embedding) and isinstance(last, Head):
        last.embedding.token = first.token
    return layers


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def next_token_loss(model: ModelConfig, parallel: TensorParallel = SERIAL) -> Loss:
    """The function (logits [B, S, v] of this rank, labels [B, S]) -> mean loss in nats."""
    start, _ = even_split(model.vocabulary, parallel.size, parallel.rank)

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_cross_entropy(logits, labels, start=start, parallel=parallel).mean()

    return loss


class Transformer(nn.Module):
    """A language model: token ids in, next-token loss or logits out."""

    def __init__(self, model: ModelConfig, parallel: TensorParallel = SERIAL) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer_list(model, parallel))
        self._loss = next_token_loss(model, parallel)
        self._vocabulary, self._parallel = model.vocabulary, parallel

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, S] token ids -> [B, S, vocab], gathered over the tensor-parallel ranks."""
        logits = self._local_logits(tokens)
        if self._parallel.size == 1:
            return logits
        rows = -(-self._vocabulary // self._parallel.size)
        padded = F.pad(logits, (0, rows - logits.shape[-1]))
        whole = gather_from_tensor_parallel_region(padded, self._parallel)
        return whole[..., : self._vocabulary]

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        """Mean next-token loss in nats of samples [B, S + 1]: each predicts its successor."""
        return self._loss(self._local_logits(samples[:, :-1]), samples[:, 1:])

    def _local_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        x = tokens
        for layer in self.layers:
            x = layer(x)
        return x


def named_tensors(model: nn.Module | Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of a model, or of some of its layers, by their names in the catalog."""
    found: dict[str, nn.Parameter] = {}
    for root in [model] if isinstance(model, nn.Module) else model:
        for layer in root.modules():
            prefix = getattr(layer, "tensor_prefix", None)
            if prefix is not None:
                for name, parameter in layer.named_parameters():
                    found.setdefault(f"{prefix}.{name}" if prefix else name, parameter)
    return found


def _norm(model: ModelConfig, parallel: TensorParallel) -> LayerNorm | RMSNorm:
    kind = LayerNorm if model.family == "gpt2" else RMSNorm
    return kind(model.hidden, model.norm_eps, parallel=parallel)
