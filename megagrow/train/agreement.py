"""Whether a checkpoint belongs to a run, and what has changed since it was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megagrow.checkpoint import NativeCheckpoint
from megagrow.checkpoint.interface.model_of import model_of, require_same_function
from megagrow.config import Config, ModelConfig
from megagrow.config.load import parse_config
from megagrow.data.run_data import RunData
from megagrow.data.sampler import VALIDATION, VALIDATION_BEFORE
from megagrow.errors import CheckpointError, ConfigError
from megagrow.state.catalog import Catalog
from megagrow.train.checkpoints import DIRECTORY
from megagrow.train.fingerprints import require_run, require_same_data
from megagrow.train.rates import require_settled_betas
from megagrow.train.run_plan import RunPlan
from megagrow.train.state import RunState


def check_agreement(
    checkpoint: NativeCheckpoint, *, config: Config, data: RunData, plan: RunPlan
) -> tuple[RunState, list[str]]:
    """Check that a checkpoint belongs to this run.

    Returns:
        The run's state, and one line per setting that has changed and may change.

    Raises:
        CheckpointError: data, tokenizer, seed or model differ, or the run state is damaged.
    """
    where = str(checkpoint.path)
    require_run(checkpoint)
    require_same_data(checkpoint, data)
    seed = checkpoint.config.get("run", {}).get("seed")
    if seed != config.run.seed:
        raise CheckpointError(
            f"{where}: run.seed differs, so the order of samples would",
            found=config.run.seed,
            expected=seed,
            fix=f"set run.seed={seed}",
        )
    try:
        state = RunState.from_json(checkpoint.run_state)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: the run state in its manifest is damaged: {error!r}",
                              fix="resume from an earlier checkpoint") from error  # fmt: skip
    if state.growth_stage >= len(plan.stages):
        raise CheckpointError(
            f"{where}: is in growth stage {state.growth_stage}, which `stages` does not have",
            found=f"{len(plan.stages)} stages",
            fix="resume with the stages that the run was started with",
        )
    _require_model(checkpoint, plan, state, config)
    _require_stages_ahead(plan, state, where=where)
    _require_betas(checkpoint, plan, state)
    _require_mixture(state, data=data, plan=plan, where=where)
    changes = _changes(_completed(checkpoint.config), _dumped(config))
    kept = {slot.name for slot in plan.slots}
    dropped = [slot.name for slot in checkpoint.slots if slot.name not in kept]
    if dropped:
        changes.append(
            f"{', '.join(dropped)} of the checkpoint: left out, {config.optimizer.name} has no "
            "such slot"
        )
    lengths = [stage.plan.sequence for stage in plan.stages[: state.growth_stage + 1]]
    if state.position.measured(lengths[-1]) != state.position and len(set(lengths)) > 1:
        changes.append(
            f"data position: an earlier version counted {state.position.samples:,} samples of any "
            f"length ({', '.join(map(str, lengths))}); the run continues as it would have"
        )
    changes += validation_changes(checkpoint.fingerprints)
    return replace(state, position=state.position.measured(lengths[-1])), changes


def _require_mixture(state: RunState, *, data: RunData, plan: RunPlan, where: str) -> None:
    """Require that a stage that has begun goes on with its mixture of data."""
    stage = plan.stages[state.growth_stage]
    if state.step <= stage.plan.start_step or not state.position.taken:
        return
    last = state.position.taken[-1].mixture
    if data.continues(last, stage.index):
        return
    raise CheckpointError(
        f"{where}: in stage {stage.index} the run trains on another mixture",
        found=data.in_words(data.mixture(stage.index)),
        expected=data.in_words(last),
        fix="resume with the data and weights that the stage was started with; another mixture "
        "begins with another stage (stages[i].data)",
    )


def _require_model(
    checkpoint: NativeCheckpoint, plan: RunPlan, state: RunState, config: Config
) -> None:
    """Require that a checkpoint is of the plan's stage: its model, and what it trains."""
    model = plan.stages[state.growth_stage].model
    expected, found = plan.stages[state.growth_stage].catalog, checkpoint.catalog
    differs = [
        f"{tensor.name} {list(tensor.shape)}"
        for tensor in found
        if tensor.name not in expected or expected[tensor.name].shape != tensor.shape
    ]
    if differs or len(found) != len(expected):
        raise CheckpointError(
            f"{checkpoint.path}: holds another model than stage {state.growth_stage} of the "
            "configuration",
            found=_shape(found, _model_of(checkpoint)),
            expected=_shape(expected, model),
            fix="resume with the model and stages that the run was started with"
            + _without_it(checkpoint.path, config, "start a run of this model"),
        )
    if found.frozen != expected.frozen:
        raise CheckpointError(
            f"{checkpoint.path}: stage {state.growth_stage} trains other tensors than those that "
            "it has moments of",
            found=f"a checkpoint with {len(found.frozen)} frozen tensors",
            expected=f"{len(expected.frozen)}, by stages[{state.growth_stage}].train",
            fix="resume with the `train` that the stage was started with; a stage of its own may "
            "train others",
        )
    before = _model_of(checkpoint)
    if before is not None:
        require_same_function(model, before, where=f"{checkpoint.path}: ")


def _require_stages_ahead(plan: RunPlan, state: RunState, *, where: str) -> None:
    """Require that no growth is left out because the run is past the end of all stages."""
    last = len(plan.stages) - 1
    if state.growth_stage == last or state.step < plan.total_steps:
        return
    raise CheckpointError(
        f"{where}: is at step {state.step:,} in stage {state.growth_stage}, and the configuration "
        f"ends all stages at step {plan.total_steps:,}",
        found=f"no step left for stages[{state.growth_stage + 1}] to stages[{last}]",
        fix=f"raise stages[{last}].until, or give stages up to {state.growth_stage} only",
    )


def _require_betas(checkpoint: NativeCheckpoint, plan: RunPlan, state: RunState) -> None:
    """Require of a resume what a stage must keep to: AdamW's betas, while they matter."""
    given = checkpoint.config.get("optimizer", {})
    before = given.get("betas")
    for stage in checkpoint.config.get("stages", [])[: state.growth_stage + 1]:
        before = (stage.get("optimizer") or {}).get("betas") or before
    stage = plan.stages[state.growth_stage]
    now = stage.optimizer.bias_correction
    if before is None or now is None or given.get("name", "adamw") != stage.optimizer.name:
        return
    try:
        require_settled_betas(
            stage.index, (tuple(before), now), step=state.optimizer_step, rules=state.rules
        )
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from None


def validation_changes(stored: Mapping[str, str]) -> list[str]:
    """A line if a checkpoint's fingerprints show that its run validated on other samples."""
    before = stored.get("validation", VALIDATION_BEFORE)
    if before == VALIDATION:
        return []
    return [
        f"validation samples: {before} -> {VALIDATION}; validation losses before and after this "
        "step are of different samples"
    ]


def _without_it(path: Path, config: Config, what: str) -> str:
    """The alternative if the run directory itself led to a checkpoint; else there is none."""
    own = (Path(config.run.dir) / DIRECTORY).resolve() == path.resolve().parent
    return f", or {what} with run.dir=NEW" if own else ""


def _model_of(checkpoint: NativeCheckpoint) -> ModelConfig | None:
    try:
        return model_of(checkpoint)
    except CheckpointError:
        return None


def _shape(catalog: Catalog, model: ModelConfig | None) -> str:
    keys = ("layers", "hidden", "heads", "ffn") if model else ()
    sizes = ", ".join(f"{key} {getattr(model, key)}" for key in keys)
    return f"{catalog.parameters:,} parameters; {sizes or 'sizes unknown'}"


def _completed(before: Mapping[str, Any]) -> Any:
    """A checkpoint's configuration with the defaults of settings that its version did not have.

    As it is, if it has settings that this version does not accept.
    """
    try:
        return _dumped(parse_config(before))
    except ConfigError:
        return before


def _dumped(config: Config) -> Any:
    return config.model_dump(mode="json", by_alias=True)


def _changes(before: Any, now: Any, key: str = "") -> list[str]:
    """One line per setting that differs, recursing into sections and lists of equal length."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(set(before) | set(now))
        pairs = [(before.get(k), now.get(k), f"{key}.{k}".lstrip(".")) for k in keys]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(a, b, f"{key}[{i}]") for i, (a, b) in enumerate(zip(before, now, strict=True))]
    else:
        return [] if before == now else [f"{key}: {before} -> {now}"]
    return [line for pair in pairs for line in _changes(*pair)]
