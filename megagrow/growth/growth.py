"""A growth: an operator and a state policy between two models, as a state map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megagrow.config import ModelConfig
from megagrow.errors import GrowthError
from megagrow.growth.operator import Block, Operator
from megagrow.growth.policy import StatePolicy
from megagrow.growth.registry import find_operator, find_policy
from megagrow.growth.rules import Factors, OptimizerRules, YoungBlocks
from megagrow.state.catalog import Catalog, LogicalTensor, Slot
from megagrow.state.statemap import Copy, Fill


@dataclass(frozen=True)
class Growth:
    """One growth between two catalogs; a `StateMap`.

    Attributes:
        operator: how parameters grow.
        policy: how optimizer state and rates follow.
        small: the catalog before.
        target: the catalog after.
        rewarm: steps of re-warming (see StatePolicy).
    """

    operator: Operator
    policy: StatePolicy
    small: Catalog
    target: Catalog
    rewarm: int

    def blocks(self, tensor: LogicalTensor) -> tuple[Block, ...]:
        """The operator's blocks of one target tensor."""
        return self._blocks[tensor.name]

    @cached_property
    def _blocks(self) -> dict[str, tuple[Block, ...]]:
        return {t.name: self.operator.blocks(t, self.small) for t in self.target}

    def copies(self, tensor: LogicalTensor, slot: Slot) -> Sequence[Copy]:
        """The blocks of one slot, without those whose coefficient is 0."""
        scaled = ((b, self.policy.coefficient(b, slot.kind)) for b in self.blocks(tensor))
        return tuple(block.scaled(c) for block, c in scaled if c != 0.0)

    def fill(self, tensor: LogicalTensor, slot: Slot) -> Fill:
        """The operator's rule for parameters, zero for optimizer state."""
        if sum(copy.volume for copy in self.copies(tensor, slot)) == tensor.volume:
            return "covered"
        return self.operator.fill(tensor) if slot.kind == "parameter" else "zeros"

    def rules_after(self, before: OptimizerRules, *, step: int) -> OptimizerRules:
        """The optimizer's rules once the growth is done.

        Args:
            before: the rules in force until now.
            step: the optimizer's step count at the growth.

        Young blocks of an earlier growth stay young where this one copies their tensor
        whole and steps count on; elsewhere they count as grown up.
        """
        factors: dict[str, Factors] = {}
        young: dict[str, YoungBlocks] = {}
        for tensor in self.target:
            blocks = self.blocks(tensor)
            inherited = before.factors_of(blocks[0].source) if blocks else Factors()
            if self.policy.scale_rates:
                inherited = inherited.times(_exact_factors(tensor, blocks))
            if inherited != Factors():
                factors[tensor.name] = inherited
            peak = self.policy.new_block_peak
            if peak is not None and any(block.new for block in blocks):
                kept = next((b for b in blocks if not b.new), None)
                young[tensor.name] = YoungBlocks(
                    kept=None if kept is None else _progressions(kept),
                    born=step,
                    peak=peak,
                    rewarm=self.rewarm,
                )
            elif (
                not self.policy.restart_steps  # it would give them a negative age
                and _is_whole(tensor, blocks)
                and blocks[0].source in before.young
            ):
                young[tensor.name] = before.young[blocks[0].source]
        return OptimizerRules(factors, young)


def make_growth(
    *,
    operator: str,
    policy: str | None,
    small: Catalog,
    target: Catalog,
    rewarm: int | None = None,
) -> Growth:
    """Look the operator and the policy up, and check that they fit each other and the models.

    Raises:
        GrowthError: unknown names, or a policy that the operator does not support.
    """
    found = find_operator(operator)
    name = policy or found.policies[0]
    if name not in found.policies:
        find_policy(name)
        raise GrowthError(
            f"grow.state_policy: operator {operator!r} does not support {name!r}",
            found=name,
            expected=" or ".join(found.policies),
            mend=f"set grow.state_policy to {found.policies[0]}, or leave it out",
        )
    rule = find_policy(name)
    growth = Growth(found, rule, small, target, rule.rewarm if rewarm is None else rewarm)
    for tensor in target:
        _check_blocks(growth, tensor)
    return growth


def grown_model(model: ModelConfig, *, operator: str, factor: int) -> ModelConfig:
    """The configuration that an operator makes of a model's."""
    return find_operator(operator).target(model, factor)


def _check_blocks(growth: Growth, tensor: LogicalTensor) -> None:
    """An operator whose blocks do not fit its own target is a defect, found before any copy."""
    for block in growth.blocks(tensor):
        source = growth.small[block.source]
        for axis, n, m in zip(block.axes, tensor.shape, source.shape, strict=True):
            last_target = axis.target_start + (axis.length - 1) * axis.target_step
            last_source = axis.source_start + (axis.length - 1) * axis.source_step
            if not (last_target < n and last_source < m):
                raise GrowthError(f"operator {growth.operator.name}: a block of {tensor.name} "
                                  f"reaches outside {list(tensor.shape)}")  # fmt: skip


def _exact_factors(tensor: LogicalTensor, blocks: Sequence[Block]) -> Factors:
    """AdamW moves a parameter by lr * m / (sqrt(v) + eps) + lr * wd * p.

    With m -> g m and v -> g^2 v the quotient stays if eps -> g eps; the parameter's own
    coefficient p then asks for lr -> p lr, and wd -> wd / p leaves the decay as it was.
    """
    pairs = {(block.param, block.grad) for block in blocks}
    if len(pairs) != 1:
        raise GrowthError(
            f"state policy 'exact': the blocks of {tensor.name} differ in their coefficients, "
            "so no one learning rate retraces the small run",
            mend="set grow.state_policy to sparkling or reset",
        )
    param, grad = pairs.pop()
    if grad is None:
        raise GrowthError(f"state policy 'exact': no gradient is stated for {tensor.name}")
    return Factors(lr=abs(param), weight_decay=1.0 / abs(param), eps=abs(grad))


def _progressions(block: Block) -> tuple[tuple[int, int, int], ...]:
    return tuple((axis.target_start, axis.target_step, axis.length) for axis in block.axes)


def _is_whole(tensor: LogicalTensor, blocks: Sequence[Block]) -> bool:
    whole = tuple((0, 1, n) for n in tensor.shape)
    return len(blocks) == 1 and _progressions(blocks[0]) == whole
