"""Commands that take the URL of a checkpoint in an object store."""

import re

import pytest

from megagrow.checkpoint import NativeCheckpoint
from megagrow.checkpoint.convert.remote import PARTIAL
from megagrow.checkpoint.io.object_store import ObjectStore
from megagrow.checkpoint.native.remote import RemoteSteps
from megagrow.cli import convert, inspect_checkpoint
from megagrow.state.layout import Layout
from tests.checkpoint.states import assert_same, contents, save_model
from tests.jobs import files_below


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A native checkpoint; temporary copies go to an empty directory."""
    staging = tmp_path / "staging"
    staging.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(staging))
    path, _ = save_model(tmp_path / "here", step=20, layout=Layout(data=2, zero=1))
    yield path
    assert list(staging.iterdir()) == []


def converted(source, target, *options):
    return convert.main(["--from", str(source), "--to", str(target), *map(str, options)])


def test_inspect_reads_heads_alone_unless_it_verifies(here, s3, capsys, monkeypatch):
    remote = RemoteSteps(s3)
    remote.upload(here)
    fetched = []
    get = ObjectStore.get
    monkeypatch.setattr(
        ObjectStore, "get", lambda self, files: (fetched.extend(files), get(self, files))
    )
    for url in (s3, f"{s3}/step_00000020", f"{s3}/step_00000020/"):
        assert inspect_checkpoint.main([url]) == 0
        out = capsys.readouterr().out
        assert re.search(r"step +20\n", out) and "not compared" in out and url in out
    assert not fetched
    assert inspect_checkpoint.main([s3, "--verify"]) == 0
    assert "all correct" in capsys.readouterr().out and len(fetched) == 1
    name = "step_00000020/rank_00000.safetensors"
    data = bytearray(remote.store.read(name))
    data[-1] ^= 1
    remote.store.write(name, bytes(data))
    assert inspect_checkpoint.main([s3]) == 0
    capsys.readouterr()
    assert inspect_checkpoint.main([s3, "--verify"]) == 1
    assert "rank_00000" in capsys.readouterr().err


def test_what_is_partial_is_refused(here, s3, capsys):
    RemoteSteps(s3).upload(here)
    ObjectStore(s3).delete(["step_00000020/manifest.json"])
    assert inspect_checkpoint.main([f"{s3}/step_00000020"]) == 1
    assert "an upload that did not finish" in capsys.readouterr().err
    assert inspect_checkpoint.main([f"{s3}/nothing"]) == 1
    assert "nothing by that name" in capsys.readouterr().err


def test_from_here_to_there_and_back_in_other_layouts(here, s3, tmp_path, capsys):
    there = f"{s3}/other/step_00000020"
    assert converted(here, there, "--to-format", "native", "--tensor", 2, "--verify") == 0
    assert f"{there}: uploaded" in capsys.readouterr().out
    again = f"{s3}/again"
    assert converted(f"{s3}/other", again, "--to-format", "deepspeed") == 0
    back = tmp_path / "back" / "step_00000020"
    assert converted(again, back, "--to-format", "native", "--data", 2, "--zero", 1) == 0
    NativeCheckpoint.open(back).verify()
    assert_same(contents(back), contents(here))
    before = files_below(tmp_path / "back")
    assert converted(here, there, "--to-format", "native") == 1
    assert "something is there already" in capsys.readouterr().err
    assert converted(f"{s3}/none", tmp_path / "none", "--to-format", "native") == 1
    assert not (tmp_path / "none").exists() and files_below(tmp_path / "back") == before


def test_an_export_whose_upload_dies_is_never_read(here, s3, tmp_path, capsys, monkeypatch):
    put = ObjectStore.put

    def putting(self, files, *, go_on):
        put(self, files[:1], go_on=go_on)
        raise KeyboardInterrupt

    export = f"{s3}/export"
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put", putting)
        assert converted(here, export, "--to-format", "deepspeed") == 130
    assert len(ObjectStore(export).sizes()) == 2
    assert inspect_checkpoint.main([export]) == 1
    assert PARTIAL in capsys.readouterr().err
    assert converted(here, export, "--to-format", "deepspeed") == 1
    assert converted(here, f"{s3}/whole", "--to-format", "deepspeed") == 0
    assert PARTIAL not in ObjectStore(f"{s3}/whole").sizes()
    assert inspect_checkpoint.main([f"{s3}/whole", "--verify"]) == 0


def test_a_native_target_counts_by_its_manifest(here, s3, monkeypatch):
    names = []
    write = ObjectStore.write

    def writing(self, name, data):
        names.append((name, sorted(self.sizes())))
        write(self, name, data)

    monkeypatch.setattr(ObjectStore, "write", writing)
    assert converted(here, f"{s3}/step_00000020", "--to-format", "native") == 0
    files = ["rank_00000.safetensors", "rank_00001.safetensors"]
    assert names[-1] == ("manifest.json", files)
