"""Laws 2, 3 and 4, for every registered operator: loss, gradients and optimizer slots.

Registered operators are tested automatically.
"""

import re

import numpy as np
import pytest
import torch

from megagrow.growth.operator import KEEPS
from megagrow.growth.policy import POLICIES
from megagrow.growth.registry import OPERATORS
from megagrow.models.catalog import build_catalog
from megagrow.models.transformer import named_tensors
from megagrow.state.boxes import whole
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.state.fresh import fresh, normals
from megagrow.transfer.state_map import Drawn
from tests.growth.models import MODELS
from tests.toys import build, grow, growths, random_state, token_batches

every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def _grown(model, operator, factor, policy=None, dtype=torch.float64):
    state = random_state(build_catalog(model), seed=1, dtype=dtype)
    return state, *grow(model, state, operator=operator, policy=policy, factor=factor)


# --- law 2: the loss ----------------------------------------------------------------------


@every_model
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("operator", "_", "factor"),
    growths(fractions=True, policies=False, keeps="loss")
    + growths(fractions=True, policies=False, keeps="old logits"),
)
def test_operators_keep_the_logits_that_they_say(operator, _, factor, model, dtype, bound):
    state, grown, growth, new = _grown(model, operator, factor, dtype=dtype)
    tokens = torch.from_numpy(token_batches(model, samples=4, seed=2)[0])[:, :-1]
    with torch.no_grad():
        before = build(model, state).logits(tokens)
        after = build(grown, new, growth.ramp).logits(tokens)
    assert before.std() > 0.1
    if OPERATORS[operator].keeps == "loss":
        assert after.shape == before.shape
    assert (after[..., : model.vocabulary] - before).abs().max() <= bound


@every_model
@pytest.mark.parametrize("factor", [2, 3])
def test_depth_stack_is_the_stack_composed_with_itself(model, factor):
    state, grown, _, new = _grown(model, "depth_stack", factor)
    by_hand = build(grown, new)
    with torch.no_grad():
        for name, parameter in named_tensors(by_hand).items():
            parameter.copy_(state.tensors[_stacked_source(name, model.layers), "master"])
    tokens = torch.from_numpy(token_batches(model, samples=4, seed=2)[0])[:, :-1]
    with torch.no_grad():
        assert torch.equal(build(grown, new).logits(tokens), by_hand.logits(tokens))
    assert grown.layers == factor * model.layers


@every_model
@pytest.mark.parametrize("factor", [2, 3])
def test_depth_interleave_repeats_each_layer(model, factor):
    state, grown, _, new = _grown(model, "depth_interleave", factor)
    by_hand = build(grown, new)
    with torch.no_grad():
        for name, parameter in named_tensors(by_hand).items():
            source = re.sub(r"(?<=layers\.)\d+", lambda n: str(int(n[0]) // factor), name)
            parameter.copy_(state.tensors[source, "master"])
    tokens = torch.from_numpy(token_batches(model, samples=4, seed=2)[0])[:, :-1]
    with torch.no_grad():
        assert torch.equal(build(grown, new).logits(tokens), by_hand.logits(tokens))


def test_every_operator_says_what_it_keeps():
    # An operator that preserves neither needs its own test, like the two above.
    assert {o.keeps for o in OPERATORS.values()} <= set(KEEPS)
    changing = [o.name for o in OPERATORS.values() if o.keeps == "nothing"]
    # width_perturb: test_noise.py; ligo: test_ligo.py; others: test_starts.py.
    assert changing == ["width_perturb", "shrink_pad_perturb", "depth_stack", "depth_interleave",
                        "depth_slices", "ligo"]  # fmt: skip


# --- law 3: gradients ---------------------------------------------------------------------


@every_model
@pytest.mark.parametrize(("operator", "_", "factor"), growths(fractions=True, policies=False))
def test_gradients_are_the_stated_multiples(operator, _, factor, model):
    state, grown, growth, new = _grown(model, operator, factor)
    samples = torch.from_numpy(token_batches(model, samples=4, seed=3)[0])
    small, large = build(model, state), build(grown, new, growth.ramp)
    small(samples).backward()
    large(samples).backward()
    old = {name: p.grad.numpy() for name, p in named_tensors(small).items()}
    stated = 0
    for name, parameter in named_tensors(large).items():
        found = parameter.grad.numpy()
        for block in growth.blocks(growth.target[name]):
            if block.grad is None:
                continue
            stated += 1
            there, here = _indices(block)
            if block.grad != 0.0:
                assert np.abs(old[block.source][here]).max() > 1e-5, "nothing to compare"
            np.testing.assert_allclose(
                found[there], block.grad * old[block.source][here], rtol=0, atol=1e-9
            )
    if OPERATORS[operator].keeps != "loss":
        assert stated == 0
    elif "exact" in OPERATORS[operator].policies:
        assert stated == sum(len(growth.blocks(tensor)) for tensor in growth.target)
    else:
        assert stated >= 1


# --- law 4: slots -------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize(("operator", "policy", "factor"), growths(fractions=True))
def test_slots_follow_their_policy(operator, policy, factor, model):
    state, _, growth, new = _grown(model, operator, factor, policy)
    for tensor in growth.target:
        for slot in ADAM_SLOTS:
            expected = np.zeros(tensor.shape)
            for block in growth.blocks(tensor):
                there, here = _indices(block)
                old = state.tensors[block.source, slot.name].numpy()
                scale = _scale_by_definition(policy, slot.name, block)
                expected[there] = scale * old[here]
                if slot.name == "master" and block.noise is not None:
                    expected[there] += _noise(block, state)
            if slot.name == "master":
                rest = _uncovered(growth, tensor)
                expected[rest] = _filled(growth.fill(tensor, slot), tensor, state)[rest]
            found = new.tensors[tensor.name, slot.name].numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-15, err_msg=tensor.name)


def _noise(block, state):
    shape, std = block.scaled(1.0).shape, block.noise.std
    if block.noise.statistic is not None:
        old = state.tensors[block.noise.statistic.tensor, "master"].numpy()
        std *= np.sqrt(np.mean(old**2))
    return std * normals(shape, whole(shape), name=block.noise.name, seed=0)


def _filled(fill, tensor, state):
    """A whole tensor as filled by a fill, in NumPy."""
    values = np.zeros(tensor.shape)
    if fill == "fresh":
        return fresh(tensor, whole(tensor.shape), seed=0)
    if isinstance(fill, str):
        return values
    old = state.tensors[fill.statistic.tensor, "master"].numpy()
    if isinstance(fill, Drawn):
        std = fill.std * np.sqrt(np.mean(old**2))
        return std * normals(tensor.shape, whole(tensor.shape), name=fill.name, seed=0)
    axis = fill.statistic.axis
    means = old.mean(axis=axis, keepdims=True)
    there = [[a.target_start + u * a.target_step for u in range(a.length)] for a in fill.axes]
    here = [
        [0] * a.length if axis in (None, at) else [a.source_start + u for u in range(a.length)]
        for at, a in enumerate(fill.axes)
    ]
    values[np.ix_(*there)] = fill.coefficient * means[np.ix_(*here)]
    return values


def _uncovered(growth, tensor):
    rest = np.ones(tensor.shape, dtype=bool)
    for block in growth.blocks(tensor):
        rest[_indices(block)[0]] = False
    return rest


def _scale_by_definition(policy, slot, block):
    if slot == "master":
        return block.param
    if policy in ("exact", "shen"):
        copied = policy == "exact" or block.param != 0.0
        return {"exp_avg": block.grad, "exp_avg_sq": block.grad**2}[slot] * copied
    kept = 0.0 if block.new else 1.0
    return {"copy": 1.0, "reset": 0.0, "sparkling": kept, "kept": kept}[policy]


@every_model
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("policy", OPERATORS["width"].policies)
def test_width_by_its_formula(policy, factor, model):
    """For every element: the old element that it copies, and the factor."""
    state, _, growth, new = _grown(model, "width", factor, policy)
    for tensor in growth.target:
        pick, copy_number = [], []
        for meaning, n in zip(tensor.axes, tensor.shape, strict=True):
            at = np.arange(n)
            if meaning == "embed":  # the stream is [h, h, ...]
                pick.append(at % (n // factor))
                copy_number.append(at // (n // factor))
            elif meaning in ("kv_group", "ffn"):  # copies next to their source
                pick.append(at // factor)
                copy_number.append(at % factor)
            else:
                pick.append(at)
                copy_number.append(np.zeros_like(at))
        is_new = sum(np.ix_(*copy_number)) > 0
        grown_axes = sum(axis in ("embed", "kv_group", "ffn") for axis in tensor.axes)
        last_norm = tensor.name.startswith("final_norm.")
        param = 1 / factor if last_norm or grown_axes == 2 else 1.0
        grad = 1.0 if last_norm else 1 / factor
        scales = {
            "exact": (param, grad, grad**2),
            "shen": (param, grad, grad**2),
            "reset": (param, 0.0, 0.0),
            "copy": (param, 1.0, 1.0),
            "sparkling": (param, ~is_new, ~is_new),
            "kept": (param, ~is_new, ~is_new),
        }[policy]
        for slot, scale in zip(ADAM_SLOTS, scales, strict=True):
            expected = state.tensors[tensor.name, slot.name].numpy()[np.ix_(*pick)] * scale
            found = new.tensors[tensor.name, slot.name].numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-15, atol=0, err_msg=tensor.name)


@every_model
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("policy", ["copy", "kept", "reset"])
def test_depth_stack_by_its_formula(policy, factor, model):
    state, _, growth, new = _grown(model, "depth_stack", factor, policy)
    for tensor in growth.target:
        for slot in ADAM_SLOTS:
            source = _stacked_source(tensor.name, model.layers)
            old = source == tensor.name
            keep = slot.name == "master" or policy == "copy" or (policy == "kept" and old)
            expected = state.tensors[source, slot.name] * float(keep)
            assert torch.equal(new.tensors[tensor.name, slot.name], expected)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_belongs_to_an_operator(name):
    assert any(name in operator.policies for operator in OPERATORS.values())


def _stacked_source(name, layers):
    return re.sub(r"(?<=layers\.)\d+", lambda number: str(int(number[0]) % layers), name)


def _indices(block):
    """(target, source) elements of a block, as lists of indices per axis."""
    there = [[a.target_start + u * a.target_step for u in range(a.length)] for a in block.axes]
    here = [[a.source_start + u * a.source_step for u in range(a.length)] for a in block.axes]
    return np.ix_(*there), np.ix_(*here)
