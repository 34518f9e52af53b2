"""The plan of the house: imports between rooms point down, and some rooms know no processes."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "megagrow"

# A room may import its own floor and those below.
FLOORS = [
    {"cli", "errors", "files"},
    {"config", "layout", "cluster"},
    {"state", "growth", "schedule", "data", "model", "ops"},
    {"engine", "checkpoint", "report"},
    {"train"},
    {"bench"},
    {"bench"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_PROCESSES = {"config", "layout", "state", "growth", "schedule", "data", "report", "errors"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    """The full dotted name of everything a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    found = list(imports(path))
    for name in found:
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if package == "megagrow" and other in FLOOR:
            assert FLOOR[other] <= FLOOR[room], f"{room} imports {name}, which lies above"
    if room in WITHOUT_PROCESSES:
        for name in found:
            message = f"{room} imports {name}, but plans by arithmetic alone"
            assert not name.startswith(("deepspeed", "torch.distributed")), message
    if room == "cluster":
        for name in found:
            assert not name.startswith(("deepspeed", "torch")), f"{room} imports {name}"


def test_every_room_has_its_floor():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms - {"__init__"} <= set(FLOOR)
