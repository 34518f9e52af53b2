"""The loss curve with kernels is the same as with PyTorch's own ops."""

import pytest
import torch

from megagrow.engine.optimizers.blockwise import BlockAdamW, YoungShard
from megagrow.growth.optimizer_rules import YoungBlocks
from megagrow.models.catalog import build_catalog
from megagrow.models.common.documents import Separator
from megagrow.models.transformer import named_tensors
from megagrow.ops import library
from megagrow.state.boxes import whole
from tests.ops.device import DEVICE
from tests.toys import FAMILIES, build, random_state, token_batches, toy_model

STEPS = 50
OWN = "cuda" if DEVICE == "cuda" else "emulated"
YOUNG = "layers.1.mlp.down.weight"


def losses(model, dtype, mode):
    """A run of some steps with weight decay, and a tensor with new blocks that re-warm."""
    module = build(model, random_state(build_catalog(model), seed=1, dtype=torch.float32))
    module.to(DEVICE, dtype)
    parameters = named_tensors(module)
    masters = {name: p.detach().float().requires_grad_() for name, p in parameters.items()}
    optimizer = BlockAdamW(
        [{"params": list(masters.values()), "lr_factor": 1.0, "weight_decay": 0.1, "eps": 1e-8}],
        betas=(0.9, 0.95),
    )
    optimizer.make_state(masters.values(), step=3)
    shape = parameters[YOUNG].shape
    kept = tuple((0, 1, n // 2) for n in shape)
    young = YoungShard(0, whole(tuple(shape)), YoungBlocks(kept, born=2, peak=1.3, rewarm=20))
    optimizer.set_young({masters[YOUNG]: [young]})
    curve = []
    with library.using(mode):
        for samples in token_batches(model, samples=4, seed=2, steps=STEPS):
            loss = module(torch.from_numpy(samples).to(DEVICE))
            loss.backward()
            curve.append(float(loss.detach()))
            optimizer.set_learning_rate(3e-3)
            for name, p in parameters.items():
                masters[name].grad, p.grad = p.grad.float(), None
            optimizer.step()
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(masters[name])
    return torch.tensor(curve, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_fifty_steps(compiled, family, dtype, tolerance):
    model = toy_model(family=family)
    ours = losses(model, dtype, OWN)
    plain = losses(model, dtype, "reference")
    assert plain[-1] < plain[0] - 0.05, "nothing was learnt"
    assert not torch.equal(ours, plain), "no kernel was used"
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=0)


def test_recomputed_attention_turns_its_heads_once(kernels):
    """Rotary positions are applied in place, so recomputation must not apply them again."""
    results = []
    for recompute in ("none", "selective", "full"):
        model = toy_model(family="llama", activation_checkpointing=recompute)
        module = build(model, random_state(build_catalog(model), seed=1, dtype=torch.float32))
        module.to(DEVICE)
        samples = torch.from_numpy(token_batches(model, samples=3, seed=2)[0]).to(DEVICE)
        module(samples).backward()
        results.append([p.grad for p in module.parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_positions_that_restart_in_each_document(compiled):
    """The kernel that turns heads in place, with positions of its own in every sample."""
    results = []
    for mode in ("reference", OWN):
        model = toy_model(family="llama")
        module = build(model, random_state(build_catalog(model), seed=1, dtype=torch.float32))
        module.to(DEVICE)
        module.separator = Separator(5, frozenset([None]), "each")
        samples = torch.from_numpy(token_batches(model, samples=8, seed=2)[0]).to(DEVICE)
        assert len(module.separator(samples[:, :-1]).lengths) > 8, "no document begins inside"
        with library.using(mode):
            loss = module(samples)
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in module.parameters())])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
