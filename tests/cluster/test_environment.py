"""The environment passed to the hosts, through a real shell."""

import subprocess

import pytest

from megagrow.cluster.environment import (
    carried,
    job_of_one,
    remote_argument,
    require_one_task,
    users_file,
    write_launcher_file,
)
from megagrow.errors import ConfigError

NASTY = [
    "plain", "a b", "100%", "%n", "$HOME", "a'b", 'a"b', "a\\b", "`id`", "a;b", "*", "", "é",
    "stages.1.until.steps=5", "{a: 1}", "x y $z `w` \\ \"q\" 'r' %h",
]  # fmt: skip


def test_what_is_carried():
    environ = {
        "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0", "MEGAGROW_JOB": "x", "HF_HOME": "/h",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": "/p", "DS_ACCELERATOR": "cpu", "HOME": "/root",
        "HOSTNAME": "here", "MINE": "1", "OUR_A": "2", "SECRET": "3", "MEGAGROW_SECRET": "t",
    }  # fmt: skip
    assert set(carried(environ, also=["MINE", "OUR_"])) == {
        "NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "MEGAGROW_JOB", "HF_HOME", "OMP_NUM_THREADS",
        "PYTHONPATH", "DS_ACCELERATOR", "MINE", "OUR_A",
    }  # fmt: skip


def test_several_lines_are_refused():
    with pytest.raises(ConfigError, match="NCCL_X cannot be carried"):
        carried({"NCCL_X": "a\nb"})


def test_the_users_own_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("# a comment\n\nA=1\n  B = two words \nnonsense\n")
    assert users_file({"DS_ENV_FILE": str(tmp_path / "mine")}) == {"A": "1", "B": "two words"}
    assert users_file({"DS_ENV_FILE": str(tmp_path / "none")}) == {}


def as_the_launcher_does(path):
    """What its ranks get: the launcher's own reader, its quotes, pdsh's %, and a shell."""
    from deepspeed.launcher.multinode_runner import MultiNodeRunner

    class Runner(MultiNodeRunner):
        def __init__(self):
            self.exports = {}

        def backend_exists(self):
            return True

        def get_cmd(self, environment, active_resources):
            return []

    runner = Runner()
    for line in path.read_text().splitlines(keepends=True):
        key, value = line.split("=", maxsplit=1)
        runner.add_export(key, value)
    script = "".join(f"export {k}={v}; " for k, v in runner.exports.items())
    return after_pdsh(script)


def after_pdsh(script):
    return script.replace("%%", "\0").replace("%n", "0").replace("%h", "h0").replace("\0", "%")


def test_values_arrive_whole(tmp_path):
    values = {f"V{i}": text for i, text in enumerate(NASTY)}
    write_launcher_file(tmp_path / "env", values)
    assert (tmp_path / "env").stat().st_mode & 0o077 == 0
    script = as_the_launcher_does(tmp_path / "env")
    script += "; ".join(f'printf "%s\\0" "$V{i}"' for i in range(len(NASTY)))
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == NASTY


def test_arguments_arrive_whole():
    from deepspeed.launcher.multinode_runner import PDSHRunner

    class Arguments:
        user_args = tuple(remote_argument(text) for text in NASTY)

    class Runner(PDSHRunner):
        def __init__(self):
            self.args = Arguments

    words = Runner().parse_user_args()
    script = after_pdsh(" ".join(["printf '%%s\\0'", *words]))
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == NASTY


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, "srun"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "Open MPI"),
        ({"PMI_SIZE": "8", "PMI_RANK": "3"}, "MPICH"),
        ({"WORLD_SIZE": "2"}, "a launcher"),
    ],
)
def test_one_of_several_tasks_without_a_rank_does_not_train_alone(environ, launcher):
    with pytest.raises(ConfigError, match=f"(?s)tasks of {launcher}.*supervise.py"):
        require_one_task(environ)
    require_one_task({**environ, "RANK": "0"})  # a launcher of ranks within
    require_one_task(dict.fromkeys(environ, "1"))


def test_a_batch_script_of_several_tasks_is_one_process():
    """As Slurm sets it outside of srun, where a single process runs."""
    require_one_task({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"})


def test_a_job_of_one_leaves_no_rank_behind():
    """A program of the user's, started after a training in the same process, is no rank of it."""
    environ = {"HOME": "/", "MASTER_PORT": "29500"}
    with job_of_one(environ):
        assert environ == {"HOME": "/", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # fmt: skip
    assert environ == {"HOME": "/", "MASTER_PORT": "29500"}
    launched = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_PORT": "29500"}
    with job_of_one(launched):
        assert launched == {"RANK": "3", "WORLD_SIZE": "4", "MASTER_PORT": "29500"}
