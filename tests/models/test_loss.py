import pytest
import torch
import torch.nn.functional as F

from megagrow.models.common.loss import vocab_parallel_cross_entropy
from megagrow.ops import references
from megagrow.state.layout import even_split
from tests.models.parts import this_rank
from tests.ranks import run_ranks

VOCABULARY = 5  # over 2 ranks 3 + 2, over 4 ranks 2 + 2 + 1 + 0
CASES = {
    "ordinary": (lambda x: x, torch.float64, 1e-12),
    "extreme": (lambda x: 1e4 * x, torch.float64, 1e-9),
    "extreme fp32": (lambda x: 1e4 * x, torch.float32, 1e-3),
    "equal": (torch.zeros_like, torch.float64, 1e-12),
    "huge and equal": (lambda x: x + 1e6, torch.float32, 1e-5),
}


def sample(case, rows=(2, 3), vocabulary=VOCABULARY):
    change, dtype, tolerance = CASES[case]
    generator = torch.Generator().manual_seed(5)
    logits = change(torch.randn(*rows, vocabulary, generator=generator, dtype=torch.float64))
    labels = torch.randint(vocabulary, rows, generator=generator)
    return logits.to(dtype), labels, tolerance


def weights(like):
    """A different gradient for every row."""
    return torch.arange(1.0, like.numel() + 1, dtype=like.dtype).view(like.shape)


def reference(logits, labels):
    """Losses and logit gradients by PyTorch's own function, in fp64."""
    logits = logits.double().requires_grad_()
    flat = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    losses = flat.view(labels.shape)
    (losses * weights(losses)).sum().backward()
    return losses.detach(), logits.grad


def ours(logits, labels, **parallel):
    logits = logits.detach().clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(logits, labels, **parallel)
    (losses * weights(losses)).sum().backward()
    return losses.detach(), logits.grad


@pytest.mark.parametrize("case", CASES)
def test_one_rank_matches_pytorch(case):
    logits, labels, tolerance = sample(case)
    for mine, wanted in zip(ours(logits, labels), reference(logits, labels), strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("elements", [1, VOCABULARY, 2 * VOCABULARY + 1])
def test_chunks_do_not_matter(monkeypatch, elements):
    logits, labels, tolerance = sample("ordinary")
    monkeypatch.setitem(references._CHUNK, "cpu", elements)
    for mine, wanted in zip(ours(logits, labels), reference(logits, labels), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_get_an_fp32_loss(dtype):
    logits, labels, _ = sample("ordinary", rows=(16,), vocabulary=300)
    logits = (10 * logits).to(dtype)
    losses, gradient = ours(logits, labels)
    wanted, wanted_gradient = reference(logits, labels)
    assert losses.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-5)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=eps, atol=eps)


def test_backward_twice_gives_the_same():
    logits, labels, _ = sample("ordinary")
    logits.requires_grad_()
    total = vocab_parallel_cross_entropy(logits, labels).sum()
    first = torch.autograd.grad(total, logits, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(total, logits)[0])


def _parts(comm):
    results = {}
    for case in CASES:
        logits, labels, _ = sample(case)
        start, stop = even_split(VOCABULARY, comm.world, comm.rank)
        mine = logits[..., start:stop]
        results[case] = ours(mine, labels, start=start, parallel=this_rank(comm))
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_vocabulary(world):
    results = run_ranks(world, _parts)
    for case in CASES:
        logits, labels, tolerance = sample(case)
        losses, gradient = reference(logits, labels)
        for rank in range(world):
            mine, mine_gradient = results[rank][case]
            assert torch.equal(mine, results[0][case][0])
            torch.testing.assert_close(mine.double(), losses, rtol=tolerance, atol=tolerance)
            start, stop = even_split(VOCABULARY, world, rank)
            wanted = gradient[..., start:stop]
            torch.testing.assert_close(
                mine_gradient.double(), wanted, rtol=tolerance, atol=tolerance
            )
