"""The model as a DeepSpeed pipeline, built from the same layers as the plain model."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from megagrow.config import ModelConfig
from megagrow.engine.deepspeed.privates import CutPipeline
from megagrow.engine.groups import Groups
from megagrow.models.common.blocks import Head
from megagrow.models.common.documents import Separator
from megagrow.models.common.parallel import TensorParallel
from megagrow.models.transformer import apply_layers, layer_types, next_token_loss


class PipelinedModel(CutPipeline):
    """This rank's stage of the layer list, under DeepSpeed's 1F1B schedule.

    Args:
        model: the shape of the model.
        cuts: stage s runs layers cuts[s] to cuts[s + 1].
        parallel: the tensor-parallel ranks.
        groups: the process groups.
        separator: finds the documents of a sample, if they do not see each other.

    Attributes:
        tokens: the token ids of coming micro-batches, with a separator. Every stage reads them, so
            that stages send each other no more than without.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        cuts: Sequence[int],
        parallel: TensorParallel,
        groups: Groups,
        separator: Separator | None = None,
    ) -> None:
        layout = groups.layout
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(
                cuts=cuts,
                tied=_token_embedding if model.tie_embeddings else None,
                ends=groups.ends,
                layers=[
                    LayerSpec(kind, model, parallel, place)
                    for place, kind in enumerate(layer_types(model))
                ],
                topology=PipeModelDataParallelTopology(
                    num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data
                ),
                loss_fn=next_token_loss(model, parallel),
                activation_checkpoint_interval=0,
            )
        self.separator = separator
        self.tokens: Iterator[torch.Tensor] = iter(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """This stage's layers, of the next micro-batch."""
        if self.separator is None:
            return super().forward(x)
        return apply_layers(self.stage_layers(), x, next(self.tokens), self.separator)


def _token_embedding(layer: Any) -> nn.Parameter:
    """The weight that the embedding and a tied head share."""
    holder: Any = layer.embedding if isinstance(layer, Head) else layer
    weight: nn.Parameter = holder.token
    return weight
