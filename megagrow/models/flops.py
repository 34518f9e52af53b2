"""Exact FLOP counts of a model, the x-axis of every comparison.

A multiply-add is 2 FLOPs; the backward pass costs twice the forward pass.  Counted are
the matrix products: projections, the output head, and attention's two products over the whole
sequence (not halved for causality), as in PaLM (Chowdhery et al., arXiv 2204.02311, appendix B).
Embedding look-ups, norms, activations and the optimizer are not counted; recomputation under
activation checkpointing neither, since it is not work that the model asks for.
"""

from __future__ import annotations

from megagrow.config import ModelConfig
from megagrow.models.registry import family_of

_FORWARD_AND_BACKWARD = 3


def forward_flops_by_place(model: ModelConfig) -> list[int]:
    """FLOPs of the forward pass for one token, for each entry of the layer list.

    The entries are the embedding, the blocks, and the final norm with the output head.
    """
    return family_of(model).flops(model)


def forward_flops_per_token(model: ModelConfig) -> int:
    """FLOPs of the forward pass for one token at the model's full sequence length."""
    return sum(forward_flops_by_place(model))


def train_flops_per_token(model: ModelConfig) -> int:
    """FLOPs of forward and backward pass for one token."""
    return _FORWARD_AND_BACKWARD * forward_flops_per_token(model)


def matrix_parameters(model: ModelConfig) -> int:
    """Parameters that a token meets in a matrix product: the blocks' and the output head's.

    Six times as many FLOPs, and attention's, train a token.  Embeddings that are looked up only,
    norms and biases are not among them.
    """
    without_attention = model.model_copy(update={"sequence": 0})
    return forward_flops_per_token(without_attention) // 2
