"""Growths in quick succession: every element of the optimizer's state has its own step count."""

import numpy as np
import pytest
import torch

from megagrow.growth.optimizer_rules import OptimizerRules
from megagrow.models.catalog import build_catalog
from megagrow.models.transformer import named_tensors
from tests.growth.trained import DECAY, EPS, LR, Run
from tests.toys import FAMILIES, random_state, token_batches, toy_model

BETAS, STEPS = (0.9, 0.999), 4


def _births(growth, births, step, *, policy):
    """The step at which each element's moments began, from the growth's blocks; by tensor."""
    found = {}
    for tensor in growth.target:
        born = torch.full(tensor.shape, float(step), dtype=torch.float64)
        for block in growth.blocks(tensor):
            if policy == "copy" or not block.new:
                at = [torch.arange(a.length) for a in block.axes]
                there = [a.target_start + i * a.target_step
                         for a, i in zip(block.axes, at, strict=True)]  # fmt: skip
                here = [a.source_start + i * a.source_step
                        for a, i in zip(block.axes, at, strict=True)]  # fmt: skip
                old = births[block.source][torch.meshgrid(*here, indexing="ij")]
                born[torch.meshgrid(*there, indexing="ij")] = old
        found[tensor.name] = born
    return found


def _check(run, births, batch):
    """One update of the run, compared with element-wise AdamW with each element's step count."""
    before, step = run.state().tensors, run.steps
    run.losses(batch)
    gradients = {name: p.grad for name, p in named_tensors(run.module).items()}
    for tensor in run.catalog:
        p, m, v = (before[tensor.name, s] for s in ("master", "exp_avg", "exp_avg_sq"))
        g, age = gradients[tensor.name], step + 1 - births[tensor.name]
        m, v = m + (1 - BETAS[0]) * (g - m), BETAS[1] * v + (1 - BETAS[1]) * g * g
        update = m / (1 - BETAS[0] ** age) / ((v / (1 - BETAS[1] ** age)).sqrt() + EPS)
        p = p * (1 - LR * DECAY * tensor.decay) - LR * update
        found = run.state().tensors[tensor.name, "master"]
        assert (found - p).abs().max() <= 1e-10, tensor.name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("operators", "policy"),
    [
        (("width", "width"), "kept"),
        (("width_diag", "width", "width"), "kept"),
        (("head_dim", "width"), "kept"),
        (("width", "head_dim"), "kept"),
        (("width", "kv_groups", "width"), "kept"),
        (("vocab", "width"), "kept"),
        (("width", "depth_identity"), "kept"),
        (("depth_identity", "width"), "kept"),
        (("width_split", "width_noise"), "kept"),
        (("vocab", "vocab"), "copy"),  # elements without a source count as new
        (("vocab", "depth_stack", "vocab"), "copy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_growths_close_together_keep_the_step_count_of_every_element(family, operators, policy):
    model = toy_model(family=family, tie_embeddings=False, vocab=8)
    state = random_state(build_catalog(model), seed=4)
    for (_, slot), values in state.tensors.items():
        if slot != "master":
            values.zero_()
    run = Run(model, state, rules=OptimizerRules(), step=0, betas=BETAS)
    births = {t.name: torch.zeros(t.shape, dtype=torch.float64) for t in run.catalog}
    for number, operator in enumerate(operators):
        run.losses(token_batches(run.model, samples=2, seed=number, steps=STEPS))
        if operator == "kv_groups" and family == "gpt2":
            continue
        run, growth = run.grown(operator=operator, factor=2, policy=policy)
        births = _births(growth, births, run.steps, policy=policy)
    ages = {int(run.steps - b) for born in births.values() for b in np.unique(born)}
    assert len(ages) >= 2
    for batch in token_batches(run.model, samples=2, seed=9, steps=2):
        _check(run, births, batch[None])
