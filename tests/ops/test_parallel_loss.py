"""Vocab-parallel cross entropy with kernels on two processes."""

import pytest
import torch
import torch.nn.functional as F

from megagrow.models.common.loss import vocab_parallel_cross_entropy
from megagrow.models.common.parallel import TensorParallel
from megagrow.ops import library
from megagrow.state.layout import even_split
from tests.ranks import run_ranks

VOCABULARY, SHAPE = 37, (2, 5)


def sample():
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(*SHAPE, VOCABULARY, generator=generator, dtype=torch.float64)
    logits[0, 0, 30], logits[1, 1, 2] = 200.0, 300.0  # the largest is on another rank
    labels = torch.randint(VOCABULARY, SHAPE, generator=generator)
    labels[0, 0], labels[0, 1], labels[0, 2] = 30, 0, VOCABULARY - 1
    return logits, labels


def shard_loss(comm, dtype):
    start, stop = even_split(VOCABULARY, comm.world, comm.rank)
    logits, labels = sample()
    mine = logits[..., start:stop].contiguous().to(dtype)
    leaf = mine.clone().requires_grad_()
    local = leaf * 1  # the loss may overwrite its input, which a leaf must not be
    address = local.data_ptr()
    parallel = TensorParallel(torch.distributed.group.WORLD, comm.rank, comm.world)
    with library.using("emulated"):
        losses = vocab_parallel_cross_entropy(local, labels, start=start, parallel=parallel)
        seen = []
        local.register_hook(lambda grad: seen.append(grad.data_ptr() == address))
        losses.mean().backward()
    return losses.detach(), leaf.grad, seen == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_ranks_have_the_loss_and_gradient_of_one(compiled, dtype):
    logits, labels = sample()
    whole = logits.to(dtype).double().requires_grad_()
    wanted = F.cross_entropy(whole.flatten(0, 1), labels.flatten(), reduction="none").view(SHAPE)
    wanted.mean().backward()
    results = run_ranks(2, shard_loss, dtype)
    exact = dtype == torch.float32
    tolerance = {"rtol": 1e-6 if exact else 1e-2, "atol": 1e-6 if exact else 1e-4}
    for losses, _, in_place in results:
        torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-6, atol=1e-6)
        assert in_place, "the gradient took memory of its own"
    assert torch.equal(results[0][0], results[1][0])
    gradient = torch.cat([grad for _, grad, _ in results], -1).double()
    torch.testing.assert_close(gradient, whole.grad, **tolerance)


def test_a_second_backward_pass_over_overwritten_logits_is_an_error(kernels):
    logits = torch.randn(3, 8, device=next(iter(kernels.served))).requires_grad_()
    losses = vocab_parallel_cross_entropy(logits * 1, torch.tensor([0, 1, 2], device=logits.device))
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()
