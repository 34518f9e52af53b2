"""The interface of a model family."""

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
    """One family; the defaults are those of plain pre-norm transformers.

    Attributes:
        name: its name in the configuration.
        architecture: the architectural properties of its models.
        layers: the kinds of layer of a model, in order: entry `place` is built as
            `kind(model, parallel, place)`.  The first is an `Embedding`, the last a `Head`.
        catalog: the logical tensors of a model; the layers' parameters have the same names.
        flops: forward FLOPs per token, for each entry of the layer list.
        huggingface: its Hugging Face format; None if there is none.
        megatron: whether Megatron-LM's GPT model computes the same function of the same tensors,
            given the arguments that follow from the architecture. Only then are its models written
            in Megatron's format, or read from it.
        documents: whether its layers, if they are its own, take `documents` and pass them to
            attention; without it, `data.documents: mask` is refused.
    """

    name: str
    architecture: Architecture
    layers: Callable[[ModelConfig], list[Layer]] = layer_types
    catalog: Callable[[ModelConfig], Catalog] = catalog
    flops: Callable[[ModelConfig], list[int]] = forward_flops_by_place
    huggingface: HuggingFace | None = None
    megatron: bool = False
    documents: bool = False

    def __post_init__(self) -> None:
        made = self.architecture
        if self.megatron and made.activation != ("silu" if made.gated else "gelu"):
            raise ValueError(f"family {self.name}: Megatron's MLP is GELU's or SwiGLU")

    @property
    def separates_documents(self) -> bool:
        """Whether its models can keep the documents of a sample apart."""
        return self.documents or self.layers is layer_types
