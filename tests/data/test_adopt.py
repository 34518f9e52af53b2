"""Token files that others made become a dataset where they are."""

import hashlib
import json

import numpy as np
import pytest

from megagrow.cli.prepare_data import main
from megagrow.data.dataset import open_dataset, verify
from megagrow.data.sampler import SampleIndex
from megagrow.data.tokenizer import load_tokenizer
from megagrow.errors import DataError
from tests.jobs import events, settings, train, write_config


@pytest.fixture
def tokens(dataset):
    """The documents of a prepared dataset, each with its end token."""
    data = open_dataset(dataset).train
    return [np.array(data[number]) for number in range(len(data))]


@pytest.fixture
def tokenizer(dataset):
    return dataset / "tokenizer.model"


def raw(path, documents):
    np.concatenate(documents).astype("<u2").tofile(path)
    return path


def npy(path, documents):
    np.save(path, np.concatenate(documents).astype(np.int32))
    return path


def llmc(path, documents, *, claimed=None):
    body = np.concatenate(documents).astype("<u2")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(body) if claimed is None else claimed
    path.write_bytes(header.tobytes() + body.tobytes())
    return path


def megatron(path, documents, dtype=np.uint16):
    """By Megatron-Core's own writer."""
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = theirs.IndexedDatasetBuilder(str(path.with_suffix(".bin")), dtype=dtype)
    for document in documents:
        import torch

        builder.add_item(torch.from_numpy(document.astype(np.int64)))
        builder.end_document()
    builder.finalize(str(path.with_suffix(".idx")))
    return path.with_suffix("")


KINDS = {"raw": (raw, "t.bin"), "npy": (npy, "t.npy"), "llm.c": (llmc, "t.bin"),
         "megatron": (megatron, "t")}  # fmt: skip


def adopt(*words):
    return main([str(word) for word in words])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_tokens_that_are_in_it(kind, tmp_path, tokens, tokenizer, capsys):
    write, name = KINDS[kind]
    (tmp_path / "files").mkdir()
    path = write(tmp_path / "files" / name, tokens)
    before = {p: p.read_bytes() for p in (tmp_path / "files").iterdir()}
    assert adopt("--tokens", path, "--tokenizer", tokenizer, "--output", tmp_path / "out",
                 "--validation-fraction", 0.1) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert f"({kind})" in said and "nothing was copied" in said
    data, flat = open_dataset(tmp_path / "out"), np.concatenate(tokens)
    train_tokens = data.train.total_tokens
    assert train_tokens + data.validation.total_tokens == len(flat)
    assert abs(data.validation.total_tokens - len(flat) / 10) < max(map(len, tokens)) + 1
    assert np.array_equal(data.train.window(0, train_tokens, "all"), flat[:train_tokens])
    assert flat[train_tokens - 1] == data.eod  # cut at the end of a document
    rest = data.validation.window(0, len(flat) - train_tokens, "all")
    assert np.array_equal(rest, flat[train_tokens:])
    assert verify(data) == len(flat) * data.train.dtype.itemsize
    assert {p: p.read_bytes() for p in (tmp_path / "files").iterdir()} == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "dataset.json",
        "tokenizer.model",
    ]


def test_several_files_are_one_stream(tmp_path, tokens, tokenizer):
    """Windows and single places across borders, as in one file."""
    parts = [tokens[:40], tokens[40:45], tokens[45:]]
    for number, part in enumerate(parts):
        raw(tmp_path / f"part_{number}.bin", part)
    (tmp_path / "files").mkdir()
    for path in tmp_path.glob("part_*.bin"):
        path.rename(tmp_path / "files" / path.name)
    whole = raw(tmp_path / "whole.bin", tokens)
    for name, source in (("many", tmp_path / "files"), ("one", whole)):
        assert adopt("--tokens", source, "--tokenizer", tokenizer, "--output", tmp_path / name) == 0
    many, one = (open_dataset(tmp_path / name) for name in ("many", "one"))
    assert many.train.total_tokens == one.train.total_tokens
    for k in range(30):
        a, b = (SampleIndex(d.train, 64, 7, ((16, 33),)).sample(k) for d in (many, one))
        assert np.array_equal(a, b)
    total = one.train.total_tokens
    assert np.array_equal(
        many.train.window(total - 50, 200, "around"), one.train.window(total - 50, 200, "around")
    )


def test_a_run_on_them_is_a_run_on_a_dataset_of_the_same_tokens(dataset, tmp_path, tokenizer):
    """Our own files are Megatron-LM's kind, so they can be taken too."""
    assert adopt("--tokens", dataset / "train", "--validation-tokens", dataset / "validation",
                 "--tokenizer", tokenizer, "--output", tmp_path / "same") == 0  # fmt: skip
    losses = []
    for name, path in (("a", dataset), ("b", tmp_path / "same")):
        run = settings(path, tmp_path / name, stages=[{"until": {"steps": 3}}])
        lines = train(1, write_config(tmp_path / f"{name}.yaml", run))
        losses.append([line["loss"] for line in events(lines, "step")])
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_what_changes_afterwards_is_seen(tmp_path, tokens, tokenizer):
    path = raw(tmp_path / "t.bin", tokens)
    assert adopt("--tokens", path, "--tokenizer", tokenizer, "--output", tmp_path / "out") == 0
    body = bytearray(path.read_bytes())
    body[10] ^= 1
    path.write_bytes(body)
    with pytest.raises(DataError, match="checksum of train"):
        verify(open_dataset(tmp_path / "out"))
    path.write_bytes(body[:100])
    with pytest.raises(DataError, match=r"(?s)cannot be read.*the [\d,]+ tokens that were there"):
        open_dataset(tmp_path / "out")
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        open_dataset(tmp_path / "out")


def test_files_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path, tokens, tokenizer, capsys):
    wide = [np.array([1, 2, 60_000]), *tokens]
    cases = [
        ([raw(tmp_path / "wide.bin", wide)], "wide.bin, token 2: an id that the vocabulary"),
        ([llmc(tmp_path / "short.bin", tokens, claimed=7)], "length differs from what its header"),
        ([tmp_path / "none.bin"], "No such file"),
        ([tokenizer], "no kind of token file that is known"),
        (
            [npy(tmp_path / "a.npy", tokens), raw(tmp_path / "a.bin", tokens)],
            "different token types",
        ),
    ]
    (tmp_path / "odd.bin").write_bytes(b"123")
    cases.append(([tmp_path / "odd.bin"], "not a whole number of tokens"))
    np.save(tmp_path / "square.npy", np.zeros((2, 2), np.int32))
    cases.append(([tmp_path / "square.npy"], "not a list of tokens"))
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "README.md").write_text("x")
    cases.append(([tmp_path / "mixed"], "not a directory of token files alone"))
    before = sorted(p.name for p in tmp_path.iterdir())
    for paths, said in cases:
        words = ["--tokens", *paths, "--tokenizer", tokenizer, "--output", tmp_path / "out"]
        assert adopt(*words) == 1, paths
        assert said in capsys.readouterr().err
        assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_options_that_would_have_no_effect_are_refused(tmp_path, tokens, tokenizer, capsys):
    path = raw(tmp_path / "t.bin", tokens)
    words = ["--tokens", path, "--tokenizer", tokenizer, "--output", tmp_path / "out"]
    for more in (["--text-key", "x"], ["--workers", 2], ["--documents", "paragraph"]):
        with pytest.raises(SystemExit):
            adopt(*words, *more)
        assert "only with --input" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        adopt("--tokens", path, "--output", tmp_path / "out")
    assert "also give --tokenizer" in capsys.readouterr().err


def test_an_output_that_exists_is_replaced_only_on_demand(tmp_path, tokens, tokenizer, capsys):
    path = raw(tmp_path / "t.bin", tokens)
    words = ["--tokens", path, "--tokenizer", tokenizer, "--output", tmp_path / "out"]
    assert adopt(*words) == 0
    assert adopt(*words) == 1 and "--overwrite" in capsys.readouterr().err
    raw(path, tokens[:50])
    assert adopt(*words, "--overwrite") == 0
    verify(open_dataset(tmp_path / "out"))
    (tmp_path / "out" / "mine").write_text("x")
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert manifest["made"]["ranges"]["train"][0]["path"] == str(path)


def test_documents_that_do_not_end_are_said(tmp_path, tokens, tokenizer, capsys):
    end = load_tokenizer(tokenizer).eod
    path = raw(tmp_path / "t.bin", [document[document != end] for document in tokens])
    assert adopt("--tokens", path, "--tokenizer", tokenizer, "--output", tmp_path / "out") == 0
    assert "no document ends with" in capsys.readouterr().out


def test_the_fingerprint_does_not_depend_on_where_the_files_are(tmp_path, tokens, tokenizer):
    found = set()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        path = raw(tmp_path / name / "t.bin", tokens)
        out = tmp_path / f"{name}_set"
        assert adopt("--tokens", path, "--tokenizer", tokenizer, "--output", out) == 0
        found.add(open_dataset(out).fingerprint)
    assert len(found) == 1 and len(hashlib.sha256().hexdigest()) == len(found.pop())


def test_megatrons_reader_reads_what_we_write(dataset):
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for split in ("train", "validation"):
        found, ours = theirs.IndexedDataset(str(dataset / split)), open_dataset(dataset)
        mine = getattr(ours, split)
        assert len(found) == len(mine)
        assert all(np.array_equal(found[i], mine[i]) for i in range(len(mine)))
