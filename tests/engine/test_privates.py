"""What DeepSpeed does not document: used in one file, and there in the installed version."""

import ast
import contextlib
import importlib
import inspect
import re
from importlib import metadata
from pathlib import Path

import pytest

from megagrow.engine.deepspeed import privates

PACKAGE = Path(privates.__file__).parents[2]
PRIVATES = Path(privates.__file__)
ENGINE = sorted((PACKAGE / "engine").rglob("*.py"))
# Documented modules of DeepSpeed, which every file may import.
DOCUMENTED = {
    "deepspeed", "deepspeed.accelerator", "deepspeed.pipe", "deepspeed.runtime.pipe.topology",
}  # fmt: skip
# PyTorch documents the foreach operations under these names.
ALLOWED = re.compile(r"torch\._foreach_\w+")
# Outside the engine. Of checkpoints: the class by whose name PyTorch's reader finds the place of a
# tensor.
# Of the elastic agent: see tests/cluster/test_elastic.py.
ELSEWHERE = {
    "checkpoint/formats/dcp/sink.py": {"torch.distributed.checkpoint.filesystem"},
    "cluster/agent.py": {
        "torch.distributed.elastic.multiprocessing.api",
        "torch.distributed.elastic.rendezvous.dynamic_rendezvous",
    },
}


def origin(name: str) -> tuple[object, str]:
    """The module or class that a dotted name of `USES` is of, and what is asked of it."""
    owner, _, attribute = name.replace(": .", ".").rpartition(".")
    parts = owner.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found, attribute
    raise ModuleNotFoundError(owner)


def exists(name: str) -> bool:
    """Whether what `USES` names is in the installed version."""
    try:
        owner, attribute = origin(name)
    except (AttributeError, ModuleNotFoundError):
        return False
    if ": ." not in name:
        if hasattr(owner, attribute) or attribute in getattr(owner, "__annotations__", {}):
            return True
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name) is not None
        if not inspect.isclass(owner):
            return False
    # An attribute that code gives to objects: `self.name` in a class or its bases, `x.name` in a
    # module.
    places = [k for k in owner.__mro__ if k is not object] if inspect.isclass(owner) else [owner]
    receiver = "self" if inspect.isclass(owner) else r"\w+"
    pattern = re.compile(rf"\b{receiver}\.{attribute}\b")
    return any(pattern.search(inspect.getsource(place)) for place in places)


@pytest.mark.parametrize("user", privates.USES)
def test_the_installed_versions_have_what_is_used(user):
    missing = [name for name in privates.USES[user] if not exists(name)]
    installed = {name: metadata.version(name) for name in privates.CHECKED}
    assert not missing, (
        f"not in {installed} (checked with {privates.CHECKED}): {missing}. "
        f"Look at {user} in {PRIVATES}: its docstring says what it needs them for. Find what took "
        "their place, change the function and its `@uses`, run tests/engine, update CHECKED."
    )


def test_the_installed_versions_are_those_that_were_checked():
    for name, version in privates.CHECKED.items():
        installed = metadata.version(name).partition("+")[0]
        assert installed == version, (
            f"{name} {installed} is installed; {PRIVATES} was checked with {version}. Read it "
            "against the new version, run tests/engine, and then update CHECKED."
        )


@pytest.mark.parametrize(
    "name",
    [
        "deepspeed.runtime.engine.DeepSpeedEngine._broadcast_models",
        "deepspeed.runtime.engine.NoEngine._broadcast_model",
        "deepspeed.runtime.no_engine.DeepSpeedEngine._broadcast_model",
        "deepspeed.runtime.engine.DeepSpeedEngine.basic_optimizers",
        "deepspeed.utils.tensor_fragment: ._hp_mappings",
    ],
)
def test_a_missing_name_is_noticed(name):
    assert not exists(name)


def attributes(tree: ast.AST) -> list[ast.Attribute]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def of_its_own(node: ast.Attribute) -> bool:
    """Whether an attribute is of `self`, `cls` or `super()`."""
    value = node.value
    if isinstance(value, ast.Call):
        value = value.func
    return isinstance(value, ast.Name) and value.id in ("self", "cls", "super")


def foreign(tree: ast.AST) -> list[str]:
    """The uses in a file of names that are private, or that `USES` lists."""
    # Public ones of other things have the same name: `box.start`, `tensor.dtype`, ...
    listed = {name.rpartition(".")[2] for names in privates.USES.values() for name in names}
    listed -= {"start", "numel", "partition", "all_gather", "dynamic", "parts", "group"}
    found = []
    for node in attributes(tree):
        text = ast.unparse(node)
        allowed = of_its_own(node) or ALLOWED.match(text)
        if (is_private(node.attr) or node.attr in listed) and not allowed:
            found.append(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and (name.value in listed or is_private(name.value)):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", [p for p in ENGINE if p != PRIVATES], ids=lambda p: p.name)
def test_only_one_file_of_the_engine_touches_privates(path):
    found = foreign(ast.parse(path.read_text(encoding="utf-8")))
    assert not found, f"{path} uses {found}; put it into a function of {PRIVATES} with its reason"


def imported(tree: ast.AST) -> set[str]:
    """The modules of DeepSpeed and torch.distributed that a file imports."""
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            hidden = [a.name for a in node.names if a.name.startswith("_")]
            internal = node.module.startswith("deepspeed") or hidden
            names = [node.module] if internal else []
        found |= {n for n in names if n.split(".")[0] == "deepspeed" or "torch.distributed." in n}
    return found


def test_only_one_file_imports_undocumented_modules_of_deepspeed():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if path != PRIVATES:
            found = imported(ast.parse(path.read_text(encoding="utf-8")))
            assert found - DOCUMENTED - ELSEWHERE.get(name, set()) == set(), path


def test_every_private_name_in_it_is_listed_and_has_a_reason():
    tree = ast.parse(PRIVATES.read_text(encoding="utf-8"))
    for item in tree.body:
        if not isinstance(item, (ast.FunctionDef, ast.ClassDef)):
            continue
        used = {n.attr for n in attributes(item) if is_private(n.attr) and not of_its_own(n)}
        listed = {name.rpartition(".")[2] for name in privates.USES.get(item.name, ())}
        assert used <= listed, f"{item.name} uses {used - listed} without @uses"
        if item.name in privates.USES and not item.name.startswith("_"):
            assert ast.get_docstring(item), item.name


@pytest.mark.parametrize(
    "text",
    [
        "engine.optimizer._global_grad_norm", "getattr(engine.optimizer, '_global_grad_norm', 0)",
        "engine.total_loss", "p.ds_pipe_replicated = True", "dist.distributed_c10d._world.pg_map",
        "setattr(p, 'tensor_model_parallel', True)",
    ],
)  # fmt: skip
def test_a_private_name_elsewhere_is_noticed(text):
    assert foreign(ast.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "from deepspeed.runtime import bf16_optimizer", "import deepspeed.ops",
        "from torch.distributed.distributed_c10d import _get_default_store",
    ],
)  # fmt: skip
def test_an_undocumented_module_elsewhere_is_noticed(text):
    assert imported(ast.parse(text)) - DOCUMENTED
