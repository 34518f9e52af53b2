"""The predicted communication of a step, compared with what a model actually sends."""

import itertools
from collections import Counter

import pytest
import torch

from megagrow.config import ModelConfig
from megagrow.forecast.machine import stream_reductions
from tests.ranks import run_ranks

TENSOR, SAMPLES = 2, 3
CASES = list(itertools.product(("none", "selective", "full"), (False, True), (0.0, 0.1)))


def _model(layers, activation_checkpointing, dropout):
    return ModelConfig(
        family="llama", layers=layers, hidden=16, heads=4, ffn=12, sequence=6, vocab=13,
        dropout=dropout, activation_checkpointing=activation_checkpointing,
    )  # fmt: skip


def _sent(comm):
    """Elements that a forward and a backward pass send through each kind of collective."""
    from megagrow.models.common import parallel as calls
    from megagrow.models.common.parallel import TensorParallel
    from megagrow.models.transformer import Transformer

    counts = Counter()

    def counted(kind, function, size):
        def call(*args, **more):
            # Gradients of norms are reduced as well, independent of the batch.
            if size(*args).numel() > _model(1, "none", 0.0).hidden:
                counts[kind] += size(*args).numel()
            return function(*args, **more)

        return call

    dist = torch.distributed
    dist.all_reduce = counted("all_reduce", dist.all_reduce, lambda x: x)
    calls._gather_single = counted("half", calls._gather_single, lambda out, x: out)
    calls._scatter_single = counted("half", calls._scatter_single, lambda out, x: x)
    found = {}
    for (checkpointing, sequence, dropout), layers in itertools.product(CASES, (1, 2)):
        parallel = TensorParallel(
            rank=comm.rank, size=TENSOR, group=dist.group.WORLD, sequence=sequence
        )
        module = Transformer(_model(layers, checkpointing, dropout), parallel)
        counts.clear()
        module(torch.zeros(SAMPLES, 7, dtype=torch.int64)).backward()
        found[checkpointing, sequence, dropout, layers] = dict(counts)
    return found


@pytest.fixture(scope="module")
def sent():
    return run_ranks(TENSOR, _sent)[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_block_reduces_the_stream_as_often_as_foretold(sent, case):
    checkpointing, sequence, dropout = case
    model = _model(1, checkpointing, dropout)
    stream = SAMPLES * model.sequence * model.hidden
    totals = [
        one.get("all_reduce", 0) + one.get("half", 0) / 2
        for one in (sent[(*case, layers)] for layers in (1, 2))
    ]
    expected = stream_reductions(model, sequence_parallel=sequence)
    assert (totals[1] - totals[0]) / stream == expected
    assert (expected == 4) == (checkpointing != "full" and not sequence)
