import torch

from megagrow.models.common.rotary import rotary_table, rotate

THETA = 100.0


def by_complex_numbers(x):
    """Pair i of a head, features i and i + D/2, is a number that position p multiplies by
    exp(i p theta^(-2i/D)).
    """
    _, sequence, *_, width = x.shape
    out = torch.empty_like(x)
    for pair in range(width // 2):
        for position in range(sequence):
            angle = torch.tensor(position * THETA ** (-2 * pair / width), dtype=torch.float64)
            number = torch.complex(
                x[:, position, ..., pair], x[:, position, ..., pair + width // 2]
            )
            turned = number * torch.exp(1j * angle)
            out[:, position, ..., pair] = turned.real
            out[:, position, ..., pair + width // 2] = turned.imag
    return out


def heads(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_rotation_is_multiplication_by_unit_numbers():
    x = heads(2, 5, 3, 2, 6)
    torch.testing.assert_close(rotate(x, THETA), by_complex_numbers(x), rtol=0, atol=1e-12)


def test_gradient_by_finite_differences():
    x = heads(1, 3, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotate(x, THETA), (x,))


def test_products_depend_on_the_distance_alone():
    q, k = heads(1, 1, 1, 8), heads(1, 2, 1, 8)[:, 1:]
    turned_q, turned_k = (rotate(x.expand(-1, 9, -1, -1), THETA)[0, :, 0] for x in (q, k))
    products = turned_q @ turned_k.T
    torch.testing.assert_close(products[3, 1], products[8, 6], rtol=0, atol=1e-12)
    assert not torch.isclose(products[3, 1], products[3, 2])


def test_angles_of_low_precision_are_exact_before_rounding():
    exact = rotary_table(4096, 8, 1e4, torch.float64, torch.device("cpu"))
    rounded = rotary_table(4096, 8, 1e4, torch.bfloat16, torch.device("cpu"))
    for a, b in zip(exact, rounded, strict=True):
        assert torch.equal(a.bfloat16(), b)


def test_a_table_made_in_inference_mode_serves_training():
    x = heads(1, 7, 1, 10)  # a new shape, for which no table is cached yet
    with torch.inference_mode():
        rotate(x, THETA)
    rotate(x.requires_grad_(), THETA).sum().backward()
    assert x.grad.abs().sum() > 0
