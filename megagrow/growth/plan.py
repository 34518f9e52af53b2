"""A growth: an operator and a state policy between two models, as a state map."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megagrow.config import GrowConfig, ModelConfig
from megagrow.errors import GrowthError
from megagrow.growth.compose import Composition, composed
from megagrow.growth.features import check_growth, refusal
from megagrow.growth.new_blocks import with_unfrozen, young_after
from megagrow.growth.operator import GrowthBlock, Operator
from megagrow.growth.operators.ramp import Ramp, make_ramp
from megagrow.growth.operators.vocabulary import TokenMap, with_tokens
from megagrow.growth.optimizer_rules import (
    Factors,
    OptimizerRules,
    YoungBlocks,
    beyond_shape,
)
from megagrow.growth.policy import StatePolicy
from megagrow.growth.rates import exact_factors
from megagrow.growth.registry import OPERATORS, find_operator, find_operators, find_policy
from megagrow.growth.settings import configured
from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import Catalog, LogicalTensor, Slot
from megagrow.state.roles import FINAL_NORM
from megagrow.transfer.state_map import Copy, Fill, Level


@dataclass(frozen=True)
class Growth:
    """A growth between two catalogs; a `StateMap`.

    Attributes:
        operator: how parameters grow.
        policy: how optimizer state and rates are carried over.
        small: the catalog before.
        target: the catalog after.
        rewarm: re-warm steps (see StatePolicy).
        mup: whether a matrix whose inputs grew k-fold has 1/k of the rate from now on.
        ramp: the ramp of new units, counted from the growth; None: no mask.
        fit_steps: steps of fitting on data, if the operator is fitted.
    """

    operator: Operator
    policy: StatePolicy
    small: Catalog
    target: Catalog
    rewarm: int
    mup: bool = False
    ramp: Ramp | None = None
    fit_steps: int = 0

    def blocks(self, tensor: LogicalTensor) -> tuple[GrowthBlock, ...]:
        """The operator's blocks of one target tensor."""
        return self._blocks[tensor.name]

    @cached_property
    def _blocks(self) -> dict[str, tuple[GrowthBlock, ...]]:
        return {t.name: self.operator.blocks(t, self.small, self.target) for t in self.target}

    def with_tokens(self, tokens: TokenMap) -> Growth:
        """The growth with the map of the tokens that its operator `lacks`.

        Raises:
            GrowthError: state policy and operators do not fit this map.
        """
        operator = self.operator
        if isinstance(operator, Composition):
            parts = [with_tokens(p, tokens) if p.lacking else p for p in operator.parts]
            operator = composed(parts, operator.catalogs)
        else:
            operator = with_tokens(operator, tokens)
        return _checked(replace(self, operator=operator))

    def copies(self, tensor: LogicalTensor, slot: Slot) -> Sequence[Copy]:
        """The blocks of one slot, without those whose coefficient is 0 or whose source lacks it."""
        key = tensor.name, slot.name
        if key not in self._copies:
            if self.operator.lacking:
                raise AssertionError(f"{self.operator.name} is applied without its map of tokens")
            self._copies[key] = tuple(self._scaled(tensor, slot))
        return self._copies[key]

    @cached_property
    def _copies(self) -> dict[tuple[str, str], Sequence[Copy]]:
        return {}

    def _scaled(self, tensor: LogicalTensor, slot: Slot) -> Iterator[Copy]:
        for block in self.blocks(tensor):
            if not slot.of(self.small[block.source]):
                continue
            c = self.policy.coefficient(block, slot.kind)
            if c != 0.0 and slot.kind != "parameter":
                yield block.scaled(c)
            elif c != 0.0:
                # offset + new = c (offset + old), in the first term of a sum.
                shift = tensor.offset * (c if block.term else c - 1.0)
                yield block.scaled(c, block.noise, shift)

    def fill(self, tensor: LogicalTensor, slot: Slot) -> Fill:
        """The operator's rule for parameters, zero for optimizer state."""
        set_by = (copy for copy in self.copies(tensor, slot) if copy.term == 0)
        if sum(copy.volume for copy in set_by) == tensor.volume:
            return "covered"
        if slot.kind != "parameter":
            return "zeros"
        rule = self.operator.fill(tensor, self.small, self.target)
        if isinstance(rule, Level) and tensor.offset:
            return replace(rule, shift=tensor.offset * (rule.coefficient - 1.0))
        return rule

    def caveats(self, *, grad_clip: float, dropout: float) -> list[str]:
        """Warnings: what makes the growth inexact or useless, a sentence each.

        Args:
            grad_clip: the norm that the run clips gradients at; 0 for none.
            dropout: the model's; it breaks the symmetry of copies, since it drops each
                independently.
        """
        found = []
        policy = self.policy.caveat(grad_clip=grad_clip, dropout=dropout)
        if policy is not None:
            found.append(f"state policy {self.policy.name} {policy}")
        departure = self.operator.departure(self.small, self.target)
        if departure is not None:
            found.append(departure)
        copied = self.operator.interchangeable(self.small, self.target)
        if copied and self.policy.moments != "kept" and dropout == 0:
            found.append(
                f"copies never part under state policy {self.policy.name}, since their gradients "
                "and moments are equal: the grown model learns what the small one would; "
                "grow.operator width_fresh makes no copies, kept and sparkling part them slowly"
            )
        return found

    def rules_after(
        self,
        before: OptimizerRules,
        *,
        step: int,
        betas: tuple[float, float] | None = None,
    ) -> OptimizerRules:
        """The optimizer's rules after the growth.

        Args:
            before: the rules before the growth.
            step: the optimizer's step count at the growth.
            betas: AdamW's, if that is the optimizer.

        New blocks of an earlier growth keep their step count inside the old block of this one, or
        if their tensor is copied as a whole. If they are copied in pieces among old elements, they
        count as old.

        Raises:
            GrowthError: they are copied in pieces while bias correction still matters for them.
        """
        factors: dict[str, Factors] = {}
        young: dict[str, YoungBlocks] = {}
        before = with_unfrozen(before, self.small, step=step)
        for tensor in self.target:
            blocks = self.blocks(tensor)
            inherited = before.factors_of(blocks[0].source) if blocks else Factors()
            if self.policy.scale_rates:
                factors_of_growth = exact_factors(tensor, self.small, blocks)
                own = beyond_shape(factors_of_growth, self.small[blocks[0].source], tensor)
                inherited = inherited.times(own)
            elif self.mup and blocks:
                inherited = inherited.times(self._mup_factors(tensor, self.small[blocks[0].source]))
            if inherited != Factors():
                factors[tensor.name] = inherited
            blocks_of_tensor = young_after(
                tensor,
                blocks,
                policy=self.policy,
                policies=self.operator.policies,
                rewarm=self.rewarm,
                before=before,
                step=step,
                betas=betas,
            )
            if blocks_of_tensor is not None and tensor.training == "trained":
                young[tensor.name] = blocks_of_tensor
        return OptimizerRules(factors, young)

    def _mup_factors(self, tensor: LogicalTensor, old: LogicalTensor) -> Factors:
        """Yang et al., arXiv 2203.03466, table 8: under Adam hidden matrices learn at 1 / fan-in.

        The head reads its inputs through the final norm. If the norm carries the head's share of 1
        / k, as with copies, its elements move the logits as the head's would, so 1 / k is the
        norm's rate and not the head's (whose weight may be the embedding); otherwise it is the rate
        of an untied head. Weight decay is divided by the rate factor, so that the decay per step is
        unchanged.
        """
        if tensor.role in FINAL_NORM and self._norm_carries:
            inputs = frozenset(tensor.axes)
        elif tensor.role == "head" and self._norm_carries:
            inputs = frozenset()
        else:
            inputs = frozenset(tensor.reads)
        sizes = zip(tensor.axes, tensor.shape, old.shape, strict=True)
        k = math.prod(large / n for axis, large, n in sizes if axis in inputs)
        return Factors(lr=1 / k, weight_decay=k)

    @cached_property
    def _norm_carries(self) -> bool:
        """Whether the final norm is scaled down by the growth factor of the head's inputs.

        If its gradient grows by the same factor, it is the norm's input whose scale changed.
        """
        gain = self.target.of("final_norm_gain")
        if gain is None:
            return False
        blocks = self._blocks[gain.name]
        moved = sum(b.param * (1.0 if b.grad is None else b.grad) * b.volume for b in blocks)
        return moved < (1 - 1e-9) * sum(b.volume for b in blocks)


def plan_growth(grow: GrowConfig, model: ModelConfig) -> tuple[ModelConfig, Growth]:
    """Plan a `grow` section: the grown model, and the growth from the given model to it.

    Raises:
        GrowthError: names, sizes and policy do not fit together or do not fit the model.
    """
    parts = configured(find_operators(grow.operator), grow)
    wanted = {} if grow.target is None else grow.target.model_dump(exclude_none=True)
    owners = {key: [p.name for p in parts if key in p.sizes] for key in wanted}
    for key, names in owners.items():
        if len(names) != 1:
            reach = ", ".join(sorted({key for part in parts for key in part.sizes}))
            raise GrowthError(
                f"grow.target.{key}: "
                + (f"both {' and '.join(names)} grow it" if names else "no operator grows it"),
                found=f"grow.operator {grow.operator}",
                expected=f"sizes among {reach}, each grown by one operator",
                fix=f"leave grow.target.{key} out, or change grow.operator",
            )
    models = [model]
    for part in parts:
        sizes = {key: n for key, n in wanted.items() if key in part.sizes}
        if grow.target is None:
            models.append(part.target(models[-1], grow.factor or 2))
        else:
            models.append(part.grown(models[-1], sizes))
        if (error := refusal(part, models[-2], models[-1])) is not None:
            raise error
        if not part.sizes and models[-1] == models[-2]:
            raise GrowthError(
                f"grow.operator: {part.name} changes nothing here",
                found=f"tie_embeddings {models[-1].tie_embeddings}",
                fix="leave the operator out",
            )
    catalogs = [build_catalog(m) for m in models]
    operator = parts[0] if len(parts) == 1 else composed(parts, catalogs[:-1])
    growth = make_growth(
        operator=operator,
        policy=grow.state_policy,
        small=catalogs[0],
        target=catalogs[-1],
        rewarm=grow.rewarm,
        ramp=grow.ramp,
        fit_steps=grow.fit_steps,
    )
    if model.mup is not None:
        _require_mup(grow, model, models[-1])
    if grow.mup and growth.policy.scale_rates:
        raise GrowthError(
            f"grow.mup: state policy {growth.policy.name!r} sets the rates itself",
            fix="leave grow.mup out, or set grow.state_policy to another",
        )
    return models[-1], replace(growth, mup=grow.mup)


def _require_mup(grow: GrowConfig, model: ModelConfig, grown: ModelConfig) -> None:
    """Check that the grown model's rates follow from its shape."""
    if grow.mup:
        raise GrowthError(
            "grow.mup: the rates follow from the shape already, before a growth and after it",
            found=f"model.mup {model.mup.model_dump() if model.mup else None}",
            fix="leave grow.mup out",
        )
    if grown.head_dim != model.head_dim:
        raise GrowthError(
            "model.mup: wider heads have no rates of their own, since the scores' scale is "
            "1 / sqrt(head_dim), and queries, keys and values are one tensor",
            found=f"head_dim {model.head_dim} -> {grown.head_dim}",
            fix="grow heads instead (grow.target.heads), or leave model.mup out",
        )


def make_growth(
    *,
    operator: str | Operator,
    policy: str | None,
    small: Catalog,
    target: Catalog,
    rewarm: int | None = None,
    ramp: int | None = None,
    fit_steps: int | None = None,
) -> Growth:
    """Look up the operator and the policy, and check that they fit each other and the models.

    Args:
        operator: the operator, or its name.
        policy: name of the state policy; None: the operator's default.
        small, target: the catalogs before and after.
        rewarm, ramp, fit_steps: override the defaults of the policy and the operator.

    Raises:
        GrowthError: unknown names, a policy or a target that the operator does not support, or a
            tensor of unknown role.
    """
    found = find_operator(operator) if isinstance(operator, str) else operator
    if not found.policies:
        raise GrowthError(
            f"grow.operator: no state policy serves all parts of {found.name}",
            fix="grow in two stages",
        )
    name = policy or found.policies[0]
    if name not in found.policies:
        find_policy(name)
        raise GrowthError(
            f"grow.state_policy: operator {found.name!r} does not support {name!r}",
            found=name,
            expected=" or ".join(found.policies),
            fix=f"set grow.state_policy to {found.policies[0]}, or leave it out",
        )
    rule = find_policy(name)
    if ramp is not None and not found.ramp:
        raise _useless(
            "ramp", "lets its units in at once", found, [o for o in OPERATORS.values() if o.ramp]
        )
    if fit_steps is not None and not found.fitted:
        raise _useless(
            "fit_steps", "has nothing to fit", found, [o for o in OPERATORS.values() if o.fitted]
        )
    growth = Growth(
        operator=found,
        policy=rule,
        small=small,
        target=target,
        rewarm=rule.rewarm if rewarm is None else rewarm,
        ramp=make_ramp(_before_ramp(found, small), target, steps=ramp or found.ramp),
        fit_steps=fit_steps or found.fitted,
    )
    growth = _checked(growth)
    # With a step behind it, where new elements have to be told from old ones.
    growth.rules_after(OptimizerRules(), step=1)  # raises if the policy cannot express it
    return growth


def _checked(growth: Growth) -> Growth:
    """The growth, if its blocks fit its models (GrowthError)."""
    if isinstance(growth.operator, Composition):
        growth.operator.check_fills(growth.target)
    check_growth(growth.operator.name, growth.small, growth.target, growth.blocks)
    return growth


def _before_ramp(operator: Operator, small: Catalog) -> Catalog:
    """The catalog whose units stay unmasked while a ramp admits the new ones."""
    if isinstance(operator, Composition):
        ramped = [i for i, part in enumerate(operator.parts) if part.ramp]
        return operator.catalogs[ramped[0]] if ramped else small
    return small


def _useless(key: str, why: str, found: Operator, others: Sequence[Operator]) -> GrowthError:
    return GrowthError(
        f"grow.{key}: operator {found.name!r} {why}",
        fix=f"leave grow.{key} out, or set grow.operator to "
        + " or ".join(operator.name for operator in others),
    )


def grown_model(model: ModelConfig, *, operator: str, factor: int) -> ModelConfig:
    """The configuration after all operators, each with the same factor."""
    for part in find_operators(operator):
        model = part.target(model, factor)
    return model
