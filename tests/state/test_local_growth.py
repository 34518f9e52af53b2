"""Copies stay on the tensor-parallel rank that holds their source."""

import pytest

from megagrow.growth.plan import grown_model, make_growth
from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.state.layout import Layout
from megagrow.state.placement import Placement
from megagrow.transfer.moves import plan_receives
from tests.toys import toy_model, toy_models


@pytest.mark.parametrize("family", sorted({name.split("-")[0] for name, _ in toy_models()}))
@pytest.mark.parametrize("factor", [2, 3])
def test_widening_under_tensor_parallelism_moves_nothing_between_ranks(family, factor):
    model = toy_model(family=family, heads=4)
    grown = grown_model(model, operator="width", factor=factor)
    small, target = build_catalog(model), build_catalog(grown)
    growth = make_growth(operator="width", policy="exact", small=small, target=target)
    layout = Layout(tensor=2)
    old, new = Placement(small, layout), Placement(target, layout)
    for rank in range(layout.world):
        moves = list(plan_receives(growth, old, new, slots=ADAM_SLOTS, rank=rank))
        assert moves and all(move.holder == rank for move in moves)
