"""Which tensors the parameters in DeepSpeed's files are: our model's, mapped, or plain.

The files give names and shapes; at ZeRO 0 not even which optimizer state belongs to which.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megagrow.checkpoint.formats.deepspeed import names
from megagrow.checkpoint.formats.deepspeed.engine_state import KEY, EngineState
from megagrow.checkpoint.formats.deepspeed.files import Tag
from megagrow.checkpoint.formats.deepspeed.mapping import NAME as MAPPING
from megagrow.checkpoint.formats.deepspeed.mapping import (
    LocalPart,
    MappingFile,
    Rule,
    local_of,
    local_of_ours,
    local_of_placement,
    rules_for,
    whole_shape,
)
from megagrow.checkpoint.formats.deepspeed.saved_optimizer import assign
from megagrow.checkpoint.interface.accounting import enumerated
from megagrow.checkpoint.interface.model_of import replayed_model
from megagrow.checkpoint.interface.one_family import require_family
from megagrow.checkpoint.io.files import RESTORE
from megagrow.config import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.growth.optimizer_rules import OptimizerRules, group_keys
from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.state.layout import Layout
from megagrow.state.placement import PLACEHOLDER, Placement


@dataclass(frozen=True)
class Scheme:
    """What the parameters of a checkpoint are.

    Attributes:
        names: stored name to the tensor's name.
        local: (stored name, tensor, rank) to `LocalPart`, a tensor-parallel rank's part.
        last: the head's index in the layer list for one of our models, else -1.
    """

    model: ModelConfig | None
    catalog: Catalog
    names: Mapping[str, str]
    local: Callable[[str, LogicalTensor, int], LocalPart]
    last: int


def recognised(tag: Tag, client: Mapping[str, Any], family: str | None) -> Scheme:
    """One of our models, recognised by configuration or names and shapes; else plain tensors."""
    layout = tag.layout
    shapes_of = [
        {name: shape for name, shape in shapes.items() if not name.startswith(PLACEHOLDER)}
        for shapes in tag.shapes
    ]
    last = names.last_place(name for shapes in shapes_of for name in shapes)
    local = {
        names.logical_name(name, last) or name: shape
        for mp in reversed(range(0, tag.model_parallel, layout.tensor))
        for name, shape in shapes_of[mp].items()
    }
    written = replayed_model(
        client["config"], client["run_state"], vocabulary=_vocabulary(tag, local, layout)
    )
    if written is not None:
        require_family(written, where=str(tag.path), family=family)
    model = written or names.recognised_model(
        local, tensor=layout.tensor, where=tag.path, family=family
    )
    placement = Placement(build_catalog(model), layout) if model else None
    if placement is not None and _fits(placement, local):
        ours = placement
        logical = {n: names.logical_name(n, last) or n for shapes in shapes_of for n in shapes}
        return Scheme(
            model, ours.catalog, logical, lambda _, t, rank: local_of_placement(ours, t, rank), last
        )
    if written is not None:
        raise another_model(tag.path, build_catalog(written), local, layout)
    if layout.tensor > 1:
        raise CheckpointError(
            f"{tag.path}: an unknown model, split over tensor-parallel ranks in an unknown way",
            fix=f"describe it in a file {MAPPING} next to the files: see docs/formats.md",
        )
    whole = {n: shape for shapes in reversed(tag.shapes) for n, shape in shapes.items()}
    whole |= {n: buffer.shape for kept in reversed(tag.buffers) for n, buffer in kept.items()}
    plain = Placement(names.plain_catalog(whole, tag.decayed), layout)
    same = {name: name for name in whole}
    return Scheme(
        None, plain.catalog, same, lambda _, t, rank: local_of_placement(plain, t, rank), -1
    )


def another_model(
    path: Path, catalog: Catalog, found: Iterable[str], layout: Layout
) -> CheckpointError:
    """The error for parameters that do not match the model in the client state.

    Args:
        path: the checkpoint's.
        catalog: the model's tensors.
        found: names of the parameters, in the catalog's form.
        layout: the layout they are split for.
    """
    odd = sorted({tensor.name for tensor in catalog} ^ set(found))
    return CheckpointError(
        f"{path}: its client state describes a model that its parameters do not match",
        found=f"{len(set(found))} parameters"
        + (f"; in one of the two alone: {enumerated(odd)}" if odd else ", of other shapes"),
        expected=f"{len(catalog)}, for layout {layout}",
        fix=RESTORE,
    )


def _vocabulary(tag: Tag, local: Mapping[str, tuple[int, ...]], layout: Layout) -> int | None:
    """The token table's rows without padding, if known."""
    merging = tag.head.get("universal_checkpoint_info")
    rows = merging.get("original_vocab_size") if isinstance(merging, dict) else None
    if type(rows) is int and rows > 0:
        return rows
    table = local.get(names.TOKENS)
    return table[0] * layout.tensor if table else None


def mapped(tag: Tag, mapping: MappingFile, where: Path) -> Scheme:
    """The scheme that a mapping file describes."""
    layout = tag.layout
    stored = {n: shape for shapes in reversed(tag.shapes) for n, shape in shapes.items()}
    rules = rules_for(mapping, list(stored), where=where, tensor=layout.tensor)
    if mapping.model is None:  # an unlisted buffer is replicated on every rank
        buffers = {n: b.shape for kept in reversed(tag.buffers) for n, b in kept.items()}
        said = [n for n in buffers if any(re.fullmatch(r.match, n) for r in mapping.tensors)]
        rules |= {n: (n, Rule(match=re.escape(n))) for n in buffers}
        rules |= rules_for(mapping, said, where=where, tensor=layout.tensor)
        stored |= buffers
    logical = {name: to for name, (to, _) in rules.items()}
    if mapping.model is None:
        whole = {
            logical[n]: whole_shape(rules[n][1], s, tensor=layout.tensor, at=f"{where}: {n}")
            for n, s in stored.items()
        }
        catalog = names.plain_catalog(whole, {logical[n]: d for n, d in tag.decayed.items()})
        return Scheme(
            None,
            catalog,
            logical,
            lambda n, t, rank: local_of(t, rules[n][1], stored[n], rank, layout),
            -1,
        )
    placement = Placement(build_catalog(mapping.model), layout)
    odd = {t.name for t in placement.catalog} ^ set(logical.values())
    if odd:
        name = sorted(odd)[0]
        absent = name in placement.catalog
        raise CheckpointError(
            f"{where}: tensor {name}: "
            + ("no parameter is mapped to it" if absent else "the model has no such tensor")
        )

    def local(name: str, tensor: LogicalTensor, rank: int) -> LocalPart:
        rule = rules[name][1]
        try:
            found = local_of_ours(placement, tensor, rule, stored[name], rank)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: parameter {name}: {error}") from None
        if found is None:
            raise CheckpointError(
                f"{where}: parameter {name}, mapped to {tensor.name}: shape",
                found=list(stored[name]),
                expected=f"{list(placement.local(tensor, rank).shape)}"
                f"{f', part {rule.part}' if rule.part else ''}, axes joined in any way",
            )
        return found

    return Scheme(mapping.model, placement.catalog, logical, local, -1)


def _fits(placement: Placement, local: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a rank's shapes match a catalog."""
    catalog = placement.catalog
    return {t.name for t in catalog} == set(local) and all(
        placement.local(t, 0).shape == local[t.name] for t in catalog
    )


def with_roles(tag: Tag, scheme: Scheme, order: Sequence[Sequence[Sequence[str]]]) -> Catalog:
    """The catalog, with untrained tensors and aliases marked."""
    frozen = {scheme.names[name] for name in tag.frozen}
    if any(tag.saved(mp).members for mp in range(tag.model_parallel)) and not tag.zero:
        trained = {name for groups in order for group in groups for name in group}
        frozen = {
            scheme.names[n]
            for shapes in tag.shapes
            for n in shapes
            if n not in trained and n in scheme.names
        }
    aliases: dict[str, list[str]] = {}
    for other, name in tag.aliases.items() if scheme.model is None else ():
        aliases.setdefault(scheme.names[name], []).append(other)
    buffers = {scheme.names[n] for kept in tag.buffers for n in kept if n in scheme.names}
    return Catalog(
        tuple(
            replace(
                tensor,
                training="buffer" if tensor.name in buffers else "frozen"
                if tensor.name in frozen else "trained",
                aliases=tuple(aliases.get(tensor.name, ())),
            )
            for tensor in scheme.catalog
        )
    )  # fmt: skip


def group_order(
    tag: Tag, scheme: Scheme, state: Mapping[str, Any], mapping: MappingFile | None
) -> list[list[list[str]]]:
    """At ZeRO 0, whose files do not give it: the names in each group of each rank's optimizer."""
    if tag.zero:
        return []
    if scheme.last < 0:
        return [_stored_order(tag, mp, scheme, state, mapping) for mp in range(tag.model_parallel)]
    try:
        rules = OptimizerRules.from_json(state["rules"])
    except (KeyError, TypeError, ValueError):
        rules = OptimizerRules()
    keys = group_keys(scheme.catalog, rules)
    order = []
    for shapes in tag.shapes:
        modules = {names.logical_name(name, scheme.last): name for name in shapes}
        order.append(
            [
                [modules[t.name] for t in scheme.catalog if t.name in modules and keys[t.name] == k]
                or [name for name in shapes if name == f"{PLACEHOLDER}{number}"]
                for number, k in enumerate(sorted(set(keys.values())))
            ]
        )
    return order


def _stored_order(
    tag: Tag, mp: int, scheme: Scheme, state: Mapping[str, Any], mapping: MappingFile | None
) -> list[list[str]]:
    """The same for a foreign model: as supplied, else the only order that fits the shapes.

    Raises:
        CheckpointError: neither settles it.
    """
    saved, shapes = tag.saved(mp), tag.shapes[mp]
    members = tag.members(mp)
    listed = [group.get("param_names") for group in saved.groups]
    if KEY in state:  # written by megagrow
        groups = EngineState.from_json(state[KEY]).groups
        stored = {scheme.names[name]: name for name in shapes}
        order = [[stored[n] for n in group.tensors if n in stored] for group in groups]
    elif mapping is not None and mapping.groups is not None:
        order = [
            [name for name in shapes if any(re.fullmatch(rule, name) for rule in rules)]
            for rules in mapping.groups
        ]
    elif all(isinstance(one, list) for one in listed) and listed:
        order = [[str(name) for name in one] for one in listed]  # type: ignore[union-attr]
    else:
        found = assign(shapes, [[saved.shape_of(number) for number in one] for one in members])
        if found is None:
            raise CheckpointError(
                f"{tag.path}: which parameter is which tensor of the optimizer is unknown: it "
                "numbers them, and their shapes allow several answers, or none",
                found=f"{len(shapes)} parameters, groups of {[len(one) for one in members]}",
                fix=f"list the names in each group under `groups` in a file {MAPPING} next to "
                "the files, or save with ZeRO 1: see docs/formats.md",
            )
        order = found
    if [len(one) for one in order] != [len(one) for one in members] or any(
        name not in shapes for one in order for name in one
    ):
        raise tag.fault(
            "its optimizer's groups do not match the listed ones",
            f"{[len(one) for one in members]} tensors",
            f"{[len(one) for one in order]}, each a parameter of the module",
        )
    return order
