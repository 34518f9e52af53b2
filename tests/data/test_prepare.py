"""Preparing data: splits, workers, kills, reruns and bad input, with the real command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest

from megagrow.data import prepare as module
from megagrow.data.corpus import STDLIB, open_corpus
from megagrow.data.dataset import PreparedData, open_dataset, verify
from megagrow.data.documents import read_documents
from megagrow.data.prepare import prepare
from megagrow.data.request import Request
from megagrow.data.shards import Encoder
from megagrow.errors import DataError, LockError
from megagrow.lock import holding_output
from tests.data.corpora import as_json, documents, request, small

ROOT = Path(__file__).parents[2]
LIBRARY = Path(sysconfig.get_paths()["stdlib"])
FILES = ("train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer.model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 4 MB in four shards and 200 files, one of them not UTF-8, one empty."""
    root = tmp_path_factory.mktemp("corpus")
    sources = sorted(LIBRARY.glob("*.py"))[:50]
    for number in range(4):
        (root / f"part{number}").mkdir()
        for source in sources:
            text = f"# copy {number}\n".encode() + source.read_bytes()
            (root / f"part{number}" / source.name).write_bytes(text)
    (root / "part1" / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (root / "part2" / "empty.txt").write_bytes(b"")
    (root / ".hidden").write_text("not to be found")
    return root


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepare(request(folder, tmp_path_factory.mktemp("undisturbed") / "out")).data


def contents(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in FILES}


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "launch/prepare_data.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, check=False
    )


# The corpus


def test_directory_is_prepared_whole(undisturbed: PreparedData, folder: Path) -> None:
    verify(undisturbed)
    made = undisturbed.made
    assert (made["files"], made["unreadable_files"], made["empty_documents"]) == (202, 1, 1)
    assert made["unreadable_examples"] == [str(folder / "part1" / "latin.txt")]
    texts = documents(undisturbed, "train") + documents(undisturbed, "validation")
    expected = [path.read_bytes().decode() for path in folder.glob("part*/*.py")]
    assert sorted(texts) == sorted(expected)
    assert 5 <= undisturbed.validation.document_count <= 40
    assert not undisturbed.path.with_name("out.work").exists()


def test_standard_library_is_found_without_packages() -> None:
    corpus = open_corpus(STDLIB, glob="*", split="file")
    names = [piece.path.relative_to(LIBRARY).as_posix() for piece in corpus.pieces]
    assert names == sorted(names) and "ast.py" in names and "json/decoder.py" in names
    assert not any("-packages/" in name for name in names)
    assert corpus == open_corpus(STDLIB, glob="ignored", split="file")


@pytest.mark.parametrize("target", [1, 7, 50, 10_000])
@pytest.mark.parametrize("name", ["c.jsonl", "c.txt"])
def test_pieces_cut_no_document(
    tmp_path: Path, name: str, target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"document {n}\n" + "line\n" * (n % 4) for n in range(30)]
    joined = "\n \n\n".join(texts) if name == "c.txt" else "\n\n".join(map(as_json, texts))
    (tmp_path / name).write_bytes(joined.encode())
    monkeypatch.setattr("megagrow.data.corpus._SHARD_BYTES", target)
    corpus = open_corpus(str(tmp_path / name), glob="*", split="paragraph")
    found = [text for piece in corpus.pieces for text in read_documents(piece, text_key="text")]
    assert found == texts
    assert sum(piece.end - piece.begin for shard in corpus.shards for piece in shard) == corpus.size
    assert len(corpus.shards) > 1 or target == 10_000


def test_glob_and_output_inside_the_input(tmp_path: Path) -> None:
    for name in ("a.md", "b.md", "c.txt"):
        (tmp_path / name).write_text(f"# {name} has words enough to learn from\n" * 50)
    ask = request(tmp_path, tmp_path / "out", glob="*.md", vocab_size=280)
    assert prepare(ask).data.made["files"] == 2
    assert not prepare(ask).fresh


def test_text_file_as_paragraphs_and_as_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("".join(f"Paragraph {n}.\r\nIt goes on.\r\n\r\n" for n in range(50)).encode())
    data = prepare(request(path, tmp_path / "a", documents="paragraph", vocab_size=290)).data
    assert data.train.document_count + data.validation.document_count == 50
    assert "Paragraph 0.\r\nIt goes on.\r\n" in documents(data, "train") + documents(
        data, "validation"
    )
    # One document: its end is used for validation.
    data = prepare(request(path, tmp_path / "b", vocab_size=290)).data
    [head], [tail] = documents(data, "train"), documents(data, "validation")
    assert head + tail == path.read_bytes().decode()


def test_given_tokenizer_and_dtype(undisturbed: PreparedData, folder: Path, tmp_path: Path) -> None:
    given = undisturbed.path / "tokenizer.model"
    ask = request(folder / "part0", tmp_path / "out", tokenizer=given, dtype="int32")
    data = prepare(ask).data
    assert data.content.dtype == "int32" and data.train.dtype.itemsize == 4
    assert data.content.tokenizer_sha256 == undisturbed.content.tokenizer_sha256


def test_small_corpus_has_a_validation_document(tmp_path: Path) -> None:
    lines = [as_json(f"text {n} of very few, with words enough " * 9) for n in range(3)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    ask = request(tmp_path / "c.jsonl", tmp_path / "o", vocab_size=290, validation_fraction=1e-9)
    data = prepare(ask).data
    assert (data.train.document_count, data.validation.document_count) == (3, 1)
    # The whole of one document: three of equal length, a third requested.
    ask = request(tmp_path / "c.jsonl", tmp_path / "p", vocab_size=290, validation_fraction=1 / 3)
    data = prepare(ask).data
    assert data.validation.total_tokens == pytest.approx(data.train.total_tokens / 2, rel=0.02)


# The order and the split


def test_workers_change_nothing(undisturbed: PreparedData, folder: Path, tmp_path: Path) -> None:
    data = prepare(request(folder, tmp_path / "out", workers=2)).data
    assert contents(data.path) == contents(undisturbed.path)
    assert data.fingerprint == undisturbed.fingerprint


def test_seed_changes_the_split(undisturbed: PreparedData, folder: Path, tmp_path: Path) -> None:
    given = undisturbed.path / "tokenizer.model"
    splits = [
        documents(prepare(request(folder, tmp_path / str(s), tokenizer=given, seed=s)).data,
                  "validation")
        for s in (1, 2)
    ]  # fmt: skip
    assert splits[0] != splits[1]


# Kills and reruns


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.002)


def test_killed_run_goes_on_to_the_same_result(
    undisturbed: PreparedData, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, work = tmp_path / "out", tmp_path / "out.work"
    process = subprocess.Popen(
        command(
            *("--input", folder, "--output", output, "--vocab-size", 400),
            *("--validation-fraction", 0.1, "--workers", 2),
        ),
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: list(work.glob("plan-*/shard-*.json")), "a first shard")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not output.exists() and len(children) >= 2
    wait_for(lambda: not any(map(alive, children)), "the workers' end")

    encoded = []
    real = Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, n, shard: encoded.append(n) or real(self, n, shard)
    )
    outcome = prepare(request(folder, output))
    shards = len(open_corpus(str(folder), glob="*", split="file").shards)
    assert outcome.fresh and len(encoded) < shards
    assert contents(output) == contents(undisturbed.path)
    manifests = [path / "dataset.json" for path in (output, undisturbed.path)]
    assert manifests[0].read_bytes() == manifests[1].read_bytes()
    assert not work.exists()


def alive(process: str) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_damaged_shard_is_made_again(
    undisturbed: PreparedData, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def stop(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_split", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(request(folder, output))
    shard = next((tmp_path / "out.work").glob("plan-*/shard-000001.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    prepare(request(folder, output))
    assert contents(output) == contents(undisturbed.path)


def test_rerun_is_done_at_once_and_other_arguments_are_refused(tmp_path: Path) -> None:
    source, output = small(tmp_path), tmp_path / "out"
    first = prepare(request(source, output, vocab_size=290))
    before = contents(output)
    assert first.fresh
    assert not prepare(request(source, output, vocab_size=290, workers=2)).fresh
    with pytest.raises(DataError, match=r"(?s)vocab_size 290, asked for 291.*--overwrite"):
        prepare(request(source, output, vocab_size=291))
    assert contents(output) == before
    again = prepare(request(source, output, vocab_size=291, overwrite=True))
    assert again.fresh and again.data.vocab_size == 291

    source.write_text(source.read_text() + "\n" + as_json("one more"))
    with pytest.raises(DataError, match=r"(?s)other text.*c\.jsonl.*--overwrite"):
        prepare(request(source, output, vocab_size=291))


def test_overwrite_fixes_a_damaged_output(tmp_path: Path) -> None:
    source, output = small(tmp_path), tmp_path / "out"
    prepare(request(source, output, vocab_size=290))
    good = contents(output)
    flipped = bytearray(good["train.bin"])
    flipped[0] ^= 1
    (output / "train.bin").write_bytes(flipped)
    assert prepare(request(source, output, vocab_size=290, overwrite=True)).fresh
    assert contents(output) == good
    (output / "train.bin").unlink()
    with pytest.raises(DataError, match=r"train\.bin"):
        prepare(request(source, output, vocab_size=290))


def test_killed_while_replacing_brings_the_old_output_back(tmp_path: Path) -> None:
    source, output = small(tmp_path), tmp_path / "out"
    prepare(request(source, output, vocab_size=290))
    (tmp_path / "out.work").mkdir()
    output.rename(tmp_path / "out.work" / "old")
    assert not prepare(request(source, output, vocab_size=290)).fresh
    open_dataset(output)
    assert not (tmp_path / "out.work").exists()


def test_foreign_directory_is_never_replaced(tmp_path: Path) -> None:
    source, output = small(tmp_path), tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="no prepared dataset"):
        prepare(request(source, output, vocab_size=290, overwrite=True))
    assert (output / "thesis.txt").read_text() == "years of work"
    (output / "thesis.txt").rename(tmp_path / "thesis.txt")
    assert prepare(request(source, output, vocab_size=290)).fresh


def test_foreign_work_directory_is_never_emptied(tmp_path: Path) -> None:
    source, work = small(tmp_path), tmp_path / "out.work"
    work.mkdir()
    (work / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not ours"):
        prepare(request(source, tmp_path / "out", vocab_size=290))
    assert (work / "thesis.txt").exists()


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with holding_output(output), pytest.raises(LockError, match="another job is writing there"):
        prepare(request(small(tmp_path), output, vocab_size=290))
    assert not output.exists() and not (tmp_path / "out.work").exists()


def test_input_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small(tmp_path)
    real = module._split

    def split(*arguments: Any, **options: Any) -> Any:
        with open(source, "a") as stream:
            stream.write("\n")
        return real(*arguments, **options)

    monkeypatch.setattr(module, "_split", split)
    with pytest.raises(DataError, match="changed while"):
        prepare(request(source, tmp_path / "out", vocab_size=290))
    assert not (tmp_path / "out").exists()


# Bad input


@pytest.mark.parametrize(
    ("line", "word", "workers"),
    [
        (b"{", "not JSON", 1),
        (b"{", "not JSON", 2),
        (b"[1]", "a JSON list", 1),
        (b"{}", "keys none", 1),
        (b'{"body": "x"}', "keys 'body'", 1),
        (b'{"text": 3}', "a int under 'text'", 1),
        (b'{"text": "\\ud800"}', "whole characters", 1),
        (b'{"text": "\xff"}', "UTF-8", 1),
    ],
)
def test_bad_line_is_named(
    undisturbed: PreparedData, tmp_path: Path, line: bytes, word: str, workers: int
) -> None:
    path = tmp_path / "c.jsonl"
    good = as_json("word " * 50_000).encode()
    path.write_bytes(b"\n".join([good] * 9 + [line] + [good] * 3))
    given = undisturbed.path / "tokenizer.model"
    with pytest.raises(DataError, match=rf"(?s)c\.jsonl, line 10\n.*{word}"):
        prepare(request(path, tmp_path / "out", tokenizer=given, workers=workers))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"validation_fraction": 1.0}, "--validation-fraction"),
        ({"validation_fraction": float("nan")}, "--validation-fraction"),
        ({"workers": 0}, "--workers"),
        ({"validation_fraction": 0.0}, "--validation-fraction"),
        ({"vocab_size": 0}, "--vocab-size"),
        ({"tokenizer_sample": 0}, "--tokenizer-sample"),
        ({"dtype": "int8"}, "--dtype"),
    ],
)
def test_option_out_of_range(tmp_path: Path, options: dict[str, Any], word: str) -> None:
    with pytest.raises(DataError, match=word):
        request("x", tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("empty.txt", b"", "empty files only"),
        ("empty.jsonl", b"", "empty files only"),
        ("latin.txt", b"caf\xe9", r"1 files that are not UTF-8 text, such as .*latin\.txt"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_input_without_text(
    undisturbed: PreparedData, tmp_path: Path, name: str, content: bytes, word: str, own: bool
) -> None:
    (tmp_path / name).write_bytes(content)
    given = None if own else undisturbed.path / "tokenizer.model"
    with pytest.raises(DataError, match=word):
        prepare(request(tmp_path / name, tmp_path / "out", tokenizer=given))


# The command


def test_command_from_start_to_rerun(tmp_path: Path) -> None:
    options = ("--input", small(tmp_path), "--output", tmp_path / "out", "--vocab-size", 290)
    done = run(*options)
    assert done.returncode == 0, done.stderr
    assert "out: prepared" in done.stdout and "validation" in done.stdout
    again = run(*options)
    assert again.returncode == 0 and "already prepared" in again.stdout
    assert "stdlib" in run("--help").stdout


@pytest.mark.parametrize(
    ("options", "status", "word"),
    [
        (("--input", "absent", "--output", "out"), 1, "error: --input absent: no such file"),
        (("--input", "stdlib"), 2, "--output"),
        (("--input", "stdlib", "--output", "o", "--tokenizer", "t.model"), 1, "t.model: no such"),
    ],
)
def test_command_with_bad_options(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    status: int,
    word: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*options)
    assert done.returncode == status and word in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_no_space_left(tmp_path: Path) -> None:
    # A limit on file sizes fails writes as a full disk does.
    source = small(tmp_path)
    arguments = command("--input", source, "--output", tmp_path / "out", "--vocab-size", 290)
    limited = "import resource, runpy, sys; sys.argv = sys.argv[1:];"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
    limited += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", limited, *arguments[1:]],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr
    assert "File too large" in done.stderr and not (tmp_path / "out").exists()


def test_a_unit_of_documents_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(DataError, match="--documents"):
        Request(input="x", output=tmp_path / "out", documents="sentence")
