"""How far a grown run departs from the small run that it started from, for each policy.

One process, fp64, AdamW without clipping.  A small model trains for some steps and then continues;
every grown model trains on the same batches from that point.  Under the `exact` policy the losses
are the same up to rounding; under all others the difference shows how far they depart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megagrow.config import GrowConfig, ModelConfig
from megagrow.config.load import parse_settings
from megagrow.engine.optimizers.blockwise import BlockAdamW, YoungShard
from megagrow.growth.optimizer_rules import OptimizerRules, group_keys
from megagrow.growth.plan import plan_growth
from megagrow.growth.registry import OPERATORS
from megagrow.models.catalog import build_catalog
from megagrow.models.transformer import Transformer, named_tensors
from megagrow.report.axis import axis
from megagrow.report.chart import COLOURS, Series
from megagrow.report.figure import figure as draw
from megagrow.state.boxes import whole
from megagrow.state.catalog import ADAM_SLOTS, MASTER
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from megagrow.transfer.ends import NoChannel
from megagrow.transfer.execute import transfer_between_ranks
from megagrow.transfer.state_map import FreshStart, StateMap
from megagrow.transfer.whole_state import MemoryState

Result = dict[str, Any]
SEED, SAMPLES = 0, 8
LR, DECAY, EPS, BETAS = 1e-3, 0.1, 1e-8, (0.9, 0.95)
_ROUNDING = 1e-17  # plotted in place of 0 on a logarithmic axis


def model(family: str) -> ModelConfig:
    """A small model with every kind of tensor."""
    sizes = {"layers": 2, "hidden": 32, "heads": 4, "ffn": 64, "sequence": 32, "vocab": 61}
    return ModelConfig.model_validate({"family": family, **sizes})


def measure(*, family: str, factor: int, before: int, steps: int) -> list[Result]:
    """Measure every loss-preserving operator that can be exact, under all its policies.

    Args:
        family: of the model.
        factor: of the growth.
        before: steps of the small model before the growth.
        steps: steps after the growth.
    """
    small = _Run(model(family), None, OptimizerRules(), step=0)
    batches = _batches(small.model, before + steps)
    small.losses(batches[:before])
    start = small.state()
    expected = small.losses(batches[before:])
    found = []
    for operator in OPERATORS.values():
        for policy in operator.policies if "exact" in operator.policies else ():
            section = parse_settings(
                GrowConfig,
                {"operator": operator.name, "factor": factor, "state_policy": policy, "rewarm": 0},
                source="growth",
            )
            large, growth = plan_growth(section, small.model)
            state = _mapped(growth, growth.small, start)
            kept = 0 if growth.policy.restart_steps else before
            rules = growth.rules_after(OptimizerRules(), step=kept)
            losses = _Run(large, state, rules, step=kept).losses(batches[before:])
            found.append(
                {
                    "operator": operator.name,
                    "policy": policy,
                    "family": family,
                    "departure": np.abs(losses - expected).tolist(),
                    "small": expected.tolist(),
                    "grown": losses.tolist(),
                }
            )
    return found


def table(found: Sequence[Result]) -> str:
    """The greatest departure over all steps, in Markdown."""
    steps = len(found[0]["small"])
    lines = [
        f"| operator | state policy | family | at the growth | greatest in {steps} steps "
        "| loss at the end, small -> grown |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        lines.append(
            f"| {one['operator']} | {one['policy']} | {one['family']} "
            f"| {one['departure'][0]:.1e} | {max(one['departure']):.1e} "
            f"| {one['small'][-1]:.4f} -> {one['grown'][-1]:.4f} |"
        )
    return "\n".join(lines)


def figures(found: Sequence[Result]) -> dict[str, str]:
    """SVG files by name."""
    return {"": figure(found, operator="width_diag", family="gpt2")}


def figure(found: Sequence[Result], *, operator: str, family: str) -> str:
    """Plot one operator's policies over the steps; returns the SVG text."""
    chosen = [one for one in found if (one["operator"], one["family"]) == (operator, family)]
    series = [
        Series(
            one["policy"],
            [(step, max(gap, _ROUNDING)) for step, gap in enumerate(one["departure"])],
            colour,
        )
        for one, colour in zip(chosen, COLOURS, strict=False)
    ]
    values = [y for one in series for _, y in one.points]
    return draw(
        title=f"{operator}, {family}: distance of the grown run's loss from the small run's",
        note="absolute difference in nats per token, fp64, logarithmic",
        x=axis([x for one in series for x, _ in one.points]),
        y=axis(values, log=True, snap=True),
        x_label="steps after the growth",
        series=series,
    )


class _Run:
    """Training in fp64, entirely in memory."""

    def __init__(
        self, model: ModelConfig, state: MemoryState | None, rules: OptimizerRules, *, step: int
    ) -> None:
        self.model, catalog = model, build_catalog(model)
        if state is None:
            state = _mapped(FreshStart(catalog), catalog, None)
        self._module = Transformer(model).double()
        self._parameters = named_tensors(self._module)
        keys = group_keys(catalog, rules)
        self._optimizer = BlockAdamW(
            [
                {
                    "params": [self._parameters[t.name] for t in catalog if keys[t.name] == key],
                    "lr_factor": key[1],
                    "weight_decay": 0.0 if key[0] else DECAY * key[2],
                    "eps": EPS * key[3],
                }
                for key in sorted(set(keys.values()))
            ],
            betas=BETAS,
        )
        self._optimizer.make_state(self._parameters.values(), step=step)
        with torch.no_grad():
            for (name, slot), values in state.tensors.items():
                self._slot(name, slot).copy_(values)
        self._optimizer.set_young(
            {
                self._parameters[name]: [YoungShard(0, whole(catalog[name].shape), young)]
                for name, young in rules.young.items()
            }
        )

    def _slot(self, name: str, slot: str) -> torch.Tensor:
        parameter = self._parameters[name]
        if slot == MASTER.name:
            return parameter
        values: torch.Tensor = self._optimizer.state[parameter][slot]
        return values

    def state(self) -> MemoryState:
        """A copy of everything."""
        return MemoryState(
            {
                (name, slot.name): self._slot(name, slot.name).detach().clone()
                for name in self._parameters
                for slot in ADAM_SLOTS
            }
        )

    def losses(self, batches: np.ndarray) -> np.ndarray:
        """Take one step per batch; returns the losses before each step."""
        found = []
        self._optimizer.set_learning_rate(LR)
        for batch in batches:
            self._optimizer.zero_grad()
            loss = self._module(torch.from_numpy(batch))
            loss.backward()
            self._optimizer.step()
            found.append(loss.item())
        return np.array(found)


def _mapped(state_map: StateMap, small: Any, state: MemoryState | None) -> MemoryState:
    """Apply a state map in memory."""
    new = MemoryState.empty(state_map.target, ADAM_SLOTS, dtype=torch.float64)
    transfer_between_ranks(
        state_map=state_map,
        old=state or new,
        old_placement=Placement(small, Layout()),
        new=new,
        new_placement=Placement(state_map.target, Layout()),
        slots=ADAM_SLOTS,
        channel=NoChannel(),
        seed=SEED,
        staging_bytes=1 << 20,
        dtype=torch.float64,
    )
    return new


def _batches(model: ModelConfig, count: int) -> np.ndarray:
    """[count, samples, sequence + 1]: each sample counts up with its own increment."""
    draw = np.random.default_rng(SEED)
    shape = (count, SAMPLES, 1)
    first, stride = draw.integers(0, model.vocabulary, shape), draw.integers(1, 5, shape)
    return np.asarray((first + stride * np.arange(model.sequence + 1)) % model.vocabulary)


def summary(found: Sequence[Result]) -> Mapping[str, float]:
    """The greatest departure of each policy, over all operators and families."""
    return {
        policy: max(max(one["departure"]) for one in found if one["policy"] == policy)
        for policy in dict.fromkeys(one["policy"] for one in found)
    }
