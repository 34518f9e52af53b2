"""The format of a file is detected from its content; everything that is skipped is reported."""

from __future__ import annotations

import builtins
import bz2
import gzip
import io
import json
import lzma
import os
import re
import socket
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagrow.data.corpus import open_corpus
from megagrow.data.documents import read_documents
from megagrow.data.formats import _Zstd, form_of
from megagrow.errors import DataError

TEXTS = [f"document {n}\nof two lines, \u00e9" for n in range(7)]
LINES = "\n".join(json.dumps({"id": n, "text": text}) for n, text in enumerate(TEXTS)).encode()
ARRAY = json.dumps([{"text": text} for text in TEXTS], indent=1, ensure_ascii=False).encode()
SERIES = "\n".join(json.dumps({"text": text}, indent=2) for text in TEXTS).encode()


def read(path: Path, **options: Any) -> list[str | None]:
    key = options.get("text_key", "text")
    corpus = open_corpus(str(path), **{"glob": "*", "split": "file", **options})
    return [text for piece in corpus.pieces for text in read_documents(piece, text_key=key)]


@pytest.mark.parametrize("name", ["a.json", "a.JSONL", "a.txt", "a", "a.ndjson", "a.jsonl"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_json_lines_are_records_whatever_the_file_is_called(
    tmp_path: Path, name: str, bom: bytes
) -> None:
    (tmp_path / name).write_bytes(bom + LINES)
    assert read(tmp_path / name) == TEXTS
    assert read(tmp_path) == TEXTS
    assert read(tmp_path, form="jsonl") == TEXTS


@pytest.mark.parametrize("content", [ARRAY, SERIES, b" " + ARRAY.replace(b"\n", b"") + b"\n "])
@pytest.mark.parametrize("size", [1, 50, 1 << 20])
def test_json_of_any_layout_is_records(
    tmp_path: Path, content: bytes, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megagrow.data.documents._READ", size)
    (tmp_path / "a.json").write_bytes(content)
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize(
    "content",
    [b"plain", b"{% if x %} {{ y }}", b"[1] A. Author, 1999.\n[2] B.", b'"a string"', b"17", b"{"],
)
def test_text_stays_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert read(tmp_path) == [content.decode()]
    with pytest.raises(DataError, match=r"a\.json: is not JSON"):
        read(tmp_path, form="jsonl")


@pytest.mark.parametrize(
    "content",
    [b'{"name": "x"}', b'{\n "name": "x"\n}', b"[]", b"[1, 2]", b'[{"b": 1}]', b'{"text": 3}\n{}'],
)
def test_json_without_the_key_is_refused_until_it_is_said_what_it_is(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "package.json").write_bytes(content)
    with pytest.raises(DataError, match=r"(?s)package\.json: JSON, but.*--format text"):
        read(tmp_path)
    assert read(tmp_path, form="text") == [content.decode()]
    if b"name" in content:
        assert read(tmp_path, text_key="name", form="jsonl") == ["x"]


@pytest.mark.parametrize(
    ("name", "pack"), [("b.gz", gzip.compress), ("b.bz2", bz2.compress), ("b", lzma.compress)]
)
def test_compressed_files_are_read_beside_plain_ones(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "a.txt").write_bytes(b"plain")
    (tmp_path / name).write_bytes(pack(LINES))
    (tmp_path / "c.txt.gz").write_bytes(pack(b"one\n\ntwo"))
    assert read(tmp_path) == ["plain", *TEXTS, "one\n\ntwo"]
    assert read(tmp_path, split="paragraph") == ["plain", *TEXTS, "one\n", "two"]
    (tmp_path / name).write_bytes(pack(LINES)[:-9])
    with pytest.raises(DataError, match=rf"{re.escape(name)}: its \w+ data is damaged or cut off"):
        read(tmp_path)


def test_zstd_without_its_package_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_bytes(b"plain")
    (tmp_path / "b.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd rest")
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "zstandard":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"(?s)b\.jsonl\.zst: .*megagrow\[zstd\]"):
        read(tmp_path)


def test_frames_follow_one_another_and_one_cut_off_is_noticed(tmp_path: Path) -> None:
    """megagrow's zstd frame reader, tested with zlib, whose objects have the same methods."""
    stand_in = types.SimpleNamespace(
        ZstdDecompressor=lambda: types.SimpleNamespace(decompressobj=zlib.decompressobj)
    )
    packed = zlib.compress(LINES[:100]) + zlib.compress(LINES[100:])
    (tmp_path / "a").write_bytes(packed)
    with io.BufferedReader(_Zstd(open(tmp_path / "a", "rb"), stand_in), 50) as stream:
        assert stream.read(7) == LINES[:7] and stream.read() == LINES[7:]
    (tmp_path / "a").write_bytes(packed[:-5])
    with (
        io.BufferedReader(_Zstd(open(tmp_path / "a", "rb"), stand_in)) as stream,
        pytest.raises(EOFError, match="not complete"),
    ):
        stream.read()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"PK\x03\x04 and more", "ZIP"),
        (b"x" * 257 + b"ustar", "tar"),
        (gzip.compress(b"x" * 257 + b"ustar", mtime=0), "tar"),
    ],
)
def test_data_that_is_not_read_is_refused_by_name(
    tmp_path: Path, content: bytes, word: str
) -> None:
    (tmp_path / "a.txt").write_bytes(b"plain")
    (tmp_path / "b.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"b\.txt: an? {word}"):
        read(tmp_path)
    assert read(tmp_path, glob="a*") == ["plain"]


def test_what_is_no_regular_file_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(DataError, match=r"(?s)pipe: is not a regular file.*a named pipe"):
            read(source)
    (tmp_path / "pipe").unlink()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(str(tmp_path / "s"))
        with pytest.raises(DataError, match="a socket"):
            form_of(tmp_path / "s", wanted="auto", key="text")
    (tmp_path / "s").unlink()
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"(?s)gone: .*a link to nothing"):
        read(tmp_path)


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    for name in ("a.md", "b.txt", ".c", "d/.e", ".git/f", "d/g.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("words")
    (tmp_path / "h").symlink_to(tmp_path / "d", target_is_directory=True)
    corpus = open_corpus(str(tmp_path), glob="*.md", split="file")
    assert {why: group.names for why, group in corpus.left_out.items()} == {
        "hidden directories": [".git"],
        "hidden files": [".c", "d/.e"],
        "not like --glob *.md": ["b.txt"],
        "links to directories": ["h"],
    }
    [(what, group)] = corpus.formats.items()
    assert (what, group.files, group.names) == ("text", 2, ["a.md", "d/g.md"])


@pytest.mark.parametrize("codec", [bytes, gzip.compress])
def test_the_first_wrong_line_of_the_file_is_named_and_wrong_lines_counted(
    tmp_path: Path, codec: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megagrow.data.corpus._SHARD_BYTES", 200)
    lines = [json.dumps({"text": "word " * 20})] * 30
    lines[7] = lines[19] = lines[25] = '{"text": 3}'
    (tmp_path / "a.jsonl").write_bytes(codec("\n".join(lines).encode()))
    corpus = open_corpus(str(tmp_path), glob="*", split="file")
    stated = []
    for piece in reversed(corpus.pieces):
        try:
            list(read_documents(piece, text_key="text"))
        except DataError as error:
            stated.append(str(error))
    assert len(stated) == (1 if codec is gzip.compress else 3)
    for text in stated:
        assert "a.jsonl, line 8\n" in text and "3 of the first 30 lines" in text


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b'[{"text": "a"}, {"text": }]', r"record 2.*not JSON"),
        (b'[{"text": "a"}, {"text": "b"}', r"record 3.*the end of the file"),
        (b'[{"text": "a"}, 7]', r"record 2.*a JSON int"),
        (b'[{"text": "a"}, {"text": 7}]', r"record 2.*a int under 'text'"),
        (b'[{"text": "a"}] x', r"record 2.*not JSON"),
        (b'{\n"text": "a"}\n{"text": "\xff"}', r"record 2.*UTF-8|record 1.*UTF-8"),
    ],
)
def test_a_wrong_record_is_named(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"(?s)a\.json, {word}"):
        read(tmp_path, form="jsonl")
