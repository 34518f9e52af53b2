"""The command line of launch/supervise.py: what it rejects before it starts anything."""

import re

import pytest

from megagrow.cluster.launchers import resumed
from megagrow.errors import ConfigError
from tests.jobs import PRETRAIN, command, settings, write_config


@pytest.fixture(scope="module")
def supervise():
    return command("supervise")


def node_job(supervise, *words, **environ):
    return supervise._node_job(supervise.parse([*words, "script.py"]), environ)


def test_not_a_job_of_nodes(supervise):
    assert node_job(supervise, MEGAGROW_TOKEN="t", SLURM_JOB_ID="7", SLURM_NNODES="2") is None


def test_nodes_by_hand(supervise):
    job = node_job(
        supervise, "--nnodes", "2", "--node-rank", "1", "--master", "[fd00::1]:29400",
        "--ranks", "4", MEGAGROW_TOKEN="t",
    )  # fmt: skip
    assert (job.nodes, job.node, job.master, job.port) == (2, 1, "fd00::1", 29400)
    assert (job.ranks, job.token) == (4, "t")


def test_nodes_of_slurm(supervise, tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$3" | tr , "\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    environ = {
        "SLURM_JOB_ID": "1234567", "SLURM_STEP_NUM_NODES": "3", "SLURM_NODEID": "2",
        "SLURM_STEP_NODELIST": "a7,a8,b1",
    }  # fmt: skip
    job = node_job(supervise, "--scheduler", "slurm", **environ)
    assert (job.nodes, job.node, job.master, job.port) == (3, 2, "a7", 24567)
    # Without a token, the job's number separates it from other jobs.
    assert job.token == "1234567"


def test_slurm_without_scontrol(supervise, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"scontrol(.|\n)*give --master"):
        node_job(supervise, "--scheduler", "slurm", SLURM_JOB_ID="1", SLURM_STEP_NODELIST="a")


def test_nodes_of_kubernetes(supervise):
    job = node_job(
        supervise, "--scheduler=kubernetes", JOB_COMPLETION_INDEX="0", MEGAGROW_NODES="2",
        MEGAGROW_MASTER="run-0.run:29400", MEGAGROW_TOKEN="uid",
    )  # fmt: skip
    assert (job.nodes, job.node, job.master, job.port) == (2, 0, "run-0.run", 29400)


@pytest.mark.parametrize(
    ("words", "environ", "parts"),
    [
        (["--nnodes", "2"], {}, ["--node-rank, --master, MEGAGROW_TOKEN not given"]),
        (["--scheduler", "slurm"], {}, ["--nnodes, --node-rank, --master, MEGAGROW_TOKEN"]),
        (["--scheduler", "kubernetes"], {"MEGAGROW_NODES": "2"}, ["--node-rank, --master"]),
        (["--nnodes", "2", "--node-rank", "2", "--master", "a:1"], {"MEGAGROW_TOKEN": "t"},
         ["--node-rank", "found:    2", "0 to 1"]),
        (["--nnodes", "2", "--node-rank", "0", "--master", "a:1", "--hostfile", "h"],
         {"MEGAGROW_TOKEN": "t"}, ["--hostfile as well"]),
        (["--hostfile", "/no/such/file"], {}, ["--hostfile /no/such/file: cannot be read"]),
        (["--nnodes", "2", "--node-rank", "0", "--master", "a"], {"MEGAGROW_TOKEN": "t"},
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


@pytest.mark.parametrize("words", [["--ranks", "0"], ["--ranks", "x"], ["--scheduler", "pbs"]])
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
