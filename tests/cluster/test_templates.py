"""The scheduler templates, run with stand-ins for the scheduler's commands and for ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.jobs import REPOSITORY, settings, write_config

HERE = Path(__file__).parent
TEMPLATES = REPOSITORY / "configs" / "cluster"
SLURM, KUBERNETES = TEMPLATES / "slurm.sh", TEMPLATES / "kubernetes.yaml"
SLURM_TORCHRUN = TEMPLATES / "slurm_torchrun.sh"
KUBERNETES_TORCHRUN = TEMPLATES / "kubernetes_torchrun.yaml"

# Starts one task per node, locally; passes SIGUSR1 to each, as Slurm does for --signal.
SRUN = """
import os, signal, subprocess, sys
nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
words = sys.argv[1:]
program = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
[start] = [i for i, word in enumerate(words) if word in program]
words = program[words[start]] + words[start + 1:]
tasks = [
    subprocess.Popen(words, env={**os.environ, "SLURM_NODEID": str(n),
        "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_STEP_NODELIST": "node[0-1]"})
    for n in range(nodes)
]
signal.signal(signal.SIGUSR1, lambda n, f: [t.send_signal(n) for t in tasks])
open("srun_pid", "w").write(str(os.getpid()))
sys.exit(max(t.wait() for t in tasks))
"""
SCONTROL = """
import sys
open("scontrol_calls", "a").write(" ".join(sys.argv[1:]) + chr(10))
if sys.argv[1:3] == ["show", "hostnames"]:
    print("localhost"); print("node1")
"""


@pytest.fixture
def place(tmp_path):
    """A directory to submit jobs from, with lightweight programs in it."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "bin").mkdir()
    for name, script in (("supervise", "light_supervise"), ("pretrain", "light_rank")):
        text = (
            f"import runpy\nrunpy.run_path({str(HERE / script)!r} + '.py', run_name='__main__')\n"
        )
        (tmp_path / "launch" / f"{name}.py").write_text(text)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(0o755)
    write_config(tmp_path / "run.yaml", settings(tmp_path / "data", tmp_path / "run"))
    return tmp_path


def submit(place, *words, template=SLURM, **environ):
    return subprocess.Popen(
        ["bash", template, "run.yaml", "--dir", place, *map(str, words)],
        cwd=place / "bin",
        env={
            **os.environ,
            "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "SLURM_SUBMIT_DIR": str(place),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "2",
            **environ,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


def asked_of_slurm(place):
    calls = (place / "scontrol_calls").read_text().splitlines()
    return [call for call in calls if not call.startswith("show hostnames node[0-1]")]


def test_slurm(place):
    status, said = finish(submit(place, "--steps", 3))
    assert status == 0, said
    # Four ranks on two nodes.
    assert [(place / f"starts_{n}").read_text().split()[2] for n in range(4)] == ["4"] * 4
    assert asked_of_slurm(place) == []


def test_slurm_where_fewer_nodes_will_do(place):
    status, said = finish(submit(place, "--steps", 3, NNODES="1:2"))
    assert status == 0, said
    assert (place / "starts_3").read_text().split()[2] == "4"


def test_slurm_by_torchrun(place):
    words = ["--steps", 3]
    environ = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2"}
    status, said = finish(submit(place, *words, template=SLURM_TORCHRUN, **environ))
    assert status == 0, said
    assert [(place / f"starts_{n}").read_text().split()[2] for n in range(4)] == ["4"] * 4


def test_slurm_before_its_time_limit(place):
    process = submit(place, "--steps", 9999)
    saved = place / "saved"
    end = time.monotonic() + 300
    while not saved.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.kill(int((place / "srun_pid").read_text()), signal.SIGUSR1)
    status, said = finish(process)
    assert status == 75, said
    assert asked_of_slurm(place) == [f"requeue {os.getpid()}"]


def test_slurm_with_a_wrong_configuration(place):
    status, said = finish(submit(place, "--fail-at-start"))
    assert status == 78 and "layout.tensor does not divide" in said
    assert asked_of_slurm(place) == []


def test_slurm_says_how_it_is_used():
    done = subprocess.run(["bash", SLURM], capture_output=True, text=True)
    assert done.returncode != 0 and "usage: sbatch" in done.stderr
    lines = [line.split() for line in SLURM.read_text().splitlines() if "#SBATCH" in line]
    options = dict([*word[1].split("="), None][:2] for word in lines if word[0] == "#SBATCH")
    assert options["--signal"] == "USR1@300" and "--requeue" in options
    assert options["--open-mode"] == "append" and options["--ntasks-per-node"] == "1"


def test_kubernetes_says_what_it_must():
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    environ = {entry["name"]: entry.get("value") for entry in container["env"]}
    name = job["metadata"]["name"]
    assert spec["completionMode"] == "Indexed"
    assert str(spec["completions"]) == str(spec["parallelism"]) == environ["MEGAGROW_NODES"]
    # Pods have names only through a headless service with their subdomain's name.
    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == "megagrow"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert environ["MEGAGROW_MASTER"].startswith(f"{name}-0.{pod['subdomain']}:")
    # A podFailurePolicy is accepted only with this restart policy.
    assert pod["restartPolicy"] == "Never"
    actions = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", ["disrupted"])
    }
    assert actions == {78: "FailJob", 75: "Ignore", "disrupted": "Ignore"}
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule.get("onExitCodes", {}).get("containerName", "train") == container["name"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    stop = next(word for word in container["command"] if word.startswith("--stop="))
    assert float(stop[7:]) < pod["terminationGracePeriodSeconds"]


def test_kubernetes_by_torchrun(place):
    """The container's own command, as the training operator starts it."""
    [job] = yaml.safe_load_all(KUBERNETES_TORCHRUN.read_text())
    assert (job["kind"], job["apiVersion"]) == ("PyTorchJob", "kubeflow.org/v1")
    replicas, policy = job["spec"]["pytorchReplicaSpecs"], job["spec"]["elasticPolicy"]
    [worker] = replicas.values()
    assert list(replicas) == ["Worker"] and worker["replicas"] == policy["maxReplicas"]
    assert policy["rdzvBackend"] == "c10d" and worker["restartPolicy"] == "ExitCode"
    pod = worker["template"]["spec"]
    [container] = pod["containers"]
    assert container["name"] == "pytorch"  # the operator looks for this name
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    [program, *words] = container["command"]
    assert program == "torchrun" and words[:2] == ["launch/pretrain.py", "--config"]
    given = {"PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}",
             "PET_NPROC_PER_NODE": "1", "PET_RDZV_BACKEND": policy["rdzvBackend"],
             "PET_RDZV_ENDPOINT": "localhost:29477", "PET_RDZV_ID": "run",
             "PET_MAX_RESTARTS": str(policy["maxRestarts"])}  # fmt: skip
    pods = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "launch/pretrain.py", "--config",
             "run.yaml", "--dir", str(place)],
            cwd=place, env={**os.environ, "PYTHONPATH": str(REPOSITORY), **given},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(policy["maxReplicas"])
    ]  # fmt: skip
    ended = [finish(pod) for pod in pods]
    assert [status for status, _ in ended] == [0, 0], ended
    assert (place / "starts_1").read_text().split()[2] == "2"


def test_kubernetes_pods(place):
    """The container's own command, once per index, with its pods' names as localhost."""
    _, job = yaml.safe_load_all(KUBERNETES.read_text())
    [container] = job["spec"]["template"]["spec"]["containers"]
    words = [w.replace("--ranks=8", "--ranks=2") for w in container["command"]]
    words[words.index("/shared/run.yaml")] = "run.yaml"
    given = {entry["name"]: entry.get("value", "0123456789abcdef") for entry in container["env"]}
    port = given["MEGAGROW_MASTER"].rpartition(":")[2]
    pods = [
        subprocess.Popen(
            [sys.executable, *words[1:], "--dir", str(place)],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **given,
                 "JOB_COMPLETION_INDEX": str(index), "MEGAGROW_MASTER": f"localhost:{port}"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(job["spec"]["completions"])
    ]  # fmt: skip
    ended = [finish(pod) for pod in pods]
    assert [status for status, _ in ended] == [0, 0], ended
    assert (place / "saved").read_text() == "5"
