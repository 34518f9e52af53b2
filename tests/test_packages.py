"""Imports between packages point down in one strict order, and some packages know no processes."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "megagrow"

# Each may import those before it, and none behind it.
ORDER = [
    "errors", "files", "background", "processes", "lock", "arguments", "cluster", "ops", "state",
    "transfer", "config", "models", "growth", "forecast", "schedule", "data", "engine",
    "checkpoint", "report", "train", "evaluation", "plan", "savings", "api", "cli",
]  # fmt: skip
CHECKPOINT = ["io", "interface", "containers", "native", "formats", "convert"]
WITHOUT_PROCESSES = {
    "errors", "files", "background", "processes", "lock", "cluster", "state", "transfer", "config",
    "growth", "forecast", "schedule", "data", "report",
}  # fmt: skip
WITHOUT_PYTORCH = {"errors", "files", "background", "processes", "lock", "arguments", "cluster"}
# Stand on its elastic agent; no rank imports them.
ON_PYTORCH = {"cluster/agent.py", "cluster/rendezvous.py"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    """The full dotted name of everything a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package(path):
    """The package of a file, or the module itself where it stands alone."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def packages_of(names):
    """The packages of megagrow's among dotted names."""
    parts = (name.split(".") for name in names if name.startswith("megagrow."))
    return {part[1] for part in parts if part[1] in ORDER}


def module(name):
    """The file that a dotted name of megagrow's lies in."""
    parts = name.split(".")[1:]
    for count in range(len(parts), 0, -1):
        for path in (
            PACKAGE.joinpath(*parts[:count]).with_suffix(".py"),
            PACKAGE.joinpath(*parts[:count], "__init__.py"),
        ):
            if path.exists():
                return path
    return None


def test_every_package_has_its_place():
    assert {package(path) for path in FILES} - {"__init__", "__main__"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_down(name):
    for path in FILES:
        if package(path) != name:
            continue
        found = list(imports(path))
        free = str(path.relative_to(PACKAGE)) in ON_PYTORCH
        above = packages_of(found) - set(ORDER[: ORDER.index(name) + 1])
        assert not above, f"{path} imports {above}"
        if name in WITHOUT_PROCESSES and not free:
            bad = [x for x in found if x.startswith(("deepspeed", "torch.distributed"))]
            assert not bad, f"{path} imports {bad}, but {name} is arithmetic alone"
        if name in WITHOUT_PYTORCH and not free:
            bad = [x for x in found if x.startswith(("deepspeed", "torch"))]
            assert not bad, f"{path} imports {bad}, but {name} starts without it"


def test_imports_point_down_in_checkpoint():
    for path in (PACKAGE / "checkpoint").rglob("*.py"):
        own = path.relative_to(PACKAGE / "checkpoint").parts[0]
        if own not in CHECKPOINT:
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[:2] == ["megagrow", "checkpoint"] and parts[2] in CHECKPOINT:
                assert CHECKPOINT.index(parts[2]) <= CHECKPOINT.index(own), f"{path}: {name}"


def test_no_format_imports_another():
    formats = PACKAGE / "checkpoint" / "formats"
    for path in formats.rglob("*.py"):
        own = path.relative_to(formats).parts[0]
        for name in imports(path):
            parts = name.split(".")
            if parts[:3] == ["megagrow", "checkpoint", "formats"]:
                assert parts[3] == own, f"{path} imports {name}"


def test_no_circle_of_modules():
    """Also not by an import inside a function; those for type checkers alone count as well."""
    graph = {}
    for path in FILES:
        below = {module(name) for name in imports(path) if name.startswith("megagrow.")}
        graph[path] = below - {path, None}
    graphlib.TopologicalSorter(graph).prepare()


# Threads are made by `megagrow.background`, where none dies unnoticed.  Besides it:
#   ops/build.py   setup.py uses it before megagrow is installed; a list takes every result
#   data/shards.py, savings/runs.py   processes, whose results are all asked for
MAY_START = {
    "background.py": {"Thread", "ThreadPoolExecutor"},
    "ops/build.py": {"ThreadPoolExecutor"},
    "data/shards.py": {"ProcessPoolExecutor"},
    "savings/runs.py": {"ProcessPoolExecutor"},
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


def test_what_is_installed_does_without_the_checkout():
    """`benchmarks` is not installed; one script runs it."""
    launch = (PACKAGE.parent / "launch").glob("*.py")
    for path in [*FILES, *launch]:
        above = [name for name in imports(path) if name.split(".")[0] in ("benchmarks", "tests")]
        assert not above or (path.name == "benchmark.py" and path.parent.name == "launch"), path


def test_threads_are_made_where_none_dies_unnoticed():
    found = {}
    beside = (path for name in ("launch", "benchmarks")
              for path in (PACKAGE.parent / name).rglob("*.py"))  # fmt: skip
    for path in [*FILES, *beside]:
        names = set(starters(ast.parse(path.read_text(encoding="utf-8"))))
        if names:
            found[path.relative_to(PACKAGE.parent).as_posix()] = names
    assert found == {f"megagrow/{name}": names for name, names in MAY_START.items()}


def test_a_runs_data_is_opened_and_sampled_in_one_way():
    """By `data.dataset.open_data` and `PreparedData.samples`, so that a blend is one change."""
    for path in FILES:
        if package(path) in ("data", "bench"):  # benchmarks open what no run has configured
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).split(".")[-1]
                assert called not in ("open_dataset", "SampleIndex"), f"{path}:{node.lineno}"


def test_no_two_public_classes_share_a_name():
    """A name found by search, or in a traceback, means one thing.  Benchmarks are apart."""
    places = {}
    for path in FILES:
        if package(path) == "bench":
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(path.relative_to(PACKAGE).as_posix())
    shared = {name: found for name, found in places.items() if len(found) > 1}
    assert not shared


@pytest.mark.parametrize("name", ["models", "engine", "train", "data"])
def test_a_readme_names_every_file_of_its_folder(name):
    """Or the folder that it is in; so a reader finds where to start, and nothing is missing."""
    text = (PACKAGE / name / "README.md").read_text(encoding="utf-8")
    here = PACKAGE / name
    for path in here.glob("*.py"):
        assert path.name == "__init__.py" or f"{path.name}`" in text, path
    for path in here.glob("*/__init__.py"):
        assert f"`{path.parent.name}/" in text, path
    for found in re.findall(r"`([a-z0-9_/]+\.py)`", text):
        folders = (here, here / "common", PACKAGE, PACKAGE.parent)
        assert any((folder / found).exists() for folder in folders), found


# All uses of what DeepSpeed does not document stand in one file, however many they are.
MAY_BE_LONG = {"megagrow/engine/deepspeed/privates.py"}


def test_files_are_at_most_400_lines():
    """A file that grows beyond is split at a seam of its own."""
    lengths = {
        path.relative_to(PACKAGE.parent).as_posix(): len(path.read_text("utf-8").splitlines())
        for path in FILES
    }
    assert {name for name, n in lengths.items() if n > 400} <= MAY_BE_LONG, lengths
