"""Runs that start from a checkpoint (`init.from`): what is required of it, and what is taken.

The first stage's engine is filled from the source as a resumed one is from its checkpoint: each
rank reads its own boxes, in any layout, through a state map (the identity, or the growth of the
first stage).  The data position, the step and the schedule start at 0.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagrow.checkpoint.convert.registry import detect
from megagrow.checkpoint.interface.accounting import summary
from megagrow.checkpoint.interface.format import CheckpointSource, ReadOptions
from megagrow.checkpoint.interface.history import history
from megagrow.checkpoint.interface.model_of import optimizer_of, recorded_model
from megagrow.checkpoint.interface.own_tokenizer import held_tokenizers, require_own_tokenizer
from megagrow.config import Config, ModelConfig, StartConfig
from megagrow.data.run_data import RunData
from megagrow.errors import CheckpointError, ConfigError, MegagrowError
from megagrow.growth.optimizer_rules import OptimizerRules
from megagrow.growth.settings import growth_in_words
from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import MASTER
from megagrow.state.optimizers import OPTIMIZERS
from megagrow.train.fingerprints import fingerprints
from megagrow.train.new_tokenizer import NewTokenizer, new_tokenizer
from megagrow.train.rates import require_settled_betas
from megagrow.train.run_plan import RunPlan
from megagrow.train.state import Origin, RunState
from megagrow.transfer.state_map import Identity, StateMap, WeightsAlone

if TYPE_CHECKING:  # requires DeepSpeed
    from megagrow.engine.comm import Comm

# Settings of the section `model` that do not change what the weights compute.
_OF_TRAINING = frozenset(
    {"sequence", "dropout", "init_std", "mup", "activation_checkpointing", "compile"}
)


def completed(given: Mapping[str, Any], model: ModelConfig, *, whose: str) -> dict[str, Any]:
    """The section `model` of a run that starts from a model, with what is left out filled in.

    Args:
        given: the section as the user wrote it.
        model: the one to start from.
        whose: what it is the model of.

    Raises:
        ConfigError: it has another model, by name of the setting.
    """
    held = model.model_dump(mode="json", by_alias=True)
    asked = {key: value for key, value in given.items() if value is not None and key in held}
    _require_model(asked, model, whose=whose)  # unknown keys are refused with the other settings
    own = {key: given[key] for key in given if key in _OF_TRAINING or key not in held}
    return held | own


def _require_model(given: Mapping[str, Any], model: ModelConfig, *, whose: str) -> None:
    """Require settings of a model to be those of another, but for those of training alone."""
    means = _meaning(model)
    for key, value in given.items():
        if key not in _OF_TRAINING and not _same(value, means[key]):
            raise ConfigError(
                f"model.{key}: is not that of {whose}",
                found=json.dumps(value, default=str),
                expected=json.dumps(means[key]),
                fix=f"leave model.{key} out: it is taken from there",
            )
    longest, asked = model.sequence, given.get("sequence")
    if model.architecture.positions == "learned" and isinstance(asked, int) and asked > longest:
        raise ConfigError(
            f"model.sequence: longer than the learned positions of {whose}",
            found=asked,
            expected=f"at most {longest}",
            fix="leave model.sequence out and grow it: stages[0].grow with operator: sequence",
        )


def _meaning(model: ModelConfig) -> dict[str, Any]:
    """The section of a model, with the sizes that follow from others filled in."""
    found = model.model_dump(mode="json", by_alias=True)
    return found | {"kv_heads": model.kv_groups, "head_dim": model.head_dim}


def _same(given: Any, held: Any) -> bool:
    """Whether a setting as written is the one that a model has."""
    if isinstance(given, Mapping) and isinstance(held, Mapping):
        one, two = ({k: v for k, v in x.items() if v is not None} for x in (given, held))
        return one == two
    return bool(given == held) and isinstance(given, bool) == isinstance(held, bool)


# --- the start --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """What a run's first engine is filled with.

    Attributes:
        source: the checkpoint, open.
        state_map: from it to the first stage's model and the optimizer's slots.
        state: the run's state before its first step.
        lines: what a user should know of it.
    """

    source: CheckpointSource
    state_map: StateMap
    state: RunState
    lines: tuple[str, ...]


def open_start(init: StartConfig) -> tuple[str, CheckpointSource]:
    """Open the checkpoint that a run starts from: the name of its format, and the checkpoint.

    Raises:
        ConfigError, CheckpointError: there is none, or it cannot be read.
    """
    options = ReadOptions(vocabulary=init.vocab_size, ignore=tuple(sorted(init.ignore)))
    try:
        found, path = detect(Path(init.from_), init.format)
        return found.name, found.open(path, options)
    except MegagrowError as error:
        text = re.sub(r"--ignore ([\w.]+)", r"init.ignore=[\1]", str(error))
        for option, key in _KEYS.items():
            text = text.replace(option, key)
        raise type(error)(f"init.from: {text}") from error


# Options of convert.py in errors, and the settings that are the same here.
_KEYS = {
    "--from-format": "init.format",
    "--vocab-size": "init.vocab_size",
    "--ignore": "init.ignore",
}


def start_model(source: CheckpointSource) -> ModelConfig:
    """The model of a checkpoint that a run starts from.

    Raises:
        CheckpointError: it does not say its model, or has other tensors.
    """
    try:
        model = recorded_model(source)
    except CheckpointError as error:
        raise CheckpointError(f"init.from: {source.path}: {error}") from None
    if model is None:
        raise CheckpointError(
            f"init.from: {source.path}: does not say which model it holds",
            expected="a section `model` in its configuration",
            fix=f"python launch/convert.py --from {source.path} --to imports/run --to-format "
            "native --config RUN.yaml, with the model and no init in it; then "
            "init.from=imports/run",
        )
    return model


def plan_start(config: Config, plan: RunPlan, data: RunData | None) -> Start:
    """Open the source of a run and check that the run can start from it; moves nothing.

    Args:
        config: with `init`.
        plan: of all stages.
        data: the run's; None: the tokenizer is not compared.

    Raises:
        MegagrowError: the source is damaged, or of another model, tokenizer or kind of state.
    """
    init = config.init
    assert init is not None
    name, source = open_start(init)
    model = start_model(source)
    _require_model(_meaning(config.model), model, whose=f"init.from = {source.path}")
    if source.run_state.get("ramp"):
        raise CheckpointError(
            f"init.from: {source.path}: new units of its last growth count in part only, by a mask",
            fix="train that run to the end of the ramp (grow.ramp), and start from there",
        )
    stage = plan.stages[0]
    growth, brought = stage.growth, None
    if growth is not None and stage.grow is not None and stage.grow.tokenizer is not None:
        rows = model.vocabulary, stage.model.vocabulary
        try:
            brought = new_tokenizer(stage.grow, source, rows=rows)
            growth = growth.with_tokens(brought.map)
        except MegagrowError as error:
            raise error.within("stages[0]", setting="grow") from None
    tokenizer = "not compared: the data is not there yet"
    if data is not None:
        tokenizer = _compared_tokenizer(init, source, model, data, brought)
    why, count, rules = _moments(config, source)
    state = RunState(
        optimizer_step=count,
        rules=rules,
        origin=Origin(
            path=str(source.path),
            format=name,
            step=source.step,
            sha256=_sha256(source),
            moments=not why,
            history=history(source),
        ),
    )
    held = build_catalog(config.model).with_frozen(source.catalog.frozen)
    state_map: StateMap = growth or Identity(stage.catalog, held)
    if growth is not None:
        state_map = growth = replace(growth, small=held)
        state = state.grown(growth, betas=stage.optimizer.bias_correction)
    elif not why:
        state = state.retrained(held, stage.catalog)
    if why:
        state_map = WeightsAlone(state_map)
    lines = _in_words(config, plan, source, name=name, tokenizer=tokenizer, why=why, state=state)
    return Start(source, state_map, state, (*lines, *(brought.lines if brought else ())))


def require_same(comm: Comm, origin: Origin | None) -> None:
    """Require that all ranks have found the same source, which each reads for itself.

    Raises:
        CheckpointError: on all ranks: they have not.
    """
    found = comm.all_gather(origin)
    other = next((rank for rank, theirs in enumerate(found) if theirs != found[0]), None)
    if other is not None:
        raise CheckpointError(
            f"init.from: rank {other} finds another checkpoint there than rank 0",
            found=found[other],
            expected=found[0],
            fix="put it on a file system that all hosts share, or the same copy on each host",
        )


def _moments(config: Config, source: CheckpointSource) -> tuple[str, int, OptimizerRules]:
    """Why the moments start at zero ("": they are the source's), the step count, and the rules."""
    assert config.init is not None
    kind = OPTIMIZERS[config.optimizer.name]
    held = {(slot.name, slot.matrices) for slot in source.slots}
    count, rules = _optimizer_state(source)
    reset = 0, OptimizerRules()
    if config.init.moments == "reset":
        return "init.moments: reset", *reset
    if not any(slot.kind != "parameter" for slot in source.slots):
        return "the checkpoint has none", *reset
    if held != {(slot.name, slot.matrices) for slot in kind.slots}:
        names = ", ".join(slot.name for slot in source.slots if slot.kind != "parameter")
        return f"the checkpoint's ({names}) are not those of {kind.name}", *reset
    if count == 0:
        return "the checkpoint counts no update", *reset
    if source.config.get("optimizer"):
        before = optimizer_of(source)
        if before.name != kind.name:
            return f"the checkpoint's are those of {before.name}, not of {kind.name}", *reset
        betas = before.bias_correction, config.optimizer.bias_correction
        try:
            require_settled_betas(0, betas, step=count, rules=rules)
        except ConfigError:
            return (
                f"after {count:,} updates under betas {list(before.betas)} AdamW's bias "
                f"correction would be wrong under {list(config.optimizer.betas)}"
            ), *reset
    return "", count, rules


def _optimizer_state(source: CheckpointSource) -> tuple[int, OptimizerRules]:
    """The optimizer's step count and rules; of another program's state, its step."""
    state = source.run_state
    try:
        count = int(state.get("optimizer_step", source.step))
        return count, OptimizerRules.from_json(state["rules"]) if "rules" in state else (
            OptimizerRules()
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"init.from: {source.path}: its run state is damaged", found=repr(error)
        ) from None


def _compared_tokenizer(
    init: StartConfig,
    source: CheckpointSource,
    model: ModelConfig,
    data: RunData,
    brought: NewTokenizer | None,
) -> str:
    """Compare the source's tokenizer with the data's; says what was compared.

    Raises:
        CheckpointError: they differ, or may differ.
    """
    if brought is not None:
        if data.tokenizer_sha256 != brought.sha256:
            raise CheckpointError(
                f"data.path = {data.path}: was not prepared with stages[0].grow.tokenizer",
                found=f"SHA-256 {data.tokenizer_sha256}",
                expected=brought.sha256,
                fix="prepare it with that tokenizer, or set grow.tokenizer to data.path",
            )
        return "that of the data is the growth's, by its SHA-256"
    instead = "init.allow_other_tokenizer=true"
    if init.allow_other_tokenizer:
        return "not compared (init.allow_other_tokenizer)"
    if held_tokenizers(source):
        require_own_tokenizer(source, fingerprints(data), override=instead)
        return "that of the data is the checkpoint's, by its SHA-256"
    if model.vocabulary != data.vocab_size:
        raise CheckpointError(
            f"init.from: {source.path} does not hold its tokenizer, and its vocabulary is not the "
            "data's",
            found=f"{data.vocab_size} tokens in data.path = {data.path}",
            expected=model.vocabulary,
            fix="prepare the data with the weights' own tokenizer: launch/prepare_data.py "
            f"--tokenizer; if it is that one, {instead}",
        )
    return (
        "not compared: the checkpoint does not hold its own; both vocabularies have "
        f"{data.vocab_size} tokens"
    )


def _sha256(source: CheckpointSource) -> str:
    described = [source.config, source.step, source.catalog.fingerprint()]
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _in_words(
    config: Config,
    plan: RunPlan,
    source: CheckpointSource,
    *,
    name: str,
    tokenizer: str,
    why: str,
    state: RunState,
) -> Iterator[str]:
    stage, model = plan.stages[0], config.model
    origin = state.origin
    assert origin is not None
    yield (
        f"from {source.path} ({name}, step {source.step:,}, SHA-256 {origin.sha256[:12]}): "
        f"{model.family}, {source.catalog.parameters:,} parameters"
    )
    for line in summary(source.left_out):
        yield f"left out: {line}"
    yield f"tokenizer: {tokenizer}"
    yield f"model: {_sizes(model)}"
    if stage.growth is not None and stage.grow is not None:
        yield (
            f"growth at step 0: {growth_in_words(stage.grow)} ({stage.growth.policy.name}), "
            f"{stage.growth.small.parameters:,} -> {stage.growth.target.parameters:,} parameters"
        )
        yield from stage.growth.caveats(
            grad_clip=stage.optimizer.grad_clip, dropout=stage.model.dropout
        )
    warmup = plan.learning_rate.warmup
    if why:
        yield (
            f"optimizer: starts at step 0, its moments at zero: {why}; the learning rate warms up "
            f"over {warmup} steps"
        )
        if not warmup:
            yield (
                "warning: no warm-up (schedule.warmup = 0), so that moments of a single gradient "
                "decide the first updates"
            )
    else:
        yield f"optimizer: moments and step count ({state.optimizer_step:,}) of the checkpoint"
        zeros = sorted(tensor for tensor, slot in source.zeros if slot != MASTER.name)
        if zeros:
            yield f"optimizer: no moments in the checkpoint, so zero, of {len(set(zeros))} tensors"
        if state.rules.factors:
            yield (
                f"optimizer: {len(state.rules.factors)} tensors keep the learning-rate factors of "
                "growths"
            )


def _sizes(model: ModelConfig) -> str:
    return (
        f"{model.layers} layers x {model.hidden} hidden x {model.heads} heads x {model.ffn} ffn, "
        f"vocabulary {model.vocabulary}, sequence {model.sequence}"
    )
