"""The transformer: plain pre-norm blocks, in the GPT-2 family.

Parameter names are the catalog's.  Shapes: B batch, S sequence, E embed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megagrow.config import ModelConfig
from megagrow.model.layers import LayerNorm, Linear


class Embedding(nn.Module):
    """Token plus learned position embedding: [B, S] -> [B, S, E]."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(model.vocabulary, model.hidden))
        self.position = nn.Parameter(torch.empty(model.sequence, model.hidden))
        self.dropout = model.dropout

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed token ids."""
        x = F.embedding(tokens, self.token) + self.position[: tokens.shape[1]]
        return F.dropout(x, self.dropout, self.training)


class Attention(nn.Module):
    """Pre-norm causal self-attention: [B, S, E] -> [B, S, E], without the residual."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.groups, self.head_dim = model.kv_groups, model.head_dim
        self.queries = model.heads // model.kv_groups
        self.dropout = model.dropout
        heads = (self.groups, self.queries, self.head_dim)
        self.norm = LayerNorm(model.hidden, model.norm_eps)
        self.qkv = Linear((self.groups, self.queries + 2, self.head_dim), (model.hidden,))
        self.out = Linear((model.hidden,), heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend."""
        batch, sequence, _ = x.shape
        qkv = self.qkv(self.norm(x))
        qkv = qkv.view(batch, sequence, self.groups, self.queries + 2, self.head_dim)
        q, k, v = qkv.split((self.queries, 1, 1), dim=3)
        y = F.scaled_dot_product_attention(
            q.flatten(2, 3).transpose(1, 2),
            k.squeeze(3).transpose(1, 2),
            v.squeeze(3).transpose(1, 2),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            enable_gqa=self.queries > 1,
        )
        return self.out(y.transpose(1, 2).flatten(2, 3))


class MLP(nn.Module):
    """Pre-norm two-layer perceptron with GELU: [B, S, E] -> [B, S, E], without the residual."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(model.hidden, model.norm_eps)
        self.up = Linear((model.ffn,), (model.hidden,))
        self.down = Linear((model.hidden,), (model.ffn,))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply."""
        # The tanh form is GPT-2's own.
        return self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream [B, S, E]."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(model)
        self.mlp = MLP(model)
        self.dropout = model.dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply."""
        x = x + F.dropout(self.attention(x), self.dropout, self.training)
        return x + F.dropout(self.mlp(x), self.dropout, self.training)


class Output(nn.Module):
    """An output head of its own, where embeddings are not tied."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.vocabulary, model.hidden))


class Transformer(nn.Module):
    """A language model: token ids in, next-token loss or logits out."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.embedding = Embedding(model)
        self.layers = nn.ModuleList(Block(model) for _ in range(model.layers))
        self.final_norm = LayerNorm(model.hidden, model.norm_eps)
        self.output = None if model.tie_embeddings else Output(model)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, S] token ids -> [B, S, vocab]."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        head = self.embedding.token if self.output is None else self.output.weight
        return F.linear(self.final_norm(x), head)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        """Mean next-token loss in nats of samples [B, S + 1]: each predicts its successor."""
        logits = self.logits(samples[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten())


def named_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by their names in the catalog."""
    return dict(model.named_parameters())
