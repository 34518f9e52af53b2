"""The model that a state is of, from what its run has written down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megagrow.checkpoint.manifest import CheckpointMeta
from megagrow.config import GrowConfig, ModelConfig
from megagrow.config.load import in_words
from megagrow.errors import CheckpointError, MegagrowError
from megagrow.growth.growth import plan_growth
from megagrow.model.catalog import build_catalog
from megagrow.state.catalog import Catalog


def model_of(meta: CheckpointMeta) -> ModelConfig:
    """The model whose tensors `meta.catalog` lists, growths included.

    Raises:
        CheckpointError: the configuration tells of no model, or of one with other tensors.
    """
    section = meta.config.get("model")
    if not isinstance(section, Mapping):
        raise CheckpointError(
            "the checkpoint does not tell the shape of its model",
            expected="a section `model` in its configuration",
            mend="convert to native or dcp, which need no shape",
        )
    try:
        model = ModelConfig(**section)
        if model.vocab is None:
            model = model.model_copy(update={"vocab": _rows(meta.catalog, "embedding.token")})
        for grow in _growths(meta):
            model, _ = plan_growth(grow, model)
    except (ValidationError, MegagrowError, TypeError, ValueError) as error:
        raise CheckpointError(
            "the checkpoint's configuration describes no model", found=in_words(error)[:500]
        ) from None
    wanted = {tensor.name: tensor.shape for tensor in build_catalog(model)}
    found = {tensor.name: tensor.shape for tensor in meta.catalog}
    if wanted != found:
        name = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
        raise CheckpointError(
            f"tensor {name}: the checkpoint's configuration describes another model",
            found=f"shape {list(found[name])}" if name in found else "no such tensor",
            expected=f"shape {list(wanted[name])}" if name in wanted else "no such tensor",
        )
    return model


# What a model computes of its tensors; the rest of a section says how it is trained.
_FUNCTION = (
    "family", "layers", "hidden", "heads", "kv_groups", "head_dim", "ffn", "tie_embeddings",
    "norm_eps", "rope_theta",
)  # fmt: skip


def catalog_for(run: CheckpointMeta, source: CheckpointMeta) -> Catalog:
    """The catalog of a run that is to start from the parameters of a source.

    Args:
        run: the source's catalog under the run's configuration.
        source: what the source tells.

    Raises:
        CheckpointError: the run's model has other tensors, or computes something else of them.
    """
    _require_vocabulary(run, source)
    model = model_of(run)
    if "model" in source.config:
        before = model_of(source)
        for key in _FUNCTION:
            found, expected = getattr(model, key), getattr(before, key)
            if found != expected and (key, model.family) != ("rope_theta", "gpt2"):
                setting = key.replace("kv_groups", "kv_heads")
                raise CheckpointError(
                    f"model.{setting}: the run's model is not the one of these parameters",
                    found=found,
                    expected=expected,
                    mend=f"set model.{setting}: {expected} in the run's configuration",
                )
    return build_catalog(model)


def _require_vocabulary(run: CheckpointMeta, source: CheckpointMeta) -> None:
    rows, wanted = _rows(source.catalog, "embedding.token"), run.config["model"].get("vocab")
    if None in (rows, wanted) or rows == wanted or _growths(run):
        return
    larger = rows is not None and rows > wanted
    raise CheckpointError(
        "model.vocab: the run's vocabulary is not that of these weights",
        found=f"{wanted} (of model.vocab, or of the tokenizer of data.path)",
        expected=rows,
        mend="prepare the data with the weights' own tokenizer: launch/prepare_data.py --tokenizer"
        + (f"; if it is that one, set model.vocab: {rows}" if larger else ""),
    )


def _growths(meta: CheckpointMeta) -> list[GrowConfig]:
    """The growths that the state has been through."""
    stages: Any = meta.config.get("stages", [])
    reached = meta.run_state.get("growth_stage", 0)
    sections = [stage.get("grow") for stage in stages[1 : reached + 1]]
    return [GrowConfig(**section) for section in sections if section]


def _rows(catalog: Catalog, name: str) -> int | None:
    return catalog[name].shape[0] if name in catalog else None
