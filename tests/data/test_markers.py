"""Document markers: never a token that text can encode to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megagrow.data.dataset import open_dataset
from megagrow.data.prepare import Request, prepare
from megagrow.data.tokenizer import load_tokenizer
from megagrow.errors import DataError


def hugging_face(
    folder: Path,
    *,
    special: tuple[str, ...] = (),
    ordinary: tuple[str, ...] = (),
    around: str = "",
    config: Any = None,
) -> Path:
    """A byte tokenizer with additional tokens; `around` is a post-processor's template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate([*special, *ordinary, *alphabet])}
    model = Tokenizer(models.BPE(vocabulary, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(list(special))
    model.add_tokens(list(ordinary))
    if around:
        pairs = [(name, vocabulary[name]) for name in around.split() if name != "$A"]
        model.post_processor = processors.TemplateProcessing(
            single=around, pair=f"{around} $B:1", special_tokens=pairs
        )
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def sentence_piece(path: Path, **options: Any) -> Path:
    import sentencepiece

    with open(path, "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words, few of them"] * 9),
            model_writer=stream,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
    return path


KINDS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    # the tokenizer's tokens; the end and begin markers
    "gemma: </s> is a word of its texts": (
        {"special": ("<pad>", "<eos>", "<bos>"), "ordinary": ("<s>", "</s>")},
        "<eos>",
        None,
    ),
    "deepseek": (
        {"special": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")},
        "<｜end▁of▁sentence｜>",
        None,
    ),
    "bert: its template tells": (
        {"special": ("[PAD]", "[CLS]", "[SEP]"), "around": "[CLS] $A [SEP]"},
        "[SEP]",
        "[CLS]",
    ),
    "llama: its template begins": (
        {"special": ("<s>", "</s>"), "around": "<s> $A"},
        "</s>",
        "<s>",
    ),
    "the configuration comes first": (
        {"special": ("<|endoftext|>", "<|im_end|>"), "config": {"eos_token": "<|im_end|>"}},
        "<|im_end|>",
        None,
    ),
    "a token as a record; the beginning is asked for": (
        {
            "special": ("<a>", "<z>"),
            "config": {
                "eos_token": {"content": "<z>"},
                "bos_token": {"content": "<a>"},
                "add_bos_token": True,
            },
        },
        "<z>",
        "<a>",
    ),
    "the configuration takes the beginning away": (
        {
            "special": ("<s>", "</s>"),
            "around": "<s> $A",
            "config": {"bos_token": "<s>", "add_bos_token": False},
        },
        "</s>",
        None,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_tokenizer_has_its_own_end(tmp_path: Path, kind: str) -> None:
    parts, end, begin = KINDS[kind]
    tokenizer = load_tokenizer(hugging_face(tmp_path / "t", **parts))
    marks = tokenizer.markers
    assert tokenizer.name(marks.eod) == end and tokenizer.eod == marks.eod
    assert (None if marks.bos is None else tokenizer.name(marks.bos)) == begin
    assert tokenizer.start == (marks.eod if begin is None else marks.bos)
    text = f"a {end} b </s> c {begin}"
    ids = tokenizer.encode(text)
    assert not {marks.eod, marks.bos} & set(ids) and tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("parts", "options", "word"),
    [
        ({"special": ("<|endoftext|>", "</s>")}, {}, "does not define which.*--eod NAME"),
        ({"special": ("<x>",)}, {}, "does not define which.*special tokens <x>"),
        ({"ordinary": ("</s>",)}, {}, "does not define which.*special tokens none"),
        ({"special": ("<x>",), "ordinary": ("</s>",)}, {"eod": "</s>"}, "ordinary.*<x>"),
        ({"special": ("<x>",)}, {"eod": "<y>"}, "no token.*<x>"),
        ({"special": ("<x>",)}, {"eod": "<x>", "bos": "a"}, "--bos 'a' cannot.*ordinary"),
        ({"ordinary": ("</s>",), "config": {"eos_token": "</s>"}}, {}, "eos_token of.*ordinary"),
    ],
)
def test_a_token_that_text_can_become_or_a_doubtful_one_is_refused(
    tmp_path: Path, parts: dict[str, Any], options: dict[str, Any], word: str
) -> None:
    path = hugging_face(tmp_path / "t", **parts)
    with pytest.raises(DataError, match=f"(?s){word}"):
        load_tokenizer(path, **options)


def test_damaged_configuration_beside_the_tokenizer_is_named(tmp_path: Path) -> None:
    path = hugging_face(tmp_path / "t", special=("</s>",))
    (tmp_path / "t" / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: cannot be read"):
        load_tokenizer(path)


def test_sentencepiece_ends_with_a_control_symbol_alone(tmp_path: Path) -> None:
    own = load_tokenizer(sentence_piece(tmp_path / "a.model"))
    assert own.name(own.eod) == "</s>" and own.markers.bos is None
    spoken = {"eos_id": -1, "bos_id": -1, "user_defined_symbols": ["</s>", "<eod>"]}
    path = sentence_piece(tmp_path / "b.model", **spoken)
    with pytest.raises(DataError, match=r"(?s)does not define which.*special tokens none"):
        load_tokenizer(path)
    with pytest.raises(DataError, match="ordinary token"):
        load_tokenizer(path, eod="<eod>")
    path = sentence_piece(tmp_path / "c.model", eos_id=-1, control_symbols=["<eod>", "<x>"])
    assert load_tokenizer(path).name(load_tokenizer(path).eod) == "<eod>"
    assert load_tokenizer(path, eod="<x>", bos="<s>").markers.bos is not None
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<x>", "bos_token": "<s>", "add_bos_token": True})
    )
    found = load_tokenizer(path)
    assert (found.name(found.eod), found.name(found.start)) == ("<x>", "<s>")


def test_the_choice_is_recorded_and_every_document_lies_between_its_tokens(tmp_path: Path) -> None:
    given = hugging_face(tmp_path / "t", special=("<a>", "<z>"), around="<a> $A")
    texts = [f"text {n} </s>" for n in range(60)]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))

    def ask(output: str, **options: Any) -> Request:
        return Request(str(tmp_path / "c.jsonl"), tmp_path / output, given,
                       validation_fraction=0.1, eod="<z>", **options)  # fmt: skip

    prepare(ask("out"))
    data = open_dataset(tmp_path / "out")
    assert (data.content.eod, data.content.bos) == (1, 0)
    assert data.made["markers"] == {"eod": "<z>", "bos": "<a>", "why": "--eod"}
    seen = []
    for split in (data.train, data.validation):
        for number in range(len(split)):
            first, *ids, last = split[number].tolist()
            assert (first, last) == (0, 1) and not {0, 1} & set(ids)
            seen.append(data.tokenizer.decode(ids))
    assert sorted(seen) == sorted(texts)
    # The dataset's tokenizer has the same markers when opened again, wherever it is.
    again = load_tokenizer(tmp_path / "out" / "tokenizer.json").markers
    assert (
        (again.eod, again.bos) == (data.tokenizer.markers.eod, data.tokenizer.markers.bos) == (1, 0)
    )
    plain = prepare(ask("plain", bos="none")).data
    assert plain.content.bos is None and "bos" not in plain.content.record()
    with pytest.raises(DataError, match=r"(?s)bos None, asked for 0.*--overwrite"):
        prepare(ask("plain"))


def test_markers_of_a_tokenizer_that_is_trained_here_are_not_to_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--eod: only with --tokenizer"):
        Request("x", tmp_path / "o", eod="</s>")
