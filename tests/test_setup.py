"""Set-up: packaging, pins, the Makefile's checks, continuous integration."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import megagrow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def requirements(tmp_path_factory):
    """Every direct requirement that setup.py states, extras included."""
    target = tmp_path_factory.mktemp("egg")
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", target],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    info = metadata.PathDistribution(target / "megagrow.egg-info")
    assert info.version == megagrow.__version__
    assert SpecifierSet(info.metadata["Requires-Python"]) == SpecifierSet(">=3.10")
    assert {"dev", "gpu", "hf"} <= set(info.metadata.get_all("Provides-Extra"))
    return [Requirement(line) for line in info.requires]


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_apex_is_never_a_dependency(requirements):
    names = {requirement.name.lower() for requirement in [*requirements, *pins()]}
    assert "apex" not in names
    assert "torch" in names


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_every_direct_requirement_has_one_pin_that_satisfies_it(requirements, python):
    def applies(requirement, extra=""):
        marker = requirement.marker
        return marker is None or marker.evaluate({"python_version": python, "extra": extra})

    pinned = {}
    for pin in pins():
        if applies(pin):
            assert pin.name.lower() not in pinned, f"{pin.name} is pinned twice"
            pinned[pin.name.lower()] = pin
    for requirement in requirements:
        if any(applies(requirement, extra) for extra in ("", "dev", "gpu", "hf")):
            pin = pinned[requirement.name.lower()]
            (exact,) = pin.specifier
            assert exact.operator == "=="
            assert Version(exact.version) in requirement.specifier


def test_this_environment_has_the_pinned_versions():
    for pin in pins():
        if pin.marker is None or pin.marker.evaluate():
            try:
                version = metadata.version(pin.name)
            except metadata.PackageNotFoundError:
                continue  # of an extra that is not installed
            assert pin.specifier.contains(version), f"{pin.name} {version}"


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    commands = [
        line for line in script.read_text().splitlines() if not re.match(r"#|set |cd |$", line)
    ]
    assert commands == ["make test"]


def make(*arguments, path=None, cwd=ROOT, **environment):
    env = {**os.environ, **environment}
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # of the `make test` that runs this
        env.pop(name, None)
    if path is not None:
        env["PATH"] = str(path)
    return subprocess.run(
        [shutil.which("make"), *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def fresh(tmp_path):
    """A checkout in which nothing is set up."""
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_make_alone_lists_the_targets(fresh):
    result = make(cwd=fresh)
    assert result.returncode == 0
    for target in ("quickstart", "test", "setup", "check", "clean"):
        assert f"make {target}" in result.stdout


def fake_python(directory, version):
    """A `python` that answers as this one would if its version were another."""
    program = directory / f"python-{version}"
    program.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo Python {version};; *) exit 1;; esac\n"
    )
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("version", ["2.7.18", "3.9.18"])
def test_set_up_refuses_other_pythons(fresh, version):
    result = make("setup", f"PYTHON={fake_python(fresh, version)}", cwd=fresh)
    assert result.returncode != 0
    assert "needs Python 3.10 or newer" in result.stderr
    assert f"found: Python {version}" in result.stderr
    assert "make setup PYTHON=" in result.stderr
    assert not (fresh / ".venv").exists()


def test_set_up_without_any_python_says_so(fresh):
    tools = fresh / "bin"
    tools.mkdir()
    for name in ("bash", "sh"):
        (tools / name).symlink_to(shutil.which(name))
    result = make("setup", cwd=fresh, path=tools)
    assert result.returncode != 0
    assert "needs Python 3.10 or newer" in result.stderr


def test_set_up_without_a_compiler_says_so(fresh):
    result = make("setup", f"PYTHON={sys.executable}", cwd=fresh, CXX="no-such-compiler")
    assert result.returncode != 0
    assert "No C++ compiler (no-such-compiler)" in result.stderr
    assert not (fresh / ".venv").exists()


def test_set_up_that_was_interrupted_is_not_taken_for_done(fresh):
    (fresh / ".venv/bin").mkdir(parents=True)
    result = make("--question", "setup", f"PYTHON={sys.executable}", cwd=fresh)
    assert result.returncode == 1
    (fresh / ".venv/.megagrow-setup").touch()
    assert make("--question", "setup", cwd=fresh).returncode == 0
    os.utime(fresh / "constraints.txt", (4e9, 4e9))
    assert make("--question", "setup", cwd=fresh).returncode == 1


# --- outside a checkout -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A wheel of this checkout, installed into a directory of its own."""
    home = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", home]
    build += ["build", "--build-base", home / "build"]
    build += ["bdist_wheel", "--bdist-dir", home / "wheel", "--dist-dir", home]
    subprocess.run(
        build,
        cwd=ROOT,
        env={**os.environ, "MEGAGROW_CUDA": "0"},
        check=True,
        capture_output=True,
        timeout=300,
    )
    (wheel,) = home.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "--no-deps", "--no-index", "--target", home / "site", wheel],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return home / "site"


def outside(installed, directory, *words, status=0):
    """What a command of the installed package prints, run where no checkout is."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_installed_package_is_whole(installed, tmp_path):
    found = outside(
        installed, tmp_path, "-c",
        "import megagrow, megagrow.files, megagrow.ops.build as build\n"
        "print(megagrow.__file__, build.SOURCES, megagrow.files.SHIPPED, sep='\\n')",
    ).split()  # fmt: skip
    package = installed / "megagrow"
    assert found == [str(package / "__init__.py"), str(package / "kernels/csrc"), str(package)]
    for top, target in ("configs", "configs"), ("kernels/csrc", "kernels/csrc"):
        ours = {p.relative_to(ROOT / top) for p in (ROOT / top).rglob("*") if p.is_file()}
        there = {p.relative_to(package / target) for p in (package / target).rglob("*")
                 if p.is_file()}  # fmt: skip
        assert ours == there
    for pattern in ("*.py", "*.json", "*.c", "py.typed"):
        ours = {p.relative_to(ROOT) for p in (ROOT / "megagrow").rglob(pattern)}
        assert ours == {
            p.relative_to(installed) for p in package.rglob(pattern)
            if p.relative_to(package).parts[0] not in ("configs", "kernels")
        }  # fmt: skip


def test_commands_outside_a_checkout(installed, tmp_path):
    command = (installed / "bin" / "megagrow").read_text()
    assert "from megagrow.cli.main import program" in command
    said = outside(installed, tmp_path, installed / "bin" / "megagrow", "--help")
    assert said == outside(installed, tmp_path, "-m", "megagrow", "--help")
    assert said.startswith("usage: megagrow COMMAND ...")
    said = outside(installed, tmp_path, "-m", "megagrow", "inspect", "--help")
    assert said.startswith("usage: megagrow inspect ")
    run = ["-m", "megagrow", "train", "--config", "configs/llama/1b.yaml", "data.path=nowhere"]
    said = outside(installed, tmp_path, *run, "--dry-run", "--world", "8", "--memory", "80GB")
    assert "stage 0: 4 layers" in said and "fits into" in said
    machine = ["--machine", "configs/machines/h100.yaml", "data.path=nowhere"]
    run = ["-m", "megagrow", "plan", "--config", "configs/scale/gpt175b_1024.yaml", *machine]
    assert "MFU" in outside(installed, tmp_path, *run)
    listed = outside(installed, tmp_path, "-m", "megagrow", "configs").split()
    assert "configs/quickstart.yaml" in listed and "configs/tokenizers/bytes.json" in listed
    made = ["--input", "stdlib", "--glob", "a*.py", "--output", "data",
            "--tokenizer", "configs/tokenizers/bytes.json"]  # fmt: skip
    assert "data" in outside(installed, tmp_path, "-m", "megagrow", "prepare", *made)
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]


def test_the_installed_benchmark(installed, tmp_path):
    """What a user measures is installed; what measures megagrow itself says where it is."""
    assert not (installed / "benchmarks").exists()
    run = [installed / "bin" / "megagrow", "benchmark"]
    said = outside(installed, tmp_path, *run, "throughput", status=1)
    assert "benchmarks/ of a checkout" in said and "launch/benchmark.py throughput" in said
    words = ["--input", "stdlib", "--glob", "a*.py", "--output", "data", "--validation-fraction",
             "0.2", "--tokenizer", "configs/tokenizers/bytes.json"]  # fmt: skip
    outside(installed, tmp_path, "-m", "megagrow", "prepare", *words)
    plan = ["savings", "--config", "configs/bench/cpu_savings.yaml", "--dry-run"]
    said = outside(installed, tmp_path, *run, *plan, "target.data.path=data")
    assert "a decay completed at" in said and "seeds: 1 tunes" in said
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]


def test_a_source_distribution_has_what_the_wheel_is_made_of(tmp_path):
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path,
         "sdist", "--dist-dir", tmp_path],
        cwd=ROOT, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    for top in ("configs", "kernels/csrc"):
        for path in (ROOT / top).rglob("*"):
            assert path.relative_to(ROOT).as_posix() in names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "megagrow/py.typed"} <= names
