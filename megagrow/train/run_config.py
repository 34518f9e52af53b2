"""Read the configuration of a run, and complete it from the checkpoint that the run starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagrow.config import Config, StartConfig
from megagrow.config.load import parse_config, parse_settings, read_settings
from megagrow.config.loop import RunConfig
from megagrow.config.section import Section
from megagrow.errors import CheckpointError, MegagrowError

if TYPE_CHECKING:
    from megagrow.checkpoint import NativeCheckpoint


def load_run(
    path: str | Path, overrides: Sequence[str] = (), *, resume: str | Path = "auto"
) -> Config:
    """Read the configuration of a run; with `init.from`, complete its section `model`.

    The model is that of the checkpoint that the run resumes from, if there is one: `init.from` is
    then not read, and may be gone.  Otherwise it is that of `init.from`.

    Args:
        path: the file, as for `load_config`.
        overrides: `key.sub=value`, in order.
        resume: as for `Trainer`.

    Raises:
        ConfigError: as `load_config`; or the section `model` has another model.
        CheckpointError: there is no such checkpoint, it is damaged or does not say its model.
    """
    data, where = read_settings(path, overrides)
    given = data.get("model") or {}
    if not isinstance(data.get("init"), Mapping) or not isinstance(given, Mapping):
        return parse_config(data, source=where)
    settings: dict[str, Any] = {key: data[key] for key in ("run", "init") if key in data}
    start = parse_settings(_WhereFrom, settings, source=where)
    # They need PyTorch, whose import takes a second.
    from megagrow.checkpoint.interface.model_of import first_model
    from megagrow.files import is_url
    from megagrow.train.checkpoints import DIRECTORY
    from megagrow.train.init_from import completed, open_start, start_model

    # A URL is downloaded when the ranks have joined; until then the model is that of `init.from`.
    asked = "auto" if is_url(str(resume)) else str(resume)
    held = _to_resume(Path(start.run.dir) / DIRECTORY, asked)
    if held is None:
        _, source = open_start(start.init)
        model, whose = start_model(source), f"init.from = {source.path}"
    else:
        _require_same_start(held)
        model, whose = first_model(held), f"the run, by its checkpoint {held.path}"
    config = parse_config({**data, "model": completed(given, model, whose=whose)}, source=where)
    return _with_tokens_counted(config)


def _with_tokens_counted(config: Config) -> Config:
    """The configuration with the size of a vocabulary that its first stage grows to."""
    from megagrow.train.new_tokenizer import sized

    first, *others = config.stages
    if first.grow is None or first.grow.tokenizer is None:
        return config
    try:
        grow = sized(first.grow)
    except MegagrowError as error:
        raise error.within("stages[0]", setting="grow") from None
    return config.model_copy(update={"stages": [first.model_copy(update={"grow": grow}), *others]})


class _WhereFrom(Section):
    """The sections that say where a run starts."""

    run: RunConfig = RunConfig()
    init: StartConfig


def _to_resume(root: Path, resume: str) -> NativeCheckpoint | None:
    """The checkpoint that a run resumes from; None: it starts."""
    from megagrow.train import checkpoints

    paths = checkpoints.candidates(root, resume)
    for path in paths[:-1]:
        try:
            return checkpoints.open_checkpoint(path)
        except CheckpointError:
            continue  # the run itself says so, and takes the one before it
    return checkpoints.open_checkpoint(paths[-1]) if paths else None


def _require_same_start(checkpoint: NativeCheckpoint) -> None:
    if not checkpoint.config.get("init"):
        raise CheckpointError(
            f"{checkpoint.path}: is of a run that did not start from another checkpoint, so "
            "init.from would have no effect",
            fix="leave init out to go on with that run, or start a new one with run.dir=NEW",
        )
