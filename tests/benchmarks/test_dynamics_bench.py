"""The dynamics figure: `exact` on the small run's curve, compared with the published policy."""

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import dynamics
from megagrow.growth.registry import OPERATORS
from tests.toys import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_retraces_and_the_published_policy_departs(family):
    found = dynamics.measure(family=family, factor=2, before=6, steps=20)
    expected = [
        (o.name, policy)
        for o in OPERATORS.values()
        for policy in (o.policies if "exact" in o.policies else ())
    ]
    assert [(one["operator"], one["policy"]) for one in found] == expected
    for one in found:
        assert one["departure"][0] <= 1e-9  # all of these keep the loss
        if one["policy"] == "exact":
            assert max(one["departure"]) <= 1e-9
        else:
            assert max(one["departure"]) > 1e-4
    assert dynamics.summary(found)["exact"] <= 1e-9
    assert dynamics.table(found).count("\n") == len(found) + 1
    figure = ElementTree.fromstring(dynamics.figure(found, operator="width_diag", family=family))
    texts = {"".join(node.itertext()) for node in figure.iter() if node.tag.endswith("text")}
    assert set(OPERATORS["width_diag"].policies) <= texts
