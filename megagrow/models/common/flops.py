"""FLOPs of plain pre-norm transformers (see `megagrow.models.flops` for what is counted)."""

from __future__ import annotations

from megagrow.config import ModelConfig


def forward_flops_by_place(model: ModelConfig) -> list[int]:
    """FLOPs of the forward pass for one token, for each entry of the layer list.

    The entries are the embedding, the blocks, and the final norm with the output head. A block with
    a window counts as many keys as the window has.
    """
    heads_width = model.heads * model.head_dim
    qkv = model.hidden * (model.heads + 2 * model.kv_groups) * model.head_dim
    attention_out = heads_width * model.hidden
    mlp = (3 if model.architecture.gated else 2) * model.hidden * model.ffn

    def block(layer: int) -> int:
        window = model.layer_kind(layer).window or model.sequence
        attention = 2 * min(window, model.sequence) * heads_width
        return 2 * (qkv + attention_out + mlp + attention)

    blocks = [block(layer) for layer in range(model.layers)]
    return [0, *blocks, 2 * model.hidden * model.vocabulary]
