"""The tokenizer of an export: transformers must produce the same ids as in training.

Without a tokenizer_config.json, AutoTokenizer goes by the model's family: for any GPT-2 it applies
GPT-2's own rules, whatever tokenizer.json says.  So an export includes one that names the class
that follows tokenizer.json, and the tokens for begin, end and padding.  An existing
tokenizer_config.json is copied unchanged.  Either is opened with transformers, if it is installed,
and compared on probe texts before the export appears.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagrow.checkpoint.interface.tokenizer_files import LIMIT, OwnTokenizer
from megagrow.checkpoint.io.files import read_small
from megagrow.checkpoint.io.strict_json import parse_json, read_json
from megagrow.data.tokenizer import Tokenizer
from megagrow.data.tokenizer_json import as_trained, difference, from_sentencepiece
from megagrow.errors import CheckpointError, DataError

CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
_JSON, _MODEL = "tokenizer.json", "tokenizer.model"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PADS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")


@dataclass(frozen=True)
class Carried:
    """An export's tokenizer.

    Attributes:
        files: content by name.
        ids: of the begin, end and padding tokens, for config.json.
        tokenizer: the tokenizer that the files must agree with; None if we cannot read its kind.
        made: whether we wrote the tokenizer_config.json: then a text that spells a special token
            stays text, and no special tokens are added around it, as in training.
        notes: for the user.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    ids: Mapping[str, Any] = field(default_factory=lambda: dict.fromkeys(_IDS))
    tokenizer: Tokenizer | None = None
    made: bool = False
    notes: tuple[str, ...] = ()


def carried(own: OwnTokenizer | str | None, *, vocabulary: int, sequence: int) -> Carried:
    """Plan the files of a tokenizer.

    Args:
        own: the tokenizer, or the reason why there is none.
        vocabulary: size of the model's.
        sequence: the model's maximum text length, in tokens.

    Raises:
        CheckpointError: it has more tokens than the model.
        DataError: it is damaged, or cannot be written for transformers.
    """
    if own is None or isinstance(own, str):
        why = own or "none was looked for"
        note = f"tokenizer: none ({why}): no token ends a text, so generate() does not stop"
        return Carried(notes=(note,))
    note = f"tokenizer: {own.said}"
    names = {path.name for path in own.companions}
    if own.file is None or CONFIG in names:
        return _as_it_is(own, vocabulary, note)
    tokenizer = own.load()
    if tokenizer.vocab_size > vocabulary:
        raise _too_large(own.file, tokenizer, vocabulary)
    files = {path.name: read_small(path, LIMIT) for path in own.companions}
    notes = [note]
    if own.file.suffix == ".model":
        files[_MODEL] = read_small(own.file, LIMIT)
        content = from_sentencepiece(own.file)
        files[_JSON] = _text(content)
    else:
        original = read_small(own.file, LIMIT)
        content, dropped = as_trained(parse_json(original, where=str(own.file)))
        files[_JSON] = _text(content) if dropped else original
        if dropped:
            notes.append(f"tokenizer.json: without {', '.join(dropped)}, as in training")
    eod, start = tokenizer.eod, tokenizer.start
    if tokenizer.markers.bos is not None:
        notes.append(
            f"documents of training begin with {tokenizer.name(start)}, which the export's "
            "tokenizer does not add by itself: begin a prompt with it"
        )
    known = {tokenizer.name(token): token for token in range(tokenizer.vocab_size)}
    pad = next((known[name] for name in _PADS if name in known), eod)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # Without a begin token, a text in training is preceded by the last document's end token.
        "bos_token": tokenizer.name(start),
        "eos_token": tokenizer.name(eod),
        "pad_token": tokenizer.name(pad),
        "model_max_length": sequence,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    unknown = content.get("model", {}).get("unk_token")
    if unknown in known:
        config["unk_token"] = unknown
    files[CONFIG] = _text(config)
    ids = dict(zip(_IDS, (start, eod, pad), strict=True))
    files[GENERATION] = _text(ids)
    return Carried(files, ids, tokenizer, True, tuple(notes))


def _as_it_is(own: OwnTokenizer, vocabulary: int, note: str) -> Carried:
    """The files of a Hugging Face directory, with its own begin, end and padding tokens."""
    place = (own.file or own.companions[0]).parent
    paths = [*own.companions, *([own.file] if own.file else [])]
    files = {path.name: read_small(path, LIMIT) for path in paths}
    notes = [note]
    tokenizer = None
    if own.file is not None:
        try:
            tokenizer = own.load()
        except DataError as error:
            notes.append(f"ids not compared: {str(error).splitlines()[0]}")
        else:
            if tokenizer.vocab_size > vocabulary:
                raise _too_large(own.file, tokenizer, vocabulary)
    ids = _recorded_ids(place, vocabulary)
    if ids["eos_token_id"] is None and tokenizer is not None:
        ids["eos_token_id"] = tokenizer.eod
    if own.eod is not None:
        ids["eos_token_id"] = own.eod
    generation = read_json(place / GENERATION) if (place / GENERATION).is_file() else {}
    files[GENERATION] = _text({**ids, **generation, "eos_token_id": ids["eos_token_id"]})
    if ids["eos_token_id"] is None:
        notes.append("the files do not say which token ends a text, so generate() does not stop")
    return Carried(files, ids, tokenizer, False, tuple(notes))


def _recorded_ids(place: Path, vocabulary: int) -> dict[str, Any]:
    """The token ids that a directory's configurations name, if the model has them."""
    stated: dict[str, Any] = {}
    for name in (GENERATION, "config.json"):
        if (place / name).is_file():
            stated = {**read_json(place / name), **stated}

    def known(value: Any) -> bool:
        return type(value) is int and 0 <= value < vocabulary

    ids = {}
    for key in _IDS:
        value = stated.get(key)
        several = isinstance(value, list) and bool(value) and all(map(known, value))
        ids[key] = value if known(value) or several else None
    return ids


def compare(directory: Path, held: Carried) -> str:
    """Open an export's tokenizer with transformers and compare ids; returns what was compared.

    Raises:
        CheckpointError: transformers produces other ids.
    """
    ours = held.tokenizer
    if ours is None:
        return "ids of the tokenizer: not compared (a kind that megagrow does not read)"
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return "ids of the tokenizer: not compared with transformers, which is not installed"
    try:
        loaded: Any = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # custom tokenizers may raise anything
        if not held.made:
            return f"ids of the tokenizer: not compared, transformers cannot open it ({error})"
        raise CheckpointError(
            f"{ours.path}: transformers cannot open what the export holds of it",
            found=f"{type(error).__name__}: {error}"[:300],
            fix="convert without a tokenizer: --tokenizer none",
        ) from None
    loaded.model_max_length = 1 << 30  # or it warns about the probes

    def encode(text: str) -> list[int]:
        return list(loaded(text, add_special_tokens=held.made)["input_ids"])

    other = difference(ours, encode, special=held.made)
    if other is None:
        return "ids of the tokenizer: the same by transformers, on probe texts"
    text, found, wanted = other
    raise CheckpointError(
        f"{ours.path}: transformers gives other ids than in training",
        found=f"{found[:12]} for {text[:40]!r}, by {type(loaded).__name__}",
        expected=str(wanted[:12]),
        fix="AutoTokenizer goes by the model's family here, whatever tokenizer_config.json says: "
        "--tokenizer none, and load tokenizer.json with PreTrainedTokenizerFast"
        if held.made
        else "pass only the tokenizer.json, without its tokenizer_config.json: "
        f"--tokenizer {ours.path}",
    )


def _too_large(path: Path, tokenizer: Tokenizer, vocabulary: int) -> CheckpointError:
    return CheckpointError(
        f"{path}: is not the tokenizer of this model",
        found=f"{tokenizer.vocab_size} tokens",
        expected=f"at most the model's {vocabulary}",
        fix="give its own with --tokenizer",
    )


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
