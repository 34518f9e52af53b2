"""Set-up: packaging, pins, the Makefile's checks, continuous integration."""

import os
import re
import shutil
import subprocess
import sys
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
    assert SpecifierSet(info.metadata["Requires-Python"]) == SpecifierSet(">=3.10,<3.13")
    assert {"dev", "gpu", "hf"} <= set(info.metadata.get_all("Provides-Extra"))
    return [Requirement(line) for line in info.requires]


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_apex_is_never_a_dependency(requirements):
    names = {requirement.name.lower() for requirement in [*requirements, *pins()]}
    assert "apex" not in names
    assert "torch" in names


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
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


@pytest.mark.parametrize("version", ["3.9.18", "3.13.0"])
def test_set_up_refuses_other_pythons(fresh, version):
    result = make("setup", f"PYTHON={fake_python(fresh, version)}", cwd=fresh)
    assert result.returncode != 0
    assert "needs Python 3.10, 3.11 or 3.12" in result.stderr
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
    assert "needs Python 3.10, 3.11 or 3.12" in result.stderr


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
