"""The flat AdamW against torch.optim.AdamW, element by element in fp64, with young boxes."""

import itertools

import pytest
import torch

from megagrow import ops
from megagrow.ops import references
from tests.ops.device import DEVICE, DTYPES

BETAS, EPS, DECAY, LR, STEP = (0.9, 0.95), 1e-6, 0.1, 1e-2, 4

# Boxes of a partition of 1003 elements: (start, shape, old block), and their (lr, step).
BOXES = [
    (3, (4, 5), (slice(0, 1), slice(2, 4))),  # of an earlier growth, inside the next one's old
    (3, (4, 5), (slice(0, 2), slice(1, 4))),  # begins and ends inside vectors
    (23, (17,), (slice(2, 17, 5),)),  # adjacent to the last one
    (64, (2, 3, 4, 5), None),  # three growths: nothing is left of before the first
    (64, (2, 3, 4, 5), (slice(1, 2), slice(0, 1), slice(1, 2), slice(0, 5, 2))),
    (64, (2, 3, 4, 5), (slice(0, 2), slice(0, 1), slice(1, 4, 2), slice(0, 5))),
    (400, (6, 7), None),  # all of it young
    (442, (1,), (slice(0, 1),)),  # nothing of it young
    (960, (43,), (slice(0, 20, 3),)),
    (960, (43,), (slice(0, 20),)),  # up to the end
]
RATES = [
    (0.04, 3), (0.02, 1), (0.03, 2), (0.015, 4), (0.025, 3), (0.005, 1), (0.01, 3), (0.5, 1),
    (0.03, 4), (0.02, 2),
]  # fmt: skip


def young_mask(start, shape, old, n):
    inside = torch.ones(shape, dtype=torch.bool)
    if old is not None:
        inside[old] = False
    mask = torch.zeros(n, dtype=torch.bool)
    mask[start : start + inside.numel()] = inside.flatten()
    return mask


def expected(p, g, m, v, boxes):
    """fp64: each kind of element is updated by a separate optimizer."""
    n = p.numel()
    kinds = [(young_mask(*box, n), *rate) for box, rate in zip(boxes, RATES, strict=False)]
    # An element belongs to the last box in which it is young.
    for number, (mask, *_) in enumerate(kinds):
        for later, *_ in kinds[number + 1 :]:
            mask &= ~later
    old = ~torch.stack([k[0] for k in kinds]).any(0) if kinds else torch.ones(n, dtype=torch.bool)
    result = [x.double().cpu().clone() for x in (p, m, v)]
    for mask, lr, step in [(old, LR, STEP), *kinds]:
        parameter = torch.nn.Parameter(result[0][mask])
        optimizer = torch.optim.AdamW(
            [parameter], lr=lr, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=False
        )
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step - 1)),
            "exp_avg": result[1][mask],
            "exp_avg_sq": result[2][mask],
        }
        parameter.grad = g.double().cpu()[mask]
        optimizer.step()
        state = optimizer.state[parameter]
        new = (parameter.detach(), state["exp_avg"], state["exp_avg_sq"])
        for whole, part in zip(result, new, strict=True):
            whole[mask] = part
    return result


def close(got, wanted):
    """Within a few units in the last place of the summands, which are about 1, in fp32."""
    torch.testing.assert_close(got.cpu().double(), wanted, rtol=4e-7, atol=5e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1003, 4, 1, 0])
@pytest.mark.parametrize("offset", [0, 1])
def test_flat_adamw(kernels, n, dtype, offset):
    generator = torch.Generator().manual_seed(n)
    draw = torch.randn(4, n + offset, generator=generator).to(DEVICE)
    # Without an offset each begins at an aligned address, otherwise inside a vector.
    p, g, m, v = [row[offset:] if offset else row.clone() for row in draw]
    v.abs_()
    g = g.to(dtype)
    low = torch.full((n,), torch.nan, dtype=torch.float16 if offset else torch.bfloat16).to(DEVICE)
    scale = torch.tensor([0.37], device=DEVICE)
    boxes = BOXES if n == 1003 else []
    wanted = expected(p, g.float() * scale, m, v, boxes)
    table = {}
    if boxes:
        table["young"] = ops.young_table([ops.YoungBox(*box) for box in boxes], DEVICE)
        table["rates"] = ops.young_rates(RATES, betas=BETAS, device=DEVICE)
    settings = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "step": STEP}
    ops.adamw_(p, g, m, v, **settings, low=low, scale=scale, **table)
    for got, want in zip((p, m, v), wanted, strict=True):
        close(got, want)
    assert torch.equal(low, p.to(low.dtype)), "the copy is the rounded master, bit for bit"


def test_reference_is_the_kernel(kernels):
    draw = torch.randn(4, 1003, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    draw[3].abs_()
    table = {
        "young": ops.young_table([ops.YoungBox(*box) for box in BOXES], DEVICE),
        "rates": ops.young_rates(RATES, betas=BETAS, device=DEVICE),
    }
    settings = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "step": STEP}
    results = []
    for reference in (False, True):
        tensors = [row.clone() for row in draw]
        if reference:
            references.adamw_(*tensors, None, None, *table.values(), LR, *BETAS, EPS, DECAY, STEP)
        else:
            ops.adamw_(*tensors, **settings, **table)
        results.append(tensors)
    for got, want in zip(*results, strict=True):
        close(got, want.cpu().double())


def test_tables():
    assert ops.young_table([]).shape == (0, 18)
    with pytest.raises(ValueError, match="4 axes"):
        ops.young_table([ops.YoungBox(0, (1, 2, 1, 2, 1), None)])
    row = ops.young_table([ops.YoungBox(7, (4, 6), (slice(1, 3), slice(0, 6, 4)))])[0].tolist()
    assert row == [7, 24, 1, 1, 4, 6, 0, 0, 1, 0, 1, 1, 1, 4, 1, 1, 2, 2]


def test_a_mask_is_the_old_block_left_out():
    for (start, shape, old), n in itertools.product(BOXES, (1003,)):
        row = ops.young_table([ops.YoungBox(start, shape, old)])[0].tolist()
        mask = torch.zeros(n, dtype=torch.bool)
        mask[start : start + row[1]] = references._young_mask(row)
        assert torch.equal(mask, young_mask(start, shape, old, n))
