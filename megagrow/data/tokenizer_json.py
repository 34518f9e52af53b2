"""Export tokenizer.json for other programs: the same ids as in training, for every text.

A `tokenizer.json` is exported as used in training: no truncation, no padding, and none of the
tokens that its post-processor would add. A SentencePiece model is converted:

* For models trained by megagrow (see `tokenizer`) pieces are written with plain blanks, so that
  U+2581 in a text matches no piece and becomes its three bytes, as in megagrow's encoding.
* For models with a prefix before the text (like LLaMA's), blanks and prefix are U+2581, as in the
model.

The merges of a byte-pair model are all pairs of pieces that form a piece, best score first.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from megagrow.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from megagrow.errors import DataError

_BLANK = "\u2581"
_ADDS_TOKENS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
_PROBES = (
    "def f(x):\n    return x  # two  spaces\n\tprint('\u00e9')\n",
    "  a \n\n\tb  \u00e9\U0001f600 \x00\r\n ",
    " ",
    "\n",
    "",
    f"a{_BLANK}b {_BLANK}",
    "e\u0301 \u212b \ufb01 \u3000x \u4f60\u597d \u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432",
    "It's 1234567.89, isn't it? <0x0A> [MASK]",
)


def probe_texts(tokenizer: Tokenizer, *, special: bool) -> Iterator[str]:
    """Texts on which two implementations of a tokenizer are compared.

    Blanks, line ends, other scripts, and mixtures of the tokenizer's own tokens.

    Args:
        tokenizer: the tokenizer whose tokens are used.
        special: whether to include texts that contain the name of its end token.
    """
    yield from _PROBES
    if special:
        yield f"a {tokenizer.name(tokenizer.eod)} b"
    draw = random.Random(0)
    for _ in range(64):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randint(1, 12))]
        pieces = [tokenizer.decode([token]) for token in ids]
        yield draw.choice(("", " ")).join(pieces)


def difference(
    tokenizer: Tokenizer, encode: Callable[[str], list[int]], *, special: bool
) -> tuple[str, list[int], list[int]] | None:
    """The first probe with different ids: (text, `encode`'s ids, megagrow's); None if all agree."""
    for text in probe_texts(tokenizer, special=special):
        found, wanted = list(encode(text)), tokenizer.encode(text)
        if found != wanted:
            return text, found, wanted
    return None


def as_trained(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A tokenizer.json without the parts that training does not use, and their names."""
    changed = dict(content)
    for key in ("truncation", "padding"):
        if changed.get(key) is not None:
            changed[key] = None
    if _adds_tokens(changed.get("post_processor")):
        changed["post_processor"] = None
    return changed, [key for key in changed if changed[key] != content[key]]


def _adds_tokens(step: Any) -> bool:
    if not isinstance(step, dict):
        return False
    return step.get("type") in _ADDS_TOKENS or any(map(_adds_tokens, step.get("processors", ())))


def from_sentencepiece(path: Path) -> dict[str, Any]:
    """A SentencePiece model as the content of a tokenizer.json.

    Raises:
        DataError: the model is damaged, or cannot be converted with the same ids (checking this
            needs the package `tokenizers`, for models not trained by megagrow).
    """
    ours = load_tokenizer(path)
    assert isinstance(ours, SentencePieceTokenizer)
    model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    forms = [_content(model, kind, exact=ours.exact) for kind in (_byte_pairs, _unigram)]
    try:
        import tokenizers
    except ImportError:
        if ours.exact:
            return forms[0]
        raise DataError(
            f"{path}: cannot check that transformers would produce the same ids",
            found="no module 'tokenizers'",
            fix="pip install 'megagrow[hf]'",
        ) from None
    for form in forms:
        made: Any = tokenizers.Tokenizer.from_str(json.dumps(form))
        made.encode_special_tokens = True

        def encode(text: str, made: Any = made) -> list[int]:
            return list(made.encode(text, add_special_tokens=False).ids)

        if difference(ours, encode, special=True) is None:
            return form
    raise DataError(
        f"{path}: this kind of SentencePiece model cannot be written as tokenizer.json",
        found="other ids for blanks or characters that it rewrites",
        expected="a model without normalization, such as prepare_data.py trains",
        fix="give a tokenizer.json of the same tokenizer, or leave the tokenizer out",
    )


def _content(
    model: Any, kind: Callable[[Any, list[str]], dict[str, Any]], *, exact: bool
) -> dict[str, Any]:
    count = model.get_piece_size()
    names = [model.id_to_piece(token) for token in range(count)]
    if exact:
        names = [
            name if _marked(model, token) else name.replace(_BLANK, " ")
            for token, name in enumerate(names)
        ]
    special = [i for i in range(count) if model.is_control(i) or model.is_unknown(i)]
    ending: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    normalizer: dict[str, Any] | None = None
    if not exact:
        blanks = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
        prefix = {"type": "Prepend", "prepend": _BLANK}
        normalizer = {"type": "Sequence", "normalizers": [prefix, blanks]}
        back = {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "}
        ending = [back, *ending, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token, "content": names[token], "special": True, "normalized": False,
                "single_word": False, "lstrip": False, "rstrip": False,
            }
            for token in special
        ],
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": ending},
        "model": kind(model, names),
    }  # fmt: skip


def _marked(model: Any, token: int) -> bool:
    """Whether a token is not a piece of text."""
    return bool(
        model.is_unknown(token)
        or model.is_control(token)
        or model.is_byte(token)
        or model.is_unused(token)
    )


def _byte_pairs(model: Any, names: list[str]) -> dict[str, Any]:
    pieces = {name: i for i, name in enumerate(names) if not _marked(model, i)}
    merges = [
        (-model.get_score(token), pieces[name[:at]], pieces[name[at:]], name[:at], name[at:])
        for name, token in pieces.items()
        for at in range(1, len(name))
        if name[:at] in pieces and name[at:] in pieces
    ]
    return {
        "type": "BPE",
        "unk_token": names[model.unk_id()],
        "fuse_unk": True,
        "byte_fallback": any(model.is_byte(token) for token in range(len(names))),
        "vocab": {name: token for token, name in enumerate(names)},
        "merges": [[left, right] for *_, left, right in sorted(merges)],
    }


def _unigram(model: Any, names: list[str]) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": model.unk_id(),
        "byte_fallback": any(model.is_byte(token) for token in range(len(names))),
        "vocab": [[name, model.get_score(token)] for token, name in enumerate(names)],
    }
