"""The growth operators as a table, for `launch/grow.py --list` and the README."""

from __future__ import annotations

from collections.abc import Sequence

from megagrow.growth.operator import Operator
from megagrow.growth.policy import POLICIES
from megagrow.growth.registry import OPERATORS

_HEADINGS = ("operator", "what it does", "keeps", "symmetry breaker", "state policies", "source")


def text() -> str:
    """For a terminal: a paragraph per operator, then the policies."""
    lines = []
    for operator in OPERATORS.values():
        lines.append(operator.name)
        values = _row(operator)[1:]
        lines += [f"  {h:<16}  {v}" for h, v in zip(_HEADINGS[1:], values, strict=True)]
    lines += ["", "state policies"]
    width = max(map(len, POLICIES))
    lines += [f"  {p.name:<{width}}  {p.summary}" for p in POLICIES.values()]
    return "\n".join(lines)


def markdown() -> str:
    """For the README: two tables."""
    operators = [_row(operator) for operator in OPERATORS.values()]
    named = [(f"`{name}`", *rest) for name, *rest in operators]
    policies = [(f"`{p.name}`", p.summary) for p in POLICIES.values()]
    return "\n\n".join(
        (_markdown(_HEADINGS, named), _markdown(("state policy", "what it does"), policies))
    )


def _row(operator: Operator) -> tuple[str, ...]:
    keeps = {"nothing": "neither"}.get(operator.keeps, operator.keeps)
    if operator.ramp:
        keeps += ", under its mask"
    if "exact" in operator.policies:
        keeps += "; dynamics with exact"
    policies = ", ".join(operator.policies)
    return operator.name, operator.summary, keeps, operator.breaker, policies, operator.source


def _markdown(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
