"""The model as a DeepSpeed pipeline, built from the same layers as the plain model."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from megagrow.config import ModelConfig
from megagrow.engine.groups import Groups
from megagrow.models.common.blocks import Head
from megagrow.models.common.parallel import TensorParallel
from megagrow.models.transformer import layer_types, next_token_loss


class PipelinedModel(PipelineModule):
    """This rank's stage of the layer list, under DeepSpeed's 1F1B schedule.

    Args:
        model: the shape of the model.
        cuts: stage s runs layers cuts[s] to cuts[s + 1].
        parallel: the tensor-parallel ranks.
        groups: the process groups.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        cuts: Sequence[int],
        parallel: TensorParallel,
        groups: Groups,
    ) -> None:
        layout = groups.layout
        # Set before PipelineModule.__init__, which reads them.
        self._cuts, self._ends, self._is_tied = list(cuts), groups.ends, model.tie_embeddings
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(
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

    def _partition_layers(self, method: str = "") -> None:
        """Use the cuts that the placement was planned with."""
        self.parts = self._cuts
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _index_tied_modules(self) -> dict[str, Any]:
        """DeepSpeed ties a whole module; here only the weight is shared, between two layers."""
        for weight, _ in self.get_tied_weights_and_groups():
            # The gradient norm counts only the first stage's copy.
            weight.ds_pipe_replicated = self.stage_id > 0
        return {}

    def get_tied_weights_and_groups(
        self,
    ) -> list[tuple[Any, dist.ProcessGroup | None]]:
        """The token embedding, if this stage holds a copy of it; its gradients are summed."""
        if not self._is_tied or self.stage_id not in (0, self.num_stages - 1):
            return []
        layer = self.forward_funcs[0 if self.stage_id == 0 else -1]
        return [(layer.embedding.token if isinstance(layer, Head) else layer.token, self._ends)]
