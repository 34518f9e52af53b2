"""Tokens of two tokenizers are matched by what they stand for, and new ones are split."""

import json

import pytest
import tokenizers

from megagrow.data.tokenizer_json import from_sentencepiece
from megagrow.data.vocabularies import Token, matched, read_vocabulary
from megagrow.errors import DataError
from tests.data.small_tokenizers import END, MORE, TEXT, byte_level, extended, llama_like, lossless

LINES = [TEXT] * 20
BOTH = [TEXT + MORE] * 20


def piece(text):
    return Token("piece", text.encode())


@pytest.fixture
def make(tmp_path):
    makers = {
        "bytes": (byte_level, ".json", 290, 330),
        "lossless": (lossless, ".model", 300, 320),
        "llama": (llama_like, ".model", 300, 330),
    }

    def made(kind, *, large=False):
        maker, suffix, small, more = makers[kind]
        path = tmp_path / f"{kind}-{large}{suffix}"
        return read_vocabulary(
            maker(path, size=more if large else small, texts=BOTH if large else LINES)
        )

    return made


@pytest.mark.parametrize("kind", ["bytes", "lossless", "llama"])
def test_every_token_keeps_its_text_whatever_its_id(make, kind):
    old, new = make(kind), make(kind, large=True)
    found = matched(old, new)
    assert len(found.carried) > 250 and found.pieces
    for number, before in found.carried.items():
        assert new.tokens[number] == old.tokens[before]
    assert len(set(found.carried.values())) == len(found.carried)
    assert any(number != before for number, before in found.carried.items()) or kind == "bytes"
    for number, parts in found.pieces.items():
        texts = [old.tokens[part].text for part in parts]
        assert b"".join(texts) == new.tokens[number].text
    counted = {*found.carried, *found.pieces, *found.unsplit, *found.free[1]}
    assert counted == set(range(len(new.tokens)))


@pytest.mark.parametrize("kind", ["bytes", "lossless", "llama"])
def test_a_token_is_split_into_itself_in_the_middle_of_a_text(make, kind):
    """No blank is put before it: the pieces of a word's end are those of the word's end."""
    held = make(kind)
    known = held.ids()
    for token, number in known.items():
        if token.kind == "piece" and len(token.text.decode(errors="ignore")) > 1:
            assert held.encode(token.text.decode()) == [number], token


@pytest.mark.parametrize(
    ("old", "new"),
    [("bytes", "llama"), ("llama", "bytes"), ("lossless", "bytes"), ("llama", "lossless")],
)
def test_tokenizers_of_different_kinds(make, old, new):
    old, new = make(old), make(new, large=True)
    found = matched(old, new)
    at = {new.tokens[n]: old.tokens[o] for n, o in found.carried.items()}
    assert at[piece(" the")] == piece(" the") and at[piece("a")] == piece("a")
    # A byte that is no character is one token in both, whatever it is called.
    ids = new.ids()
    half = next(ids[t] for t in (Token("byte", b"\xe4"), piece("\xe4")) if t in ids)
    assert old.tokens[found.carried[half]].text == b"\xe4"
    for number, parts in found.pieces.items():
        if new.tokens[number].kind != "special":
            assert b"".join(old.tokens[p].text for p in parts) == new.tokens[number].text


def test_a_sentencepiece_model_and_its_tokenizer_json_are_the_same(make):
    for kind in ("lossless", "llama"):
        model = make(kind)
        file = model.path.with_suffix(".json")
        file.write_text(json.dumps(from_sentencepiece(model.path)), encoding="utf-8")
        again = read_vocabulary(file)
        assert again.tokens == model.tokens
        for text in (" the cat", "ing", "  x\n", "你"):
            assert again.encode(text) == model.encode(text), (kind, text)


def test_added_tokens_and_special_ones(tmp_path):
    old = byte_level(tmp_path / "old.json", size=290, texts=LINES)
    new = extended(tmp_path / "new.json", old, ["growing", " models", tokenizers.AddedToken(
        "<|tool|>", special=True)])  # fmt: skip
    before, after = map(read_vocabulary, (old, new))
    found = matched(before, after)
    assert found.carried == {i: i for i in range(len(before.tokens))} and not found.dropped
    first = len(before.tokens)
    assert sorted(found.pieces) == [first, first + 1, first + 2]
    assert found.pieces[first] == before.encode("growing")
    assert found.pieces[first + 2] == before.encode("<|tool|>")
    back = matched(after, before)
    assert sorted(back.dropped) == [first, first + 1, first + 2]
    assert before.tokens[before.ids()[Token("special", END.encode())]].kind == "special"


def test_ids_without_a_token_are_free(tmp_path):
    path = byte_level(tmp_path / "old.json", size=290, texts=LINES)
    content = json.loads(path.read_text(encoding="utf-8"))
    first = len(content["model"]["vocab"])
    content["model"]["vocab"]["zz"] = 299
    path.write_text(json.dumps(content), encoding="utf-8")
    held = read_vocabulary(path)
    assert len(held.tokens) == 300 and held.tokens[295] is None
    assert matched(held, held).free[1] == tuple(range(first, 299))


def test_a_tokenizer_whose_texts_are_not_known_is_refused(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, "##b": 1}, unk_token="a"))
    made.save(str(tmp_path / "pieces.json"))
    with pytest.raises(DataError, match="not known what text the tokens"):
        read_vocabulary(tmp_path / "pieces.json")
    (tmp_path / "none.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read as a tokenizer"):
        read_vocabulary(tmp_path / "none.json")


def test_what_the_old_tokenizer_does_not_know_has_no_pieces(tmp_path):
    letters = tokenizers.Tokenizer(tokenizers.models.BPE({"<unk>": 0, "a": 1, "b": 2}, [],
                                                         unk_token="<unk>"))  # fmt: skip
    letters.save(str(tmp_path / "old.json"))
    more = tokenizers.Tokenizer(
        tokenizers.models.BPE({"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}, [("a", "b")],
                              unk_token="<unk>")
    )  # fmt: skip
    more.save(str(tmp_path / "new.json"))
    found = matched(*map(read_vocabulary, (tmp_path / "old.json", tmp_path / "new.json")))
    assert found.unsplit == (3,) and found.pieces == {4: [1, 2]}
