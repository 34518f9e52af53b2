"""The Python API: what its documentation shows, run as it stands."""

import ast
import inspect
import os
import re
import subprocess
import sys

import pytest

import megagrow
from megagrow.errors import CheckpointError, ConfigError
from tests.jobs import REPOSITORY, settings, write_config

PAGE = REPOSITORY / "docs" / "python-api.md"
OFFERED = sorted(set(megagrow.__all__) - {"__version__"})


def python(code, directory):
    """Run code in a process of its own, as a program of a user's."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def documented(dataset, tmp_path_factory):
    """(directory, what the examples of the documentation printed there)."""
    home = tmp_path_factory.mktemp("api")
    write_config(home / "run.yaml", settings(dataset, "runs/mine"))
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL))
    return home, python(code, home)


def test_the_examples_of_the_documentation_run(documented):
    home, said = documented
    assert "runs/mine/checkpoints/step_00000010 done" in said
    assert (home / "grown" / "step_00000010").is_dir()
    assert (home / "export" / "config.json").is_file()
    assert re.search(r"^10 tensor 1 x .* [\d,]+ parameters$", said, re.MULTILINE)
    assert "embedding.token (" in said and "did you mean optimizer.lr?" in said


def test_a_run_goes_on_in_the_same_process(documented):
    home, _ = documented
    said = python(
        "import megagrow\n"
        "new = ['run.dir=runs/other', 'train.stop_after_steps=4']\n"
        "first = megagrow.train_model(megagrow.load_config('run.yaml', new))\n"
        "again = megagrow.train_model(megagrow.load_config('run.yaml', new[:1]))\n"
        "over = megagrow.train_model(megagrow.load_config('run.yaml', new[:1]), resume='good')\n"
        "print(first.checkpoint.name, again.checkpoint.name, over == again, over.signal)\n",
        home,
    )
    assert said.splitlines()[-1] == "step_00000004 step_00000010 True 0"


def test_errors_are_the_users_to_fix(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        megagrow.load_config(tmp_path / "none.yaml")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        megagrow.open_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="did you mean noise"):
        megagrow.grow_checkpoint(tmp_path, tmp_path / "out", operator="width_noise", noize=1.0)
    with pytest.raises(ConfigError, match="--tensor: format huggingface has no such thing"):
        megagrow.convert_checkpoint(tmp_path, tmp_path / "x", to_format="huggingface", tensor=2)
    with pytest.raises(ConfigError, match="not an element type"):
        megagrow.convert_checkpoint(tmp_path, tmp_path / "x", to_format="dcp", dtype="int8")
    with pytest.raises(CheckpointError, match="no such checkpoint format"):
        megagrow.convert_checkpoint(tmp_path, tmp_path / "x", to_format="gguf", zero=1)
    for layout in ({"tensor": 0}, {"data": -1}, {"pipeline": 1.5}, {"zero": 7}, {"zero": True}):
        with pytest.raises(ConfigError, match=next(iter(layout))):
            megagrow.convert_checkpoint(tmp_path, tmp_path / "x", to_format="native", **layout)
    assert not (tmp_path / "x").exists()


def test_a_model_is_grown_on_the_way(documented):
    home, _ = documented
    code = """
import megagrow
megagrow.convert_checkpoint("runs/mine", "deeper", to_format="native", verify=True,
                            grow={"operator": "depth_stack", "factor": 2})
small, large = megagrow.open_checkpoint("runs/mine"), megagrow.open_checkpoint("deeper")
assert large.catalog.parameters > small.catalog.parameters
"""
    python(code, home)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = megagrow.nothing


def test_a_shipped_configuration_has_its_name_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert megagrow.load_config("configs/llama/7b.yaml").model.family == "llama"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("model: 1\n")
    with pytest.raises(ConfigError, match="wrong settings"):
        megagrow.load_config("configs/quickstart.yaml")  # one's own comes first


def test_importing_takes_nothing_along(tmp_path):
    heavy = "{'torch', 'deepspeed', 'numpy', 'pydantic', 'ruamel', 'megagrow.api'}"
    assert python(f"import megagrow, sys; print({heavy} & set(sys.modules))", tmp_path) == "set()\n"


def test_the_functions_are_typed_documented_and_seen_by_tools():
    text = PAGE.read_text("utf-8")
    tree = ast.parse((REPOSITORY / "megagrow" / "__init__.py").read_text("utf-8"))
    seen = [n.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
            for n in node.names]  # fmt: skip
    assert set(OFFERED) <= set(seen) and set(OFFERED) <= set(dir(megagrow))
    for name in OFFERED:
        function = getattr(megagrow, name)
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty
                   for p in signature.parameters.values())  # fmt: skip
        assert "Raises:" in function.__doc__ and "Example:" in function.__doc__
        assert f"`{name}(" in text
