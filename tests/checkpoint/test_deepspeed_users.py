"""A user's own model under DeepSpeed: nothing is lost, and its engine resumes bit for bit."""

import itertools

import pytest

from tests.checkpoint.users import go_on
from tests.ranks import run_ranks

TRAINED = ["a.bias", "a.weight", "emb.weight", "head.weight", "norm.bias", "norm.weight"]


def case(zero, dtype="fp32", optimizer="adamw", *, then=None, route=("deepspeed",), **more):
    first = {"zero": zero, "dtype": dtype, "optimizer": optimizer, **more}
    second = first | {"zero": zero if then is None else then, "round_robin_gradients": False}
    if "universal" in route:
        second["universal"] = True
    name = "-".join(map(str, (zero, dtype, optimizer, second["zero"], *route, *more)))
    return name, first, second, route


def assert_goes_on(cases, world, root):
    for found in run_ranks(world, go_on, root, cases, timeout=500.0):
        assert set(found) == {name for name, *_ in cases}
        for name, (at_load, after, moved, _) in found.items():
            assert sorted(moved) == TRAINED, name  # so that "nothing differs" says something
            assert at_load == [], name
            assert after == [], name


def test_a_users_engine_goes_on_bit_for_bit_from_what_was_converted(tmp_path):
    cases = [
        case(0), case(0, "bf16"), case(0, optimizer="sgd"), case(1, "bf16", "sgd"),
        case(2, route=("native", "dcp", "deepspeed")), case(2, "bf16", then=1), case(3, "bf16"),
    ]  # fmt: skip
    assert_goes_on(cases, 1, tmp_path)


def test_dealt_out_parameters_are_collected(tmp_path):
    """With `round_robin_gradients` ZeRO deals parameters over two ranks before it cuts them."""
    assert_goes_on([case(2, round_robin_gradients=True), case(1, "bf16", then=2)], 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_every_users_engine_goes_on(world, tmp_path):
    kinds = itertools.product((0, 1, 2, 3), ("fp32", "bf16"), ("adamw", "amsgrad", "sgd"))
    cases = [case(*kind) for kind in kinds]
    cases += [case(zero, optimizer="plain_sgd") for zero in (1, 2, 3)]
    cases += [case(a, then=b) for a, b in itertools.permutations(range(4), 2)]
    cases += [case(a, "bf16", then=b) for a, b in itertools.permutations(range(4), 2)]
    cases += [case(zero, route=("native", "deepspeed")) for zero in range(4)]
    cases += [case(zero, route=("universal",)) for zero in (1, 2)]
    assert_goes_on(cases, world, tmp_path)
