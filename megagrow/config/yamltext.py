"""Reading and writing the YAML of a configuration file, by ruamel.yaml.

YAML 1.2's rules: `yes` and `on` are text, `010` is ten, and `1:30` is not ninety.  Besides, a date
is text, `1e6` is the integer a million, and digits may have underscores between them (`1_000_000`).
Duplicate keys, keys that are not text, self-references, tags for other types, and documents that
aliases make larger than any configuration are refused.
"""

from __future__ import annotations

import io
import re
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver, implicit_resolvers

from megagrow.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
_POWER = re.compile(r"([-+]?[0-9][0-9_]*)[eE]\+?([0-9]{1,2})")  # 1e6: exact, so an integer
_MOST_VALUES = 100_000  # with each alias counted as a copy of its target
_MOST_DIGITS = 40
_MOST_NESTING = 100  # far above any real file; keeps a hostile one from exhausting the stack


class _Resolver(VersionedResolver):
    """Dates and `=` are text."""

    processing_version = (1, 2)  # whatever a %YAML directive says

    def add_version_implicit_resolver(
        self, version: Any, tag: Any, regexp: Any, first: Any
    ) -> None:
        if tag in _PLAIN:
            super().add_version_implicit_resolver(version, tag, regexp, first)


class _Representer(SafeRepresenter):
    """What readers of YAML 1.1 and of 1.2 take for the same."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, text: str) -> ScalarNode:
        # Other styles lose some line breaks, such as U+0085.
        quoted = not text.isprintable() or any(rule[2].match(text) for rule in implicit_resolvers)
        return self.represent_scalar(_TAG + "str", text, style='"' if quoted else None)

    def represent_float(self, data: float) -> ScalarNode:
        node = super().represent_float(data)
        if "." not in node.value:  # 1e-08 is text in YAML 1.1
            node.value = node.value.replace("e", ".0e")
        return node


_Representer.add_representer(str, _Representer.represent_str)
_Representer.add_representer(float, _Representer.represent_float)


def read_yaml(text: str | bytes, *, source: str) -> Any:
    """Parse one YAML document into dicts, lists, text, numbers, booleans and None.

    Args:
        text: the document.
        source: its name in errors.

    Raises:
        ConfigError: on a syntax error, a duplicate key, a forbidden tag, text that is not
            UTF-8 or more than one document; it names line and column where known.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = _Resolver
    try:
        node = yaml.compose(text)
        if node is None:
            return None
        _count(node, {})
        return yaml.constructor.construct_document(node)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or error.context or "cannot be read"
        context = f" ({error.context})" if error.context and error.problem else ""
        raise ConfigError(f"{source}{place}: {problem}{context}", expected="valid YAML") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested deeper than {_MOST_NESTING} levels") from error
    except YAMLError as error:
        raise ConfigError(f"{source}: {error}", expected="valid YAML in UTF-8") from error
    except (ValueError, LookupError) as error:  # such as `!!int ''`, `!!bool 3` and `0x_`
        raise ConfigError(
            f"{source}: a value is not of its type: {error}", expected="valid YAML"
        ) from error


def write_yaml(data: Any) -> str:
    """Plain data as YAML that `read_yaml` reads back to equal data; key order is kept."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer, yaml.Resolver = _Representer, _Resolver
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 100
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def _count(node: Node, counts: dict[Node, int], nesting: int = 1) -> int:
    """Check a node and what is in it; the number of values, an alias being a copy of its target."""
    if node in counts:
        return counts[node] or _refuse(node, "is recursive: it contains itself")
    if nesting > _MOST_NESTING:
        _refuse(node, f"nested deeper than {_MOST_NESTING} levels")
    if node.tag not in _PLAIN:
        _refuse(node, f"tag {node.tag!r} is not allowed in a configuration")
    counts[node] = 0
    parts: list[Node] = [] if isinstance(node, ScalarNode) else node.value
    if isinstance(node, ScalarNode):
        power = _POWER.fullmatch(node.value)
        if node.tag == _TAG + "int" and len(node.value) > _MOST_DIGITS:
            _refuse(node, f"a number of {len(node.value)} digits")
        if node.tag == _TAG + "float" and power:
            node.tag, node.value = _TAG + "int", power[1] + "0" * int(power[2])
    elif isinstance(node, MappingNode):
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag not in (_TAG + "str", _TAG + "merge"):
                shown = key.value if isinstance(key, ScalarNode) else "of several values"
                _refuse(key, f"key {shown} is not text: put it in quotes")
            if key.value in lines:
                _refuse(key, f"key {key.value!r} is given twice (first in line {lines[key.value]})")
            lines[key.value] = key.start_mark.line + 1
        parts = [value for _, value in node.value]
    counts[node] = 1 + sum(_count(part, counts, nesting + 1) for part in parts)
    if counts[node] > _MOST_VALUES:
        _refuse(node, f"stands for more than {_MOST_VALUES:,} values")
    return counts[node]


def _refuse(node: Node, problem: str) -> NoReturn:
    raise ConstructorError(None, None, problem, node.start_mark)
