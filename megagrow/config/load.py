"""Load a YAML file and dotted overrides into a validated `Config`, and dump it to YAML."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megagrow.config.overrides import apply_overrides
from megagrow.config.schema import Config
from megagrow.config.section import SECTION, TEXT, VALUE
from megagrow.config.yamltext import read_yaml, write_yaml
from megagrow.errors import ConfigError
from megagrow.files import or_shipped

S = TypeVar("S", bound=BaseModel)

# What pydantic's error types expect, in YAML terms; the messages of the other types are clear
# enough ("greater than 0").
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a section",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "an integer",
    "list_type": "a list",
    "model_type": "a section",
    "string_type": "text",
    "too_short": "more items",
    "tuple_type": "a list",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a run: read `path`, apply `overrides` (`key.sub=value`, in order) and validate.

    Raises:
        ConfigError: as in `load_settings`.
    """
    return load_settings(Config, path, overrides)


# An example of an existing file, by the option that names it.
_FOR_INSTANCE = {
    "--config": "configs/quickstart.yaml",
    "--machine": "configs/machines/h100.yaml",
    "--mapping": "MAPPING.yaml",
}


def load_settings(
    kind: type[S],
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    option: str = "--config",
) -> S:
    """The same for any schema; `option` is the command-line option that named the file.

    If there is no file `configs/quickstart.yaml`, for instance, the one that ships with megagrow is
    read.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML or not a mapping; an override
            is malformed; or settings are unknown, missing or out of range.  All wrong settings are
            reported at once, each by its dotted key.
    """
    data, source = read_settings(path, overrides, option=option)
    return parse_settings(kind, data, source=source)


def read_settings(
    path: str | Path, overrides: Sequence[str] = (), *, option: str = "--config"
) -> tuple[dict[str, Any], str]:
    """Read a file and apply overrides: the plain data, and its origin in words for errors.

    Raises:
        ConfigError: as in `load_settings`, but settings are not validated.
    """
    try:
        text = or_shipped(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: not a valid file name
        raise ConfigError(
            f"{option} {_shortened(path)}: cannot be read",
            found=getattr(error, "strerror", None) or str(error),
            expected="a YAML file",
            fix=f"give the path of an existing file, for instance {option} {_FOR_INSTANCE[option]}",
        ) from error
    data = read_yaml(text, source=str(path))
    if not isinstance(data, dict):
        raise ConfigError(
            f"configuration {path} has no settings",
            found="an empty file" if data is None else f"{_kind(data)} at the top",
            expected="sections such as `model:` and `data:`, each with indented `key: value` lines",
        )
    source = f"{path} with {' '.join(overrides)}" if overrides else str(path)
    return apply_overrides(data, overrides), source


def parse_config(data: Mapping[str, Any], *, source: str = "configuration") -> Config:
    """Validate plain data (YAML or JSON types) as the configuration of a run.

    Raises:
        ConfigError: as in `load_settings`.
    """
    return parse_settings(Config, data, source=source)


def parse_settings(kind: type[S], data: Mapping[str, Any], *, source: str) -> S:
    """Validate plain data against a schema.

    Values are not coerced: text is not a number and `true` is not 1, but an integer is accepted
    where a float is expected. An empty section (all its lines are comments) counts as absent.

    Raises:
        ConfigError: as in `load_settings`.
    """
    try:
        # The JSON rules of pydantic's strict mode apply: a list may become a tuple and an integer a
        # float, and nothing else is converted.
        text = json.dumps({key: value for key, value in data.items() if value is not None})
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{source}: not plain data: {error}", expected="text, numbers, lists and sections"
        ) from error
    try:
        return kind.model_validate_json(text, strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        faults = [_fault(kind, details) for details in error.errors(include_url=False)]
        count = "1 wrong setting" if len(faults) == 1 else f"{len(faults)} wrong settings"
        raise ConfigError("\n".join([f"{source}: {count}", *faults])) from error


def in_words(error: Exception) -> str:
    """An exception in one line; a validation error by its keys and what they expect."""
    if not isinstance(error, ValidationError):
        return str(error)
    faults = []
    for details in error.errors(include_url=False):
        key, kind, value = _dotted(details["loc"]), details["type"], details["input"]
        if kind == "value_error":
            words = details["msg"].removeprefix("Value error, ")
        elif kind in ("extra_forbidden", "missing"):
            words = "unknown" if kind == "extra_forbidden" else "missing"
        else:
            expected = _EXPECTED.get(kind, details["msg"].removeprefix("Input should be "))
            words = f"expected {expected}, found {_shown(value)}"
        faults.append(f"{key}: {words}" if key else words)
    return "; ".join(faults)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; loading it gives an equal `Config`.

    Unset settings (None) are omitted.
    """
    return write_yaml(config.model_dump(by_alias=True, exclude_none=True))


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the schema as a dotted path, list items as `stages[i]`."""
    for name, field in model.model_fields.items():
        path = prefix + (field.alias or name)
        yield path
        section, is_list = _section_of(field.annotation)
        if section is not None:
            yield from known_keys(section, f"{path}[i]." if is_list else f"{path}.")


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The type inside `Section`, `Section | None` or `list[Section]`; and whether it is a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    origin = typing.get_origin(annotation)
    if origin in (list, typing.Annotated, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            section, _ = _section_of(argument)
            if section is not None:
                return section, origin is list
    return None, False


def _fault(schema: type[BaseModel], details: ErrorDetails) -> str:
    """One wrong setting: its dotted key, what was found and what was expected."""
    kind, message, value = details["type"], details["msg"], details["input"]
    key = _dotted(details["loc"])
    if kind == "extra_forbidden":
        lines = [f"{key}: unknown key", *_suggestion(schema, key)]
    elif kind == "missing":
        lines = [f"{key}: missing, and it has no default"]
    elif kind == "value_error":
        message = message.removeprefix("Value error, ")
        lines = [f"{key}: {message}" if key else message]  # a check across keys names them itself
    else:
        expected = _EXPECTED.get(kind, message.removeprefix("Input should be "))
        lines = [key, f"  found:    {_shown(value)}", f"  expected: {expected}"]
        glued = re.fullmatch(r"(\w+):(\S+)", value) if isinstance(value, str) else None
        if glued is not None and kind in ("model_type", "dict_type"):
            lines.append(f"  fix:      a blank after the colon: {glued[1]}: {glued[2]}")
    return "\n".join(f"  {line}" for line in lines)


def _dotted(location: Sequence[int | str]) -> str:
    """('stages', 1, 'until') as `stages[1].until`."""
    parts = [part for part in location if part not in (SECTION, TEXT, VALUE)]
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.lstrip(".")


def _suggestion(schema: type[BaseModel], key: str) -> list[str]:
    """The hint for an unknown key: the nearest known one, or all keys of its section."""
    section, _, name = re.sub(r"\[\d+\]", "[i]", key).rpartition(".")
    known = list(known_keys(schema))
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    names = [k.rpartition(".")[2] for k in siblings]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    blank = re.match(r"(\w+):(\S+)$", name)
    if blank is not None and blank[1] in names:
        return [f"  fix:      a blank after the colon: {blank[1]}: {blank[2]}"]
    if near:
        return [f"  fix:      did you mean {key.removesuffix(name)}{near[0]}?"]
    elsewhere = [k for k in known if k.rpartition(".")[2] == name]
    elsewhere = [k for k in elsewhere if "[i]" not in k] or elsewhere  # keys outside lists first
    if elsewhere:
        return [f"  fix:      did you mean {' or '.join(elsewhere)}?"]
    return [f"  expected: one of {', '.join(names)}"] if names else []


def _kind(value: Any) -> str:
    """The value's type in YAML terms."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "text"
    return "list" if isinstance(value, list) else "section"


def _shortened(path: str | Path) -> str:
    text = str(path)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _shown(value: Any) -> str:
    """The value, shortened, and its type."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text if len(text) <= 60 else text[:57] + "..."
    return text if value is None else f"{text} ({_kind(value)})"
