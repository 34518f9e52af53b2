"""Recover the ModelConfig of a checkpoint from its saved run configuration.

A run saves its first model and its growths; the model of a checkpoint is the first one with
the growths that the state has been through replayed.  `config["model"]` alone is right only
before the first growth, so only this file reads it (a test enforces that).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pydantic import ValidationError

from megagrow.config import GrowConfig, ModelConfig
from megagrow.config.load import in_words
from megagrow.config.model import MODEL_SETTINGS
from megagrow.config.optimization import OptimizerConfig, StageOptimizerConfig
from megagrow.errors import CheckpointError, MegagrowError
from megagrow.growth.plan import plan_growth
from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import Catalog


class Described(Protocol):
    """Has what is needed to recover a model: a `CheckpointSource` or a `CheckpointMeta`."""

    @property
    def catalog(self) -> Catalog:
        """The logical tensors."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the run."""

    @property
    def run_state(self) -> Mapping[str, Any]:
        """The run's position, including the number of growth stages completed."""


def replayed_model(
    config: Mapping[str, Any],
    run_state: Mapping[str, Any],
    *,
    vocabulary: int | None = None,
    growths: bool = True,
) -> ModelConfig | None:
    """The first model of a run, grown as often as the run has; None if there is no configuration.

    Args:
        vocabulary: the tokenizer's size, where the configuration leaves it to that.
        growths: False: leave out the growths.

    Raises:
        CheckpointError: the sections `model` and `stages` do not describe a model.
    """
    section = _section(config)
    if section is None:
        return None
    try:
        model = ModelConfig.model_validate(section)
        if model.vocab is None:
            model = model.model_copy(update={"vocab": vocabulary})
        for grow in _growths(config, run_state) if growths else ():
            model, _ = plan_growth(grow, model)
        _ = model.vocabulary  # raises if it is still unknown
    except (ValidationError, MegagrowError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            "the checkpoint's configuration describes no model", found=in_words(error)[:500]
        ) from None
    return model


def family_in(config: Mapping[str, Any]) -> str | None:
    """The family of a run's model, which no growth changes; None if the configuration has none."""
    section = _section(config)
    found = section.get("family") if isinstance(section, Mapping) else None
    return found if isinstance(found, str) else None


def first_model(state: Described) -> ModelConfig:
    """The model that a run started with, before its first growth.

    Raises:
        CheckpointError: no model is configured.
    """
    vocabulary = _rows(state.catalog)
    model = replayed_model(state.config, {}, vocabulary=vocabulary, growths=False)
    if model is None:
        raise _untold()
    return model


def recorded_model(state: Described) -> ModelConfig | None:
    """The model whose tensors `state.catalog` lists, growths included; None if not configured.

    Raises:
        CheckpointError: the configuration is no model, or one with other tensors.
    """
    vocabulary = _rows(state.catalog)
    model = replayed_model(state.config, state.run_state, vocabulary=vocabulary)
    if model is None:
        return None
    wanted = {tensor.name: tensor.shape for tensor in build_catalog(model)}
    found = {tensor.name: tensor.shape for tensor in state.catalog}
    if wanted != found:
        name = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
        raise CheckpointError(
            f"tensor {name}: the checkpoint's configuration describes another model",
            found=f"shape {list(found[name])}" if name in found else "no such tensor",
            expected=f"shape {list(wanted[name])}" if name in wanted else "no such tensor",
        )
    return model


def model_of(state: Described) -> ModelConfig:
    """The model whose tensors `state.catalog` lists, growths included.

    Raises:
        CheckpointError: no model is configured, or one with other tensors.
    """
    model = recorded_model(state)
    if model is None:
        raise _untold()
    return model


def _untold() -> CheckpointError:
    return CheckpointError(
        "the checkpoint does not say which model it holds",
        expected="a section `model` in its configuration",
        fix="convert to native or dcp, which do not need it",
    )


def documents_apart(state: Described) -> bool:
    """Whether documents of a sample did not see each other in the state's growth stage."""
    stages, reached = state.config.get("stages"), state.run_state.get("growth_stage", 0)
    before = stages[: reached + 1] if isinstance(stages, list) else ()
    sections = [state.config, *(stage for stage in before if isinstance(stage, Mapping))]
    given = [one["data"] for one in sections if isinstance(one.get("data"), Mapping)]
    said = [data["documents"] for data in given if data.get("documents") is not None]
    return said[-1:] == ["mask"]


def optimizer_of(state: Described) -> OptimizerConfig:
    """The optimizer's settings in the state's growth stage; defaults if none are stored.

    A result of another format stores them with the state that it resumes from.
    """
    settings: OptimizerConfig = section(OptimizerConfig, state.config.get("optimizer"))
    stages, reached = state.config.get("stages"), state.run_state.get("growth_stage", 0)
    for stage in stages[: reached + 1] if isinstance(stages, list) else ():
        given = stage.get("optimizer") if isinstance(stage, Mapping) else None
        settings = settings.changed(section(StageOptimizerConfig, given))
    return settings


def section(kind: Any, data: Any) -> Any:
    """A section of a run's configuration, or its defaults if there is no valid one."""
    try:
        return kind.model_validate(data)
    except ValueError:
        return kind()


def refuse_ramp(state: Described, *, program: str) -> None:
    """Check that a state can be exported to another program, which has no notion of ramps.

    Raises:
        CheckpointError: a ramp is under way: the new units do not yet count in full.
    """
    if state.run_state.get("ramp"):
        raise CheckpointError(
            "new units of the last growth count in part only, by a mask that "
            f"no model of {program} has",
            fix="train to the end of the ramp (grow.ramp) and convert that checkpoint",
        )


# Settings that do not change what a model computes from given parameters. All others are compared.
NOT_OF_THE_FUNCTION = frozenset(
    {
        "dropout",  # in training only
        "init_std",
        "mup",  # initial values and rates of tensors
        "sequence",  # how long samples are; the length of a position table is compared as a shape
        "vocab",  # see `_require_vocabulary`
        "activation_checkpointing",
        "compile",
    }
)


def catalog_for(run: Described, source: Described) -> Catalog:
    """The catalog of a run that will start from the parameters of a source.

    Args:
        run: the source's catalog under the run's configuration.
        source: the source's metadata.

    Raises:
        CheckpointError: the run's model has other tensors, or computes another function of them.
    """
    _require_vocabulary(run, source)
    model = model_of(run)
    before = recorded_model(source)
    if before is not None:
        require_same_function(model, before)
    return build_catalog(model)


def require_same_function(model: ModelConfig, before: ModelConfig, *, where: str = "") -> None:
    """Require that two models compute the same of the same parameters.

    Args:
        model: the run's.
        before: that of the parameters.
        where: the checkpoint, for the error.

    Raises:
        CheckpointError: a setting differs that changes what the model computes.
    """
    for setting in (key for key in MODEL_SETTINGS if key not in NOT_OF_THE_FUNCTION):
        found, expected = model.effective(setting), before.effective(setting)
        unused = setting == "rope_theta" and model.architecture.positions != "rotary"
        if found != expected and not unused:
            raise CheckpointError(
                f"{where}model.{setting}: the run's model is not the one of these parameters",
                found=found,
                expected=expected,
                fix=f"set model.{setting}: {expected} in the run's configuration",
            )


def _require_vocabulary(run: Described, source: Described) -> None:
    rows, wanted = _rows(source.catalog), (_section(run.config) or {}).get("vocab")
    if rows is None or wanted is None or rows == wanted or _growths(run.config, run.run_state):
        return
    larger = rows > wanted
    raise CheckpointError(
        "model.vocab: the run's vocabulary is not that of these weights",
        found=f"{wanted} (of model.vocab, or of the tokenizer of data.path)",
        expected=rows,
        fix="prepare the data with the weights' own tokenizer: launch/prepare_data.py --tokenizer"
        + (f"; if it is that one, set model.vocab: {rows}" if larger else ""),
    )


def _growths(config: Mapping[str, Any], run_state: Mapping[str, Any]) -> list[GrowConfig]:
    """The growths that the state has been through."""
    stages: Any = config.get("stages") or []
    reached = run_state.get("growth_stage", 0)
    if reached and reached >= len(stages):
        raise ValueError(f"the state is in growth stage {reached}, and stages are {len(stages)}")
    # That of the first stage, too: a run that starts from a checkpoint may begin with a growth.
    sections = [stage.get("grow") for stage in stages[: reached + 1]]
    return [GrowConfig(**section) for section in sections if section]


def _rows(catalog: Catalog) -> int | None:
    """Number of rows of the token table."""
    tables = [tensor for tensor in catalog if tensor.role == "embedding"]
    return tables[0].shape[0] if tables else None


def _section(config: Mapping[str, Any]) -> Any:
    """The model that a run started with, as stored."""
    return config.get("model")
