"""A prepared dataset opens if its parts are consistent; otherwise the error names the part."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagrow.data.dataset import PreparedData, open_dataset, verify
from megagrow.data.prepare import Request, prepare
from megagrow.data.tokenizer import train_sentencepiece
from megagrow.errors import DataError

TEXTS = [f"def function_{n}(value):\n\treturn value * {n}\n\n" * 3 for n in range(40)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    root = tmp_path_factory.mktemp("made")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (root / "corpus.jsonl").write_text("\n".join(lines))
    request = Request(
        str(root / "corpus.jsonl"), root / "out", vocab_size=320, validation_fraction=0.2
    )
    return prepare(request).data


@pytest.fixture
def copy(made: PreparedData, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.path, tmp_path / "out"))


def test_what_was_put_in_comes_out(made: PreparedData) -> None:
    seen = []
    for split in (made.train, made.validation):
        for number in range(len(split)):
            ids = split[number].tolist()
            assert ids[-1] == made.eod and made.eod not in ids[:-1]
            seen.append(made.tokenizer.decode(ids))
    assert sorted(seen) == sorted(TEXTS)
    assert made.vocab_size == made.tokenizer.vocab_size == 320
    assert made.content.dtype == "uint16"


def test_own_tokenizer_agrees(made: PreparedData) -> None:
    data = open_dataset(made.path, made.path / "tokenizer.model")
    assert data.fingerprint == made.fingerprint
    verify(data)


def test_other_tokenizer_disagrees(made: PreparedData, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    other.write_bytes(train_sentencepiece(TEXTS, vocab_size=310))
    with pytest.raises(DataError, match=r"(?s)other\.model: tokenizer and dataset .* disagree"):
        open_dataset(made.path, other)
    with pytest.raises(DataError, match="absent"):
        open_dataset(made.path, tmp_path / "absent.model")


def test_missing_directory_names_the_command(tmp_path: Path) -> None:
    where = tmp_path / "absent"
    command = f"launch/prepare_data.py --input TEXT --output {where}"
    with pytest.raises(DataError, match=f"(?s)no such directory.*{command}"):
        open_dataset(where)
    where.mkdir()
    with pytest.raises(DataError, match=r"has no dataset\.json"):
        open_dataset(where)


def change_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((path / "dataset.json").read_text())
    change(record)
    (path / "dataset.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda r: r["content"].update(format_version=2), "version"),
        (lambda r: r["content"].update(tokenizer_sha256="0"), "tokenizer.model: tokenizer"),
        (lambda r: r["content"].update(tokenizer_file="../t.model"), "plain name"),
        (lambda r: r["content"].update(dtype="int32"), "token type"),
        (lambda r: r["content"].update(eod="1"), "damaged"),
        (lambda r: r["content"].update(extra=1), "damaged"),
        (lambda r: r["content"].pop("eod"), "damaged"),
        (lambda r: r["content"]["train"].update(tokens=1), "number of tokens"),
        (lambda r: r["content"]["validation"].update(documents=1), "number of documents"),
        (lambda r: r["content"].update(train=[]), "damaged"),
        (lambda r: r.pop("made"), "damaged"),
        (lambda r: r.pop("content"), "damaged"),
    ],
)
def test_manifest_that_disagrees(
    copy: Path, change: Callable[[dict[str, Any]], object], word: str
) -> None:
    change_manifest(copy, change)
    with pytest.raises(DataError, match=word) as caught:
        open_dataset(copy)
    assert "--overwrite" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_manifest_that_is_no_json(copy: Path, content: bytes) -> None:
    (copy / "dataset.json").write_bytes(content)
    with pytest.raises(DataError, match=r"dataset\.json: damaged"):
        open_dataset(copy)


@pytest.mark.parametrize("name", ["train.bin", "validation.idx", "tokenizer.model"])
def test_missing_or_short_file_is_named(copy: Path, name: str) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:-1])
    with pytest.raises(DataError, match=name):
        open_dataset(copy)
    (copy / name).unlink()
    with pytest.raises(DataError, match=name):
        open_dataset(copy)


@pytest.mark.parametrize("name", ["train.bin", "validation.bin"])
def test_verify_finds_one_flipped_bit(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    data = open_dataset(copy)
    with pytest.raises(DataError, match=f"{name}: checksum"):
        verify(data)


def test_fingerprint_is_of_the_content_alone(made: PreparedData, copy: Path) -> None:
    change_manifest(copy, lambda record: record["made"].update(input="elsewhere"))
    assert open_dataset(copy).fingerprint == made.fingerprint
    change_manifest(copy, lambda record: record["content"]["train"].update(bin_sha256="0"))
    assert open_dataset(copy).fingerprint != made.fingerprint
