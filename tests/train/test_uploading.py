"""A run whose checkpoints go to an object store: from there it goes on as if undisturbed."""

import os
import shutil
import signal
import sys

import pytest

from megagrow.checkpoint import list_steps, step_path
from megagrow.checkpoint.native.remote import RemoteSteps
from tests.jobs import (
    events,
    launch,
    log_of,
    settings,
    train,
    trajectory,
    write_config,
)
from tests.objects import Server, be_a_client
from tests.train.runs import same_tensors


@pytest.fixture(scope="module", name="straight")
def without_a_store(tmp_path_factory, dataset):
    """An undisturbed run of ten steps, saved at every other: (its configuration, its log)."""
    base = tmp_path_factory.mktemp("straight")
    config = write_config(base / "run.yaml", settings(dataset, base / "run"))
    return config, train(2, config)


def run(world, command, server, *, status=0, hook=None):
    hook = hook or (be_a_client, dict(server.environment))
    [outcomes] = launch(world, command, hook=hook)
    assert [o.status for o in outcomes] == [status] * world, outcomes[0].err
    return outcomes[0]


def test_resumed_where_the_run_directory_is_lost(tmp_path, straight, s3, s3_server):
    config, undisturbed = straight
    here = ["--config", config, f"checkpoint.remote={s3}", "checkpoint.keep=2"]
    run(2, [*here, f"run.dir={tmp_path / 'a'}", "train.stop_after_steps=5"], s3_server)
    lines = log_of(config, f"run.dir={tmp_path / 'a'}")
    uploaded = [line["step"] for line in events(lines, "upload")]
    assert uploaded[-1] == 5 and set(uploaded) <= {2, 3, 4, 5}
    remote = RemoteSteps(s3)
    assert remote.steps()[-1] == 5 and len(remote.steps()) <= 2
    whose = (tmp_path / "a" / "run_id").read_text()
    shutil.rmtree(tmp_path / "a")  # with the host that had it
    remote.store.write("step_00000009/rank_00000.safetensors", b"of an upload that died with it")
    there = run(2, [*here, f"run.dir={tmp_path / 'b'}"], s3_server)
    assert "fetched" in there.err and "(step 5)" in there.err
    assert (tmp_path / "b" / "run_id").read_text() == whose
    lines = log_of(config, f"run.dir={tmp_path / 'b'}")
    assert trajectory(lines) == trajectory(undisturbed)[5:]
    same_tensors(step_path(tmp_path / "b" / "checkpoints", 10),
                 step_path(config.parent / "run" / "checkpoints", 10))  # fmt: skip
    assert remote.steps()[-1] == 10
    assert {name.split("/")[0] for name in remote.store.sizes()} <= {
        step_path(tmp_path, step).name for step in remote.steps()
    }
    # Everything is there and here: nothing is left to do, and no other run may use the URL.
    assert "nothing is left to train" in run(2, [*here, f"run.dir={tmp_path / 'b'}"], s3_server).err
    other = run(1, [*here, f"run.dir={config.parent / 'run'}", "train.stop_after_steps=11",
                    "layout.zero=0", "stages.2.until.steps=11"], s3_server, status=1)  # fmt: skip
    assert "checkpoints of another run" in other.err
    never = run(1, [*here, f"run.dir={tmp_path / 'c'}", "--resume", "never"], s3_server, status=1)
    assert "already holds checkpoints" in never.err and not events_of(tmp_path / "c")
    # A new run from a step of this one, by its URL.
    named = run(2, ["--config", config, f"run.dir={tmp_path / 'd'}",
                    "--resume", f"{s3}/step_00000010", "stages.2.until.steps=11"],
                s3_server)  # fmt: skip
    assert "(step 10)" in named.err and list_steps(tmp_path / "d" / "checkpoints") == [11]


def events_of(run_dir):
    return list(run_dir.rglob("metrics.jsonl")) if run_dir.exists() else []


def test_going_back_sets_newer_copies_aside(tmp_path, straight, s3, s3_server):
    config, _ = straight
    command = ["--config", config, f"checkpoint.remote={s3}", f"run.dir={tmp_path / 'run'}"]
    run(1, [*command, "train.stop_after_steps=4", "layout.zero=0"], s3_server)
    back = step_path(tmp_path / "run" / "checkpoints", 2)
    done = run(1, [*command, "--resume", str(back), "train.stop_after_steps=3", "layout.zero=0"],
               s3_server)  # fmt: skip
    assert "in checkpoint.remote a newer one was set aside as step_00000004.set-aside" in done.err
    remote = RemoteSteps(s3)
    assert remote.steps() in ([2, 3], [3])
    assert any(".set-aside-" in name for name in remote.store.sizes())


def _kill_the_server_at_its_first_upload(rank, environment, pid):
    from megagrow.checkpoint.io.object_store import ObjectStore

    be_a_client(rank, environment)
    put = ObjectStore.put

    def putting(self, files, *, go_on):
        # The first file arrives, the others do not.
        put(self, files[:1], go_on=go_on)
        os.kill(pid, signal.SIGKILL)
        put(self, files[1:], go_on=go_on)

    if rank == 0:
        ObjectStore.put = putting


def test_a_store_that_dies_does_not_end_training(tmp_path, straight):
    """All steps are trained; the run fails in the end, and the same command makes up for it."""
    config, undisturbed = straight
    server = Server()
    url = server.url("run")
    command = ["--config", config, f"checkpoint.remote={url}", f"run.dir={tmp_path / 'run'}",
               "checkpoint.every=100"]  # fmt: skip
    hook = (_kill_the_server_at_its_first_upload, dict(server.environment), server.pid)
    dead = run(2, command, server, status=1, hook=hook)
    lines = log_of(config, command[3])
    assert trajectory(lines) == trajectory(undisturbed)
    failures = events(lines, "upload_failed")
    assert failures and not events(lines, "upload") and not events(lines, "end")
    assert "The run continues" in dead.err and url in dead.err
    assert list_steps(tmp_path / "run" / "checkpoints")[-1] == 10
    server.kill()
    again = Server(server.port)
    try:
        run(2, command, again)
        with pytest.MonkeyPatch.context() as patch:
            again.use(patch)
            assert RemoteSteps(url).steps() == [10]
            copy = RemoteSteps(url).fetch(10, tmp_path / "copy")
        same_tensors(copy, step_path(config.parent / "run" / "checkpoints", 10))
    finally:
        again.kill()


def _fail_the_upload_of(rank, environment, step):
    from megagrow.checkpoint.io.object_store import ObjectStore
    from megagrow.errors import CheckpointError

    be_a_client(rank, environment)
    write = ObjectStore.write

    def writing(self, name, data):
        if name.startswith(f"step_{step:08d}"):
            raise CheckpointError(f"{name}: the store is full")
        write(self, name, data)

    ObjectStore.write = writing


def test_the_next_save_is_the_retry(tmp_path, straight, s3, s3_server):
    config, _ = straight
    command = ["--config", config, f"checkpoint.remote={s3}", f"run.dir={tmp_path / 'run'}",
               "checkpoint.every=100"]  # fmt: skip
    done = run(1, [*command, "layout.zero=0"], s3_server,
               hook=(_fail_the_upload_of, dict(s3_server.environment), 3))  # fmt: skip
    lines = log_of(config, command[3])
    assert [line["step"] for line in events(lines, "upload_failed")] == [3]
    assert "the store is full" in done.err
    assert events(lines, "upload")[-1]["step"] == 10 and RemoteSteps(s3).steps()[-1] == 10


def test_damage_in_the_store_is_refused_and_good_takes_the_one_before(
    tmp_path, straight, s3, s3_server
):
    config, _ = straight
    command = ["--config", config, f"checkpoint.remote={s3}", "layout.zero=0"]
    # An upload ends before the next save, so that both are there.
    run(1, [*command, f"run.dir={tmp_path / 'a'}", "train.stop_after_steps=2"], s3_server)
    run(1, [*command, f"run.dir={tmp_path / 'a'}", "train.stop_after_steps=4"], s3_server)
    remote = RemoteSteps(s3)
    assert remote.steps()[0] == 2 and remote.steps()[-1] == 4
    name = "step_00000004/rank_00000.safetensors"
    data = bytearray(remote.store.read(name))
    data[-1] ^= 1
    remote.store.write(name, bytes(data))
    more = ["train.stop_after_steps=5", f"run.dir={tmp_path / 'b'}"]
    refused = run(1, [*command, *more], s3_server, status=1)
    assert "damaged, there or on the way" in refused.err and "--resume good" in refused.err
    assert not list_steps(tmp_path / "b" / "checkpoints")
    if remote.steps() == [2, 4]:
        good = run(1, [*command, *more, "--resume", "good"], s3_server)
        assert "The one before it is tried" in good.err and "(step 2)" in good.err


def _without_credentials(rank, environment):
    be_a_client(rank, environment)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del os.environ[name]
    os.environ |= {
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def test_missing_credentials_are_told_before_training(tmp_path, straight, s3, s3_server):
    config, _ = straight
    run_dir = tmp_path / "run"
    done = run(2, ["--config", config, f"checkpoint.remote={s3}", f"run.dir={run_dir}"], s3_server,
               status=1, hook=(_without_credentials, dict(s3_server.environment)))  # fmt: skip
    assert "AWS_ACCESS_KEY_ID" in done.err and "NoCredentialsError" in done.err
    assert not events_of(run_dir)


@pytest.mark.parametrize(
    ("override", "words"),
    [("run.dir=s3://bucket/run", "set checkpoint.remote to the URL"),
     ("checkpoint.remote=bucket/run", "checkpoint.remote"),
     ("checkpoint.remote=nowhere://bucket/run", "Protocol not known")],
)  # fmt: skip
def test_what_is_no_place_is_refused(tmp_path, straight, s3_server, override, words):
    config, _ = straight
    command = ["--config", config, f"run.dir={tmp_path / 'run'}", override]
    assert words in run(1, [*command, "layout.zero=0"], s3_server, status=1).err


def _no_fsspec(rank):
    sys.modules["fsspec"] = None  # type: ignore[assignment]


def test_fsspec_is_imported_only_where_it_is_used(tmp_path, straight):
    config, _ = straight
    command = ["--config", config, f"run.dir={tmp_path / 'run'}", "train.stop_after_steps=1",
               "layout.zero=0"]  # fmt: skip
    [[outcome]] = launch(1, command, hook=(_no_fsspec,))
    assert outcome.status == 0, outcome.err
    [[outcome]] = launch(1, [*command, "checkpoint.remote=s3://b/x"], hook=(_no_fsspec,))
    assert outcome.status == 1 and "fsspec is not installed" in outcome.err
