"""An engine that waits for its state: what it holds, prints and sends."""

import contextlib
import io
import itertools

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from megagrow.engine.deepspeed import publish
from megagrow.engine.state import fill_with_nan
from megagrow.state.layout import Layout
from tests.engine.plays import Job, data_layouts, model_layouts
from tests.ranks import run_ranks


@pytest.mark.parametrize("shared", [True, False])
def test_parameters_without_values_share_the_memory_of_the_largest(shared):
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((3, 5), (7,), (2, 2, 4))]
    shapes = [parameter.shape for parameter in parameters]
    fill_with_nan(parameters, shared=shared)
    assert [parameter.shape for parameter in parameters] == shapes
    assert all(p.isnan().all() and p.is_contiguous() for p in parameters)
    memories = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
    assert sum(memories.values()) == (4 * 16 if shared else 4 * (15 + 7 + 16))


def _start(comm, dtype):
    """What a layout's engine prints, and which parameters share memory once it exists."""
    said, overlaps = io.StringIO(), []
    for layout in data_layouts(comm.world) + model_layouts(comm.world):
        with contextlib.redirect_stdout(said):
            job = Job(comm, layout=layout, fresh=False, precision={"dtype": dtype})
        if layout.zero < 3:
            spans = sorted(
                (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size())
                for p in job.engine._deepspeed.module.parameters()
            )
            overlaps += [a for a, b in itertools.pairwise(spans) if a[1] > b[0]]
        job.load(seed=1)
        assert torch.isfinite(torch.tensor(job.evaluate())), layout
    return said.getvalue(), overlaps


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_parameter_gets_memory_of_its_own_without_a_word(dtype):
    for said, overlaps in run_ranks(2, _start, dtype):
        assert said == "" and overlaps == []


def _publish(comm, dtype, size):
    """The model's parameters after a publish in messages of `size` bytes, and DeepSpeed's own."""
    publish._PUBLISH_BYTES = size
    found = []
    for zero in (1, 2):
        job = Job(
            comm, layout=Layout(data=comm.world, zero=zero), fresh=False,
            precision={"dtype": dtype},
        )  # fmt: skip
        job.load(seed=zero)
        engine = job.engine._deepspeed
        ours = [p.detach().clone() for p in engine.module.parameters()]
        for parameter in engine.module.parameters():
            parameter.data.fill_(torch.nan)
        engine.optimizer.update_lp_params()
        theirs = list(engine.module.parameters())
        found.append(all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)))
        assert not any(p.isnan().any() for p in ours)
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("world", "size"), [(2, 4), (3, 100), (3, 1 << 20)])
def test_publish_writes_what_deepspeeds_own_gather_writes(world, dtype, size):
    assert run_ranks(world, _publish, dtype, size) == [[True, True]] * world


def _flattened(comm):
    """Bytes of the parameters' buffer when DeepSpeed copies them, and of the largest parameter."""
    found = []

    def watched(original):
        def flatten(optimizer, tensors, *args, **options):
            memories = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
            found.append(sum(memory.nbytes() for memory in memories.values()))
            return original(optimizer, tensors, *args, **options)

        return flatten

    for kind, name in (
        (DeepSpeedZeroOptimizer, "flatten_dense_tensors_aligned"),
        (BF16_Optimizer, "_flatten_dense_tensors_aligned"),
    ):
        setattr(kind, name, watched(getattr(kind, name)))
    largest = 0
    for zero, dtype in ((1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16")):
        layout = Layout(data=comm.world, zero=zero)
        job = Job(comm, layout=layout, fresh=False, precision={"dtype": dtype})
        sizes = [p.numel() * 4 for p in job.engine._deepspeed.module.parameters()]
        largest = max(largest, *sizes)
        assert sum(sizes) > 3 * largest
    return found, largest


def test_no_second_copy_of_the_model_at_the_start():
    for found, largest in run_ranks(2, _flattened):
        assert len(found) >= 4 and max(found) <= largest


def _broadcasts(comm):
    """Bytes that collectives of PyTorch broadcast while an engine starts."""
    sent, original = [], dist.broadcast

    def count(tensor, *args, **options):
        sent.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **options)

    dist.broadcast = count
    for layout in data_layouts(comm.world):
        Job(comm, layout=layout, fresh=False)
    return sum(sent)


def test_no_parameters_are_sent_before_there_are_any():
    assert run_ranks(2, _broadcasts) == [0, 0]
