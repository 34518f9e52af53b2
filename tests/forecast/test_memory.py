"""Activation memory: the paper's formula where both count the same, and the effect of settings."""

import pytest

from megagrow.forecast.memory import (
    activation_bytes,
    micro_batches_in_flight,
    partition_size,
    slot_elements,
)
from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import ADAM_SLOTS, MUON_SLOTS
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from tests.toys import toy_model

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
