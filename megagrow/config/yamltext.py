"""Reading and writing the YAML of a configuration file.

The reader follows the YAML 1.2 core rules where YAML 1.1 (PyYAML's default)
surprises: `1e-3` is a number, `1e6` is the integer a million, `yes` and `on`
are text, `010` is ten, a date is text and `1:30` is not ninety.  Underscores
between digits (`1_000_000`) are kept as a convenience.  Duplicate keys, keys
that are not text, self-references, tags for other types, and documents that
aliases make larger than any configuration are refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable
from typing import Any

import yaml

from megagrow.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_MOST_VALUES = 100_000  # with each alias counted as a copy of its target
_MOST_DIGITS = 40
_MOST_NESTING = 100  # far above any real file; keeps a hostile one from exhausting the stack

_INTEGER = re.compile(
    r"""^(?: [-+]?[0-9][0-9_]*                 # 12, 1_000
        | [-+]?[0-9][0-9_]*[eE]\+?[0-9]{1,2}    # 1e6: exact, so an integer
        | 0x[0-9a-fA-F]+ )$""",
    re.VERBOSE,
)
_REAL = re.compile(
    r"""^(?: [-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?
        | [-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        | [-+]?\.(?:inf|Inf|INF)
        | \.(?:nan|NaN|NAN) )$""",
    re.VERBOSE,
)

# (tag, pattern, possible first characters); the first match is used.
_RESOLVERS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", _INTEGER, list("-+0123456789")),
    ("float", _REAL, list("-+0123456789.")),
    ("merge", re.compile(r"^<<$"), ["<"]),
)


class _Loader(yaml.SafeLoader):
    """Plain data only; the tables below replace those of YAML 1.1."""

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        self.nesting = getattr(self, "nesting", 0) + 1
        if self.nesting > _MOST_NESTING:
            raise yaml.composer.ComposerError(
                None,
                None,
                f"nested deeper than {_MOST_NESTING} levels",
                self.peek_event().start_mark,
            )
        node = super().compose_node(parent, index)
        self.nesting -= 1
        if node is not None:
            self._weigh(node)
        return node

    def _weigh(self, node: yaml.Node) -> None:
        """Count the values of a node; an alias counts as the node that it refers to."""
        sizes: dict[yaml.Node, int] = self.__dict__.setdefault("sizes", {})
        if node in sizes or isinstance(node, yaml.ScalarNode):
            return
        parts = node.value if isinstance(node, yaml.SequenceNode) else itertools.chain(*node.value)
        sizes[node] = 1 + sum(sizes.get(part, 1) for part in parts)
        if sizes[node] > _MOST_VALUES:
            raise yaml.composer.ComposerError(
                None, None, f"stands for more than {_MOST_VALUES:,} values", node.start_mark
            )


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or this reader would parse as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML's plain and single-quoted styles lose some line breaks, such as U+0085.
    return dumper.represent_scalar(_TAG + "str", text, style=None if text.isprintable() else '"')


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    if len(text) > _MOST_DIGITS:
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of {len(text)} digits", node.start_mark
        )
    if text.startswith("0x"):
        return int(text, 16)
    mantissa, _, exponent = text.lower().partition("e")
    return int(mantissa) * 10 ** int(exponent or 0)


def _real(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: dict[str, yaml.Mark] = {}
    for key_node, _ in node.value:
        if key_node.tag == _TAG + "merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is not text: put it in quotes", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"key '{key}' is given twice (first in line {seen[key].line + 1})",
                key_node.start_mark,
            )
        seen[key] = key_node.start_mark
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


def _refused(loader: _Loader, node: yaml.Node) -> None:
    raise yaml.constructor.ConstructorError(
        None, None, f"tag {node.tag!r} is not allowed in a configuration", node.start_mark
    )


_Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)
_Loader.yaml_constructors = {
    _TAG + "null": yaml.SafeLoader.construct_yaml_null,
    _TAG + "bool": yaml.SafeLoader.construct_yaml_bool,
    _TAG + "int": _integer,
    _TAG + "float": _real,
    _TAG + "str": yaml.SafeLoader.construct_yaml_str,
    _TAG + "seq": lambda loader, node: loader.construct_sequence(node, deep=True),
    _TAG + "map": _mapping,
    None: _refused,
}


_Dumper.add_representer(str, _text)


def read_yaml(text: str | bytes, *, source: str) -> Any:
    """Parse one YAML document into dicts, lists, text, numbers, booleans and None.

    Args:
        text: the document.
        source: its name in errors.

    Raises:
        ConfigError: on a syntax error, a duplicate key, a forbidden tag, text that is not
            UTF-8 or more than one document; it names line and column where known.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or error.context or "cannot be read"
        context = f" ({error.context})" if error.context and error.problem else ""
        raise ConfigError(f"{source}{place}: {problem}{context}", expected="valid YAML") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: {error}", expected="valid YAML in UTF-8") from error


def write_yaml(data: Any) -> str:
    """Plain data as YAML that `read_yaml` reads back to equal data; key order is kept."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
