"""A growth with the copy kernel is bit-identical to one with PyTorch's copies."""

import pytest
import torch

from megagrow.models.catalog import build_catalog
from megagrow.ops import dispatch, library
from tests.ops.device import DEVICE
from tests.toys import grow, random_state, toy_model


@pytest.mark.skipif(DEVICE != "cpu", reason="the toy state lives on the CPU")
@pytest.mark.parametrize(
    ("operator", "factor"), [("width", 2), ("width", 3), ("width_noise", 2), ("depth_stack", 2)]
)
def test_growth_by_kernel(kernels, monkeypatch, operator, factor):
    boxes = []

    class Counted:
        def copy_boxes_(self, targets, *rest):
            boxes.extend(targets)
            torch.ops.megagrow.copy_boxes_(targets, *rest)

    monkeypatch.setattr(dispatch, "_ops", Counted())
    model = toy_model()
    state = random_state(build_catalog(model), seed=1, dtype=torch.float32)
    _, _, by_kernel = grow(model, state, operator=operator, factor=factor)
    assert boxes, "no kernel was used"
    with library.using("reference"):
        _, _, plain = grow(model, state, operator=operator, factor=factor)
    assert by_kernel.tensors.keys() == plain.tensors.keys()
    for key, tensor in plain.tensors.items():
        assert torch.equal(by_kernel.tensors[key], tensor), key
