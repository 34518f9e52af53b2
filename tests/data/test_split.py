"""The validation set has the requested share of the tokens, from texts not trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.data.prepare import prepare
from megagrow.data.request import Request
from megagrow.data.split import SUM, choose
from megagrow.data.summary import summary


def sums(values: list[int]) -> np.ndarray:
    """A checksum with the value in both halves."""
    return np.array([(value % 3, value) for value in values], SUM)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    fraction=st.floats(1e-4, 0.9),
    seed=st.integers(0, 9),
)
def test_the_share_is_what_was_asked_for(lengths: list[int], fraction: float, seed: int) -> None:
    total = sum(lengths)
    if total < 2:
        return
    chosen = choose(
        np.array(lengths), sums(list(range(len(lengths)))), fraction=fraction, seed=seed
    )
    target = min(max(1, round(fraction * total)), total - 1)
    assert abs(int(chosen.tokens.sum()) - target) <= max(target / 8, 1)
    assert (chosen.tokens >= 0).all() and (chosen.tokens <= lengths).all()
    assert chosen.tokens.sum() < total  # something is left to train on
    assert chosen.shared == chosen.copies == 0
    assert chosen.cut == sum(0 < t < n for t, n in zip(chosen.tokens, lengths, strict=True))


@pytest.mark.parametrize("lengths", [[50_000], [70_000, 50_000], [9000] * 10, [10**6, *[100] * 99]])
def test_few_long_documents_are_cut_and_each_gives_a_part(lengths: list[int]) -> None:
    chosen = choose(np.array(lengths), sums(list(range(len(lengths)))), fraction=0.01, seed=1)
    assert chosen.tokens.sum() == pytest.approx(0.01 * sum(lengths), rel=0.01)
    if len(lengths) <= 2:
        assert (chosen.tokens > 0).all()


def test_documents_are_whole_where_there_are_enough() -> None:
    lengths = np.random.default_rng(0).integers(50, 500, 3000)
    chosen = choose(lengths, sums(list(range(3000))), fraction=0.01, seed=1)
    assert chosen.cut == 0 and (chosen.tokens > 0).sum() > 20
    other = choose(lengths, sums(list(range(3000))), fraction=0.01, seed=2)
    assert (chosen.tokens != other.tokens).any()


def test_documents_with_copies_are_trained_on_unless_there_is_nothing_else() -> None:
    lengths = np.full(300, 40)
    values = [number % 100 if number < 250 else number for number in range(300)]
    chosen = choose(lengths, sums(values), fraction=0.05, seed=3)
    assert chosen.tokens[:250].sum() == 0 and chosen.tokens.sum() == 600
    assert (chosen.copies, chosen.shared) == (250, 0)
    # Half of all: more than the fifty that occur once.
    chosen = choose(lengths, sums(values), fraction=0.5, seed=3)
    assert (chosen.tokens[250:] == 40).all()
    assert chosen.shared == (chosen.tokens[:250] > 0).sum() == 100


def test_no_text_of_the_validation_set_is_trained_on_and_all_is_reported(tmp_path: Path) -> None:
    texts = [f"text {n} " * 9 for n in range(60)] + [f"text {n} " * 9 for n in range(30)] + [""] * 5
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    outcome = prepare(Request(str(tmp_path / "c.jsonl"), tmp_path / "out", vocab_size=275,
                              validation_fraction=0.1))  # fmt: skip
    data = outcome.data
    train, validation = (
        [data.tokenizer.decode(split[n].tolist()) for n in range(len(split))]
        for split in (data.train, data.validation)
    )
    assert validation and not set(train) & set(validation)
    assert sorted(train + validation) == sorted(filter(None, texts))
    stated = "\n".join(summary(outcome))
    assert "60 documents with exact copies" in stated and "5 documents without text" in stated
    tokens = data.validation.total_tokens, data.train.total_tokens
    share = tokens[0] / sum(tokens)
    assert share == pytest.approx(0.1, rel=0.1)
    assert f"{share:.3%} of all (asked for: 10.000%)" in stated
    assert "end with '<|endoftext|>'" in stated and "1 files as JSON lines: c.jsonl" in stated
