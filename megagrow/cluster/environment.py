"""The environment of a job: what goes along to its hosts, and what a rank is told there.

Neither ssh nor DeepSpeed's launcher carries the first: the launcher exports what starts with
PYTHON and a few more prefixes, and what a file (DS_ENV_FILE) says.  That file takes no comment and
no blank line, and its values pass through a remote shell.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
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
# They belong to one process.
_OWN = frozenset({"TORCHELASTIC_RUN_ID", "MEGAGROW_TOKEN"})


def ranks_here(environ: Mapping[str, str]) -> int | None:
    """How many ranks of the job this host has, as its launcher says; None without a launcher."""
    # torchrun and the deepspeed launcher call it differently.
    told = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE")
    return int(told) if told else None


# How launchers of MPI's kind tell a process how many of them there are.
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
    """Refuse to be a job of one process beside others that were started as its ranks.

    Without RANK a process trains alone.  A launcher that starts several but sets no RANK would
    have each of them train the whole run, in the same directory.

    Raises:
        ConfigError: there is no RANK, but one of several tasks.
    """
    if "RANK" in environ:
        return
    for name, launcher in _TASKS.items():
        count = environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            slurm = name.startswith("SLURM")
            raise ConfigError(
                f"one of {count} tasks of {launcher}, but no RANK tells which",
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
    """CPU threads of this rank: what is asked for, what OMP says, or its share of the cores."""
    if asked is not None:
        return asked
    if "OMP_NUM_THREADS" in environ:
        return int(environ["OMP_NUM_THREADS"])
    return max(1, (os.cpu_count() or 1) // (ranks_here(environ) or 1))


def carried(environ: Mapping[str, str], *, also: Sequence[str] = ()) -> dict[str, str]:
    """What of this environment every rank shall see.

    Args:
        also: further names or prefixes (ending with ``_``) that the user asks for.

    Raises:
        ConfigError: a value of them has several lines, which the launcher cannot carry.
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
    """What the user's own file for DeepSpeed's launcher says, which ours takes the place of."""
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
    """Write a file for DS_ENV_FILE, for this user's eyes alone: it holds the lifeline's token."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as stream:
        stream.write("\n".join(f"{k}={_as_launcher_quotes(v)}" for k, v in values.items()))


def _as_launcher_quotes(value: str) -> str:
    """Such that it arrives whole: the launcher writes it between double quotes, then pdsh reads."""
    return re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")


def remote_argument(text: str) -> str:
    """An argument of the script, such that it arrives whole.

    The launcher joins all by spaces for a remote shell.  One with a space it puts between double
    quotes, after escaping those in it; pdsh takes ``%`` for a format.
    """
    if " " in text:
        return re.sub(r"([\\$`])", r"\\\1", text).replace("%", "%%")
    if re.fullmatch(r"[\w@+=:,./-]+", text):
        return text
    return ("'" + text.replace("'", "'\\''") + "'").replace("%", "%%")
