"""What a growth operator is: blocks that make each grown tensor of a smaller model's.

An operator states two numbers for every block: how its parameters are scaled
(``param``), and which multiple of the old gradient the grown model's gradient
will be there (``grad``).  Everything about optimizer state follows from the
second (the slot law), so operators know nothing of optimizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from megagrow.config import ModelConfig
from megagrow.config.load import in_words
from megagrow.errors import GrowthError
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.transfer.state_map import AxisMap, Copy, Fill, Noise


@dataclass(frozen=True)
class Block:
    """One block of a grown tensor.

    Attributes:
        source: the small model's tensor that it is copied from.
        axes: which elements, axis by axis.
        param: grown parameter = param * old parameter.
        grad: gradient of the grown model = grad * old gradient, or None where the
            operator states nothing.
        new: whether the block is additional capacity, not the old block in its place.
        rate: how far the block must move where the old tensor moves by 1, so that the
            grown function moves as the old one; None: as far as its parameters are scaled.
        noise: what is added to the parameters.
    """

    source: str
    axes: tuple[AxisMap, ...]
    param: float = 1.0
    grad: float | None = None
    new: bool = False
    rate: float | None = None
    noise: Noise | None = None

    def scaled(self, coefficient: float, noise: Noise | None = None) -> Copy:
        """The block as a copy of some slot."""
        return Copy(self.source, self.axes, coefficient, noise)

    @property
    def volume(self) -> int:
        """Number of elements."""
        return self.scaled(1.0).volume


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One way to grow a model: a description, and the blocks that a subclass answers with.

    Attributes:
        name: as written in a configuration.
        summary: one line on what it does.
        keeps: what is the same right after the growth: one of `KEEPS`.
        breaker: how exact copies come to differ (the symmetry law).
        source: paper or report that it comes from.
        policies: names of the state policies that make sense; the first is the default.
        sizes: keys of the model's configuration that it can enlarge.
        ramp: over how many steps its new units come in, unless told; 0: they are in at once.
        fitted: for how many steps it is fitted on data, unless told; its blocks are where the
            fitting begins.  0: there is nothing to fit.
        any_size: whether it reaches any larger size, not multiples alone.
        settings: keys of the `grow` section that it takes besides; fields of the same names.
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

    def target(self, model: ModelConfig, factor: int) -> ModelConfig:
        """The configuration of the model that a whole factor makes: its sizes, times that."""
        fields = model.model_dump(by_alias=True)
        return self.grown(model, {key: fields[key] * factor for key in self.sizes if fields[key]})

    def grown(self, model: ModelConfig, sizes: Mapping[str, int]) -> ModelConfig:
        """The configuration of the model with these sizes, as the operator makes it.

        Raises:
            GrowthError: there is no such model.
        """
        return resized(model, sizes)

    def blocks(self, tensor: LogicalTensor, small: Catalog, target: Catalog) -> tuple[Block, ...]:
        """The blocks of one tensor of the grown model; they do not overlap.

        Raises:
            GrowthError: the operator cannot reach this target.
        """
        raise NotImplementedError

    def interchangeable(self, small: Catalog, target: Catalog) -> bool:
        """Whether copies that it makes have equal gradients for as long as their moments are."""
        return False

    def fill(self, tensor: LogicalTensor, small: Catalog, target: Catalog) -> Fill:
        """What parameters that no block covers become."""
        return "zeros"


# What an operator may keep, the strongest first.  `loss`: every logit of every sample that the
# small model takes; `old logits`: of the old vocabulary; `nothing`: the function changes.
KEEPS = ("loss", "old logits", "nothing")


def same(n: int) -> AxisMap:
    """An axis that does not grow."""
    return AxisMap(0, 1, 0, 1, n)


def tiled(n: int, factor: int) -> list[AxisMap]:
    """Copies laid end to end: a b -> a b a b."""
    return [AxisMap(c * n, 1, 0, 1, n) for c in range(factor)]


def repeated(n: int, factor: int) -> list[AxisMap]:
    """Copies interleaved: a b -> a a b b.

    A copy stays beside its source, hence on the tensor-parallel rank that holds it.
    """
    return [AxisMap(c, factor, 0, 1, n) for c in range(factor)]


def growth_factor(large: int, small: int, what: str) -> int:
    """How many times larger an axis became; raises GrowthError if not a whole number."""
    factor, rest = divmod(large, small)
    if rest or factor < 1:
        raise GrowthError(
            f"{what} cannot grow from {small} to {large}",
            expected=f"a multiple of {small}",
        )
    return factor


def unchanged(tensor: LogicalTensor, old: LogicalTensor) -> tuple[AxisMap, ...]:
    """The axes of a tensor that an operator leaves alone; raises GrowthError if they grew."""
    for meaning, n, large in zip(tensor.axes, old.shape, tensor.shape, strict=True):
        require_same(tensor.name, meaning, n, large)
    return tuple(same(n) for n in tensor.shape)


def require_same(name: str, meaning: str, small: int, large: int) -> None:
    """An axis that an operator cannot grow; raises GrowthError if the target wants it."""
    if small != large:
        raise GrowthError(
            f"{name}, axis {meaning}: this operator cannot grow it",
            found=f"from {small} to {large}",
            expected=str(small),
            fix="name another size in grow.target, or add the operator that grows this axis",
        )


def require_no_less(name: str, meaning: str, small: int, large: int) -> None:
    """An axis that may grow to any size; raises GrowthError if the target wants less."""
    if large < small:
        raise GrowthError(f"{name}, axis {meaning}: cannot shrink from {small} to {large}")


def resized(model: ModelConfig, sizes: Mapping[str, int]) -> ModelConfig:
    """A model with some sizes changed; all others stay, the width of a head included.

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
