"""A long text is encoded in parts only if the ids equal those of the whole."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.data import cutting
from megagrow.data.tokenizer import Tokenizer, load_tokenizer

SOURCE = (Path(sysconfig.get_paths()["stdlib"]) / "textwrap.py").read_text(encoding="utf-8")
TEXT = (
    SOURCE[:4000]
    + "ends\nhere. " * 9
    + "caf\u00e9\n\u00e9t\u00e9 !\n?\n\n x\n\n\ny \n\tz\r\n7\n8 'S\n's"
)
TEXT += " \u00a0\n12\n5\u3000\n."


def splitter(name: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if name == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    pattern = next(p for p in sorted(cutting._PATTERNS) if ("{1,3}" in p) == (name == "cl100k")
                   and p.startswith("(?i"))  # fmt: skip
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def trained(path: Path, pre_tokenizer: Any, *, normalizer: Any = None) -> Tokenizer:
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = Model(models.BPE())
    model.normalizer, model.decoder = normalizer, decoders.ByteLevel()
    model.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # As many word ends and line ends as possible, so that there are tokens with both.
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["</s>"],
                                  initial_alphabet=alphabet, show_progress=False)  # fmt: skip
    model.train_from_iterator([TEXT, "a\nb\n\nc.\n\n d\n" * 200], trainer)
    model.save(str(path))
    return load_tokenizer(path)


@pytest.fixture(scope="module", params=["gpt2", "cl100k", "qwen2"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("t") / "tokenizer.json"
    return trained(path, splitter(request.param))


def parts(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    return [part.tolist() for part in tokenizer.encode_parts(text)]


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("ab1'sS. \n\n\t\r\u00e9\u3000\u00a0?"), max_size=60))
def test_parts_have_the_ids_of_the_whole(tokenizer: Tokenizer, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "_CHARACTERS", 1)
        found = parts(tokenizer, text)
    assert [token for part in found for token in part] == tokenizer.encode(text)


def test_a_long_text_comes_in_many_parts(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "_CHARACTERS", 1)
    found = parts(tokenizer, TEXT)
    assert [token for part in found for token in part] == tokenizer.encode(TEXT)
    assert len(found) > 20


def test_a_tokenizer_that_is_not_known_to_split_there_encodes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    monkeypatch.setattr(cutting, "_CHARACTERS", 1)
    level = pre_tokenizers.ByteLevel
    others = [
        (level(add_prefix_space=True), None),
        (level(add_prefix_space=False, use_regex=False), None),
        (level(add_prefix_space=False), normalizers.NFC()),
        (pre_tokenizers.Split(Regex(r"[^.]+\."), "isolated"), None),
        (pre_tokenizers.Metaspace(), None),
    ]
    for number, (pre_tokenizer, normalizer) in enumerate(others):
        path = tmp_path / f"{number}.json"
        assert len(parts(trained(path, pre_tokenizer, normalizer=normalizer), TEXT)) == 1
