"""The transformer: the layers of a model's family in sequence.

The model is a list of layers, [Embedding, Block x L, Head], each a function of one tensor (and of
`documents`, where those of a sample do not see each other); `Transformer` runs them in one process,
a pipeline spreads them over several. A layer's `tensor_prefix` plus a parameter's name is the name
in the catalog.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from megagrow.config import ModelConfig
from megagrow.models.common.blocks import Embedding, Head, Layer
from megagrow.models.common.documents import Separator
from megagrow.models.common.loss import vocab_parallel_cross_entropy
from megagrow.models.common.parallel import (
    SERIAL,
    TensorParallel,
    gather_from_tensor_parallel_region,
    require_tensor_parallel,
)
from megagrow.models.registry import family_of
from megagrow.state.layout import even_split


def layer_types(model: ModelConfig) -> list[Layer]:
    """The kinds of layer, in order: entry `place` is built as `kind(model, parallel, place)`."""
    return family_of(model).layers(model)


def layer_list(model: ModelConfig, parallel: TensorParallel = SERIAL) -> list[nn.Module]:
    """All layers of a model, with tied weights if so configured.

    Raises:
        ConfigError: the model cannot be split over the tensor-parallel ranks.
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
    """A language model: token ids in, next-token loss or logits out.

    Args:
        model: its shape.
        parallel: the ranks that hold the other parts.
        separator: finds the documents of a sample, if they do not see each other.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: TensorParallel = SERIAL,
        separator: Separator | None = None,
    ) -> None:
        super().__init__()
        self.separator = separator
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
        return apply_layers(self.layers, tokens, tokens, self.separator)


def apply_layers(
    layers: Iterable[nn.Module], x: torch.Tensor, tokens: torch.Tensor, separator: Separator | None
) -> torch.Tensor:
    """Some layers in turn, of x, for token ids [B, S] whose documents a separator finds."""
    given = {} if separator is None else {"documents": separator(tokens)}
    for layer in layers:
        x = layer(x, **given)
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
