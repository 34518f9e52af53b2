"""How the tests are laid out: one package, a folder for each package of megagrow."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent
FILES = sorted(TESTS.rglob("*.py"))
CHANGES = re.compile(r"sys\s*\.\s*path\s*(\[|=|\+=|\.\s*(insert|append|extend))|\bsite\.addsitedir")
# Its text runs a script as `python script.py` does, which puts the script's folder first.
MAY_CHANGE = {"cli/test_commands.py", "test_layout.py"}


def folders(root: Path) -> set[str]:
    """The folders below a package that hold Python files."""
    return {path.name for path in root.iterdir() if path.is_dir() and any(path.glob("*.py"))}


def test_every_package_has_a_folder_of_tests_and_every_folder_a_package():
    top = {name for name in folders(REPOSITORY) if name == "benchmarks"}
    assert folders(TESTS) == folders(REPOSITORY / "megagrow") | top


def test_every_folder_is_part_of_the_package():
    inside = {path.parent for path in FILES}
    assert [path for path in sorted(inside) if not (path / "__init__.py").exists()] == []


def test_nothing_changes_the_path_of_imports():
    found = [
        path.relative_to(TESTS).as_posix()
        for path in FILES
        if CHANGES.search(path.read_text(encoding="utf-8"))
    ]
    assert set(found) <= MAY_CHANGE


@pytest.mark.parametrize("text", ["sys.path.insert(0, 'x')", "sys.path[:0] = ['x']"])
def test_a_changed_path_is_noticed(text):
    assert CHANGES.search(text)


def modules(path: Path) -> list[str]:
    """What a file imports from the tests, in full."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_helpers_are_imported_in_full_and_no_test_module_by_another():
    helpers = {path.stem for path in FILES if path.stem not in ("__init__", "conftest")}
    for path in FILES:
        for name in modules(path):
            parts = name.split(".")
            assert parts[0] == "tests" or parts[0] not in helpers, f"{path} imports {name}"
            assert not any(part.startswith("test_") for part in parts[1:2] + parts[2:-1]), path
