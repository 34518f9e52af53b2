"""Documents of a sample that do not see each other, against each document by itself, in fp64."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention

from megagrow.models.common.documents import Separator, choose_way
from megagrow.models.common.masks import ramp_in
from megagrow.models.common.parallel import TensorParallel
from tests.models import toy_family
from tests.models.parts import gradients, local_part, module_with, random_parameters, this_rank
from tests.ranks import run_ranks
from tests.toys import FAMILIES, featured_models, toy_model

toy_family.register()

EOD, SEQUENCE = 3, 12
SIZES = {"sequence": SEQUENCE, "hidden": 16, "heads": 4}
MODELS = {name: toy_model(family=name, **SIZES) for name in FAMILIES} | featured_models(
    **SIZES, head_dim=None
)
COMPILED = [FAMILIES[0], list(MODELS)[-1]]  # plain; with windows and caps
MODELS["toy"] = toy_model(family="toy", **SIZES)  # a family from outside, with layers of its own
every_family = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
WAYS = ("each", "dense", "flex")


def samples():
    """[3, 13]: documents of several lengths, an empty one, an end at the border, a whole sample."""
    found = torch.randint(4, 13, (3, SEQUENCE + 1), generator=torch.Generator().manual_seed(1))
    found[0, [4, 9]] = EOD
    found[1, [0, 1, SEQUENCE - 1, SEQUENCE]] = EOD
    return found


def borders(row):
    """Where the documents of one sample's inputs begin, and their end."""
    return [0, *(i + 1 for i in range(SEQUENCE - 1) if row[i] == EOD), SEQUENCE]


def separator(model, way="each"):
    windows = frozenset(model.layer_kind(layer).window for layer in range(model.layers))
    return Separator(EOD, windows, way)


def apart(model, way="each", parallel=None):
    module = module_with(model, random_parameters(model), parallel)
    module.separator = separator(model, way)
    return module


def loss_and_gradients(module):
    loss = module(samples())
    loss.backward()
    return loss.detach(), gradients(module)


def by_itself(model):
    """Loss and gradients of each document alone, with its own labels, weighted by its tokens."""
    module = module_with(model, random_parameters(model))
    losses = [
        module(row[None, start : end + 1]) * (end - start)
        for row in samples()
        for start, end in itertools.pairwise(borders(row))
    ]
    loss = sum(losses) / samples()[:, 1:].numel()
    loss.backward()
    return loss.detach(), gradients(module)


def same(found, wanted, tolerance=1e-12):
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=tolerance)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=tolerance, msg=name)


def test_a_document_ends_with_the_end_token_and_positions_restart_after_it():
    documents = separator(MODELS["gpt2"])(samples()[:, :-1])
    assert documents.positions.tolist() == [
        [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1],
        [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        list(range(12)),
    ]
    assert documents.lengths == (5, 5, 2, 1, 1, 10, 12)
    [mask] = separator(MODELS["gpt2"], "dense")(samples()[:, :-1]).masks.values()
    for row, seen in zip(samples(), mask[:, 0], strict=True):
        number = np.searchsorted(borders(row), np.arange(SEQUENCE), side="right")
        wanted = np.tril(number[:, None] == number[None])
        assert np.array_equal(seen.numpy(), wanted)


@every_family
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("way", ["each", "dense"])
def test_gradients_are_those_of_each_document_by_itself(model, recompute, way):
    module = apart(model.model_copy(update={"activation_checkpointing": recompute}), way)
    found, wanted = loss_and_gradients(module), by_itself(model)
    same(found, wanted)
    packed = module_with(model, random_parameters(model))(samples())
    assert abs(packed - wanted[0]) > 1e-4, "documents that see each other have another loss"


@every_family
@pytest.mark.parametrize("way", WAYS)
def test_logits_of_a_document_do_not_depend_on_another(model, way):
    before = samples()[:1, :-1]
    after = torch.where(torch.arange(SEQUENCE) < 4, before.flip(1), before)
    packed, module = module_with(model, random_parameters(model)), apart(model, way)
    with torch.no_grad():
        moved = (module.logits(after) - module.logits(before)).abs().amax((0, 2))
        packed_moved = (packed.logits(after) - packed.logits(before)).abs().amax((0, 2))
    assert moved[5:].max() <= 1e-12 < 1e-3 < moved[:4].max()
    assert model.window is not None or packed_moved[5:].max() > 1e-4


@every_family
def test_flex_attention_computes_the_same(model, monkeypatch):
    # PyTorch refuses its backward pass on a CPU, where the formulas run without its kernels.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    torch._dynamo.reset()
    same(loss_and_gradients(apart(model, "flex")), by_itself(model), tolerance=1e-10)


def _all_families(comm):
    return {
        (name, sequence): loss_and_gradients(
            apart(model, parallel=this_rank(comm, sequence=sequence))
        )
        for name, model in MODELS.items()
        for sequence in (False, True)
    }


def test_tensor_parallel_ranks_compute_the_same():
    results = run_ranks(2, _all_families)
    for (name, sequence), rank in itertools.product(results[0], (0, 1)):
        loss, wanted = by_itself(MODELS[name])
        parallel = TensorParallel(None, rank, 2)
        parts = {
            tensor: local_part(MODELS[name], tensor, gradient, parallel).nan_to_num(0.0)
            for tensor, gradient in wanted.items()
        }
        same(results[rank][name, sequence], (loss, parts), tolerance=1e-11)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_dropout_is_repeated_when_activations_are_recomputed(recompute):
    found = []
    for kind in ("none", recompute):
        model = toy_model(**SIZES, dropout=0.4, activation_checkpointing=kind)
        torch.manual_seed(9)
        found.append(loss_and_gradients(apart(model).train()))
    same(*found, tolerance=0)


def test_new_units_are_masked_as_without_documents():
    model = MODELS["gpt2"]
    old = {"kv_group": 4, "query": 1, "ffn": model.ffn, "embed": 16}
    module = apart(model)
    ramp_in(module, model, old).set(0.0)
    same(loss_and_gradients(module), by_itself(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_blocks_compute_the_same(name):
    model = MODELS[name].model_copy(update={"compile": True})
    assert Separator.of(model, EOD, device=torch.device("cpu"), dtype=torch.float64) == separator(
        model, "dense"
    )
    same(loss_and_gradients(apart(model, "dense")), by_itself(MODELS[name]), tolerance=1e-10)


def test_how_documents_attend_is_chosen_by_what_there_is(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    model = toy_model(heads=2, hidden=32)
    assert choose_way(model, gpu=False)[0] == "each"
    assert choose_way(model, gpu=True)[0] == "flex"
    for changes, why in (
        ({"dropout": 0.1}, "flex attention has no dropout"),
        ({"hidden": 16}, "heads of fewer than 16 features"),
    ):
        way, told = choose_way(model.model_copy(update=changes), gpu=True)
        assert way == "dense" and why in told
    assert choose_way(model, gpu=True, fp64=True)[0] == "dense"
    assert choose_way(model.model_copy(update={"compile": True}), gpu=False)[0] == "dense"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "Triton" in choose_way(model, gpu=True)[1]
