"""Exact FLOP counts of a model, the x-axis of every comparison.

A multiply-add is 2 FLOPs; the backward pass costs twice the forward pass. Only matrix products are
counted: projections, the output head, and attention's two products over the whole sequence (not
halved for causality), as in PaLM (Chowdhery et al., arXiv 2204.02311, appendix B). Embedding
lookups, norms, activations and the optimizer are not counted, nor is recomputation under activation
checkpointing, since the model does not require it.
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
    """Parameters that take part in matrix products: the blocks' and the output head's.

    Training on a token takes six times as many FLOPs, plus attention's. Embeddings that are only
    looked up, norms and biases are excluded.
    """
    without_attention = model.model_copy(update={"sequence": 0})
    return forward_flops_per_token(without_attention) // 2
