"""Which tensors a growth stage trains; the others are frozen (`stages[i].train`).

    all                 every tensor
    new                 the tensors that the stage's growth adds: with depth operators those of the
                        new layers, with `untie` the head
    [writer, layers.3.*] those with these roles (`megagrow.state.roles`) or names

A frozen tensor keeps its values bit for bit. It has no gradient, no moments and no weight decay,
and the backward pass ends at the lowest trained tensor. That it is frozen is a property of its
entry in the catalog (`LogicalTensor.training`), from which the optimizer's groups, the slots in
memory and in checkpoints, and the counts of memory and FLOPs follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from megagrow.config import Config, ModelConfig, Trained
from megagrow.errors import ConfigError
from megagrow.growth.plan import Growth
from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.state.roles import ROLES


def trained_catalog(
    asked: Trained, catalog: Catalog, *, growth: Growth | None, index: int
) -> Catalog:
    """A stage's catalog, with the tensors that it does not train marked as frozen.

    Args:
        asked: `stages[index].train`.
        catalog: all tensors of the stage's model.
        growth: into the stage, if it has one.
        index: of the stage.

    Raises:
        ConfigError: nothing would be trained, a tensor would be trained in part, or a name is
            unknown.
    """
    key = f"stages[{index}].train"
    if asked == "all":
        return catalog
    trained = _new(catalog, growth, key) if asked == "new" else _named(asked, catalog, key)
    return catalog.with_frozen({tensor.name for tensor in catalog} - trained)


def trained_stages(
    config: Config, models: Sequence[ModelConfig], growths: Sequence[Growth | None]
) -> tuple[list[Growth | None], list[Catalog]]:
    """The growths and the catalogs of all stages, with the tensors that are frozen in each.

    Args:
        config: the run.
        models, growths: of the stages.

    Raises:
        ConfigError: as `trained_catalog`; a stage grows after one that freezes tensors and does not
            say what it trains; a rule predicts what frozen parameters do not follow.
    """
    found: list[Growth | None] = []
    catalogs: list[Catalog] = []
    for i, (stage, model, growth) in enumerate(zip(config.stages, models, growths, strict=True)):
        catalog = build_catalog(model)
        if stage.train is not None:
            catalog = trained_catalog(stage.train, catalog, growth=growth, index=i)
        elif i > 0 and growth is None:
            catalog = catalogs[-1]
        elif i > 0 and catalogs[-1].frozen:
            raise ConfigError(
                f"stages[{i}]: grows a model of which stages[{i - 1}] trains a part, and does not "
                "say what it trains itself",
                fix=f"set stages[{i}].train to all, to new, or to a list of roles or names",
            )
        small = catalogs[-1] if i > 0 else catalog
        if growth is not None and (small.frozen or catalog.frozen):
            growth = replace(growth, small=small if i > 0 else growth.small, target=catalog)
        found.append(growth)
        catalogs.append(catalog)
    for i, stage in enumerate(config.stages):
        until = stage.until
        if until.looks_ahead and any(catalog.frozen for catalog in catalogs[i : i + 2]):
            raise ConfigError(
                f"stages[{i}].until.{until.rule}: predicts by laws of models that are trained as a "
                "whole",
                found="a part that is frozen, in this stage or the next (stages[].train)",
                fix="end the stage by steps, tokens, flops or slope",
            )
    return found, catalogs


def training_in_words(
    catalog: Catalog, *, before: Catalog | None = None, growth: Growth | None = None
) -> list[str]:
    """What a stage trains, a line each; none if everything was trained and is.

    Args:
        catalog: of the stage.
        before: of the stage before it, if there is one.
        growth: between them, if there is one.
    """
    frozen = [tensor for tensor in catalog if tensor.training == "frozen"]
    lines = []
    if frozen:
        count = catalog.parameters - sum(tensor.volume for tensor in frozen)
        lines.append(
            f"{count:,} of {catalog.parameters:,} parameters, in {len(catalog) - len(frozen)} of "
            f"{len(catalog)} tensors; the others are frozen, without gradients and moments"
        )
    if before is not None and before.frozen:
        again = sum(
            tensor.volume
            for tensor in catalog
            if tensor.training == "trained"
            and not before.frozen.isdisjoint(_sources(tensor, growth))
        )
        if again:
            lines.append(
                f"{again:,} parameters that were frozen: their moments start at zero, and the "
                "steps of their bias correction count from here"
            )
    return lines


def _sources(tensor: LogicalTensor, growth: Growth | None) -> list[str]:
    """The tensors that a tensor of the stage goes on from."""
    if growth is None:
        return [tensor.name]
    return [block.source for block in growth.blocks(tensor) if not block.new]


def _new(catalog: Catalog, growth: Growth | None, key: str) -> set[str]:
    """The tensors that a growth adds.

    Raises:
        ConfigError: it adds none, or adds elements to tensors that have old ones.
    """
    if growth is None:
        raise ConfigError(
            f"{key}: new, but nothing is new in a stage without a growth",
            fix=f"add {key[:-6]}.grow, or list roles or names of tensors",
        )
    name = growth.operator.name
    if growth.fit_steps:
        raise ConfigError(
            f"{key}: new, but {name} makes every tensor of fitted maps, so that none is old",
            fix=f"leave {key} out, or choose a depth operator",
        )
    added: set[str] = set()
    for tensor in catalog:
        old = [block for block in growth.blocks(tensor) if not block.new]
        if not old:
            added.add(tensor.name)
        elif sum(block.volume for block in old) < tensor.volume:
            raise ConfigError(
                f"{key}: new, but {name} adds elements to {tensor.name}, which has old ones as "
                "well; a tensor is trained as a whole or frozen as a whole",
                found=f"grow.operator {name}",
                expected="an operator that adds whole tensors: one of depth alone, or untie",
                fix=f"choose such an operator, or list roles or names of tensors in {key}",
            )
    if not added:
        raise ConfigError(
            f"{key}: new, but {name} adds no tensor here",
            fix=f"leave {key} out, or list roles or names of tensors",
        )
    return added


def _named(asked: Sequence[str], catalog: Catalog, key: str) -> set[str]:
    """The tensors with the given roles or names.

    Raises:
        ConfigError: one of them is of no tensor.
    """
    found: set[str] = set()
    for one in asked:
        matching = {tensor.name for tensor in catalog if _is(tensor, one)}
        if not matching:
            roles = sorted({tensor.role for tensor in catalog})
            known = [*roles, *(tensor.name for tensor in catalog)]
            close = get_close_matches(one, known, n=3)
            last = catalog.tensors[-1].name
            hint = f"one of {', '.join(roles)}, or a name or pattern such as {last}"
            raise ConfigError(
                f"{key}: {one!r} is neither the role nor the name of a tensor of this stage's model"
                + (", although it is a role" if one in ROLES else ""),
                found=one,
                expected=hint,
                fix=f"did you mean {' or '.join(close)}?"
                if close
                else "launch/inspect.py lists the names of a checkpoint's tensors",
            )
        found |= matching
    return found


def _is(tensor: LogicalTensor, asked: str) -> bool:
    return tensor.role == asked or fnmatchcase(tensor.name, asked)
