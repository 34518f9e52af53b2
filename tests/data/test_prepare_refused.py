"""Errors are reported before any long work, and nothing is left behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megagrow.data.corpus import STDLIB
from megagrow.data.prepare import prepare
from megagrow.data.summary import summary
from megagrow.errors import DataError
from tests.data.corpora import documents, request, small


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"vocab_size": 258}, r"258 tokens cannot be trained.*at least 259.*--vocab-size 4096"),
        ({"vocab_size": 70_000, "dtype": "uint16"}, r"--dtype uint16: too small.*--dtype int32"),
        ({"text_key": "text", "format": "text"}, r"--text-key: plain text has no keys"),
        ({"format": "csv"}, r"--format: out of range"),
    ],
)
def test_what_can_be_refused_at_once_is(
    tmp_path: Path, options: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> Any:
        raise AssertionError("text was read")

    monkeypatch.setattr("megagrow.data.prepare.open_corpus", read)
    with pytest.raises(DataError, match=f"(?s){word}"):
        prepare(request(small(tmp_path), tmp_path / "out", **options))


def test_a_vocabulary_that_does_not_fit_names_one_that_does(tmp_path: Path) -> None:
    source = small(tmp_path)
    for asked in (4096, 260):
        with pytest.raises(DataError, match=f"{asked} tokens cannot be trained") as caught:
            prepare(request(source, tmp_path / "out", vocab_size=asked))
        assert "INTERNAL" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]
        [better] = re.findall(r"fix: +--vocab-size (\d+)", str(caught.value))
        data = prepare(request(source, tmp_path / f"for {asked}", vocab_size=int(better))).data
        assert data.vocab_size == int(better)
        shutil.rmtree(data.path)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_preparation_that_fails_for_its_input_leaves_nothing(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = prepare(request(small(tmp_path), tmp_path / "good", vocab_size=290)).data
    monkeypatch.setattr("megagrow.data.corpus._SHARD_BYTES", 2000)
    source = small(tmp_path)
    source.write_text(source.read_text() + "\n{}\n")
    with pytest.raises(DataError, match=r"c\.jsonl, line 21"):
        prepare(
            request(
                source, tmp_path / "out", tokenizer=good.path / "tokenizer.model", workers=workers
            )
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "good"]


def test_who_names_a_key_gets_records_and_no_text(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_text(json.dumps({"body": "some text " * 40}))
    (tmp_path / "in" / "b.txt").write_text("plain")
    with pytest.raises(DataError, match=r"b\.txt: is not JSON"):
        prepare(request(tmp_path / "in", tmp_path / "out", text_key="body"))
    ask = request(tmp_path / "in", tmp_path / "out", text_key="body", glob="*.json", vocab_size=270)
    assert "".join(documents(prepare(ask).data, "train")).startswith("some text some")
    with pytest.raises(DataError, match="stdlib: is source files"):
        prepare(request(STDLIB, tmp_path / "p", text_key="body"))


def test_a_dataset_of_an_earlier_version_stays_and_is_said_to_be_one(tmp_path: Path) -> None:
    source, output = small(tmp_path), tmp_path / "out"
    ask = request(source, output, vocab_size=290)
    before = prepare(ask)
    assert not before.outdated
    manifest = output / "dataset.json"
    record = json.loads(manifest.read_text())
    for name in ("version", "formats", "left_out", "markers", "copies"):
        del record["made"][name]
    for name in ("format", "eod", "bos"):
        del record["made"]["arguments"][name]
    manifest.write_text(json.dumps(record))
    again = prepare(ask)
    assert not again.fresh and again.outdated
    assert again.data.fingerprint == before.data.fingerprint
    assert "by an earlier version" in "\n".join(summary(again))
    anew = prepare(request(source, output, vocab_size=290, overwrite=True))
    assert anew.fresh and not anew.outdated
