"""Text is decoded exactly."""

from __future__ import annotations

import builtins
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.data import cutting
from megagrow.data.tokenizer import END_OF_DOCUMENT, Tokenizer, load_tokenizer, train_sentencepiece
from megagrow.errors import DataError

STDLIB = Path(sysconfig.get_paths()["stdlib"])
SOURCES = [(STDLIB / name).read_bytes().decode() for name in ("ast.py", "heapq.py", "textwrap.py")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_sentencepiece(SOURCES, vocab_size=600))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        SOURCES,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    model.enable_truncation(5)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    model.save(str(path))
    return load_tokenizer(path)


@pytest.fixture(params=["trained", "hugging_face"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_source_files_come_back_exactly(tokenizer: Tokenizer) -> None:
    for name in ("argparse.py", "encodings/cp037.py", "tokenize.py", "ast.py"):
        text = (STDLIB / name).read_bytes().decode()
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) < len(text) / 1.3
        assert all(0 <= token < tokenizer.vocab_size for token in ids)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "\t\t\n  \n\n",
        "a\r\nb\rc",
        "  leading, trailing  ",
        "\u2581 \u2581\u2581a",
        "\u2585\u2047 \ufeff\u00a0\u3000",
        "nul \x00 here",
        f"{END_OF_DOCUMENT}</s><unk><0x0A>",
        "e\u0301 \u00e9 \ufb01 \U0001f600",
    ],
)
def test_awkward_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_exactly(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_document_end_decodes_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([*tokenizer.encode("x = 1\n"), tokenizer.eod]) == "x = 1\n"


def test_long_text_is_cut_without_a_trace(
    trained: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained.encode(SOURCES[0])
    monkeypatch.setattr(cutting, "_CHARACTERS", 100)
    assert trained.encode(SOURCES[0]) == whole
    assert len(list(trained.encode_parts(SOURCES[0]))) > 300


def test_training_is_deterministic_and_of_the_size_asked_for(trained: Tokenizer) -> None:
    assert trained.path.read_bytes() == train_sentencepiece(SOURCES, vocab_size=600)
    assert trained.vocab_size == 600


def test_one_line_without_end_can_be_trained_on() -> None:
    assert train_sentencepiece([" ".join(SOURCES[0].split())], vocab_size=500)


@pytest.mark.parametrize(("texts", "size"), [(SOURCES, 100), (["abc abc"], 4096), ([], 400)])
def test_vocabulary_that_does_not_fit(texts: list[str], size: int) -> None:
    with pytest.raises(DataError, match=f"(?s){size} tokens.*--vocab-size"):
        train_sentencepiece(texts, vocab_size=size)


def test_model_of_another_kind_keeps_its_own_rules(tmp_path: Path) -> None:
    import sentencepiece

    with open(tmp_path / "m.model", "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SOURCES[0].split("\n")),
            model_writer=stream,
            vocab_size=400,
            minloglevel=2,
        )
    reference = sentencepiece.SentencePieceProcessor(str(tmp_path / "m.model"))
    text = "a  line \u2581\n and another"
    assert load_tokenizer(tmp_path / "m.model").encode(text) == reference.encode(text)


def test_fingerprint_follows_the_file(trained: Tokenizer, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    other.write_bytes(train_sentencepiece(SOURCES, vocab_size=601))
    assert load_tokenizer(other).fingerprint() != trained.fingerprint()
    other.write_bytes(trained.path.read_bytes())
    assert load_tokenizer(other).fingerprint() == trained.fingerprint()


@pytest.mark.parametrize("name", ["t.model", "t.json", "t.txt", "absent.model"])
def test_file_that_is_no_tokenizer(tmp_path: Path, name: str) -> None:
    if not name.startswith("absent"):
        (tmp_path / name).write_bytes(b"\x80 nothing of the kind")
    with pytest.raises(DataError, match=name):
        load_tokenizer(tmp_path / name)


def test_tokenizer_without_document_end(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Model
    from tokenizers import models

    Model(models.BPE({"a": 0}, [])).save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match="ends a document"):
        load_tokenizer(tmp_path / "t.json")


def test_missing_package_names_the_command(
    hugging_face: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'megagrow\[hf\]'"):
        load_tokenizer(hugging_face.path)
