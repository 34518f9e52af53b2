"""A minimal GPT in plain PyTorch: the baseline for the training step.

The GPT-2 architecture as in nanoGPT (pre-norm, learned positions, GELU, tied head, biases, fused
attention), with torch's own layers and none of megagrow's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megagrow.config import ModelConfig
from megagrow.config.model import PUBLISHED_STD


class _Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).split(hidden, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, hidden))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class MinimalGPT(nn.Module):
    """Token ids [B, S + 1] in, mean next-token loss in nats out.

    Args:
        model: a GPT-2 configuration, without dropout.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(model.vocabulary, model.hidden)
        self.position = nn.Embedding(model.sequence, model.hidden)
        self.layers = nn.ModuleList(
            _Layer(model.hidden, model.heads, model.ffn) for _ in range(model.layers)
        )
        self.norm = nn.LayerNorm(model.hidden)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=model.stds.matrices or PUBLISHED_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        """The loss."""
        tokens, labels = samples[:, :-1], samples[:, 1:]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(places)
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.token.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
