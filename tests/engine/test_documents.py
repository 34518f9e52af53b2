"""Documents of a sample that do not see each other, in every layout, in real jobs."""

import numpy as np
import pytest
import torch

from megagrow.models.common.blocks import Head
from megagrow.state.layout import Layout
from tests.engine.plays import BATCH, Job, data_layouts, play_all
from tests.ranks import run_ranks
from tests.toys import FAMILIES, featured_models, toy_model

EOD = 4
MODELS = {family: toy_model(family=family, init_std=0.2) for family in FAMILIES} | featured_models(
    init_std=0.2
)
# With `sequence`: sequence parallel.
OF_TWO = [
    (Layout(data=2, zero=1), False),
    (Layout(tensor=2), False),
    (Layout(tensor=2), True),
    (Layout(pipeline=2), False),
]
OF_MORE = {
    3: [(Layout(pipeline=3), False)],  # a stage between the ends, which reads no labels
    4: [(Layout(tensor=2, pipeline=2), True), (Layout(data=2, pipeline=2, zero=1), False)],
}


def _logits(job, samples):
    """[n, S, v] of this rank's vocabulary, or None on a pipeline stage without a head."""
    found = []
    heads = [m for m in job.engine._deepspeed.module.modules() if isinstance(m, Head)]
    hooks = [m.register_forward_hook(lambda m, i, out: found.append(out.clone())) for m in heads]
    job.engine.evaluate(samples, micro=2)
    for hook in hooks:
        hook.remove()
    return torch.cat(found) if found else None


def _second_documents(comm, cases):
    """How far the logits of the first and of the second document move with the first: by case."""
    moved = []
    for model, layout, sequence, eod in cases:
        job = Job(comm, layout=layout, model=model, sequence=sequence, eod=eod)
        job.train(1)
        before = np.random.default_rng(7).integers(5, 13, (1, model.sequence + 1))
        before[0, 2] = EOD
        after = before.copy()
        after[0, :2] = [12 - before[0, 0], 12 - before[0, 1]]
        # As many equal samples as there are data ranks, so that each has one.
        pair = [_logits(job, np.repeat(one, 4, axis=0)) for one in (before, after)]
        job.engine.close()
        if pair[0] is None:
            continue
        change = (pair[1] - pair[0]).abs().amax((0, 2))
        moved.append((float(change[:3].max()), float(change[3:].max())))
    return moved


def check(world, models, layouts):
    cases = [(model, *layout, EOD) for model in models for layout in layouts]
    found = [moved for moved in run_ranks(world, _second_documents, cases, timeout=500) if moved]
    assert found
    for moved in found:
        for (first, second), case in zip(moved, cases, strict=True):
            assert second <= 1e-6 < 1e-3 < first, case


@pytest.mark.parametrize("layout", OF_TWO, ids=str)
def test_logits_of_a_document_do_not_depend_on_another(layout):
    check(2, MODELS.values(), [layout])


@pytest.mark.parametrize("world", OF_MORE)
def test_nor_in_more_processes(world):
    check(world, [toy_model(family=f, layers=3, init_std=0.2) for f in FAMILIES], OF_MORE[world])


def test_packed_documents_see_each_other():
    [(first, second)] = run_ranks(1, _second_documents, [(toy_model(), Layout(), False, None)])[0]
    assert first > 1e-3 and second > 1e-3


# --- training -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_and_recomputation_train_alike(family):
    """With several micro-batches a step, so that a pipeline has some in flight."""
    model = toy_model(family=family, layers=3, init_std=0.2)
    steps = [("train", 6)]
    options = {"model": model, "eod": EOD, "micro": 2}
    packed = {**options, "eod": None}
    (whole, others) = run_ranks(1, play_all, [(steps, options), (steps, packed)])[0]
    assert not np.allclose(whole[0], others[0], rtol=1e-4), "documents make a difference"
    plays = {
        2: [
            *({"layout": layout} for layout in data_layouts(2)),
            *({"layout": layout, "sequence": sequence} for layout, sequence in OF_TWO[1:]),
            *(
                {"layout": Layout(pipeline=2), "model": model.model_copy(
                    update={"activation_checkpointing": kind})}
                for kind in ("selective", "full")
            ),
        ],
        3: [{"layout": Layout(pipeline=3)}],
    }  # fmt: skip
    assert BATCH // 2 > 3, "more micro-batches than stages"
    for world, changes in plays.items():
        found = run_ranks(world, play_all, [(steps, options | c) for c in changes], timeout=500)[0]
        for (losses, norms, evaluations), change in zip(found, changes, strict=True):
            told = f"{family}: {change}"
            np.testing.assert_allclose(losses, whole[0], rtol=1e-5, err_msg=told)
            np.testing.assert_allclose(norms, whole[1], rtol=1e-4, err_msg=told)
            np.testing.assert_allclose(evaluations, whole[2], rtol=1e-5, err_msg=told)
