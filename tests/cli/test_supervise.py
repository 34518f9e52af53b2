"""The command line of launch/supervise.py: what it rejects before it starts anything."""

import re

import pytest

from megagrow.cluster.launchers import resumed
from megagrow.errors import ConfigError
from tests.jobs import PRETRAIN, command, settings, write_config


@pytest.fixture(scope="module")
def supervise():
    return command("supervise")


SECRET = "0123456789abcdef"


def place(supervise, *words, **environ):
    return supervise.place_of(supervise.parse([*words, "script.py"]), environ)


def test_a_job_of_this_machine(supervise):
    """Other variables of a scheduler do not make it one of many nodes; each has its own secret."""
    environ = {"MEGAGROW_SECRET": SECRET, "SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}
    found = [place(supervise, **environ) for _ in range(2)]
    assert {(p.host, p.address, p.decides, p.nodes) for p in found} == {
        ("127.0.0.1", "127.0.0.1", True, (1, 1))
    }
    assert len({p.secret for p in found} | {SECRET.encode()}) == 3


def test_nodes_by_hand(supervise):
    words = ["--nnodes", "2:8", "--node-rank", "1", "--master", "[fd00::1]:29400"]
    found = place(supervise, *words, MEGAGROW_SECRET=SECRET)
    assert (found.nodes, found.decides, found.host, found.port) == ((2, 8), False, "fd00::1", 29400)
    assert found.secret == SECRET.encode()


def test_which_node_decides(supervise):
    """By its number, or else whose address --master is."""
    words = ["--nnodes", "2", "--master", "localhost:29400"]
    found = place(supervise, *words, MEGAGROW_SECRET=SECRET)
    assert (found.decides, found.address) == (None, "127.0.0.1")
    found = place(supervise, *words, "--node-rank", "0", MEGAGROW_SECRET=SECRET)
    assert found.decides is True
    words[-1] = "192.0.2.77:29400"
    assert place(supervise, *words, MEGAGROW_SECRET=SECRET).decides is False


def test_nodes_of_slurm(supervise, tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$3" | tr , "\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    environ = {
        "SLURM_JOB_ID": "1234567", "SLURM_STEP_NUM_NODES": "3", "SLURM_NODEID": "2",
        "SLURM_STEP_NODELIST": "a7,a8,b1", "MEGAGROW_SECRET": SECRET,
    }  # fmt: skip
    found = place(supervise, "--scheduler", "slurm", **environ)
    assert (found.nodes, found.decides, found.host, found.port) == ((3, 3), False, "a7", 24567)
    # Fewer will do: --nnodes comes first.
    assert place(supervise, "--scheduler", "slurm", "--nnodes", "2:3", **environ).nodes == (2, 3)


def test_slurm_without_scontrol(supervise, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"scontrol(.|\n)*give --master"):
        place(supervise, "--scheduler", "slurm", SLURM_JOB_ID="1", SLURM_STEP_NODELIST="a")


def test_nodes_of_kubernetes(supervise):
    found = place(
        supervise, "--scheduler=kubernetes", JOB_COMPLETION_INDEX="1", MEGAGROW_NODES="2",
        MEGAGROW_MASTER="run-0.run:29400", MEGAGROW_SECRET=SECRET,
    )  # fmt: skip
    assert (found.nodes, found.decides, found.host, found.port) == (
        (2, 2),
        False,
        "run-0.run",
        29400,
    )


@pytest.mark.parametrize(
    ("words", "environ", "parts"),
    [
        (["--nnodes", "2"], {}, ["--master, MEGAGROW_SECRET not given"]),
        (["--scheduler", "slurm"], {}, ["--nnodes, --master, MEGAGROW_SECRET not given"]),
        (["--scheduler", "kubernetes"], {"MEGAGROW_NODES": "2"}, ["--master, MEGAGROW_SECRET"]),
        (["--nnodes", "2", "--master", "a:1"], {"MEGAGROW_SECRET": "short"},
         ["MEGAGROW_SECRET: too short", "openssl rand"]),
        (["--nnodes", "2", "--node-rank", "2", "--master", "a:1"], {"MEGAGROW_SECRET": SECRET},
         ["--node-rank", "found:    2", "0 to 1"]),
        (["--nnodes", "2", "--node-rank", "0", "--master", "a:1", "--hostfile", "h"],
         {"MEGAGROW_SECRET": SECRET}, ["--hostfile as well"]),
        (["--hostfile", "/no/such/file"], {}, ["--hostfile /no/such/file: cannot be read"]),
        (["--nnodes", "2", "--node-rank", "0", "--master", "a"], {"MEGAGROW_SECRET": SECRET},
         ["--master", "HOST:PORT"]),
    ],
)  # fmt: skip
def test_what_does_not_go_together(supervise, monkeypatch, capsys, tmp_path, words, environ, parts):
    monkeypatch.chdir(tmp_path)
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    status = supervise.main([*words, "--restarts", "0", str(PRETRAIN)])
    said = capsys.readouterr().err
    assert status != 0 and all(part in said for part in parts), said
    assert said.count("error: ") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--ranks", "0"],
        ["--ranks", "x"],
        ["--scheduler", "pbs"],
        ["--nnodes", "3:2"],
        ["--nnodes", "0"],
        ["--nnodes", "2:"],
    ],
)
def test_options_that_are_wrong(supervise, capsys, words):
    with pytest.raises(SystemExit) as stop:
        supervise.main([*words, str(PRETRAIN)])
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err


def test_a_configuration_is_read_first(supervise, capsys, tmp_path):
    """Before ssh or any process, so that its errors cost nothing."""
    config = write_config(tmp_path / "run.yaml", settings(tmp_path / "data", tmp_path / "run"))
    words = [str(PRETRAIN), "--config", str(config)]
    assert supervise._logs_of(words) == tmp_path / "run" / "logs"
    assert supervise._logs_of([*words, "--resume", "auto", "run.dir=else"]).parent.name == "else"
    assert supervise._logs_of(["other.py", "a=b"]) is None
    assert supervise.main([*words, "optimizer.lrr=1"]) == 78
    assert "optimizer.lrr" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_help_has_examples(supervise, capsys):
    with pytest.raises(SystemExit):
        supervise.main(["--help"])
    said = capsys.readouterr().out
    assert "--hostfile hosts" in said and "--scheduler slurm" in said and "exit status:" in said
    # Every option of the examples exists.
    examples = said[said.index("examples:") :]
    for option in set(re.findall(r"--[a-z-]+", examples)) - {"--config", "--ntasks-per-node"}:
        assert f"  {option}" in said[: said.index("examples:")]


def test_a_start_again_goes_on():
    assert resumed(["p.py", "--config", "c"]) == ["p.py", "--config", "c", "--resume", "good"]
    for given in (["--resume", "never"], ["--resume=/a/path"], ["--resume", "auto"]):
        assert resumed(["p.py", *given, "a=1"]) == ["p.py", "a=1", "--resume", "good"]
