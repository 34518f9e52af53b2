"""The growth operators and state policies by name."""

from __future__ import annotations

from difflib import get_close_matches

from megagrow.errors import GrowthError
from megagrow.growth.operator import Operator
from megagrow.growth.operators.axes import HEAD_DIM, KV_GROUPS, SEQUENCE
from megagrow.growth.operators.depth import DEPTH_IDENTITY, DEPTH_INTERLEAVE, DEPTH_STACK
from megagrow.growth.operators.depth_slices import DEPTH_SLICES
from megagrow.growth.operators.ligo import LIGO
from megagrow.growth.operators.ramp import WIDTH_RANDOM
from megagrow.growth.operators.shrink import SHRINK_PAD_PERTURB
from megagrow.growth.operators.untie import UNTIE
from megagrow.growth.operators.vocabulary import VOCAB
from megagrow.growth.operators.width import (
    WIDTH,
    WIDTH_DIAG,
    WIDTH_NOISE,
    WIDTH_PERTURB,
    WIDTH_SPLIT,
)
from megagrow.growth.operators.width_fresh import WIDTH_FRESH
from megagrow.growth.policy import POLICIES, StatePolicy

_ALL = (
    WIDTH,
    WIDTH_DIAG,
    WIDTH_SPLIT,
    WIDTH_NOISE,
    WIDTH_PERTURB,
    WIDTH_FRESH,
    WIDTH_RANDOM,
    SHRINK_PAD_PERTURB,
    DEPTH_STACK,
    DEPTH_INTERLEAVE,
    DEPTH_IDENTITY,
    DEPTH_SLICES,
    LIGO,
    HEAD_DIM,
    KV_GROUPS,
    VOCAB,
    SEQUENCE,
    UNTIE,
)
OPERATORS: dict[str, Operator] = {operator.name: operator for operator in _ALL}


def find_operator(name: str) -> Operator:
    """Find an operator by name; raises GrowthError with the nearest name."""
    if name not in OPERATORS:
        raise GrowthError(
            "grow.operator: no such growth operator",
            found=name,
            expected=", ".join(sorted(OPERATORS)),
            fix=_nearest(name, list(OPERATORS), "grow.operator"),
        )
    return OPERATORS[name]


def find_operators(names: str) -> tuple[Operator, ...]:
    """Find the operators of names joined by ``+``; raises GrowthError as `find_operator` does."""
    return tuple(find_operator(name.strip()) for name in names.split("+"))


def find_policy(name: str) -> StatePolicy:
    """Find a state policy by name; raises GrowthError with the nearest name."""
    if name not in POLICIES:
        raise GrowthError(
            "grow.state_policy: no such state policy",
            found=name,
            expected=", ".join(sorted(POLICIES)),
            fix=_nearest(name, list(POLICIES), "grow.state_policy"),
        )
    return POLICIES[name]


def _nearest(name: str, known: list[str], key: str) -> str:
    close = get_close_matches(name, known, n=1)
    return f"set {key} to {close[0]}" if close else f"set {key} to one of the names above"
