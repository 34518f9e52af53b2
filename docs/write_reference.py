"""Write the pages of `docs/reference/`: every setting, by the schema; every command, by its parser.

    python docs/write_reference.py

`tests/test_reference.py` compares the pages with what this writes.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megagrow.arguments import Parser
from megagrow.cli.main import COMMANDS
from megagrow.config import Config

REFERENCE = Path(__file__).parent / "reference"
_NOTE = "<!-- Written by docs/write_reference.py; change the {} instead, and run it again. -->\n"
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_KINDS = {"integer": "int", "number": "float", "string": "text", "boolean": "true, false"}


def settings() -> str:
    """The page of all settings of a configuration file."""
    schema = Config.model_json_schema()
    lines = [
        _NOTE.format("schema in megagrow/config"),
        "# Settings\n",
        "All settings of a configuration file. Each can be given on the command line by its dotted "
        "key (`optimizer.lr=2e-3`, `stages.1.until.steps=500`). A setting without a default must "
        "be given; an unknown key, a wrong type and a value out of range are errors.\n",
        "`Config.model_json_schema()` (`from megagrow.config import Config`) is the JSON schema of "
        "a file, which editors complete keys with.\n",
    ]
    for key, name in _sections(schema):
        definition = schema["$defs"][name] if name else schema
        lines += [f"## {f'`{key}`' if key else 'Sections'}\n", _words(definition["description"])]
        lines += ["", "| setting | values | default | meaning |", "| --- | --- | --- | --- |"]
        required = definition.get("required", ())
        for setting, entry in definition["properties"].items():
            if "description" not in entry:  # it exists for a clear error alone
                continue
            default = "" if setting in required else f"`{_default(entry)}`"
            meaning = _words(entry["description"])
            lines.append(f"| `{setting}` | {_values(entry, schema)} | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def _sections(schema: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """All sections in the order of a file: their dotted keys, and their names in the schema."""
    yield "", None
    seen: set[str] = set()

    def below(key: str, definition: dict[str, Any]) -> Iterator[tuple[str, str]]:
        for setting, entry in definition["properties"].items():
            for name, several in _names(entry):
                if name in seen:
                    continue
                seen.add(name)
                dotted = f"{key}{setting}{'[i]' if several else ''}"
                yield dotted, name
                yield from below(f"{dotted}.", schema["$defs"][name])

    yield from below("", schema)


def _names(entry: dict[str, Any], several: bool = False) -> Iterator[tuple[str, bool]]:
    """The sections that an entry of the schema may be, and whether it is a list of them."""
    if "$ref" in entry:
        yield entry["$ref"].rpartition("/")[2], several
    for kind in (*entry.get("anyOf", ()), *entry.get("oneOf", ()), *entry.get("allOf", ())):
        yield from _names(kind, several)
    if entry.get("type") == "array" and "items" in entry:
        yield from _names(entry["items"], several=True)


def _values(entry: dict[str, Any], schema: dict[str, Any]) -> str:
    """The values that an entry may have, in words."""
    choices = [*entry.get("anyOf", ()), *entry.get("oneOf", ())]
    if choices:
        words = [_values(choice, schema) for choice in choices if choice.get("type") != "null"]
        return " or ".join(dict.fromkeys(words))
    if "$ref" in entry:
        return "a section"
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{str(entry['const']).lower() if entry['const'] is True else entry['const']}`"
    if entry.get("type") == "array":
        if "prefixItems" in entry:
            each = _values(entry["prefixItems"][0], schema)
            return f"{len(entry['prefixItems'])} numbers: {each}"
        return f"a list: {_values(entry['items'], schema)}"
    if entry.get("type") == "object":
        return "a section of names" if "additionalProperties" in entry else "a section"
    bounds = [f"{sign} {entry[key]:.10g}" for key, sign in _BOUNDS.items() if key in entry]
    # A limit of 64 bits is one of the number's format.
    bounds = [bound for bound in bounds if "e+18" not in bound]
    return " ".join([_KINDS[entry["type"]], ", ".join(bounds)]).strip()


def _default(entry: dict[str, Any]) -> str:
    value = entry.get("default", {})
    if isinstance(value, dict):
        empty = "[]" if entry.get("type") == "array" else "{}"
        return "its defaults" if "$ref" in entry else empty
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value).replace("'", "")


def commands() -> str:
    """The page of all commands and their options."""
    lines = [
        _NOTE.format("parsers in megagrow/cli"),
        "# Commands\n",
        "`megagrow COMMAND --help` shows examples as well. `python launch/NAME.py` is the same "
        "command in a checkout: `pretrain.py` is `train`, `prepare_data.py` is `prepare`, the "
        "others have one name.\n",
    ]
    for name, (module, about) in COMMANDS.items():
        parser = _parser(module, f"megagrow {name}")
        lines += [f"## `megagrow {name}`\n", f"{about[0].upper()}{about[1:]}.\n", *_options(parser)]
    return "\n".join(lines)


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """A table of a parser's options, and those of its subcommands."""
    subcommands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    rows = ["| option | meaning |", "| --- | --- |"]
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or action.dest == "help" or action in subcommands:
            continue
        usage = _usage(action).replace("|", "\\|")
        rows.append(f"| `{usage}` | {_words(_expanded(parser, action))} |")
    lines = [*rows, ""] if len(rows) > 2 else []
    for several in subcommands:
        about = {choice.dest: choice.help for choice in several._choices_actions}
        for name, sub in several.choices.items():
            lines += [f"### `{parser.prog} {name}`\n"]
            lines += [f"{_words(about.get(name) or sub.description or '')}\n", *_options(sub)]
    return lines


def _expanded(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def _usage(action: argparse.Action) -> str:
    """An option as it is written, such as ``--ranks N``."""
    value = action.metavar or (None if action.nargs == 0 else action.dest.upper())
    if action.choices is not None and action.metavar is None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        return f"{value or action.dest}{' ...' if action.nargs in ('*', '+', '...') else ''}"
    text = ", ".join(action.option_strings)
    if action.nargs == 0:
        return text
    return f"{text} {value}{' ...' if action.nargs in ('*', '+') else ''}"


class _CaughtError(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def _parser(module: str, prog: str) -> argparse.ArgumentParser:
    """The parser of a command, which builds it only in order to parse with it."""
    before = Parser.parse_known_args

    def caught(self: Parser, args: Any = None, namespace: Any = None) -> Any:
        raise _CaughtError(self)

    Parser.parse_known_args = caught  # type: ignore[method-assign]
    try:
        importlib.import_module(f"megagrow.cli.{module}").parse([])
    except _CaughtError as found:
        _rename(found.parser, prog)
        return found.parser
    finally:
        Parser.parse_known_args = before  # type: ignore[method-assign]
    raise AssertionError(f"{module} has no parser")


def _rename(parser: argparse.ArgumentParser, prog: str) -> None:
    parser.prog = prog
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                _rename(sub, f"{prog} {name}")


def _words(text: str) -> str:
    """A docstring in one line of Markdown, with links to the pages it names."""
    line = " ".join(text.split()).replace("|", "\\|")
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](../\1)", line)


PAGES = {"settings.md": settings, "commands.md": commands}


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for page, made in PAGES.items():
        (REFERENCE / page).write_text(made(), encoding="utf-8")
        print(REFERENCE / page)
