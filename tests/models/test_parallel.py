import pytest
import torch
import torch.nn.functional as F

from megagrow.config import ModelConfig
from megagrow.errors import ConfigError
from megagrow.models.common import parallel as regions
from megagrow.models.common.parallel import SERIAL, TensorParallel, require_tensor_parallel
from tests.models.parts import this_rank
from tests.ranks import run_ranks

SHAPE = 2, 4, 8  # batch, sequence, width; the latter two are divisible by 2 and by 4

REGIONS = [
    regions.copy_to_tensor_parallel_region,
    regions.reduce_from_tensor_parallel_region,
    regions.scatter_to_tensor_parallel_region,
    regions.gather_from_tensor_parallel_region,
    regions.scatter_to_sequence_parallel_region,
    regions.gather_from_sequence_parallel_region,
    regions.reduce_scatter_to_sequence_parallel_region,
]


def value(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def part(x, rank, world, axis):
    return x.chunk(world, axis)[rank]


def expected(name, rank, xs, gradient):
    """(output, input gradient) of a rank, from every rank's input and output gradient."""
    world, total = len(xs), sum(xs)
    mine = xs[rank]
    if name.startswith("copy_to"):
        return mine, sum(gradient(r, mine) for r in range(world))
    if name.startswith("reduce_from"):
        return total, gradient(rank, total)
    if name.startswith("reduce_scatter"):
        outs = total.chunk(world, 1)
        return outs[rank], torch.cat([gradient(r, outs[r]) for r in range(world)], 1)
    axis = 2 if "tensor" in name else 1
    if name.startswith("scatter_to"):
        outs = [part(x, r, world, axis) for r, x in enumerate(xs)]
        return outs[rank], torch.cat([gradient(r, outs[r]) for r in range(world)], axis)
    out = torch.cat(xs, axis)
    if axis == 2:
        return out, part(gradient(rank, out), rank, world, axis)
    return out, part(sum(gradient(r, out) for r in range(world)), rank, world, axis)


def gradient_of(rank, like):
    """The gradient of a rank's output; different on every rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)


def strided(x):
    """The same values in another memory order."""
    return x.transpose(0, 2).contiguous().transpose(0, 2)


def _all_regions(comm):
    results = []
    for region in REGIONS:
        x = strided(value(comm.rank)).requires_grad_()
        y = region(x, this_rank(comm))
        before = y.detach().clone()
        gradient = strided(gradient_of(comm.rank, y))
        kept = gradient.clone()
        y.backward(gradient)
        assert torch.equal(x, value(comm.rank)), "a region must not overwrite its input"
        assert torch.equal(gradient, kept), "nor the gradient that others may read"
        results.append((before, x.grad))
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_regions_move_what_their_contract_says(world):
    results = run_ranks(world, _all_regions)
    xs = [value(rank) for rank in range(world)]
    for rank, result in enumerate(results):
        for region, (y, grad) in zip(REGIONS, result, strict=True):
            wanted, wanted_grad = expected(region.__name__, rank, xs, gradient_of)
            torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
            torch.testing.assert_close(grad, wanted_grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("region", REGIONS, ids=lambda region: region.__name__)
def test_one_rank_costs_nothing(region):
    x = torch.zeros(SHAPE, requires_grad=True)
    assert region(x, SERIAL) is x


def _unequal(comm):
    with pytest.raises(ValueError, match=r"axis 1 of a tensor of shape \(1, 3, 2\).*2 equal parts"):
        regions.scatter_to_sequence_parallel_region(torch.zeros(1, 3, 2), this_rank(comm))


def test_unequal_parts_are_refused():
    run_ranks(2, _unequal)


# --- random numbers ---


def masks(rank, world):
    """Dropout masks before, inside and after the region of per-rank random numbers."""
    parallel = TensorParallel(None, rank, world)
    x = torch.ones(64)
    before = F.dropout(x, 0.5)
    with regions.random_numbers_of_this_rank(parallel, x.device):
        inside = F.dropout(x, 0.5)
    return before, inside, F.dropout(x, 0.5)


def test_random_numbers_differ_between_ranks_only_inside():
    torch.manual_seed(3)
    first = masks(0, 2)
    torch.manual_seed(3)
    second = masks(1, 2)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])
    assert not torch.equal(first[1], first[2])


def test_random_numbers_follow_from_the_steps_seed():
    torch.manual_seed(3)
    first = masks(1, 2)
    torch.manual_seed(3)
    assert all(map(torch.equal, first, masks(1, 2)))
    assert not torch.equal(first[1], masks(1, 2)[1])


def test_one_rank_draws_from_the_common_stream():
    torch.manual_seed(3)
    together = masks(0, 1)
    torch.manual_seed(3)
    assert all(map(torch.equal, together, [F.dropout(torch.ones(64), 0.5) for _ in range(3)]))


# --- what can be cut ---


@pytest.mark.parametrize(
    ("changes", "sequence", "name", "count"),
    [
        ({"heads": 3, "hidden": 12}, False, "heads", 3),
        ({"heads": 4, "kv_heads": 1}, False, "kv_heads", 1),
        ({"ffn": 9}, False, "ffn", 9),
        ({"sequence": 7}, True, "sequence", 7),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(changes, sequence, name, count):
    sizes = {"layers": 1, "hidden": 8, "heads": 2, "ffn": 8, "sequence": 8}
    model = ModelConfig(**(sizes | changes))
    with pytest.raises(ConfigError) as caught:
        require_tensor_parallel(model, tensor=2, sequence=sequence, key="stages[1].layout")
    assert f"model.{name} = {count}, stages[1].layout.tensor = 2" in str(caught.value)
    require_tensor_parallel(model, tensor=1, sequence=sequence)
    if sequence:
        require_tensor_parallel(model, tensor=2, sequence=False)
