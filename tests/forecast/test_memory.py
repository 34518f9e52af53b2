"""Activation memory: the paper's formula where both count the same, and the effect of settings."""

import pytest
import torch

from megagrow.forecast.memory import (
    activation_bytes,
    block_bytes,
    micro_batches_in_flight,
    partition_size,
    slot_elements,
)
from megagrow.models.catalog import build_catalog
from megagrow.models.common.blocks import Block
from megagrow.state.catalog import ADAM_SLOTS, MUON_SLOTS
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from tests.toys import featured_models, toy_model

S, B, H, L = 32, 3, 64, 4
ONE_BLOCK = range(1, 2)


def model(**changes):
    sizes = {"layers": L, "hidden": H, "heads": 4, "ffn": 4 * H, "sequence": S, "dropout": 0.1}
    return toy_model(**(sizes | changes))


def count(shape, *, width=2, tensor=1, sequence_parallel=False, places=ONE_BLOCK, in_flight=1):
    return activation_bytes(
        shape, micro=B, width=width, tensor=tensor, sequence_parallel=sequence_parallel,
        places=places, in_flight=in_flight,
    )  # fmt: skip


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_a_gpt_block_in_16_bit_is_the_papers(tensor):
    row_sums = 4 * 4 / tensor * S * B  # of the fused attention, fp32
    assert count(model(), tensor=tensor) == S * B * H * (10 + 24 / tensor) + row_sums
    cut = count(model(), tensor=tensor, sequence_parallel=True)
    assert cut == S * B * H * 34 / tensor + row_sums


def test_fp32_takes_twice_as_much_without_masks():
    plain, row_sums = model(dropout=0.0), 4 * 4 * S * B
    assert count(plain, width=4) - row_sums == 2 * (count(plain) - row_sums)


def test_checkpointing_keeps_the_input_alone_and_one_block_at_a_time():
    full = model(activation_checkpointing="full")
    blocks = range(1, L + 1)
    assert count(full, places=blocks) == 2 * S * B * H * L + count(model())
    assert count(model(), places=blocks) == L * count(model())
    selective = model(activation_checkpointing="selective", family="llama")
    plain = model(family="llama")
    assert count(full) < count(selective, places=blocks) < count(plain, places=blocks)


def test_the_head_keeps_logits_and_their_gradient():
    shape = model(vocab=1000)
    head = count(shape, places=range(L + 1, L + 2))
    assert head == S * B * (2 * 2 * H + 2 * 2 * 1000 + 8)
    assert count(shape, places=range(L + 1, L + 2), tensor=4) < head


def test_a_pipeline_holds_several_micro_batches():
    assert [micro_batches_in_flight(4, pipe, 8) for pipe in range(4)] == [4, 3, 2, 2]
    assert micro_batches_in_flight(4, 0, 3) == 3 and micro_batches_in_flight(1, 0, 8) == 1
    assert count(model(), in_flight=3) == 3 * count(model())


def saved_bytes(shape):
    """What autograd keeps for the backward pass of a block, its input included."""
    block, kept = Block(shape, place=1), {}
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    x = torch.randn(B, shape.sequence, shape.hidden, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x)
    return sum(size for size, _ in kept.values())


SHAPES = {
    "gpt2": model(dropout=0.0),
    **featured_models(
        layers=L, hidden=H, heads=4, ffn=160, sequence=S, head_dim=None, tie_embeddings=False
    ),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("sequence", [S, 8 * S])
def test_a_block_of_every_family_is_what_autograd_keeps(name, sequence):
    """Without megagrow's kernels; PyTorch's rotary positions and SwiGLU keep a tenth more."""
    shape = SHAPES[name].model_copy(update={"sequence": sequence})
    _, moment = block_bytes(shape, width=4, tensor=1, stream=shape.hidden)
    wanted = count(shape, width=4) - B * sequence * moment
    assert 0.9 < saved_bytes(shape) / wanted < 1.15


def test_partitions_are_padded_as_deepspeed_pads_them():
    groups = [[5, 6], [3]]
    assert partition_size(Layout(data=4, zero=0), groups) == 14
    assert partition_size(Layout(data=4, zero=1), groups) == 4 + 2
    assert partition_size(Layout(data=4, zero=3), groups) == 2 + 2 + 1


def test_muon_keeps_no_second_moment_of_matrices():
    catalog = build_catalog(model())
    placement = Placement(catalog, Layout())
    matrices = L * (4 * H * H + 2 * 4 * H * H)  # attention and MLP of each block
    adam = slot_elements(placement, 0, ADAM_SLOTS[1:])
    assert adam == 2 * catalog.parameters
    assert slot_elements(placement, 0, MUON_SLOTS[1:]) == adam - matrices
