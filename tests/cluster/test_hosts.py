"""Real jobs on separate hosts: 2 hosts x 2 ranks, tensor 2 x data 2, growths in the middle.

Every host's name resolves to its own loopback address, as Debian's installer leaves it.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.faults.hosts import Hosts, missing
from tests.jobs import (
    REPOSITORY,
    events,
    log_of,
    settings,
    train,
    trajectory,
    write_config,
)

pytestmark = pytest.mark.skipif(missing() != "", reason=missing() or "-")

PRETRAIN = Path(__file__).parent / "faulty_pretrain.py"
SUPERVISE = REPOSITORY / "launch" / "supervise.py"
SECRET = "0123456789abcdef"
PATIENT = 500  # seconds, for a whole job on a machine with other work


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(tmp_path_factory.mktemp("hosts"), 2, loopback_names=True) as made:
        yield made


def configured(dataset, base, **changes):
    changes = {"layout": {"tensor": 2, "zero": 1}, "checkpoint": {"every": 1, "keep": 4}} | changes
    return write_config(base / "run.yaml", settings(dataset, base / "run", **changes))


@pytest.fixture
def config(dataset, tmp_path):
    return configured(dataset, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """The log of four undisturbed ranks, which equals that of one process."""
    lines = train(4, configured(dataset, tmp_path_factory.mktemp("undisturbed")))
    alone = configured(dataset, tmp_path_factory.mktemp("alone"), layout={"tensor": 1, "zero": 1})
    expected = [line["loss"] for line in events(train(1, alone), "step")]
    assert [line["loss"] for line in events(lines, "step")] == pytest.approx(expected, rel=1e-5)
    assert len(events(lines, "growth")) == 2
    return trajectory(lines)


class Jobs:
    """Starts supervisors on the hosts, and ends whatever is left of them."""

    def __init__(self, hosts, config, here):
        self.hosts, self.config, self.here = hosts, config, here
        self.hostfile = here / "hostfile"
        self.hostfile.write_text("h0 slots=2\nh1 slots=2\n")
        self.notes = here / "notes"
        self.notes.mkdir()
        self.started = []

    def over_ssh(self, *options, faults=(), overrides=()):
        return self._start(
            "login", ["--hostfile", self.hostfile, *options], faults, overrides=overrides
        )

    def on_nodes(self, *options, faults=(), overrides=(), numbers=(0, 1)):
        port = 20_000 + os.getpid() % 5000
        nodes = () if "--nnodes" in options else ("--nnodes", "2")
        common = [*nodes, "--master", f"h0:{port}", "--ranks", "2", *options]
        return [
            self._start(f"h{n}", [*common, "--node-rank", str(n)], faults, overrides=overrides)
            for n in numbers
        ]

    def _start(self, host, options, faults, *, overrides):
        usual = {"--backoff": "1", "--grace": "5", "--silence": "15"}
        quick = [word for pair in usual.items() if pair[0] not in options for word in pair]
        return self.plain(
            host, [sys.executable, SUPERVISE, *quick, *options, PRETRAIN, "--config", self.config,
                   *overrides], faults=faults,
        )  # fmt: skip

    def plain(self, host, words, *, faults=(), **environ):
        log = self.here / f"said_{len(self.started)}"
        with log.open("w") as stream:
            process = self.hosts.start(
                host, words, stdout=stream, stderr=subprocess.STDOUT,
                environ={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MEGAGROW_SECRET": SECRET,
                         "PYTHONPATH": REPOSITORY, **environ,
                         "MEGAGROW_FAULTS": " ".join([str(self.notes), *faults])},
            )  # fmt: skip
        process.log = log
        self.started.append(process)
        return process

    def wait_for(self, condition, what):
        end = time.monotonic() + PATIENT
        while not condition():
            said = "\n".join(p.log.read_text() for p in self.started)
            ended = all(p.poll() is not None for p in self.started)
            assert (condition() or not ended) and time.monotonic() < end, f"no {what}:\n{said}"
            time.sleep(0.05)

    def wait_for_note(self, fault):
        path = self.notes / fault.replace(":", "_")
        self.wait_for(path.exists, fault)

    def end(self):
        for name in self.hosts.names:
            self.hosts.heal(name)
        for process in self.started:
            process.kill()
            process.wait()
        for host in ["login", *self.hosts.names]:
            for word in ("supervise.py", "deepspeed", "pretrain.py"):
                for pid in self.hosts.processes(host, word):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def jobs(hosts, config, tmp_path):
    made = Jobs(hosts, config, tmp_path)
    yield made
    made.end()


def finish(process):
    """(exit status, output)."""
    try:
        status = process.wait(PATIENT)
    except subprocess.TimeoutExpired:
        status = None
    return status, process.log.read_text()


def test_deepspeed_over_ssh(jobs, config, undisturbed):
    """From a third host, where the hosts' own names are useless."""
    status, said = finish(jobs.over_ssh())
    assert status == 0, said
    assert trajectory(log_of(config)) == undisturbed
    # The log reads as one process's would: no prefix of a host, and rank 0 alone speaks.
    assert "\nstep 0: validation loss" in said and said.count("report: ") == 1
    assert "Traceback" not in said and jobs.hosts.ranks() == {}


@pytest.mark.cluster
def test_torchrun_and_ranks_that_are_killed(jobs, config, undisturbed):
    """While training, saving and growing, on both hosts; each is resumed from."""
    faults = ["3:train_step:3:kill", "1:put:20:kill", "2:grow/_piece:3:kill"]
    ended = [finish(process) for process in jobs.on_nodes(faults=faults)]
    assert [status for status, _ in ended] == [0, 0], ended
    said = ended[0][1]
    for rank, host in ((3, "h1"), (1, "h0"), (2, "h1")):
        assert f"error: rank {rank} on {host} (pid " in said, said
    died = re.findall(r"^error: rank .* died without a word$", said, re.MULTILINE)
    assert len(died) == said.count("starting again") == 3
    # The supervisor knows which rank died; the others do not look for it before they end.
    assert "lost contact" not in said or "is gone or stopped" not in said
    assert trajectory(log_of(config)) == undisturbed
    assert len(list(jobs.notes.iterdir())) == 3 and jobs.hosts.ranks() == {}


# --- the longer ones: `make test-cluster` -------------------------------------------------


@pytest.mark.cluster
def test_deepspeed_without_supervisor(jobs, config, undisturbed, tmp_path):
    """The launcher alone, with the environment file that it requires."""
    settings = {"DS_ACCELERATOR": "cpu", "MEGAGROW_FAULTS": str(jobs.notes)}
    (tmp_path / "env").write_text("\n".join(f"{k}={v}" for k, v in settings.items()))
    words = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", jobs.hostfile,
        PRETRAIN, "--config", config,
    ]  # fmt: skip
    status, said = finish(jobs.plain("login", words, DS_ENV_FILE=tmp_path / "env"))
    assert status == 0, said
    assert trajectory(log_of(config)) == undisturbed


@pytest.mark.cluster
@pytest.mark.parametrize("fault", ["3:train_step:5:kill", "0:put:30:kill", "1:grow/_piece:3:kill"])
def test_ranks_that_are_killed_under_deepspeed(jobs, config, undisturbed, fault):
    status, said = finish(jobs.over_ssh(faults=[fault]))
    assert status == 0, said
    assert f"error: rank {fault[0]} on h" in said and said.count("starting again") == 1
    assert trajectory(log_of(config)) == undisturbed


PAUSE = "0:train_step:5:pause"


@pytest.mark.cluster
def test_a_host_is_cut_off_and_comes_back(jobs, config, undisturbed):
    process = jobs.over_ssh("--restarts", "9", faults=[PAUSE])
    jobs.wait_for_note(PAUSE)
    jobs.hosts.cut("h1")
    # Nothing can end the ranks on the unreachable hosts from outside.
    jobs.wait_for(lambda: jobs.hosts.ranks() == {}, "end of all ranks")
    jobs.hosts.heal("h1")
    status, said = finish(process)
    assert status == 0, said
    assert "nothing was heard from rank " in said and " on h1 (pid " in said
    assert trajectory(log_of(config)) == undisturbed


@pytest.mark.cluster
@pytest.mark.parametrize("empty", [("h1",), ("h0", "h1")], ids=["one", "both"])
def test_a_host_that_lost_its_memory(jobs, config, undisturbed, empty):
    """Its share comes from the other host's memory; if that is lost too, from the disk."""
    overrides = ["checkpoint.memory_every=1", "checkpoint.every=100"]
    process = jobs.over_ssh("--restarts", "9", faults=[PAUSE], overrides=overrides)
    jobs.wait_for_note(PAUSE)
    jobs.hosts.cut("h1")
    jobs.wait_for(lambda: jobs.hosts.ranks() == {}, "end of all ranks")
    for name in empty:  # as after a reboot
        assert jobs.hosts.run(name, ["sh", "-c", "rm -r /dev/shm/megagrow-*"])[0] == 0
    jobs.hosts.heal("h1")
    status, said = finish(process)
    assert status == 0, said
    lines = log_of(config)
    assert trajectory(lines) == undisturbed
    [resume] = events(lines, "resume")
    in_memory = empty == ("h1",)
    assert (resume["step"], resume.get("memory", False)) == ((4, True) if in_memory else (3, False))
    for name in jobs.hosts.names:
        assert "megagrow-" not in jobs.hosts.run(name, ["ls", "/dev/shm"])[1]


@pytest.mark.cluster
def test_a_host_is_lost_and_left_out(jobs, config, undisturbed):
    """Two ranks continue what four began: another layout, the same curve."""
    process = jobs.over_ssh("--restarts", "9", faults=[PAUSE])
    jobs.wait_for_note(PAUSE)
    jobs.hosts.cut("h1")
    jobs.hostfile.write_text("h0 slots=2\n")
    status, said = finish(process)
    assert status == 0, said
    lines = log_of(config)
    assert [x["world"] for x in lines if x["event"] in ("run_start", "resume")] == [4, 2]
    loss = [step[3] for step in trajectory(lines)]
    assert loss == pytest.approx([step[3] for step in undisturbed], rel=1e-5)


@pytest.mark.cluster
def test_a_host_is_cut_off_under_torchrun(jobs):
    processes = jobs.on_nodes("--restarts", "0", faults=[PAUSE])
    jobs.wait_for_note(PAUSE)
    jobs.hosts.cut("h1")
    ended = [finish(process) for process in processes]
    assert [status for status, _ in ended] == [1, 1], ended
    assert "node h1" in ended[0][1] or "on h1 (pid" in ended[0][1]
    assert "supervise: h1: the supervisor at " in ended[1][1]
    assert "nothing was heard from the supervisor" in ended[1][1]
    jobs.wait_for(lambda: jobs.hosts.ranks() == {}, "end of all ranks")


@pytest.mark.cluster
def test_the_supervisor_is_killed(jobs):
    """With no supervisor left to end them, all ranks end themselves."""
    process = jobs.over_ssh(faults=["0:train_step:4:pause"])
    jobs.wait_for_note("0:train_step:4:pause")
    assert set(jobs.hosts.ranks()) == {0, 1, 2, 3}
    for pid in jobs.hosts.processes("login", "supervise.py"):
        os.kill(pid, signal.SIGKILL)
    assert process.wait(PATIENT) != 0
    end = time.monotonic() + PATIENT
    while jobs.hosts.ranks():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.cluster
def test_pdsh_is_killed(jobs):
    """After which `deepspeed` itself returns 0 and all ranks stay alive."""
    process = jobs.over_ssh(
        "--restarts", "0", faults=["0:train_step:4:pause"], overrides=["stages.2.until.steps=900"]
    )
    jobs.wait_for_note("0:train_step:4:pause")
    [pid, *_] = jobs.hosts.processes("login", "pdsh -S")
    os.kill(pid, signal.SIGKILL)
    status, said = finish(process)
    assert status == 1 and "the launcher ended: exit status 0" in said, said
    assert jobs.hosts.ranks() == {}


@pytest.mark.cluster
def test_a_run_directory_that_is_not_shared(jobs):
    """The same path, another disk on each host."""
    override = f"run.dir={jobs.hosts.here / 'disk' / 'run'}"
    status, said = finish(jobs.over_ssh("--logs", jobs.here / "logs", overrides=[override]))
    assert status == 1 and "h1 and h0 do not share it" in said
    assert "it failed before it began to train" in said and "starting again from" not in said


@pytest.mark.cluster
def test_a_host_that_is_missing(jobs):
    """Found before anything is started; the message names it."""
    jobs.hostfile.write_text("h0 slots=2\nh7 slots=2\n")
    status, said = finish(jobs.over_ssh("--restarts", "0"))
    assert status == 1 and "1 of 2 hosts cannot take part" in said
    assert "found:    h7: ssh: Could not resolve hostname h7" in said


@pytest.mark.cluster
def test_nodes_that_come_and_go(jobs, config):
    """Two ranks go on in another layout while a host is cut off; with it again there are four."""

    def worlds():
        log = Path(config).parent / "run" / "metrics.jsonl"
        lines = log_of(config) if log.exists() else []
        return [x["world"] for x in lines if x["event"] in ("run_start", "resume")]

    overrides = ["stages.2.until.steps=900"]
    first, second = jobs.on_nodes("--nnodes", "1:2", faults=[PAUSE], overrides=overrides)
    jobs.wait_for_note(PAUSE)
    jobs.hosts.cut("h1")
    jobs.wait_for(lambda: worlds() == [4, 2], "two ranks alone")
    assert finish(second)[0] == 1
    jobs.hosts.heal("h1")
    again = jobs.on_nodes("--nnodes", "1:2", faults=[PAUSE], overrides=overrides, numbers=(1,))[0]
    jobs.wait_for(lambda: worlds() == [4, 2, 4], "four ranks again")
    for pid in jobs.hosts.processes("h1", "supervise.py"):
        os.kill(pid, signal.SIGTERM)
    status, said = finish(first)
    assert (status, finish(again)[0]) == (75, 75), said
    assert "a further node is there: 2 ranks are told to save and stop" in said
    jobs.wait_for(lambda: jobs.hosts.ranks() == {}, "end of all ranks")
