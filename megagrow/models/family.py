"""What a family of models is to the rest of the code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megagrow.config import ModelConfig
from megagrow.config.families import Architecture
from megagrow.models.common.blocks import Layer, layer_types
from megagrow.models.common.flops import forward_flops_by_place
from megagrow.models.common.huggingface import HuggingFace
from megagrow.models.common.tensors import catalog
from megagrow.state.catalog import Catalog


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family; what it leaves at its default is that of plain pre-norm transformers.

    Attributes:
        name: as written in a configuration.
        architecture: what tells its models from others.
        layers: the kinds of layer of a model, in order: entry `place` is built as
            `kind(model, parallel, place)`.  The first is an `Embedding`, the last a `Head`.
        catalog: the logical tensors of a model, which the layers' parameters have the names of.
        flops: of the forward pass for one token, for each entry of the layer list.
        huggingface: its directories of Hugging Face; None where there are none.
    """

    name: str
    architecture: Architecture
    layers: Callable[[ModelConfig], list[Layer]] = layer_types
    catalog: Callable[[ModelConfig], Catalog] = catalog
    flops: Callable[[ModelConfig], list[int]] = forward_flops_by_place
    huggingface: HuggingFace | None = None
