"""The growth operator interface: the blocks that a grown model's tensors consist of.

An operator states two numbers for every block: the scale of its parameters (``param``), and the
ratio of the grown model's gradient to the old one (``grad``). All optimizer state follows from the
second (the slot law), so operators do not depend on optimizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from megagrow.config import ModelConfig
from megagrow.config.load import in_words
from megagrow.errors import GrowthError
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.transfer.state_map import AxisMap, Copy, Fill, Noise


@dataclass(frozen=True)
class GrowthBlock:
    """One block of a grown tensor.

    Attributes:
        source: the small model's tensor that it is copied from.
        axes: the elements, axis by axis.
        param: grown parameter = param * old parameter; the same for what the model makes of it,
            where it adds a constant (`LogicalTensor.offset`).
        grad: gradient of the grown model = grad * old gradient, or None if the operator makes no
            statement.
        new: whether the block adds parameters, as opposed to being the old block.
        rate: how far the block must move when the old tensor moves by 1, so that the grown function
            changes like the old one; None: equal to `param`.
        noise: noise that is added to the parameters.
        term: its place in a sum (`Copy.term`); blocks of other terms than 0 overlap those of 0.
        share: how much the source's moments count where moments are copied; the shares of a sum
            add up to 1.
    """

    source: str
    axes: tuple[AxisMap, ...]
    param: float = 1.0
    grad: float | None = None
    new: bool = False
    rate: float | None = None
    noise: Noise | None = None
    term: int = 0
    share: float = 1.0

    def scaled(self, coefficient: float, noise: Noise | None = None, shift: float = 0.0) -> Copy:
        """The block as a `Copy` of a slot."""
        return Copy(self.source, self.axes, coefficient, noise, shift, self.term)

    @property
    def volume(self) -> int:
        """Number of elements that it sets."""
        return 0 if self.term else self.scaled(1.0).volume


# What some models have beyond plain pre-norm transformers (`megagrow.growth.features`).
Feature = Literal["norm after", "norm of all heads", "head features", "scaled embedding"]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A way to grow a model: a description here, and the blocks, which a subclass defines.

    Attributes:
        name: its name in the configuration.
        summary: one line on what it does.
        keeps: what the growth preserves: one of `KEEPS`.
        breaker: what breaks the symmetry of exact copies (the symmetry law).
        source: paper or report that it comes from.
        policies: names of the supported state policies; the first is the default.
        sizes: keys of the model's configuration that it can enlarge.
        ramp: default number of steps over which new units are unmasked; 0: no mask.
        fitted: default number of steps of fitting on data, which starts from its blocks; 0: it is
            not fitted.
        any_size: whether it supports any larger size, not only multiples.
        settings: further keys of the `grow` section that it takes; it has fields of the same names.
        handles: features of models that it has rules for.
    """

    name: str
    summary: str
    keeps: str
    breaker: str
    source: str
    policies: tuple[str, ...]
    sizes: tuple[str, ...]
    ramp: int = 0
    fitted: int = 0
    any_size: bool = False
    settings: tuple[str, ...] = ()
    handles: frozenset[Feature] = frozenset()

    @property
    def lacking(self) -> bool:
        """Whether it is planned without what its blocks depend on, and cannot be applied yet."""
        return False

    @property
    def deepens(self) -> bool:
        """Whether it grows depth alone: it adds layers, and changes no other size."""
        return set(self.sizes) == {"layers"}

    @property
    def widens(self) -> bool:
        """Whether it grows width alone: the residual stream among its sizes, but not the layers."""
        return "hidden" in self.sizes and "layers" not in self.sizes

    def target(self, model: ModelConfig, factor: int) -> ModelConfig:
        """The configuration of the model grown by an integer factor: its sizes times the factor."""
        fields = model.model_dump(by_alias=True)
        return self.grown(model, {key: fields[key] * factor for key in self.sizes if fields[key]})

    def grown(self, model: ModelConfig, sizes: Mapping[str, int]) -> ModelConfig:
        """The configuration of the model with these sizes, as this operator grows it.

        Raises:
            GrowthError: there is no such model.
        """
        return resized(model, sizes)

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """The blocks of one tensor of the grown model, by term; those of a term do not overlap.

        Raises:
            GrowthError: the operator does not support this target.
        """
        raise NotImplementedError

    def interchangeable(self, small: Catalog, target: Catalog) -> bool:
        """Whether its copies have equal gradients as long as their moments are equal."""
        return False

    def departure(self, small: Catalog, target: Catalog) -> str | None:
        """By what the grown function differs beyond rounding, if it is not as said."""
        return None

    def fill(self, tensor: LogicalTensor, small: Catalog, target: Catalog) -> Fill:
        """The fill of parameters that no block covers."""
        return "zeros"


# What an operator may preserve, strongest first. `loss`: every logit of every sample that the small
# model accepts; `old logits`: the logits of the old vocabulary; `nothing`: the function changes.
KEEPS = ("loss", "old logits", "nothing")


def same(n: int) -> AxisMap:
    """An axis that does not grow."""
    return AxisMap(0, 1, 0, 1, n)


def tiled(n: int, factor: int) -> list[AxisMap]:
    """Copies laid end to end: a b -> a b a b."""
    return [AxisMap(c * n, 1, 0, 1, n) for c in range(factor)]


def repeated(n: int, factor: int) -> list[AxisMap]:
    """Copies interleaved: a b -> a a b b.

    A copy is adjacent to its source, hence on the same tensor-parallel rank.
    """
    return [AxisMap(c, factor, 0, 1, n) for c in range(factor)]


def growth_factor(large: int, small: int, what: str) -> int:
    """The factor by which an axis grew; raises GrowthError if it is not an integer."""
    factor, rest = divmod(large, small)
    if rest or factor < 1:
        raise GrowthError(
            f"{what} cannot grow from {small} to {large}",
            expected=f"a multiple of {small}",
        )
    return factor


def unchanged(tensor: LogicalTensor, old: LogicalTensor) -> tuple[AxisMap, ...]:
    """The axes of a tensor that an operator does not change; raises GrowthError if they grew."""
    for meaning, n, large in zip(tensor.axes, old.shape, tensor.shape, strict=True):
        require_same(tensor.name, meaning, n, large)
    return tuple(same(n) for n in tensor.shape)


def require_same(name: str, meaning: str, small: int, large: int) -> None:
    """An axis that an operator cannot grow; raises GrowthError if the target is larger."""
    if small != large:
        raise GrowthError(
            f"{name}, axis {meaning}: this operator cannot grow it",
            found=f"from {small} to {large}",
            expected=str(small),
            fix="name another size in grow.target, or add the operator that grows this axis",
        )


def require_no_less(name: str, meaning: str, small: int, large: int) -> None:
    """An axis that may grow to any size; raises GrowthError if the target is smaller."""
    if large < small:
        raise GrowthError(f"{name}, axis {meaning}: cannot shrink from {small} to {large}")


def resized(model: ModelConfig, sizes: Mapping[str, int]) -> ModelConfig:
    """A model with some sizes changed; all others are kept, head_dim included.

    Raises:
        GrowthError: there is no such model.
    """
    fields = model.model_dump(by_alias=True) | dict(sizes)
    if model.head_dim_ is None and "head_dim" not in sizes:
        derived = fields["hidden"] == fields["heads"] * model.head_dim
        fields["head_dim"] = None if derived else model.head_dim
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        wanted = ", ".join(f"{key} {n}" for key, n in sizes.items())
        raise GrowthError(
            f"grow: there is no model with {wanted}", found=in_words(error)
        ) from error
