"""Modules and what is in them are there, wherever docstrings and documents name them."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from megagrow.config import Config

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megagrow"
# A dotted name in backticks whose first part is the package or one of its packages.
PACKAGES = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
_ANY = "|".join(sorted(PACKAGES))
_NAME = re.compile(rf"`(?:megagrow\.)?((?:{_ANY})(?:\.\w+)+)(?:\(\))?`")

FILE_ENDS = (".py", ".yaml", ".json", ".html", ".md")
OTHERS = {"engine.save_checkpoint"}  # DeepSpeed's


def named(text):
    """The dotted names of megagrow's in a text, without the package's own name."""
    return {name for name in _NAME.findall(text) if not name.endswith(FILE_ENDS)}


def is_there(name):
    """Whether a dotted name is a module of megagrow's, or something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        at = PACKAGE.joinpath(*parts[:count])
        if at.is_dir() or at.with_suffix(".py").exists():
            rest = parts[count:]
            return not rest or _holds(at, rest[0])
    return False


def _holds(at, name):
    path = at / "__init__.py" if at.is_dir() else at.with_suffix(".py")
    return any(
        getattr(node, "name", None) == name
        or (isinstance(node, ast.alias) and (node.asname or node.name) == name)
        or (isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )


def settings():
    """Every `section.key` of a configuration, and `config.section`, as code has it."""
    for section, field in Config.model_fields.items():
        yield f"config.{section}"
        for key in getattr(field.annotation, "model_fields", {}):
            yield f"{section}.{key}"


FILES = sorted(
    [*PACKAGE.rglob("*.py"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"),
     *PACKAGE.rglob("*.md"), *(ROOT / "launch").glob("*.py")]
)  # fmt: skip


def test_names_in_backticks_are_there():
    known = set(settings()) | OTHERS
    wrong = [
        f"{path.relative_to(ROOT)}: `{name}`"
        for path in FILES
        for name in sorted(named(path.read_text(encoding="utf-8")))
        if ".".join(name.split(".")[:2]) not in known and not is_there(name)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["schedule.mixing", "growth.width", "state.boxes.Bx"])
def test_the_test_sees(name):
    assert named(f"see `megagrow.{name}` and `{name}`") == {name}
    assert not is_there(name)


def test_what_is_there_is_found():
    for name in ("forecast.mixing", "growth.operators.width", "state.boxes.Box", "engine"):
        assert is_there(name), name
    assert importlib.import_module("megagrow.forecast.mixing")
