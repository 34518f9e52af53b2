"""A training run in one process, for tests of the dynamics laws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from megagrow.config import ModelConfig
from megagrow.engine.optimizers.blockwise import BlockAdamW, YoungShard
from megagrow.engine.optimizers.muon import BlockMuon, SharedTensor
from megagrow.growth.optimizer_rules import OptimizerRules, group_keys
from megagrow.growth.plan import Growth
from megagrow.models.catalog import build_catalog
from megagrow.models.transformer import named_tensors
from megagrow.state.boxes import whole
from megagrow.state.catalog import ADAM_SLOTS, LogicalTensor
from megagrow.state.matrices import matrices
from megagrow.state.optimizers import OPTIMIZERS
from megagrow.transfer.whole_state import MemoryState
from tests.toys import build, grow, token_batches

LR, DECAY, EPS = 1e-2, 0.1, 1e-3


class Run:
    """Unclipped training in fp64 in one process, whose state can be read."""

    def __init__(
        self,
        model: ModelConfig,
        state: MemoryState,
        *,
        rules: OptimizerRules,
        step: int,
        muon: bool = False,
        lr: float = LR,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        self.betas = betas
        self.model, self.rules, self.steps, self.muon, self.lr = model, rules, step, muon, lr
        self.module = build(model, state)
        self.catalog = build_catalog(model)
        parameters = named_tensors(self.module)
        keys = group_keys(self.catalog, rules, OPTIMIZERS["muon" if muon else "adamw"])
        groups = [
            {
                "params": [parameters[t.name] for t in self.catalog if keys[t.name] == key],
                "lr_factor": key[1],
                "weight_decay": 0.0 if key[0] else DECAY * key[2],
                "eps": EPS * key[3],
                "orthogonal": key[4],
            }
            for key in sorted(set(keys.values()))
        ]
        self.optimizer: BlockAdamW
        if muon:
            optimizer = BlockMuon(groups, betas=betas, momentum=0.95, iteration=torch.float64)
            self.optimizer = optimizer
            optimizer.set_matrices(
                {parameters[t.name]: [self._matrices(t)] for t in self.catalog if t.is_matrix},
                collect=lambda whole: None,
            )
        else:
            self.optimizer = BlockAdamW(groups, betas=betas)
        self.optimizer.make_state(parameters.values(), step=step)
        for name, parameter in parameters.items():
            for slot in ADAM_SLOTS[1:]:
                self.optimizer.state[parameter][slot.name].copy_(state.tensors[name, slot.name])
        self.optimizer.set_young(
            {
                parameters[name]: [YoungShard(0, whole(self.catalog[name].shape), young)]
                for name, young in rules.young.items()
            }
        )

    def _matrices(self, tensor: LogicalTensor) -> SharedTensor:
        young = self.rules.young.get(tensor.name)
        return SharedTensor(tensor.shape, matrices(tensor), ((whole(tensor.shape), 0),), young)

    def losses(self, batches: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """One step per batch; returns the losses before each step."""
        found = []
        self.optimizer.set_learning_rate(self.lr)
        for batch in batches:
            self.optimizer.zero_grad()
            loss = self.module(torch.from_numpy(batch))
            loss.backward()
            self.optimizer.step()
            found.append(loss.item())
        self.steps += len(batches)
        return np.array(found)

    def state(self) -> MemoryState:
        """A copy of the whole state."""
        tensors = {}
        for name, parameter in named_tensors(self.module).items():
            tensors[name, "master"] = parameter.detach().clone()
            for slot in ADAM_SLOTS[1:]:
                tensors[name, slot.name] = self.optimizer.state[parameter][slot.name].clone()
        return MemoryState(tensors)

    def grown(self, *, operator: str, factor: float, policy: str) -> tuple[Run, Growth]:
        """The run continued in the grown model, and the growth."""
        model, growth, state = grow(
            self.model, self.state(), operator=operator, factor=factor, policy=policy
        )
        rules = growth.rules_after(self.rules, step=self.steps, betas=self.betas)
        return (
            Run(
                model,
                state,
                rules=rules,
                step=self.steps,
                muon=self.muon,
                lr=self.lr,
                betas=self.betas,
            ),
            growth,
        )


def moved_by_one_update(
    model: ModelConfig, state: MemoryState, factors: Callable[[str], float]
) -> dict[str, float]:
    """How much each tensor's first AdamW update alone changes the logits (no decay, eps 0)."""
    [batch] = token_batches(model, samples=4, seed=8)
    module = build(model, state)
    module(torch.from_numpy(batch)).backward()
    tokens = torch.from_numpy(batch[:, :-1])
    moved = {}
    with torch.no_grad():
        before = module.logits(tokens)
        for name, parameter in named_tensors(module).items():
            kept, gradient = parameter.clone(), parameter.grad
            assert gradient is not None
            parameter.sub_(1e-3 * factors(name) * gradient.sign() * (gradient.abs() > 1e-14))
            moved[name] = (module.logits(tokens) - before).norm().item()
            parameter.copy_(kept)
    return moved
