"""Parquet, Arrow and saved Hugging Face datasets: their rows become documents."""

from pathlib import Path

import pytest

from megagrow.data.corpus import open_corpus
from megagrow.data.dataset import open_dataset
from megagrow.data.documents import read_documents
from megagrow.data.formats import form_of
from megagrow.data.prepare import prepare
from megagrow.data.request import Request
from megagrow.errors import DataError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

BYTES = Path(__file__).parent.parent.parent / "configs" / "tokenizers" / "bytes.json"
TEXTS = [f"row {n}: αβγ 😀\n" * (1 + n % 3) for n in range(3000)]  # more than one batch


@pytest.fixture(autouse=True)
def no_progress():
    datasets.disable_progress_bars()


def rows(**columns):
    return datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(len(TEXTS))), **columns})


def read(source, key="text", **options):
    corpus = open_corpus(str(source), **{"glob": "*", "split": "file", "text_key": key, **options})
    return [text for piece in corpus.pieces for text in read_documents(piece, text_key=key)], corpus


def write_table(path, kind, table):
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=700)
    elif kind == "arrow file":
        with pyarrow.ipc.new_file(path, table.schema) as out:
            out.write_table(table, max_chunksize=700)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as out:
            out.write_table(table, max_chunksize=700)


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
@pytest.mark.parametrize("text", ["string", "large_string", "string_view"])
def test_each_row_of_a_table_is_a_document(tmp_path, kind, text):
    column = pyarrow.array(TEXTS, type=getattr(pyarrow, text)())
    table = pyarrow.table({"n": pyarrow.array(range(len(TEXTS))), "body": column})
    write_table(tmp_path / "x.bin", kind, table)  # by its content, whatever its name
    found, corpus = read(tmp_path / "x.bin", key="body")
    assert found == TEXTS
    assert list(corpus.formats) == ["Parquet" if kind == "parquet" else "Arrow"]


def test_a_saved_dataset_is_read_in_its_order_and_what_is_beside_it_is_named(tmp_path):
    rows().save_to_disk(tmp_path / "saved", num_shards=3)
    found, corpus = read(tmp_path / "saved")
    assert found == TEXTS and corpus.files == 3
    [(why, group)] = corpus.left_out.items()
    assert "saved dataset" in why and group.names == ["dataset_info.json", "state.json"]


def test_a_directory_may_hold_tables_and_text(tmp_path):
    rows().select(range(2)).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("plain")
    (tmp_path / "c.jsonl").write_text('{"text": "record"}\n')
    found, corpus = read(tmp_path)
    assert found == [*TEXTS[:2], "plain", "record"]
    assert set(corpus.formats) == {"Parquet", "text", "JSON lines"}


def test_it_is_prepared_as_the_same_text_in_records(tmp_path):
    rows().to_parquet(tmp_path / "x.parquet")
    rows().to_json(tmp_path / "x.jsonl", lines=True)
    made = [
        prepare(Request(input=str(tmp_path / name), output=tmp_path / f"out_{name}",
                        tokenizer=BYTES, workers=2))
        for name in ("x.parquet", "x.jsonl")
    ]  # fmt: skip
    assert len({one.data.fingerprint for one in made}) == 1
    assert open_dataset(tmp_path / "out_x.parquet").content.eod == 256


def test_wrong_tables_are_refused_in_words(tmp_path):
    path = tmp_path / "x.parquet"
    rows().to_parquet(path)
    with pytest.raises(DataError, match=r"(?s)without the column 'body'.*'text', 'n'"):
        form_of(path, wanted="auto", key="body")
    with pytest.raises(DataError, match=r"(?s)'n' is not text.*int64"):
        form_of(path, wanted="auto", key="n")
    with pytest.raises(DataError, match="not text"):
        form_of(path, wanted="text", key="text")
    assert form_of(path, wanted="jsonl", key="text").kind == "parquet"  # a --text-key was given
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"(?s)cannot be read as Parquet.*get the file again"):
        form_of(path, wanted="auto", key="text")
    rows().save_to_disk(tmp_path / "saved")
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    content = arrow.read_bytes()
    arrow.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot be read as Arrow"):
        read(tmp_path / "saved")
    arrow.unlink()
    with pytest.raises(DataError, match=f"are missing: {arrow.name}"):
        read(tmp_path / "saved")


def test_rows_without_text_and_several_splits_are_refused(tmp_path):
    table = pyarrow.table({"text": pyarrow.array(["a", None, "c"])})
    write_table(tmp_path / "x.parquet", "parquet", table)
    with pytest.raises(DataError, match=r"row 2"):
        read(tmp_path / "x.parquet")
    both = datasets.DatasetDict({"train": rows(), "test": rows()})
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"(?s)several splits.*train, test"):
        read(tmp_path / "both")
    assert read(tmp_path / "both" / "train")[0] == TEXTS
    selected = tmp_path / "both" / "train" / "state.json"
    selected.write_text(selected.read_text().replace("{", '{"_indices_files": [{}],', 1))
    with pytest.raises(DataError, match="flatten_indices"):
        read(tmp_path / "both" / "train")


def test_without_pyarrow_the_package_to_install_is_named(tmp_path, monkeypatch):
    rows().to_parquet(tmp_path / "x.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"megagrow\[tables\]"):
        form_of(tmp_path / "x.parquet", wanted="auto", key="text")
