"""Native checkpoints in an object store: they count when whole, and only then."""

import threading

import pytest

from megagrow.checkpoint import NativeCheckpoint, list_steps, retire, step_path
from megagrow.checkpoint.io.object_store import ObjectStore, below
from megagrow.checkpoint.native.remote import RemoteSteps
from megagrow.errors import CheckpointError
from megagrow.files import is_url
from tests.checkpoint.states import save_model
from tests.checkpoint.worlds import save_world
from tests.jobs import files_below


@pytest.fixture(params=["s3", "file", "memory"])
def remote(request, tmp_path):
    if request.param == "s3":
        return RemoteSteps(request.getfixturevalue("s3"))
    place = tmp_path / "objects"
    return RemoteSteps(f"{request.param}://{place}")


def saved(root, *steps):
    return [save_world(root, step)[0] for step in steps]


def test_what_is_uploaded_is_fetched_bit_for_bit(tmp_path, remote):
    for path in saved(tmp_path / "here", 10, 20):
        size = sum(file.stat().st_size for file in path.iterdir())
        assert remote.upload(path) == size
        assert remote.upload(path) == 0
    assert remote.steps() == [10, 20]
    copy = remote.fetch(20, tmp_path / "there")
    assert files_below(copy) == files_below(step_path(tmp_path / "here", 20))
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["step_00000020"]


def test_an_upload_that_stops_midway_never_counts(tmp_path, remote):
    old, path = saved(tmp_path / "here", 10, 20)
    remote.upload(old)
    files = len(list(path.iterdir()))
    for last in range(files):
        calls = iter(range(last))

        def go_on(calls=calls):
            if next(calls, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            remote.upload(path, go_on=go_on)
        assert remote.steps() == [10]
        with pytest.raises(CheckpointError, match="not a committed checkpoint") as error:
            remote.fetch(20, tmp_path / "there")
        assert ("did not finish" in str(error.value)) == (last > 0)
        assert list_steps(tmp_path / "there") == []
    remote.upload(path)  # over what was left
    assert remote.steps() == [10, 20]
    NativeCheckpoint.open(remote.fetch(20, tmp_path / "there")).verify()


def test_another_checkpoint_of_the_step_is_never_overwritten(tmp_path, remote):
    remote.upload(*saved(tmp_path / "a", 10))
    other, _ = save_model(tmp_path / "b", step=10, seed=3)
    before = remote.fetch(10, tmp_path / "before")
    with pytest.raises(CheckpointError, match="another checkpoint of this step"):
        remote.upload(other)
    assert files_below(remote.fetch(10, tmp_path / "after")) == files_below(before)


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damage_is_found_and_nothing_is_left(tmp_path, s3, name, how):
    remote = RemoteSteps(s3)
    remote.upload(*saved(tmp_path / "here", 10))
    where = f"step_00000010/{name}"
    data = bytearray(remote.store.read(where))
    data[-9] ^= 4
    remote.store.delete([where])
    if how != "gone":
        remote.store.write(where, bytes(data if how == "flipped" else data[:-1]))
    with pytest.raises(CheckpointError) as error:
        remote.fetch(10, tmp_path / "there")
    assert s3 in str(error.value)
    assert files_below(tmp_path / "there") == {}
    # A head that is whole, and values that are not: what is only looked at does not tell.
    if (name, how) == ("rank_00000.safetensors", "flipped"):
        look = tmp_path / "look" / "step_00000010"
        look.mkdir(parents=True)
        remote.download("step_00000010", look, values=False)
        assert NativeCheckpoint.open(look).step == 10
        with pytest.raises(CheckpointError, match=r"checksum|damaged"):
            NativeCheckpoint.open(look).verify()


def test_pruning_takes_the_manifest_first_and_removes_what_uploads_left(tmp_path, remote):
    paths = saved(tmp_path / "here", 10, 20, 30, 40)
    for path in paths:
        remote.upload(path)
    remote.store.write("step_00000015/rank_00000.safetensors", b"an upload that died")
    remote.store.write("step_00000045/rank_00000.safetensors", b"an upload that may go on")
    deleted = []
    delete = remote.store.delete
    remote.store.delete = lambda names: (deleted.append(list(names)), delete(names))
    assert remote.retire(2) == [10, 20]
    assert deleted[0] == ["step_00000010/manifest.json"]
    held = {name.split("/")[0] for name in remote.store.sizes()}
    assert held == {"step_00000030", "step_00000040", "step_00000045"}
    assert remote.steps() == [30, 40]


def test_set_aside_copies_stay_whole_and_no_reader_takes_them(tmp_path, remote):
    for path in saved(tmp_path / "here", 10, 20, 30):
        remote.upload(path)
    names = remote.set_aside(10)
    assert [name.split(".")[0] for name in names] == ["step_00000020", "step_00000030"]
    assert remote.steps() == [10]
    other, _ = save_model(tmp_path / "b", step=20, seed=3)
    remote.upload(other)
    remote.retire(1)
    place = tmp_path / "again"
    place.mkdir()
    remote.download(names[0], place, values=True)
    assert files_below(place) == files_below(tmp_path / "here" / "step_00000020")


def test_a_checkpoint_is_not_pruned_while_it_is_uploaded(tmp_path, s3):
    root = tmp_path / "here"
    first, *_ = saved(root, 10, 20, 30)
    seen, one_at_a_time = [], threading.Lock()

    def go_on():
        with one_at_a_time:
            retire(root, 1)
            seen.append(list_steps(root))

    RemoteSteps(s3).upload(first, go_on=go_on)
    assert seen[0] == [10, 30]
    assert retire(root, 1) == [first]


def test_a_full_disk_is_told_before_anything_is_fetched(tmp_path, s3, monkeypatch):
    remote = RemoteSteps(s3)
    remote.upload(*saved(tmp_path / "here", 10))
    monkeypatch.setattr("megagrow.checkpoint.native.remote.free_bytes", lambda _: 100.0)
    with pytest.raises(CheckpointError, match="not enough disk space"):
        remote.fetch(10, tmp_path / "there")
    assert files_below(tmp_path / "there") == {}


def test_what_hinders_a_store_is_said_with_its_fix(s3, monkeypatch):
    with pytest.raises(CheckpointError, match=r"made or correct|make the bucket"):
        ObjectStore("s3://no-such-bucket/run").try_out()
    with pytest.raises(CheckpointError, match="Protocol not known"):
        ObjectStore("nowhere://bucket/run")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(CheckpointError, match="AWS_ACCESS_KEY_ID"):
        ObjectStore(s3).try_out()


def test_urls_are_told_from_paths():
    assert is_url("s3://bucket/run") and is_url("memory://x")
    assert not any(map(is_url, ("runs/a", "/s3", "s3:/x", "S3 ://x", "")))
    assert below("s3://b/run/step_1", "s3://b/run/") and below("s3://b/run", "s3://b/run")
    assert not below("s3://b/runs", "s3://b/run")
