"""Tensor-parallel layers against the unsharded ones, in fp64 and on real processes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megagrow.models.common.layers import (
    ColumnParallelLinear,
    Dropout,
    LayerNorm,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelOutput,
)
from megagrow.models.common.parallel import SERIAL, TensorParallel
from megagrow.state.layout import even_split
from tests.models.parts import this_rank
from tests.ranks import run_ranks

BATCH, SEQUENCE, WIDTH, VOCABULARY = 2, 4, 6, 9  # 9 over 2 ranks: 5 + 4, over 4: 3 + 3 + 3 + 0
GROUPS, PROJECTIONS, HEAD_DIM = 4, 3, 2


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def column(parallel=SERIAL):
    axes = (GROUPS // parallel.size, PROJECTIONS, HEAD_DIM)
    return ColumnParallelLinear(axes, (WIDTH,), bias=True, parallel=parallel)


def gate_up(parallel=SERIAL):
    return ColumnParallelLinear((2, 8 // parallel.size), (WIDTH,), bias=False, parallel=parallel)


def row(parallel=SERIAL):
    axes = (GROUPS // parallel.size, HEAD_DIM)
    return RowParallelLinear((WIDTH,), axes, bias=True, parallel=parallel)


def norm(parallel=SERIAL):
    return LayerNorm(WIDTH, 1e-5, parallel=parallel)


def rms_norm(parallel=SERIAL):
    return RMSNorm(WIDTH, 1e-5, parallel=parallel)


def embedding(parallel=SERIAL):
    return VocabParallelEmbedding(VOCABULARY, WIDTH, parallel=parallel)


def output(parallel=SERIAL):
    return VocabParallelOutput(VOCABULARY, WIDTH, name="weight", parallel=parallel)


# Per layer: how to build it, the axis on which its parameters are split (by name), its whole
# input, and the axes on which input and output are split: (with sequence parallelism, without).
STREAM = (1, None)
LAYERS = {
    "column": (column, {"weight": 0, "bias": 0}, randn(BATCH, SEQUENCE, WIDTH), STREAM, (2, 2)),
    "gate_up": (gate_up, {"weight": 1}, randn(BATCH, SEQUENCE, WIDTH), STREAM, ("gate_up",) * 2),
    "row": (row, {"weight": 1}, randn(BATCH, SEQUENCE, GROUPS * HEAD_DIM), (2, 2), STREAM),
    "norm": (norm, {}, randn(BATCH, SEQUENCE, WIDTH), STREAM, STREAM),
    "rms_norm": (rms_norm, {}, randn(BATCH, SEQUENCE, WIDTH), STREAM, STREAM),
    "embedding": (
        embedding,
        {"token": 0},
        torch.tensor([[0, 8, 3, 4], [5, 2, 8, 1]]),
        (None, None),
        STREAM,
    ),
    "output": (output, {"weight": 0}, randn(BATCH, SEQUENCE, WIDTH), STREAM, (2, 2)),
}


def cut(x, axis, rank, world):
    """A rank's part of whole parameters or activations."""
    if axis is None:
        return x
    if axis == "gate_up":
        halves = x.unflatten(-1, (2, -1))
        return cut(halves, halves.dim() - 1, rank, world).flatten(-2)
    start, stop = even_split(x.shape[axis], world, rank)
    return x.narrow(axis, start, stop - start)


def run(layer, parameters, x, gradient):
    """Output, input gradient and parameter gradients; missing rows of parameters are NaN
    padding."""
    layer.double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.fill_(torch.nan)
            parameter[tuple(slice(0, n) for n in parameters[name].shape)] = parameters[name]
    x = x.clone()
    if x.is_floating_point():
        x.requires_grad_()
    y = layer(x)
    y.backward(gradient(y))
    return y.detach(), x.grad, {name: p.grad for name, p in layer.named_parameters()}


def whole(name):
    """The unsharded run of a layer: (parameters, output, output gradient, gradients)."""
    build, _, x, *_ = LAYERS[name]
    layer = build()
    parameters = {
        key: randn(*parameter.shape, seed=i)
        for i, (key, parameter) in enumerate(layer.named_parameters())
    }
    y, grad_x, grads = run(layer, parameters, x, lambda y: randn(*y.shape, seed=9))
    return parameters, y, grad_x, grads


def _sharded(comm):
    results = {}
    for name, sequence in itertools.product(LAYERS, (False, True)):
        build, axes, x, in_axes, out_axes = LAYERS[name]
        parallel = this_rank(comm, sequence=sequence)
        parameters, y, *_ = whole(name)
        mine = {key: cut(p, axes.get(key), *rank_of(parallel)) for key, p in parameters.items()}
        gradient = cut(randn(*y.shape, seed=9), out_axes[not sequence], *rank_of(parallel))
        part = cut(x, in_axes[not sequence], *rank_of(parallel))
        layer = build(parallel)
        y, grad_x, grads = run(layer, mine, part, lambda _: gradient)  # noqa: B023
        results[name, sequence] = y, grad_x, grads
    return results


def rank_of(parallel):
    return parallel.rank, parallel.size


@pytest.fixture(scope="module", params=[2, 4])
def sharded(request):
    return run_ranks(request.param, _sharded)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_sharded_layer_is_the_whole_one(sharded, name, sequence):
    _, axes, _, in_axes, out_axes = LAYERS[name]
    _, y, grad_x, grads = whole(name)
    world = len(sharded)
    for rank, results in enumerate(sharded):
        mine, mine_grad_x, mine_grads = results[name, sequence]
        assert_near(mine, cut(y, out_axes[not sequence], rank, world))
        if grad_x is not None:
            assert_near(mine_grad_x, cut(grad_x, in_axes[not sequence], rank, world))
        for key, gradient in mine_grads.items():
            wanted = cut(grads[key], axes.get(key), rank, world)
            valid = tuple(slice(0, n) for n in wanted.shape)
            assert_near(gradient[valid], wanted)
            padding = gradient.clone()
            padding[valid] = 0
            assert not padding.any(), "padding has a gradient"


def assert_near(x, y):
    torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_linear_layers_are_pytorchs():
    layer, x = column().double(), LAYERS["column"][2]
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    matrix = layer.weight.view(-1, WIDTH)
    wanted = F.linear(x, matrix, layer.bias.view(-1))
    assert_near(layer(x), wanted)
    gradient = randn(*wanted.shape)
    mine = torch.autograd.grad(layer(x), list(layer.parameters()), gradient)
    theirs = torch.autograd.grad(wanted, list(layer.parameters()), gradient)
    for a, b in zip(mine, theirs, strict=True):
        assert_near(a, b)


def test_linear_gradients_by_finite_differences():
    layer = output(TensorParallel(None, 0, 1)).double()
    nn.init.normal_(layer.weight)
    torch.autograd.gradcheck(layer, (LAYERS["output"][2].requires_grad_(),))


def test_a_linear_layer_keeps_the_parameter_and_no_view_of_it():
    # ZeRO-3 replaces a parameter's data between forward and backward; a view would keep it.
    layer, saved = column().double(), []
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        layer(LAYERS["column"][2])
    weights = [x for x in saved if x.untyped_storage().data_ptr() == layer.weight.data_ptr()]
    assert len(weights) == 1 and weights[0] is layer.weight


def test_rms_norm_by_its_formula():
    layer = rms_norm().double()
    nn.init.normal_(layer.weight)
    x = LAYERS["rms_norm"][2]
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight
    assert_near(layer(x), wanted)


@pytest.mark.parametrize("build", [norm, rms_norm])
def test_norms_take_statistics_of_bf16_in_fp32(build):
    layer = build()
    nn.init.ones_(layer.weight)
    if build is norm:
        nn.init.zeros_(layer.bias)
    x = (100 + randn(3, WIDTH)).bfloat16()
    wanted = layer(x.float())
    error = (layer.bfloat16()(x).float() - wanted).abs().max()
    assert error <= wanted.abs().max() * torch.finfo(torch.bfloat16).eps


def dropped(p, rank, sequence):
    torch.manual_seed(1)
    layer = Dropout(p, parallel=TensorParallel(None, rank, 2, sequence))
    return layer(torch.ones(2, 4, 32))


def test_dropout_of_the_stream():
    assert torch.equal(dropped(0.5, 0, False), dropped(0.5, 1, False))
    assert not torch.equal(dropped(0.5, 0, True), dropped(0.5, 1, True))
    layer, x = Dropout(0.5), torch.ones(3)
    assert layer.eval()(x) is x
    assert Dropout(0.0).train()(x) is x
