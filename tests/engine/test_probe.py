"""The probe of one update: against its definition, and the same in every layout."""

import threading

import pytest
import torch

from megagrow.engine.optimizers.generations import regions
from megagrow.engine.probe import Probe
from megagrow.growth.diagnostics import Watched, watched
from megagrow.models.catalog import build_catalog
from megagrow.state.boxes import flat_range_boxes
from megagrow.state.catalog import Init, LogicalTensor
from megagrow.state.layout import Layout
from tests.engine.plays import Job
from tests.ranks import run_ranks
from tests.toys import FAMILIES, grow, random_state, toy_model

GATED = LogicalTensor(
    "layers.0.mlp.up.weight", (2, 6, 5), ("gate_up", "ffn", "embed"), Init("zeros"), True, (1,),
    role="reader", reads=("embed",),
)  # fmt: skip
TWINS = ((0, 1), (2, 3), (4, 5))
KEPT = ((0, 1, 2), (0, 2, 3), (0, 1, 3))


def looked_at(parts, one, weight, gradient, update, *, copies=1):
    """The findings of some ranks, each holding flat ranges of a tensor."""
    ranks = len(parts) * copies
    barrier, sums = threading.Barrier(ranks), {}
    found, failed = [None] * ranks, []

    def rank(number):
        def total(values):
            barrier.wait()
            sums[number] = values.clone()
            barrier.wait()
            values.copy_(sum(sums[n] for n in range(ranks)))

        shards, group = {}, {"params": []}
        for start, stop in parts[number % len(parts)]:
            # A parameter with other elements before the part, as in a flat partition.
            parameter = torch.nn.Parameter(torch.cat([torch.ones(3), weight.flatten()[start:stop]]))
            parameter.grad = torch.cat([torch.ones(3), gradient.flatten()[start:stop]])
            boxes = flat_range_boxes(one.tensor.shape, start, stop)
            shards[parameter] = [(one.tensor.name, box, 3 + at - start) for box, at in boxes]
            group["params"].append(parameter)
        probe = Probe([one], shards, device=torch.device("cpu"))
        with probe.update([group]):
            for parameter, (start, stop) in zip(
                group["params"], parts[number % len(parts)], strict=True
            ):
                parameter.data[3:] += update.flatten()[start:stop]
        found[number] = probe.finish(total)

    def guarded(number):
        try:
            rank(number)
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=guarded, args=(n,), daemon=True) for n in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    if failed:
        raise failed[0]
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize(
    "parts",
    [[[(0, 60)]], [[(0, 7), (40, 60)], [(7, 40)]], [[(0, 1)], [(1, 33)], [(33, 60)], []]],
    ids=len,
)
@pytest.mark.parametrize("copies", [1, 2])
def test_numbers_are_what_they_are_said_to_be(parts, copies):
    random = torch.Generator().manual_seed(1)
    weight, gradient, update = (torch.randn(2, 6, 5, generator=random) for _ in range(3))
    gradient[:, 4] = 0.0  # a unit that learns nothing
    one = Watched(GATED, KEPT, TWINS)
    found = looked_at(parts, one, weight, gradient, update, copies=copies)
    new = torch.ones(2, 6, 5, dtype=torch.bool)
    new[:, ::2, :3] = False
    after = weight + update
    assert found["parameter_share"] == pytest.approx(1 - 2 * 3 * 3 / 60)
    for what, values in (("gradient", gradient), ("update", update)):
        share = (values[new] ** 2).sum() / (values**2).sum()
        assert found[f"{what}_share"] == pytest.approx(share.item(), rel=1e-5)
    rows = after.movedim(1, 0).flatten(1)
    cosines = torch.cosine_similarity(rows[::2], rows[1::2], dim=1)
    assert found["twin_cosine"] == pytest.approx(cosines.mean().item(), rel=1e-4)
    gram = after.flatten(0, 1).T @ after.flatten(0, 1)
    ratio = gram.trace() ** 2 / (gram @ gram).trace()
    assert found["participation"] == pytest.approx(ratio.item(), rel=1e-4)
    assert found["dead_units"] == pytest.approx(1 / 6)


def test_of_wide_matrices_ranks_and_cosines_are_estimates():
    wide = LogicalTensor(
        "up", (96, 512), ("ffn", "embed"), Init("zeros"), True, (1,), "reader", ("embed",)
    )
    random = torch.Generator().manual_seed(2)
    weight = torch.randn(96, 512, generator=random) @ torch.diag(torch.linspace(0.1, 2, 512))
    weight[1::2] = 0.6 * weight[::2] + 0.8 * weight[1::2]
    nothing = torch.zeros_like(weight)
    one = Watched(wide, None, tuple((i, i + 1) for i in range(0, 96, 2)))
    found = looked_at([[(0, 20_000)], [(20_000, 96 * 512)]], one, weight, weight, nothing)
    gram = weight @ weight.T
    ratio = gram.trace() ** 2 / (gram @ gram).trace()
    assert found["participation"] == pytest.approx(ratio.item(), rel=0.1)
    cosines = torch.cosine_similarity(weight[::2], weight[1::2], dim=1)
    assert found["twin_cosine"] == pytest.approx(cosines.mean().item(), abs=0.05)
    assert found["parameter_share"] == found["gradient_share"] == 1.0
    assert "update_share" not in found  # nothing moved


# --- which matrices -----------------------------------------------------------------------


def watched_by(operator, *, policy="kept", factor=2, **model):
    small = toy_model(**model)
    state = random_state(build_catalog(small), seed=0)
    return {
        one.tensor.name: one
        for one in watched(grow(small, state, operator=operator, policy=policy, factor=factor)[1])
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_widened_matrices_have_twins_and_old_elements(family):
    found = watched_by("width", family=family, layers=5)
    assert {name.split(".")[1] for name in found} == {"0", "2", "4"} and len(found) == 12
    up = found["layers.0.mlp.up.weight"]
    assert up.twins == tuple((2 * u, 2 * u + 1) for u in range(12))
    assert up.kept[-2:] == ((0, 2, 12), (0, 1, 8)) and up.has_units
    down = found["layers.0.mlp.down.weight"]
    assert down.twins == () and not down.has_units
    old, new = regions(up.kept, next(flat_range_boxes(up.tensor.shape, 0, up.tensor.volume))[0])
    assert len(old) == 1 and new


def test_three_copies_are_pairs_with_the_first():
    pairs = watched_by("width", factor=3)["layers.1.mlp.up.weight"].twins
    assert pairs[:2] == ((0, 1), (0, 2)) and len(pairs) == 24


def test_new_layers_are_looked_at_beside_old_ones():
    found = watched_by("depth_stack", layers=2, factor=3, policy="copy")
    new = {name.split(".")[1] for name, one in found.items() if one.kept is None}
    assert new == {"2", "3", "5"} and {name.split(".")[1] for name in found} == new | {"0", "1"}
    assert not any(one.twins for one in found.values())


def test_where_nothing_is_new_nothing_is_looked_at():
    assert watched_by("vocab") == {} and watched_by("sequence") == {}


# --- real engines -------------------------------------------------------------------------


def play(comm, layouts, family):
    """Grow and train in each layout; returns the probe's report on the last update."""
    results = []
    for layout, optimizer in layouts:
        job = Job(comm, layout=layout, model=toy_model(family=family, init_std=0.2), **optimizer)
        job.train(3)
        growth = job.grow("width", "kept", 2, layout)
        job.train(4)
        probe = job.engine.probe(watched(growth))
        job.train(1, probe=probe)
        results.append(probe.finish(comm.add_up))
        job.engine.close()
    return results


LAYOUTS = [
    Layout(data=2, zero=0), Layout(data=2, zero=1), Layout(data=2, zero=2), Layout(data=2, zero=3),
    Layout(tensor=2, zero=0), Layout(tensor=2, zero=1), Layout(pipeline=2, zero=1),
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_layout_sees_the_same(family, name):
    options = {"name": name}
    [alone] = run_ranks(1, play, [(Layout(), options)], family)[0]
    assert set(alone) == {"parameter_share", "gradient_share", "update_share", "twin_cosine",
                          "participation", "dead_units"}  # fmt: skip
    assert alone["parameter_share"] == pytest.approx(3 / 4)
    assert 0 < alone["gradient_share"] < 1 and 0 < alone["update_share"] < 1
    assert 0.5 < alone["twin_cosine"] < 1 and alone["dead_units"] == 0
    by_rank = run_ranks(2, play, [(layout, options) for layout in LAYOUTS], family, timeout=400)
    assert by_rank[0] == by_rank[1]
    for layout, results in zip(LAYOUTS, by_rank[0], strict=True):
        assert results == pytest.approx(alone, rel=2e-3), layout
