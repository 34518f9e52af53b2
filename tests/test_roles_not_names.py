"""Code asks what a tensor is (its role) and how a family is made, never what either is called.

A name may be spelt where names are made or translated: `ALLOWED`.
"""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "megagrow"
# Their folders.
FAMILIES = {path.parent.name for path in PACKAGE.glob("models/*/__init__.py")} - {"common"}

# Who may spell names of tensors or families.
ALLOWED = [
    "models/common/tensors.py",  # makes them
    "models/common/blocks.py",  # says where in a catalog a layer's parameters stand
    "state/catalog.py",  # the form of a name inside a block
    "state/roles.py",  # those of catalogs that were written before there were roles
    "config/families.py",  # the list of families
    *(f"models/{family}/*.py" for family in FAMILIES),
    "checkpoint/formats/*/names.py",  # tables of names in other programs
    "benchmarks/minimal_gpt.py",  # a model of its own, to compare with
]
CODE = [PACKAGE, PACKAGE.parent / "benchmarks"]
FILES = [
    path
    for path in sorted(path for folder in CODE for path in folder.rglob("*.py"))
    if not any(path.relative_to(PACKAGE.parent).match(pattern) for pattern in ALLOWED)
]
# Benchmarks measure the families that their tables have rows for.
LISTS_OF_BENCHMARKS = ("benchmarks/commands.py",)

# A name of a tensor, or its beginning or end, wherever it is spelt.
_TENSOR = re.compile(
    r"(embedding\.|(layers\.\d+\.|\.)?(attention|mlp)\.|final_norm\.|output\.weight|layers\.$"
    r"|layers\.\d|\.(weight|bias|norm)\b).*"
)
# Words of such names, that mean nothing unless a name is asked for them.
_WORDS = {"norm", "bias", "weight", "attention", "mlp", "qkv", "up", "down", "out", "token",
          "embedding", "position", "final_norm", "output", "head", "layers"}  # fmt: skip
_ASKING = {"startswith", "endswith", "removeprefix", "removesuffix", "find", "index", "count",
           "partition", "rpartition"}  # fmt: skip


def offences(source):
    """(line, what) of everything in a file that depends on a name."""
    tree = ast.parse(source)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for text in _texts(sides):
                if text in FAMILIES:
                    yield node.lineno, f"compares a family with {text!r}"
                elif text.strip(".") in _WORDS and any(_is_name(side) for side in sides):
                    yield node.lineno, f"looks for {text!r} in a name"
            if any(_is(side, "family") for side in sides) and any(_texts(sides)):
                yield node.lineno, "compares a family"
        elif isinstance(node, ast.MatchValue):
            if any(text in FAMILIES for text in _texts([node.value])):
                yield node.value.lineno, "matches a family"
        elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            if len(FAMILIES & set(_texts([node]))) > 1:
                yield node.lineno, "lists families"
        elif isinstance(node, ast.Dict):
            if any(key is not None and FAMILIES & set(_texts([key])) for key in node.keys):
                yield node.lineno, "looks families up in a table"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            words = {text.strip(".") for text in _texts(node.args)}
            if node.func.attr in _ASKING and words & _WORDS and _is_name(node.func.value):
                yield node.lineno, f"asks a name for {sorted(words & _WORDS)}"
        elif id(node) not in docs:
            for text in _texts([node] if isinstance(node, ast.Constant) else []):
                if _TENSOR.fullmatch(text):
                    yield node.lineno, f"spells the name of a tensor: {text!r}"


def _texts(nodes):
    """The texts among expressions, also inside tuples, lists and sets of them."""
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            yield from _texts(node.elts)


def _is(node, word):
    return (isinstance(node, ast.Name) and node.id == word) or (
        isinstance(node, ast.Attribute) and node.attr == word
    )


def _is_name(node):
    """Whether an expression is called a name: `name`, `tensor.name`, `stored_name`."""
    called = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
    return called.endswith("name")


@pytest.mark.parametrize(
    "path", FILES, ids=[p.relative_to(PACKAGE.parent).as_posix() for p in FILES]
)
def test_nothing_depends_on_the_name_of_a_tensor_or_family(path):
    found = [
        f"{path}:{line} {what}"
        for line, what in offences(path.read_text(encoding="utf-8"))
        if what != "lists families" or not path.as_posix().endswith(LISTS_OF_BENCHMARKS)
    ]
    assert not found, "ask tensor.role or model.architecture: " + "\n".join(found)


def lists_of_families(tree):
    """The lines of tuples and lists that name several families, and nothing else but strings."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Tuple, ast.List)) and len(node.elts) > 1:
            texts = [one.value for one in node.elts if isinstance(one, ast.Constant)]
            if len(texts) == len(node.elts) and set(texts) <= FAMILIES:
                yield node.lineno


# Tests that compare a family with another program's own implementation, family by family, and the
# names of cases that are more than families.
OWN_LISTS = {"models/test_transformer.py", "checkpoint/test_huggingface.py",
             "checkpoint/test_convert.py"}  # fmt: skip


def test_tests_take_all_families():
    """From `toys.FAMILIES`, so that a new family is tested without touching them."""
    root = PACKAGE.parent / "tests"
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name in OWN_LISTS or path == Path(__file__) or name.startswith("bench/"):
            continue
        found = list(lists_of_families(ast.parse(path.read_text(encoding="utf-8"))))
        assert not found, f"{name}: lines {found} list families; take toys.FAMILIES"


def test_what_may_spell_names_is_there():
    for pattern in ALLOWED:
        assert any(list(top.glob(pattern)) for top in (PACKAGE, PACKAGE.parent)), pattern


@pytest.mark.parametrize(
    "bad",
    [
        'if model.family == "gpt2": pass',
        'if "llama" != family: pass',
        'gated = kind in ("llama", "mistral")',
        'old = model.family in OTHERS or model.family == "t5"',
        'TABLE = {"gpt2": 1, "llama": 2}',
        'FAMILIES = ("gpt2", "llama")',
        'choices = ["llama", "gpt2", "other"]',
        'match family:\n    case "gpt2": pass',
        'if tensor.name.startswith("final_norm."): pass',
        'if tensor.name.endswith(".bias"): pass',
        'if name.endswith("bias"): pass',
        'if "norm" in tensor.name: pass',
        'if ".norm." not in tensor.name: pass',
        'if tensor.name == "output.weight": pass',
        'HEAD = "output.weight"',
        'table = catalog["embedding.token"]',
        'writers = ("attention.out.", "mlp.down.")',
        'name = f"layers.{i}.mlp.up.weight"',
        'rest = name.removeprefix("layers.")',
    ],
)
def test_the_test_sees(bad):
    assert list(offences(bad)), bad


@pytest.mark.parametrize(
    "good",
    [
        'if tensor.role == "writer": pass',
        'if "position" in tensor.axes: pass',
        'if model.architecture.positions == "learned": pass',
        'if config.optimizer.name == "muon": pass',
        '"""Of `final_norm.weight` and layers.3.mlp.up.weight, in gpt2."""',
        'settings = {"family": "gpt2", "layers": 2}',
        'words = ["gpt2", "bert"]',
        'if operator.name.startswith("width"): pass',
        'path.name.endswith(".safetensors")',
    ],
)
def test_the_test_lets_pass(good):
    assert not list(offences(good)), good
