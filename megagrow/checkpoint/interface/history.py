"""Where a model comes from: the checkpoint that it started from and its growths, as JSON records.

A run's history follows from its configuration and state; weights without a run carry theirs under
the key `history` of their configuration.  A record is one of

    {"source": {"name": ..., "format": ..., "step": ..., "sha256": ...}}
    {"growth": {"operator": ..., "sizes": ..., "parameters": [before, after], "step": ..., ...}}

with names, never paths, since a record goes with the model to other machines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megagrow.checkpoint.interface.model_of import Described, first_model
from megagrow.config import Config, GrowConfig, ModelConfig
from megagrow.config.growths import SIZES
from megagrow.config.load import parse_config
from megagrow.errors import MegagrowError
from megagrow.growth.plan import plan_growth
from megagrow.models.catalog import build_catalog
from megagrow.schedule.stages import sample_length, stage_batch

KEY = "history"
Record = Mapping[str, Any]
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)")
_PATHS = ("tokenizer", "old_tokenizer")


def source_name(path: str | Path) -> str:
    """The name of a model for other people: OWNER/NAME in Hugging Face's cache, else the last part.

    Of a step of a run, the run's directory comes first.
    """
    found = _CACHED.search(str(path))
    if found:
        return f"{found[1]}/{found[2]}"
    parts = [part for part in Path(path).parts if part not in ("checkpoints", "/")]
    last = parts[-1] if parts else str(path)
    return "/".join(parts[-2:]) if re.fullmatch(r"step_\d+", last) else last


def growth_record(
    grow: GrowConfig,
    before: ModelConfig,
    after: ModelConfig,
    *,
    step: int | None = None,
    tokens: int | None = None,
) -> Record:
    """The record of a growth.

    Args:
        grow: its section.
        before, after: the models.
        step, tokens: of the run so far, if it was in a run.
    """
    sizes = [
        f"{key} {before.effective(key)} -> {after.effective(key)}"
        for key in SIZES
        if before.effective(key) != after.effective(key)
    ]
    if before.tie_embeddings != after.tie_embeddings:
        sizes.append("untied head")
    given = grow.model_dump(mode="json", exclude_defaults=True)
    others = {key: v for key, v in given.items() if key not in ("operator", "factor", "target")}
    named = {key: source_name(v) if key in _PATHS else v for key, v in others.items()}
    record = {
        "operator": grow.operator,
        "sizes": ", ".join(sizes),
        "parameters": [build_catalog(before).parameters, build_catalog(after).parameters],
        **({} if step is None else {"step": step}),
        **({} if tokens is None else {"tokens": tokens}),
        **({"settings": named} if named else {}),
    }
    return {"growth": record}


def history(state: Described) -> tuple[Record, ...]:
    """The records of a checkpoint, oldest first; empty if it has neither source nor growth."""
    carried = state.config.get(KEY)
    records: list[Record] = list(carried) if isinstance(carried, list) else []
    origin = state.run_state.get("origin")
    if isinstance(origin, Mapping):
        records += origin.get(KEY) or ()
        source = {key: origin.get(key) for key in ("format", "step", "sha256")}
        records.append({"source": {"name": source_name(str(origin.get("path"))), **source}})
    if "stages" not in state.config:
        return tuple(records)
    try:
        config = parse_config(_of_run(state.config))
        records += _growths(config, state)
    except (MegagrowError, ValueError, TypeError, LookupError) as error:
        text = str(error).splitlines()[0]
        records.append({"unknown": f"the growths of the run, whose record is damaged: {text}"})
    return tuple(records)


def _of_run(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: value for key, value in config.items() if key != KEY}


def _growths(config: Config, state: Described) -> list[Record]:
    reached = int(state.run_state.get("growth_stage", 0))
    ends: Sequence[int] = [0, *state.run_state.get("ends", ())]
    tokens, model, found = 0, first_model(state), []
    total: int | None = state.run_state.get("tokens")
    for index, stage in enumerate(config.stages[: reached + 1]):
        start = ends[index] if index < len(ends) else None
        if stage.grow is not None:
            grown, _ = plan_growth(stage.grow, model)
            # Batch and length may have been other than those of the configuration at the end.
            known = start is not None and total is not None and tokens <= total
            found.append(
                growth_record(
                    stage.grow, model, grown, step=start, tokens=tokens if known else None
                )
            )
            model = grown
        if index + 1 < len(ends) and start is not None:
            samples = (ends[index + 1] - start) * stage_batch(config, index).global_
            tokens += samples * sample_length(config, model, index)
    return found
