import torch

from megagrow.models.common.rotary import Rotary, rotary_table, rotate

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


def turned(x):
    return rotate(x, Rotary(THETA, x.shape[-1]))


def heads(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_rotation_is_multiplication_by_unit_numbers():
    x = heads(2, 5, 3, 2, 6)
    torch.testing.assert_close(turned(x), by_complex_numbers(x), rtol=0, atol=1e-12)


def test_gradient_by_finite_differences():
    x = heads(1, 3, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(turned, (x,))


def test_products_depend_on_the_distance_alone():
    q, k = heads(1, 1, 1, 8), heads(1, 2, 1, 8)[:, 1:]
    turned_q, turned_k = (turned(x.expand(-1, 9, -1, -1))[0, :, 0] for x in (q, k))
    products = turned_q @ turned_k.T
    torch.testing.assert_close(products[3, 1], products[8, 6], rtol=0, atol=1e-12)
    assert not torch.isclose(products[3, 1], products[3, 2])


def test_angles_of_low_precision_are_exact_before_rounding():
    exact = rotary_table(4096, Rotary(1e4, 8), torch.float64, torch.device("cpu"))
    rounded = rotary_table(4096, Rotary(1e4, 8), torch.bfloat16, torch.device("cpu"))
    for a, b in zip(exact, rounded, strict=True):
        assert torch.equal(a.bfloat16(), b)


def test_a_table_made_in_inference_mode_serves_training():
    x = heads(1, 7, 1, 10)  # a new shape, for which no table is cached yet
    with torch.inference_mode():
        turned(x)
    turned(x.requires_grad_()).sum().backward()
    assert x.grad.abs().sum() > 0


def test_only_the_first_features_are_turned():
    x = heads(1, 5, 2, 10)
    found = rotate(x, Rotary(THETA, 4))
    assert torch.equal(found[..., 4:], x[..., 4:])
    assert torch.equal(found[..., :4], turned(x[..., :4].contiguous()))


def test_frequencies_are_scaled_by_their_wavelengths():
    plain = Rotary(5e5, 128).frequencies(torch.device("cpu"))
    linear = Rotary(5e5, 128, ("linear", 4.0, 0.0, 0.0, 0)).frequencies(torch.device("cpu"))
    assert torch.equal(linear, plain / 4)
    # Llama 3.1: wavelengths below 8192 / 4 stay, those above 8192 are 8 times as long.
    scaled = Rotary(5e5, 128, ("llama3", 8.0, 1.0, 4.0, 8192)).frequencies(torch.device("cpu"))
    waves = 2 * torch.pi / plain
    assert torch.equal(scaled[waves < 2048], plain[waves < 2048])
    torch.testing.assert_close(scaled[waves > 8192], plain[waves > 8192] / 8)
    between = (waves > 2048) & (waves < 8192)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()
