"""Every kernel against plain PyTorch in fp64: odd shapes, all types, both schedules."""

import itertools

import pytest
import torch
from torch.library import opcheck

from megagrow.ops import references
from megagrow.ops.schemas import SCHEMAS
from tests.ops.device import DEVICE, DTYPES

OPS = torch.ops.megagrow
# Relative errors in the 2-norm against fp64: rounding of the output, and a little more.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float64: 1e-13}


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def high(value):
    """The same argument in fp64."""
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floating else value


def assert_close(got, wanted, dtype):
    assert got.shape == wanted.shape
    assert not got.isnan().any(), "something was left unwritten"
    if wanted.numel():
        # Where sums cancel, relative to the summands, which are about 1.
        error = (got.double() - wanted).norm() / wanted.norm().clamp_min(
            0.3 * wanted.numel() ** 0.5
        )
        assert error <= TOLERANCE[dtype], f"relative error {error:.1e}"


def check(name, *args, dtype):
    """Run an op in its own precision, and its reference in fp64."""
    got = getattr(OPS, name)(*args)
    wanted = references.REFERENCES[name](*map(high, args))
    if isinstance(got, torch.Tensor):
        got, wanted = (got,), (wanted,)
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, dtype)


# (rows, n): whole vectors, odd ones, one row, one element, longer than registers hold, nothing
ROWS = [((5, 64)), ((2, 3, 17)), ((1, 128)), ((3, 1)), ((2, 2065)), ((7, 520)), ((0, 8)), ((33,))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_norms(kernels, kind, shape, dtype, with_residual):
    x = randn(*shape, dtype=dtype)
    # The reference adds in the low precision first, as the kernel stores the sum.
    residual = randn(*shape, dtype=dtype, seed=1) if with_residual else None
    parameters = [randn(shape[-1], dtype=dtype, seed=k) for k in range(1 + (kind == "layer_norm"))]
    y, z, *statistics = getattr(OPS, kind)(x, residual, *parameters, 1e-5)
    total = x if residual is None else x + residual
    assert torch.equal(z, total if with_residual else x.new_empty(0))
    wanted = getattr(references, kind)(total.double(), None, *map(high, parameters), 1e-5)
    assert_close(y, wanted[0], dtype)
    for a, b in zip(statistics, wanted[2:], strict=True):
        torch.testing.assert_close(a, b.float(), rtol=2e-6, atol=2e-6)
    dy, dz = randn(*shape, dtype=dtype, seed=2), randn(*shape, dtype=dtype, seed=3)
    more = dz if with_residual else None
    check(f"{kind}_backward", dy, more, total, parameters[0], *statistics, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 34), (1, 2), (0, 8), (70, 16), (4, 1040), (6,)])
def test_swiglu(kernels, shape, dtype):
    x = randn(*shape, dtype=dtype)
    check("swiglu", x, dtype=dtype)
    check(
        "swiglu_backward", randn(*shape[:-1], shape[-1] // 2, dtype=dtype, seed=1), x, dtype=dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 17), (1, 1), (0, 8), (70, 16), (4, 520)])
def test_bias_gelu(kernels, shape, dtype):
    x, bias = 2 * randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1)
    check("bias_gelu", x, bias, dtype=dtype)
    check("bias_gelu_backward", randn(*shape, dtype=dtype, seed=2), x, bias, dtype=dtype)


def angles(sequence, half, dtype):
    angle = randn(sequence, half, dtype=torch.float64, seed=9)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return angle.cos().to(wide), angle.sin().to(wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "turned"),
    [((2, 3, 2, 4, 16), 3), ((1, 1, 1, 3, 2), 2), ((1, 5, 3, 3, 10), 2), ((0, 2, 1, 3, 4), 2),
     ((2, 2, 1, 3, 64), 0)],
)  # fmt: skip
@pytest.mark.parametrize("back", [False, True])
def test_rotary(kernels, shape, turned, dtype, back):
    x = randn(*shape, dtype=dtype)
    tables = angles(shape[1], shape[-1] // 2, dtype)
    check("rotary", x, *tables, turned, back, dtype=dtype)
    ours = x.clone()
    OPS.rotary_(ours, *tables, turned, back)
    assert torch.equal(ours, OPS.rotary(x, *tables, turned, back))
    assert torch.equal(ours[..., turned:, :], x[..., turned:, :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (3, 17), (1, 1), (0, 8), (4, 1031), (3, 5), (2, 0)])
def test_cross_entropy(kernels, shape, dtype):
    rows, width = shape
    logits = 5 * randn(*shape, dtype=dtype)
    start = 11
    # Labels below, inside and above this rank's range.
    labels = (torch.arange(rows, device=DEVICE) * 7) % (width + 8) + start - 4
    stats = OPS.softmax_stats(logits, labels, start)
    wanted = references.softmax_stats(logits.double(), labels, start)
    torch.testing.assert_close(stats, wanted.float(), rtol=3e-6, atol=0)
    if width:
        grad = randn(rows, seed=1)
        arguments = (grad, logits, labels, stats, start)
        check("cross_entropy_backward", *arguments, dtype=dtype)
        expected = OPS.cross_entropy_backward(*arguments)
        OPS.cross_entropy_backward_(*arguments)
        assert torch.equal(logits, expected)


def test_cross_entropy_of_infinite_logits(kernels):
    logits = torch.full((3, 40), -torch.inf, device=DEVICE)
    logits[0, 39], logits[1, 0], logits[1, 20] = 0.0, 80.0, 80.0
    labels = torch.tensor([39, 0, 5], device=DEVICE)
    stats = OPS.softmax_stats(logits, labels, 0)
    assert stats[0].tolist() == [0.0, 80.0, -torch.inf]
    assert stats[1].tolist() == [1.0, 2.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("offset", "target", "scale"), [(0, 1.0, 1.0), (1, 0.5, -2.0), (0, 0.25, 0.1)]
)
def test_copy_boxes(kernels, dtype, offset, target, scale):
    low_type = torch.float16 if offset else torch.bfloat16
    flat, low = randn(400, dtype=dtype), torch.zeros(400, dtype=low_type, device=DEVICE)
    before = flat.clone()
    source = randn(offset + 240, dtype=dtype, seed=1)[offset:]
    views = [
        (flat[8:104].view(4, 24)[:, offset : 8 + offset], source[:32].view(4, 8)),
        (flat[104:104], source[:0]),
        # A transpose, a box with strides on all axes, and one value.
        (flat[104:128].view(6, 4), source[32:56].view(4, 6).t()),
        (flat[128:368].view(2, 3, 5, 8)[:, ::2, 1:4, ::3], source[56:92].view(2, 2, 3, 3)),
        (flat[399:].view(()), source[92]),
    ]
    lows = [
        low[:1].as_strided(t.shape, t.stride(), t.storage_offset()) for t, _ in views
    ]  # fmt: skip
    scales = [target, 1.0, scale, scale, target]
    OPS.copy_boxes_([t for t, _ in views], [s for _, s in views], lows, scales)
    wanted, wanted_low = before.clone(), torch.zeros_like(low)
    for (t, s), factor in zip(views, scales, strict=True):
        place = wanted[:1].as_strided(t.shape, t.stride(), t.storage_offset())
        torch.mul(s, factor, out=place)
        wanted_low[:1].as_strided(t.shape, t.stride(), t.storage_offset()).copy_(place)
    assert torch.equal(flat, wanted)
    assert torch.equal(low, wanted_low)


def test_copy_boxes_takes_more_than_a_launch_holds(kernels):
    source, flat = randn(100, 8), torch.full((100, 8), torch.nan, device=DEVICE)
    OPS.copy_boxes_(list(flat), list(source), [], [2.0] * 100)
    assert torch.equal(flat, 2 * source)


# --- what is refused ------------------------------------------------------------------------


def arguments(name, dtype=torch.float32):
    """Arguments of an op, small."""
    x, w, b = randn(4, 16, dtype=dtype), randn(16, dtype=dtype), randn(16, dtype=dtype, seed=1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = randn(4, dtype=wide).abs()
    packed, labels = randn(2, 3, 1, 3, 8, dtype=dtype), torch.tensor([0, 3, 15, 20], device=DEVICE)
    tables = angles(3, 4, dtype)
    stats = torch.stack((rows, rows + 1, rows))
    flat = [randn(40, seed=k).abs() for k in range(4)]
    young = torch.tensor([[4, 12, 1, 1, 3, 4, 0, 0, 0, 0, 1, 1, 2, 1, 1, 1, 1, 2]], device=DEVICE)
    rates = torch.tensor([[0.02, 0.1, 0.3]], device=DEVICE)
    low, scale = torch.zeros(40, dtype=torch.bfloat16, device=DEVICE), randn(1).abs()
    return {
        "rms_norm": (x, x.flip(0), w, 1e-5),
        "rms_norm_backward": (x, x.flip(0), x.flip(1), w, rows),
        "layer_norm": (x, x.flip(0), w, b, 1e-5),
        "layer_norm_backward": (x, x.flip(0), x.flip(1), w, rows, rows),
        "swiglu": (x,),
        "swiglu_backward": (randn(4, 8, dtype=dtype), x),
        "bias_gelu": (x, b),
        "bias_gelu_backward": (x.flip(0), x, b),
        "rotary": (packed, *tables, 2, False),
        "rotary_": (packed, *tables, 2, False),
        "softmax_stats": (x, labels, 2),
        "cross_entropy_backward": (rows, x, labels, stats, 2),
        "cross_entropy_backward_": (rows, x, labels, stats, 2),
        "adamw_": (*flat, low, scale, young, rates, 1e-2, 0.9, 0.95, 1e-8, 0.1, 3),
        "copy_boxes_": ([flat[0]], [flat[1]], [low], [0.5]),
    }[name]  # fmt: skip


def strided(x):
    """The same values, not contiguous."""
    return torch.stack((x, x), -1)[..., 0] if x.dim() and x.numel() > 1 else x


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name != "copy_boxes_"])
def test_strided_input_is_refused(kernels, name):
    args = arguments(name)
    with pytest.raises(RuntimeError, match="contiguous"):
        getattr(OPS, name)(*(strided(a) if isinstance(a, torch.Tensor) else a for a in args))


def test_wrong_types_and_shapes_are_refused(kernels):
    x = randn(4, 16)
    with pytest.raises(RuntimeError, match="length of the last axis"):
        OPS.rms_norm(x, None, randn(8), 1e-5)
    with pytest.raises(RuntimeError, match="one type"):
        OPS.rms_norm(x, None, randn(16, dtype=torch.bfloat16), 1e-5)
    with pytest.raises(RuntimeError, match="number of elements"):
        OPS.rms_norm(x, randn(2, 16), randn(16), 1e-5)
    with pytest.raises(RuntimeError, match="even length"):
        OPS.swiglu(randn(4, 3))
    with pytest.raises(RuntimeError, match="fp32, bf16 and fp16"):
        OPS.swiglu(torch.ones(4, 2, dtype=torch.int32, device=DEVICE))


# --- torch.library --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(compiled, kernels, name):
    args = arguments(name)
    differentiable = name in ("rms_norm", "layer_norm", "swiglu", "bias_gelu", "rotary")
    if differentiable:
        args = tuple(
            a.clone().requires_grad_() if isinstance(a, torch.Tensor) and k not in table else a
            for k, a in enumerate(args)
            for table in ((1, 2) if name == "rotary" else (),)
        )
    opcheck(getattr(OPS, name).default, args)


@pytest.mark.parametrize(
    ("name", "with_residual"),
    [("rms_norm", True), ("rms_norm", False), ("layer_norm", True), ("layer_norm", False),
     ("swiglu", False), ("bias_gelu", False), ("rotary", False)],
)  # fmt: skip
def test_gradients_in_fp64(fp64_kernels, name, with_residual):
    args = list(arguments(name, torch.float64))
    if name.endswith("norm"):
        args[0] = args[0][:2]
        args[1] = args[1][:2] if with_residual else None
    fixed = (1, 2) if name == "rotary" else ()
    places = [
        k for k, a in enumerate(args) if isinstance(a, torch.Tensor) and k not in fixed
    ]  # fmt: skip
    leaves = [args[k].clone().requires_grad_() for k in places]

    def function(*values):
        for k, value in zip(places, values, strict=True):
            args[k] = value
        outputs = getattr(OPS, name)(*args)
        if not name.endswith("norm"):
            return outputs
        return outputs[:2] if with_residual else outputs[0]

    assert torch.autograd.gradcheck(function, leaves)


def test_fp64_kernels_are_exact(fp64_kernels):
    for name in ("rms_norm", "layer_norm", "swiglu", "bias_gelu", "rotary"):
        check(name, *arguments(name, torch.float64), dtype=torch.float64)


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "bias_gelu"])
def test_ops_go_through_the_compiler_whole(compiled, kernels, name):
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments(name)]

    def function(*args):
        out = getattr(OPS, name)(*args)
        return out if isinstance(out, torch.Tensor) else out[0]

    leaves = [a for a in args if isinstance(a, torch.Tensor)]
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        y = f(*args)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)))
    for a, b in itertools.zip_longest(*results):
        assert (a is None and b is None) or torch.equal(a, b)
