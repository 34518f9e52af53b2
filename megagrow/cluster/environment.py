"""The environment of a job: the variables passed on to its hosts, and those set for a rank.

Neither ssh nor DeepSpeed's launcher passes the first: the launcher exports only names with the
prefix PYTHON and a few others, and the contents of a file (DS_ENV_FILE).  That file allows no
comments and no blank lines, and its values pass through a remote shell.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path

from megagrow.errors import ConfigError

PREFIXES = (
    "CUDA_DEVICE_", "FI_", "GLOO_", "HF_", "MEGAGROW_", "MKL_", "NCCL_", "OMP_", "PYTORCH_",
    "TORCH_", "TORCHINDUCTOR_", "TRITON_", "UCX_", "WANDB_",
)  # fmt: skip
NAMES = (
    "CUDA_HOME", "CUDA_LAUNCH_BLOCKING", "DS_ACCELERATOR", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH",
    "TOKENIZERS_PARALLELISM", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
# Specific to one process.
_OWN = frozenset({"TORCHELASTIC_RUN_ID", "MEGAGROW_SECRET"})


def ranks_here(environ: Mapping[str, str]) -> int | None:
    """Number of the job's ranks on this host, from the launcher's variables; None without one."""
    # torchrun and the deepspeed launcher use different names.
    stated = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE")
    return int(stated) if stated else None


@contextlib.contextmanager
def job_of_one(environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Set a rank's variables for a job of this process alone, unless a launcher has set them.

    They are removed at the end: a process that this one starts afterwards is no rank of its job.
    DeepSpeed reads LOCAL_RANK whenever it makes an engine, so they stay for the whole job.

    Raises:
        ConfigError: as for `require_one_task`.
    """
    require_one_task(environ)
    before = dict(environ)
    if "RANK" not in environ:
        environ.update(_ALONE)
    try:
        yield
    finally:
        for name in _ALONE:
            if name in before:
                environ[name] = before[name]
            else:
                environ.pop(name, None)


# Port 0: the system picks one, and no other process needs to know it.
_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
          "MASTER_PORT": "0"}  # fmt: skip


# Variables with which MPI-style launchers tell a process how many tasks there are.
_TASKS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "MPICH's or Intel's mpiexec",
    "MV2_COMM_WORLD_SIZE": "MVAPICH's mpirun",
    "JSM_NAMESPACE_SIZE": "jsrun",
    "FLUX_JOB_SIZE": "flux run",
    "WORLD_SIZE": "a launcher",
}


def require_one_task(environ: Mapping[str, str]) -> None:
    """Refuse to run as a single-process job if other tasks were started with this one.

    Without RANK a process trains alone.  A launcher that starts several tasks without setting RANK
    would make each of them train the whole run, in the same directory.

    Raises:
        ConfigError: there is no RANK, but this is one of several tasks.
    """
    if "RANK" in environ:
        return
    for name, launcher in _TASKS.items():
        count = environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            slurm = name.startswith("SLURM")
            raise ConfigError(
                f"one of {count} tasks of {launcher}, but no RANK says which",
                found=f"{name}={count} in the environment, and no RANK",
                expected="a launcher that sets RANK and WORLD_SIZE (deepspeed, torchrun, "
                "launch/supervise.py), or one task",
                fix="srun --ntasks-per-node 1 python launch/supervise.py --scheduler slurm "
                "launch/pretrain.py --config FILE"
                if slurm
                else "start it by launch/supervise.py, deepspeed or torchrun, one on each node; "
                f"or, if this job is meant to have one process, unset {name}",
            )


def threads_of_a_rank(environ: Mapping[str, str], *, asked: int | None) -> int:
    """CPU threads of this rank: as requested, from OMP_NUM_THREADS, or its share of the cores."""
    if asked is not None:
        return asked
    if "OMP_NUM_THREADS" in environ:
        return int(environ["OMP_NUM_THREADS"])
    return max(1, (os.cpu_count() or 1) // (ranks_here(environ) or 1))


def carried(environ: Mapping[str, str], *, also: Sequence[str] = ()) -> dict[str, str]:
    """The variables of this environment that every rank should see.

    Args:
        also: additional names or prefixes (ending with ``_``) that the user requests.

    Raises:
        ConfigError: one of the values has several lines, which the launcher cannot pass on.
    """
    names = {*NAMES, *also}
    prefixes = PREFIXES + tuple(name for name in also if name.endswith("_"))
    found = {
        key: value
        for key, value in sorted(environ.items())
        if (key in names or key.startswith(prefixes)) and key not in _OWN
    }
    for key, value in found.items():
        if "\n" in value or "\r" in value:
            raise ConfigError(
                f"environment variable {key} cannot be carried to the hosts",
                found=f"a value of {len(value.splitlines())} lines",
                expected="one line",
                fix=f"unset {key}, or set it on the hosts themselves",
            )
    return found


def users_file(environ: Mapping[str, str]) -> dict[str, str]:
    """The contents of the user's own file for DeepSpeed's launcher, which ours replaces."""
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    values: dict[str, str] = {}
    for directory in (Path.home(), Path.cwd()):
        path = directory / name
        if not path.is_file():
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            key, equals, value = line.strip().partition("=")
            if equals and not key.startswith("#"):
                values[key.strip()] = value.strip()
    return values


def write_launcher_file(path: Path, values: Mapping[str, str]) -> None:
    """Write a DS_ENV_FILE, readable only by this user."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as stream:
        stream.write("\n".join(f"{k}={_as_launcher_quotes(v)}" for k, v in values.items()))


def _as_launcher_quotes(value: str) -> str:
    """Quote a value to arrive intact: the launcher adds double quotes, then pdsh reads it."""
    return re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")


def remote_argument(text: str) -> str:
    """Quote an argument of the script so that it arrives intact.

    The launcher joins all arguments with spaces for a remote shell.  It double-quotes those with a
    space, after escaping the quotes inside; pdsh interprets ``%`` as a format.
    """
    if " " in text:
        return re.sub(r"([\\$`])", r"\\\1", text).replace("%", "%%")
    if re.fullmatch(r"[\w@+=:,./-]+", text):
        return text
    return ("'" + text.replace("'", "'\\''") + "'").replace("%", "%%")
