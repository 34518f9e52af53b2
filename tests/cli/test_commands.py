"""The `megagrow` command and the scripts of launch/: the same commands, which start fast."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megagrow.arguments import as_installed
from megagrow.checkpoint.convert import registry
from megagrow.checkpoint.convert.job import BUFFER_BYTES
from megagrow.cli import benchmark, configs, convert
from megagrow.cli.main import COMMANDS, main
from megagrow.cluster import launchers
from megagrow.errors import MegagrowError
from tests.checkpoint.states import save_model
from tests.jobs import REPOSITORY, command, log_of, settings, write_config

SCRIPTS = sorted(path.stem for path in (REPOSITORY / "launch").glob("*.py"))
HEAVY = ("torch", "deepspeed", "numpy", "scipy")
# Runs a script as Python would, then prints which libraries it imported, and where `inspect` came
# from.
WATCHED = """
import json, os, runpy, sys
how, name, *sys.argv[1:] = sys.argv[1:]
if how == "script":
    sys.argv[0], sys.path[0] = name, os.path.dirname(name)
try:
    run = runpy.run_path if how == "script" else runpy.run_module
    run(name, run_name="__main__")
except SystemExit as stop:
    status = stop.code or 0
heavy = [word for word in ("torch", "deepspeed", "numpy", "scipy") if word in sys.modules]
import inspect
print("\\n" + json.dumps({"status": status, "heavy": heavy, "inspect": inspect.__file__}))
"""


def watched(*words, cwd=REPOSITORY):
    """What a command did: its output, and what `WATCHED` reports about it."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    text, _, stated = done.stdout.rstrip("\n").rpartition("\n")
    found = json.loads(stated)
    assert found["status"] == 0, text + done.stderr
    return text, found


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_of_a_script_imports_no_library(script):
    text, found = watched("script", REPOSITORY / "launch" / f"{script}.py", "--help")
    assert text.startswith(f"usage: {script}.py")
    assert found["heavy"] == []
    assert Path(found["inspect"]).parent != REPOSITORY / "launch"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_imports_no_library(name, tmp_path):
    text, found = watched("module", "megagrow", name, "--help", cwd=tmp_path)
    assert found["heavy"] == []
    assert text.startswith(f"usage: megagrow {name}")
    assert "launch/" not in text.partition("examples:")[2]


def test_a_script_and_a_command_take_the_same():
    assert {command(script).__name__ for script in SCRIPTS if script != "benchmark"} | {
        configs.__name__, benchmark.__name__
    } == {f"megagrow.cli.{module}" for module, _ in COMMANDS.values()}  # fmt: skip


def test_a_benchmark_is_installed_or_in_a_checkout(capsys):
    """The script has every benchmark; the command has savings, and says where the others are."""
    script = command("benchmark")
    words = {"--json": "a", "--config": "b"}
    given = [word for pair in words.items() for word in pair]
    assert vars(script.parse(["savings", *given])) == vars(benchmark.parse(["savings", *given]))
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    kinds = re.findall(r"^    (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    assert set(kinds) == {"savings", *benchmark.IN_A_CHECKOUT}
    for kind in benchmark.IN_A_CHECKOUT:
        assert benchmark.main([kind, "--json", "c"]) == 1
        said = capsys.readouterr().err
        assert f"benchmark {kind}: is not part of the installed package" in said
        assert f"python launch/benchmark.py {kind}" in said


def test_the_command_says_what_there_is(capsys):
    for words, status in (["--help"], 0), (["--version"], 0), ([], 2), (["tarin"], 2):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == status
    said = capsys.readouterr()
    assert all(re.search(rf"^  {name} ", said.out, re.MULTILINE) for name in COMMANDS)
    assert "invalid choice: 'tarin' (choose from 'train'" in said.err


def test_what_deepspeed_puts_first_is_the_commands_own(capsys, monkeypatch):
    """`deepspeed --module megagrow train ...` starts `megagrow --local_rank=0 train ...`."""
    monkeypatch.setattr(sys, "argv", ["megagrow"])
    assert main(["--local_rank=0", "train", "--config", "missing.yaml"]) == 1
    assert sys.argv == ["megagrow train", "--local_rank=0", "--config", "missing.yaml"]
    assert "missing.yaml: cannot be read" in capsys.readouterr().err


def test_examples_are_shown_as_the_command_takes_them():
    shown = as_installed(
        "  python launch/prepare_data.py --input x\n\n"
        "  deepspeed --num_gpus 2 \\\n      launch/pretrain.py --config a\n\n"
        "  python launch/supervise.py --ranks 2 \\\n      launch/pretrain.py --config a\n"
    )
    assert shown == (
        "  megagrow prepare --input x\n\n"
        "  deepspeed --num_gpus 2 \\\n      --module megagrow train --config a\n\n"
        "  megagrow supervise --ranks 2 \\\n      train --config a\n"
    )


def test_what_a_command_line_knows_of_libraries_that_it_does_not_import():
    assert list(convert.FORMATS) == list(registry.FORMATS)
    assert convert._BUFFER_MIB << 20 == BUFFER_BYTES


def test_inspect_and_a_dry_run_do_without_deepspeed(dataset, tmp_path):
    path, _ = save_model(tmp_path)
    text, found = watched("module", "megagrow", "inspect", path, cwd=tmp_path)
    assert "parameters" in text and "deepspeed" not in found["heavy"]
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run"))
    text, found = watched("module", "megagrow", "train", "--config", config, "--dry-run")
    assert "stage 2: " in text and "deepspeed" not in found["heavy"]


# --- other processes ---------------------------------------------------------------------------


def test_train_in_the_place_of_a_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = ["train", "--config", "c"]
    launchers.require_script(script)
    assert launchers.rank(script)[-5:] == ["-m", "megagrow", *script]
    monkeypatch.setattr(launchers.shutil, "which", lambda *_, **__: "/usr/bin/pdsh")
    over_ssh = launchers.over_ssh(
        script, hosts=[], master="a", port=1, environ={}, also=[], directory=tmp_path
    ).words  # fmt: skip
    assert over_ssh[-5:] == ("--module", "megagrow", *script)
    (tmp_path / "train").write_text("")  # a script of this name is one
    assert launchers.rank(script)[-4:] == ["-u", *script]
    with pytest.raises(MegagrowError, match="the script to start is missing"):
        launchers.require_script(["grow"])


def test_a_supervised_job_of_the_installed_command(dataset, tmp_path):
    """Away from the checkout: the module is started."""
    config = write_config(
        tmp_path / "run.yaml", settings(dataset, tmp_path / "run", stages=[{"until": {"steps": 2}}])
    )
    words = ["supervise", "--ranks", "2", "--restarts", "0", "train", "--config", config]
    done = subprocess.run(
        [sys.executable, "-m", "megagrow", *map(str, words)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = log_of(config)
    assert lines[0]["world"] == 2 and lines[-1]["event"] == "end"


# --- configurations ----------------------------------------------------------------------------


def test_the_configurations_that_come_along(capsys):
    assert configs.main([]) == 0
    listed = capsys.readouterr().out.split()
    assert listed == sorted(
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "configs").rglob("*")
        if path.is_file()
    )
    for name in ("configs/quickstart.yaml", "quickstart.yaml"):
        assert configs.main([name]) == 0
        text = (REPOSITORY / "configs" / "quickstart.yaml").read_text("utf-8")
        assert capsys.readouterr().out == text
    for name in ("configs/none.yaml", "../setup.py", "/etc/hosts"):
        assert configs.main([name]) == 1
        assert "no such configuration comes with megagrow" in capsys.readouterr().err
