"""A conversion as a person asks for it: what its words stand for, refused where they clash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.convert.registry import FORMATS, detect, get_format
from megagrow.checkpoint.convert.run import Job
from megagrow.checkpoint.interface.format import ReadOptions
from megagrow.config import GrowConfig
from megagrow.config.load import parse_config, parse_settings, read_settings
from megagrow.config.overrides import apply_overrides
from megagrow.data.run_data import open_data
from megagrow.errors import ConfigError
from megagrow.state.layout import Layout
from megagrow.state.precision import ELEMENTS
from megagrow.train.fingerprints import fingerprints, is_of_run
from megagrow.train.grow_offline import Grow, OfflineGrowth, plan_offline
from megagrow.train.run_plan import with_vocabulary
from megagrow.train.state import RunState


def conversion(
    source: Path,
    target: Path,
    *,
    to_format: str,
    from_format: str | None = None,
    tensor: int | None = None,
    pipeline: int | None = None,
    data: int | None = None,
    zero: int | None = None,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    allow_other_tokenizer: bool = False,
    vocab_size: int | None = None,
    ignore: Sequence[str] = (),
    family: str | None = None,
    config: str | Path | None = None,
    shard_gib: float | None = None,
    grow: Sequence[str] | Mapping[str, Any] = (),
) -> Job:
    """The job that the options of `megagrow convert` ask for; nothing is read but what it takes.

    Raises:
        ConfigError: an option that the target's format has no use for, or no such element type.
        CheckpointError: no such format, or there is no checkpoint at `source`.
    """
    layout = {"tensor": tensor, "pipeline": pipeline, "data": data, "zero": zero}
    _require_sizes(**layout)
    given = {**layout, "tokenizer": tokenizer, "shard-gib": shard_gib}
    for name, value in given.items():
        if value is not None:
            _require_option(name, to_format)
    if dtype is not None and dtype not in ELEMENTS:
        raise ConfigError(
            "--dtype: not an element type of checkpoints", found=dtype, expected=", ".join(ELEMENTS)
        )
    read_options = ReadOptions(vocab_size, tuple(sorted(ignore)), family)
    run, held = _run_to_be(config)
    transform = _growth(grow)
    if transform is not None and transform.grow.tokenizer is not None and tokenizer is None:
        able = "tokenizer" in get_format(to_format).options
        tokenizer = Path(transform.grow.tokenizer) if able else None
    return Job(
        source=source,
        source_format=from_format,
        target=target,
        target_format=to_format,
        layout=_layout(source, from_format, read_options, to_format=to_format, **layout),
        dtype=getattr(torch, dtype) if dtype else None,
        tokenizer=tokenizer,
        read_options=read_options,
        allow_other_tokenizer=allow_other_tokenizer,
        file_bytes=int((shard_gib or 5.0) * 2**30),
        run_state=RunState().to_json(),
        config=run,
        fingerprints=held,
        transform=transform,
    )


def grown(
    source: Path, target: Path, grow: GrowConfig, *, to_format: str | None = None
) -> Job | OfflineGrowth:
    """Plan an offline growth of a checkpoint of any format.

    Args:
        source: a checkpoint, or a run directory: its newest one.
        target: the directory to make.
        grow: the growth.
        to_format: of the result; by default the source's.

    Returns:
        An `OfflineGrowth` if a run's native checkpoint stays one, whose steps are below `target`;
        else a conversion, whose result `target` itself is.

    Raises:
        CheckpointError: there is no checkpoint at `source`, or it is damaged.
    """
    found, at = detect(source)
    if (
        found.name == "native"
        and to_format in (None, "native")
        and is_of_run(found.open_source(at))
    ):
        return plan_offline(source, grow)
    section = grow.model_dump(mode="json", exclude_defaults=True)
    return conversion(at, target, to_format=to_format or found.name, grow=section)


def _growth(settings: Sequence[str] | Mapping[str, Any]) -> Grow | None:
    """A `grow` section, as such or as `key=value`."""
    if not settings:
        return None
    if isinstance(settings, Mapping):
        section = dict(settings)
    else:
        keys = [setting.partition("=")[0] for setting in settings]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ConfigError(
                f"--grow: {', '.join(twice)} is given more than once",
                found=" ".join(settings),
                fix="name several operators in one, such as operator=depth_stack+width",
            )
        section = apply_overrides({}, settings)
    return Grow(parse_settings(GrowConfig, section, source="--grow"))


def _require_sizes(*, zero: int | None, **sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and (type(size) is not int or size < 1):
            raise ConfigError(
                f"{name}: not a parallel size", found=repr(size), expected="a whole number from 1"
            )
    if zero is not None and (type(zero) is not int or zero not in range(4)):
        raise ConfigError("zero: no such ZeRO stage", found=repr(zero), expected="0, 1, 2 or 3")


def _require_option(name: str, to_format: str) -> None:
    """Refuse what would make no difference."""
    if name not in get_format(to_format).options:
        able = [fmt.name for fmt in FORMATS.values() if name in fmt.options]
        raise ConfigError(
            f"--{name}: format {to_format} has no such thing",
            expected=f"one of {', '.join(able)} with it",
            fix=f"leave --{name} out",
        )


def _layout(
    source: Path,
    from_format: str | None,
    read_options: ReadOptions,
    *,
    to_format: str,
    zero: int | None,
    **sizes: int | None,
) -> Layout | None:
    """The layout asked for: sizes that are not given are 1, the ZeRO stage is the source's.

    Where nothing is asked for it is the source's, as far as the format has a place for it.
    """
    if zero is None and not any(sizes.values()):
        return None
    held = FORMATS[to_format].axes
    fmt, path = detect(source, from_format)
    before = fmt.open(path, read_options).layout
    if not any(sizes.values()):
        sizes = {axis: getattr(before, axis) for axis in held}
    if zero is None:
        zero = before.zero if "data" in held else 0
    return Layout(**{axis: size or 1 for axis, size in sizes.items()}, zero=zero)


def _run_to_be(
    path: str | Path | None,
) -> tuple[Mapping[str, Any] | None, Mapping[str, str] | None]:
    """Configuration and fingerprints of the run that is to start from the result."""
    if path is None:
        return None, None
    settings, source = read_settings(path)
    if settings.get("init") is not None:
        raise ConfigError(
            f"--config {path}: init.from says where the run starts, which is not this conversion",
            fix="leave --config out, and give the result as init.from; or leave init out of the "
            "configuration",
        )
    config = parse_config(settings, source=source)
    data = open_data(config)
    config = with_vocabulary(config, data.vocab_size)
    return config.model_dump(mode="json", by_alias=True), fingerprints(data)
