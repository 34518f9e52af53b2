"""The best schedule of growth stages for a target model and a budget, under a scaling law.

Growth that preserves the training dynamics puts the large model on its own loss curve at the small
model's loss (Shen et al., arXiv 2203.06211).  So to grow at loss L from N_1 to N_2 saves

    C_2(L + d) - C_1(L)

where C_i(L) are the FLOPs that size i needs to reach L from scratch, and d is the increase of the
loss at the growth.  The FLOPs of a whole schedule are those of the last size alone to the final
loss, minus the sum of these gains, so every pair of sizes has one best loss to grow at, independent
of the other stages; chains of sizes whose growths are in order are then followed to the end of the
budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import scipy

from megagrow.config import ModelConfig
from megagrow.errors import ConfigError
from megagrow.forecast.scaling import ScalingLaw
from megagrow.growth.registry import find_operator
from megagrow.models.catalog import build_catalog
from megagrow.models.flops import train_flops_per_token

_FACTORS = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Size:
    """A model size on the way to the target.

    Attributes:
        model: its configuration.
        depth, width: the growth factors to the target.
        n: parameters, by the law's definition of N.
        flops_per_token: forward and backward.
    """

    model: ModelConfig
    depth: int
    width: int
    n: int
    flops_per_token: int


@dataclass(frozen=True)
class PlannedStage:
    """One growth stage of a schedule; counts are from the start of the run."""

    size: Size
    end_loss: float
    end_tokens: float
    end_flops: float


@dataclass(frozen=True)
class Schedule:
    """A schedule and the law's predictions for it.

    Attributes:
        stages: in order.
        loss: at the end of the budget, before any learning-rate decay.
        saving: 1 - C / C_scratch at that loss, with C_scratch for the target from scratch.
    """

    stages: tuple[PlannedStage, ...]
    loss: float
    saving: float


class Curves:
    """C(L) and L(C) of model sizes under a law.

    Args:
        law: with S in steps or tokens.
        batch_tokens: tokens per step; converts steps into tokens.
    """

    def __init__(self, law: ScalingLaw, *, batch_tokens: int) -> None:
        self.law = law
        self._tokens = batch_tokens if law.unit == "steps" else 1

    def tokens(self, size: Size, loss: float) -> float:
        """Tokens that a size needs to reach a loss from scratch; infinite if it never does."""
        return self.law.duration(size.n, loss) * self._tokens

    def flops(self, size: Size, loss: float) -> float:
        """FLOPs that a size needs to reach a loss from scratch."""
        return self.tokens(size, loss) * size.flops_per_token

    def loss_at(self, size: Size, tokens: float) -> float:
        """The loss of a size after this many tokens from scratch."""
        return self.law.loss(size.n, tokens / self._tokens)


def size_of(model: ModelConfig, law: ScalingLaw, *, depth: int = 1, width: int = 1) -> Size:
    """The `Size` of a model under a law."""
    n = parameters_for(law, model)
    return Size(model, depth, width, n, train_flops_per_token(model))


def parameters_for(law: ScalingLaw, model: ModelConfig) -> int:
    """N by the law's definition: with or without embeddings."""
    catalog = build_catalog(model)
    if law.embeddings:
        return catalog.parameters
    tables = ("embedding", "position", "head")
    return catalog.parameters - sum(t.volume for t in catalog if t.role in tables)


def sizes_towards(target: ModelConfig, law: ScalingLaw, *, operators: Sequence[str]) -> list[Size]:
    """The target and the smaller models that can be grown into it by depth and width.

    Args:
        target: the model of the last stage.
        law: determines whether embeddings count.
        operators: names of the depth and width operators that may be used.
    """
    used = [find_operator(name) for name in operators]
    deep = any(operator.deepens for operator in used)
    wide = any(operator.widens for operator in used)
    found = []
    for depth in _FACTORS if deep else (1,):
        for width in _FACTORS if wide else (1,):
            sizes = (target.heads, target.kv_groups, target.hidden, target.ffn)
            if target.layers % depth or any(size % width for size in sizes):
                continue
            # Like the width operator: more heads of the same size.
            model = target.model_copy(
                update={
                    "layers": target.layers // depth,
                    "hidden": target.hidden // width,
                    "heads": target.heads // width,
                    "kv_heads": None if target.kv_heads is None else target.kv_heads // width,
                    "ffn": target.ffn // width,
                }
            )
            found.append(size_of(model, law, depth=depth, width=width))
    return sorted(found, key=lambda size: size.n)


@dataclass(frozen=True)
class _Growth:
    """The best point to grow from one size to another."""

    loss: float
    gain: float


def best_growth(curves: Curves, small: Size, large: Size, *, added_loss: float) -> _Growth | None:
    """The loss at which growing saves the most FLOPs, and the saving; None if it never saves."""
    limit = curves.law.limit(small.n)

    def cost(rest: float) -> float:
        loss = limit + math.exp(rest)
        return curves.flops(small, loss) - curves.flops(large, loss + added_loss)

    # From the left, where the small model is at its limit, the gain rises to a single maximum.
    found = scipy.optimize.minimize_scalar(
        cost, bounds=(math.log(1e-6), math.log(20.0)), method="bounded", options={"xatol": 1e-7}
    )
    if found.fun >= 0:
        return None
    return _Growth(limit + math.exp(float(found.x)), -float(found.fun))


def plan_schedule(
    curves: Curves,
    sizes: Sequence[Size],
    *,
    flops: float,
    most_stages: int = 3,
    added_loss: float = 0.0,
    allowed: Callable[[Size], bool] = lambda size: True,
) -> Schedule:
    """The schedule that ends with the lowest loss.

    Args:
        curves: the law's curves.
        sizes: from `sizes_towards`; the last is the target.
        flops: the budget.
        most_stages: maximum number of growth stages; 1 is the target from scratch.
        added_loss: increase of the loss at a growth, nats; 0 for operators that preserve it.
        allowed: whether a size fits on the machines.

    Raises:
        ConfigError: the target does not fit.
    """
    target, usable = sizes[-1], [size for size in sizes if allowed(size)]
    if target not in usable:
        raise ConfigError(
            "the target does not fit on the machines in any layout",
            found=f"{target.n:,} parameters",
            fix="more machines, or more memory a device",
        )
    growths = {
        (i, j): best_growth(curves, usable[i], usable[j], added_loss=added_loss)
        for j in range(len(usable))
        for i in range(j)
        if usable[i].depth % usable[j].depth == 0 and usable[i].width % usable[j].width == 0
    }
    best = _finish(curves, [target], [], flops=flops, added_loss=added_loss)
    for chain in _chains(len(usable) - 1, growths, most_stages):
        moments = [growths[pair] for pair in pairwise(chain)]
        losses = [moment.loss for moment in moments if moment is not None]
        if len(losses) < len(moments) or any(b >= a for a, b in pairwise(losses)):
            continue
        members = [usable[i] for i in chain]
        found = _finish(curves, members, losses, flops=flops, added_loss=added_loss)
        if found is not None and (best is None or found.loss < best.loss):
            best = found
    assert best is not None  # the target from scratch fits any budget
    return best


def _chains(
    last: int, growths: dict[tuple[int, int], _Growth | None], most: int
) -> list[tuple[int, ...]]:
    """All chains of growths that end at the last size, with at most `most_stages` stages."""
    chains: list[tuple[int, ...]] = []
    ends: list[tuple[int, ...]] = [(last,)]
    for _ in range(most - 1):
        ends = [
            (i, *chain) for chain in ends for (i, j), found in growths.items()
            if j == chain[0] and found is not None
        ]  # fmt: skip
        chains += ends
    return chains


def _finish(
    curves: Curves,
    sizes: Sequence[Size],
    losses: Sequence[float],
    *,
    flops: float,
    added_loss: float,
) -> Schedule | None:
    """Follow a chain to the end of the budget; None if its last growth is too late."""
    stages: list[PlannedStage] = []
    done_tokens = done_flops = 0.0
    begun = 0.0  # tokens that the size would have needed from scratch to its starting point
    for size, loss in zip(sizes, losses, strict=False):
        took = curves.tokens(size, loss) - begun
        if took <= 0:
            return None
        done_tokens += took
        done_flops += took * size.flops_per_token
        stages.append(PlannedStage(size, loss, done_tokens, done_flops))
        following = sizes[len(stages)]
        begun = curves.tokens(following, loss + added_loss)
    target = sizes[-1]
    left = (flops - done_flops) / target.flops_per_token
    if left <= 0:
        return None
    loss = curves.loss_at(target, begun + left)
    end = done_flops + left * target.flops_per_token
    stages.append(PlannedStage(target, loss, done_tokens + left, end))
    return Schedule(tuple(stages), loss, 1 - end / curves.flops(target, loss))


def predict(curves: Curves, schedule: Schedule, added_loss: float = 0.0) -> Schedule | None:
    """The same stages, at the same tokens, under another law; None if that is impossible."""
    stages: list[PlannedStage] = []
    loss, tokens, flops = math.inf, 0.0, 0.0
    for stage in schedule.stages:
        begun = 0.0 if not stages else curves.tokens(stage.size, loss + added_loss)
        took = stage.end_tokens - tokens
        if not math.isfinite(begun):
            return None
        loss = curves.loss_at(stage.size, begun + took)
        tokens, flops = stage.end_tokens, flops + took * stage.size.flops_per_token
        stages.append(PlannedStage(stage.size, loss, tokens, flops))
    return Schedule(tuple(stages), loss, 1 - flops / curves.flops(stages[-1].size, loss))


def best_alone(curves: Curves, sizes: Sequence[Size], *, flops: float) -> tuple[Size, float]:
    """The size that is best from scratch for a FLOPs budget, and its loss.

    If that is not the target, the target is too large for its budget, and growth has to beat this
    size as well.
    """
    found = [(curves.loss_at(size, flops / size.flops_per_token), size) for size in sizes]
    loss, size = min(found, key=lambda one: one[0])
    return size, loss
