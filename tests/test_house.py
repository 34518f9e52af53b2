"""The plan of the house: imports between rooms point down, and some rooms know no processes."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "megagrow"

# A room may import its own floor and those below.
FLOORS = [
    {"cli", "errors", "files", "background", "lock"},
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


# Threads are made by `megagrow.background`, where none dies unnoticed.  Besides it:
#   ops/build.py   setup.py uses it before megagrow is installed; a list takes every result
#   data/shards.py, bench/savings/runs.py   processes, whose results are all asked for
MAY_START = {
    "background.py": {"Thread", "ThreadPoolExecutor"},
    "ops/build.py": {"ThreadPoolExecutor"},
    "data/shards.py": {"ProcessPoolExecutor"},
    "bench/savings/runs.py": {"ProcessPoolExecutor"},
}
STARTERS = {"Thread", "Timer", "ThreadPoolExecutor", "ProcessPoolExecutor", "ThreadPool",
            "start_new_thread", "to_thread", "run_in_executor"}  # fmt: skip


def starters(tree):
    """Everything in a file that starts threads, by the name it is called or imported by."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in STARTERS:
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if alias.name in STARTERS)


def test_threads_are_made_where_none_dies_unnoticed():
    found = {}
    for path in [*FILES, *(PACKAGE.parent / "launch").glob("*.py")]:
        names = set(starters(ast.parse(path.read_text(encoding="utf-8"))))
        if names:
            found[path.relative_to(PACKAGE.parent).as_posix()] = names
    assert found == {f"megagrow/{name}": names for name, names in MAY_START.items()}


def test_every_room_has_its_floor():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms - {"__init__"} <= set(FLOOR)
