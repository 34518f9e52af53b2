"""Exact FLOP counts of a model, the x-axis of every comparison.

A multiply-add is 2 FLOPs; the backward pass costs twice the forward pass, or less where tensors are
frozen (`train_flops_per_token`). Only matrix products are
counted: projections, the output head, and attention's two products over the whole sequence (not
halved for causality), as in PaLM (Chowdhery et al., arXiv 2204.02311, appendix B). Embedding
lookups, norms, activations and the optimizer are not counted, nor is recomputation under activation
checkpointing, since the model does not require it.
"""

from __future__ import annotations

from collections.abc import Sequence

from megagrow.config import ModelConfig
from megagrow.models.registry import family_of
from megagrow.state.catalog import Catalog, LogicalTensor

_FORWARD_AND_BACKWARD = 3


def forward_flops_by_place(model: ModelConfig) -> list[int]:
    """FLOPs of the forward pass for one token, for each entry of the layer list.

    The entries are the embedding, the blocks, and the final norm with the output head.
    """
    return family_of(model).flops(model)


def forward_flops_per_token(model: ModelConfig) -> int:
    """FLOPs of the forward pass for one token at the model's full sequence length."""
    return sum(forward_flops_by_place(model))


def train_flops_per_token(model: ModelConfig, catalog: Catalog | None = None) -> int:
    """FLOPs of forward and backward pass for one token.

    The backward pass computes the gradient of each product's inputs as far down as something is
    trained below it, and of the weights that are trained. Attention's products count together, as
    fused kernels compute them. Inside the lowest trained block the order of the products is that of
    the architecture's blocks; a family with other layers of its own may compute less.

    Args:
        model: the model.
        catalog: its tensors, if some of them may be frozen.
    """
    forward = forward_flops_by_place(model)
    trained = {t.name for t in catalog or () if t.training == "trained"}
    if catalog is None or len(trained) == len(catalog):
        return _FORWARD_AND_BACKWARD * sum(forward)
    lowest = min(catalog[name].places[0] for name in trained)
    products = forward_flops_by_place(model.model_copy(update={"sequence": 0}))
    total = sum(forward)
    for place in range(lowest, len(forward)):
        here = [tensor for tensor in catalog if place in tensor.places]
        total += sum(_product(t, place) for t in here if t.name in trained)
        attention = 2 * (forward[place] - products[place])
        if place > lowest:
            total += products[place] + attention
            continue
        for branch in _branches(here) if model.architecture.parallel else (here,):
            below = False  # whether something in the branch so far is trained
            for tensor in branch:
                if below:
                    total += _product(tensor, place)
                    if tensor.role == "writer" and tensor is _first_writer(here):
                        total += attention
                below = below or tensor.name in trained
    return total


def _product(tensor: LogicalTensor, place: int) -> int:
    """FLOPs of a tensor's product for one token, in one of the places that use it."""
    head = tensor.role == "embedding" and place == tensor.places[-1] > tensor.places[0]
    return 2 * tensor.volume if tensor.reads or head else 0


def _first_writer(block: Sequence[LogicalTensor]) -> LogicalTensor:
    """The matrix of a block that reads what attention has computed."""
    return next(tensor for tensor in block if tensor.role == "writer")


def _branches(block: Sequence[LogicalTensor]) -> tuple[Sequence[LogicalTensor], ...]:
    """Attention and MLP of a block that computes them side by side, each with its norm."""
    at = next((i for i, tensor in enumerate(block) if "ffn" in tensor.axes), 0)
    while at > 0 and block[at - 1].role in ("norm_gain", "norm_bias"):
        at -= 1
    return block[:at], block[at:]


def matrix_parameters(model: ModelConfig) -> int:
    """Parameters that take part in matrix products: the blocks' and the output head's.

    Training on a token takes six times as many FLOPs, plus attention's. Embeddings that are only
    looked up, norms and biases are excluded.
    """
    without_attention = model.model_copy(update={"sequence": 0})
    return forward_flops_per_token(without_attention) // 2
