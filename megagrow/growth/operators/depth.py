"""Depth growth: more layers.

    depth_stack       whole copies of the stack, appended: M o M o ... o M
    depth_interleave  every layer followed by its copies: l1 l1 l2 l2 ...
    depth_identity    the same positions, but the copies start as the identity; or by a list, as
                      0 1 1 2 3 3: a copy after every second layer, where LLaMA Pro has them

`depth_stack` is the operator that "Stacking Your Transformers" (Du et al.,
arXiv 2405.15319, where it is called G_stack) found to save most, after Gong et al. (ICML 2019). The
first two change the function, so the loss jumps, and soon falls below its old value.

A copy is the identity once its two output projections and their biases are 0.
Zero norm gains, as Shen et al. (arXiv 2203.06211) describe them, would leave the
MLP of a bias-free RMSNorm and SwiGLU block without any gradient; zero projections have a gradient
at the first step and everything else from the second on (LLaMA Pro, arXiv 2401.02415).

All of them support any larger number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megagrow.config import ModelConfig
from megagrow.errors import GrowthError
from megagrow.growth.operator import GrowthBlock, Operator, resized, unchanged
from megagrow.growth.operators.width import own_noise
from megagrow.state.catalog import Catalog, LogicalTensor, of_layer
from megagrow.state.roles import WRITERS

_SIZES = ("layers",)


@dataclass(frozen=True, kw_only=True)
class Copies(Operator):
    """Copies of layers.

    Attributes:
        noise: standard deviation of the noise added to a copy's matrices, in units of their own
            root mean square.
    """

    noise: float = 0.0

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """One block, the whole tensor, from the layer that is copied."""
        source, new = self.copied(tensor, small, target)
        old, noise = small[source], None
        if new and tensor.is_matrix:
            # The name includes the number of layers, so that a later growth has different noise.
            noise = own_noise(f"{tensor.name} of {target.layers}", self.noise, old)
        return (GrowthBlock(source, unchanged(tensor, old), new=new, noise=noise),)

    def copied(self, tensor: LogicalTensor, small: Catalog, target: Catalog) -> tuple[str, bool]:
        """(source, whether it is a copy)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Listed(Operator):
    """Layers by a list.

    Attributes:
        sources: for each layer of the grown model, its source layer in the old one; None: the
            operator has another rule.
    """

    sources: tuple[int, ...] | None = None

    def target(self, model: ModelConfig, factor: int) -> ModelConfig:
        """As many layers as are listed, or else the factor times as many."""
        return self.grown(model, {} if self.sources else {"layers": factor * model.layers})

    def grown(self, model: ModelConfig, sizes: Mapping[str, int]) -> ModelConfig:
        """As many layers as are listed, or named.

        Raises:
            GrowthError: the list names layers that do not exist, leaves some out, or conflicts with
                other settings.
        """
        if self.sources is None:
            return resized(model, sizes)
        layers = set(range(model.layers))
        wrong = sorted(set(self.sources) - layers)
        if wrong:
            raise GrowthError(
                f"grow.sources: there is no layer {', '.join(map(str, wrong))}",
                found=f"a model of {model.layers} layers before this growth",
                expected=f"numbers from 0 to {model.layers - 1}",
                fix="correct the list",
            )
        lost = sorted(layers - set(self.sources))
        if lost:
            raise GrowthError(
                f"grow.sources leaves out layer {', '.join(map(str, lost))}",
                expected="every layer of the model at least once: a growth drops none",
                fix="add what is left out to the list",
            )
        if sizes.get("layers", len(self.sources)) != len(self.sources):
            raise GrowthError(
                "grow.target.layers is not the length of grow.sources",
                found=sizes["layers"],
                expected=len(self.sources),
                fix="leave grow.target.layers out",
            )
        return resized(model, {**sizes, "layers": len(self.sources)})


@dataclass(frozen=True, kw_only=True)
class DepthStack(Copies):
    """Append copies of all layers; layer i of the grown model is layer i mod L of the old."""

    def copied(self, tensor: LogicalTensor, small: Catalog, target: Catalog) -> tuple[str, bool]:
        """(source, whether it is a copy): whole copies of the stack, end to end."""
        return stacked(tensor, small)


DEPTH_STACK = DepthStack(
    name="depth_stack",
    summary="copies of all layers appended, any factor",
    keeps="nothing",
    breaker="copies sit at different depths, so their gradients differ; noise, where set",
    source="Gong et al., ICML 2019; Du et al., arXiv 2405.15319",
    policies=("copy", "kept", "sparkling", "reset"),
    sizes=_SIZES,
    any_size=True,
    settings=("noise",),
)


@dataclass(frozen=True, kw_only=True)
class DepthInterleave(Copies):
    """Repeat every layer; layer i of the grown model is layer i L / L' of the old."""

    def copied(self, tensor: LogicalTensor, small: Catalog, target: Catalog) -> tuple[str, bool]:
        """(source, whether it is a copy): every layer followed by its copies."""
        return _interleaved(tensor, small, target)


DEPTH_INTERLEAVE = DepthInterleave(
    name="depth_interleave",
    summary="every layer followed by its copies, any factor",
    keeps="nothing",
    breaker="copies sit at different depths, so their gradients differ; noise, where set",
    source="Shen et al., arXiv 2203.06211; Du et al., arXiv 2405.15319",
    policies=("copy", "kept", "sparkling", "reset"),
    sizes=_SIZES,
    any_size=True,
    settings=("noise",),
)


@dataclass(frozen=True, kw_only=True)
class DepthIdentity(Listed):
    """Repeat layers, with the output projections of the copies zero: every one, or by a list."""

    def grown(self, model: ModelConfig, sizes: Mapping[str, int]) -> ModelConfig:
        """As many layers as are listed, or named.

        Raises:
            GrowthError: the list would change the order of the old layers.
        """
        grown = super().grown(model, sizes)
        firsts = list(dict.fromkeys(self.sources or ()))
        if firsts != sorted(firsts):
            raise GrowthError(
                "grow.sources changes the order of the layers, so the copies alone cannot keep the "
                "loss",
                found=", ".join(map(str, firsts)),
                expected="each layer for the first time after those below it",
                fix="correct the list, or use depth_slices",
            )
        return grown

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """One block, the whole tensor.

        No gradient passes through a zero projection, so inside a copy it is 0.
        """
        if self.sources is None:
            source, new = _interleaved(tensor, small, target)
        else:
            source, new = of_first_use(tensor, self.sources)
        axes = unchanged(tensor, small[source])
        if not new:
            return (GrowthBlock(source, axes, grad=1.0),)
        if tensor.role in WRITERS:
            return (GrowthBlock(source, axes, param=0.0, new=True),)
        return (GrowthBlock(source, axes, grad=0.0, new=True),)


DEPTH_IDENTITY = DepthIdentity(
    name="depth_identity",
    summary="every layer followed by copies whose output projections are 0",
    keeps="loss",
    breaker="copies write nothing at first, so they are no twins of their source",
    source="LLaMA Pro, arXiv 2401.02415; identity layers of Shen et al., arXiv 2203.06211",
    policies=("kept", "sparkling", "reset"),
    sizes=_SIZES,
    any_size=True,
    settings=("sources",),
)


def stacked(tensor: LogicalTensor, small: Catalog) -> tuple[str, bool]:
    """(source, whether it is a copy): whole copies of the stack, end to end."""
    depth = small.layers
    return from_layer(tensor, lambda layer: (layer % depth, layer >= depth))


def from_layer(
    tensor: LogicalTensor, source: Callable[[int], tuple[int, bool]]
) -> tuple[str, bool]:
    """(source, whether it is a copy) of a tensor, given that of its layer.

    A tensor outside the layers is its own source.
    """
    if tensor.layer is None:
        return tensor.name, False
    number, new = source(tensor.layer)
    return of_layer(number, tensor.inner), new


def of_first_use(tensor: LogicalTensor, order: Sequence[int]) -> tuple[str, bool]:
    """(source, whether it is a copy), given the source of every layer.

    A layer is old where its source is first used.
    """
    return from_layer(tensor, lambda layer: (order[layer], order.index(order[layer]) < layer))


def _interleaved(tensor: LogicalTensor, small: Catalog, target: Catalog) -> tuple[str, bool]:
    """(source, whether it is a copy): a model's layers, each followed by its copies.

    The copies are distributed as evenly as possible. If layers differ, as where every second one
    has a window, what is repeated is a whole period of them, so that each stays of its kind.
    """
    period = target.period
    if small.layers % period or target.layers % period:
        period = 1
    old, large = small.layers // period, target.layers // period

    def source(layer: int) -> tuple[int, bool]:
        group, within = divmod(layer, period)
        number = group * old // large
        first = -(-number * large // old)  # the first group that has this source
        return number * period + within, group > first

    return from_layer(tensor, source)
