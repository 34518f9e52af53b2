"""Text from a model: against transformers, over tensor-parallel ranks, and what is drawn."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

import megagrow
from megagrow.checkpoint.convert.load_model import load_model
from megagrow.cli.generate import main
from megagrow.errors import ConfigError
from megagrow.evaluation.generation import Sampling, generate
from megagrow.models.common.parallel import TensorParallel
from tests.ranks import run_ranks

transformers = pytest.importorskip("transformers")

BYTES = Path(__file__).parent.parent.parent / "configs" / "tokenizers" / "bytes.json"
SEQUENCE, VOCABULARY, END = 16, 257, 256
PROMPTS = [[1, 2, 3], [40, 50, 60, 70, 80], [9]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small model of transformers, with a tokenizer of bytes, and the directory it is in."""
    path = tmp_path_factory.mktemp("model")
    shape = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=SEQUENCE, vocab_size=VOCABULARY,
        initializer_range=0.3, eos_token_id=END, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(shape)
    model.save_pretrained(path)
    shutil.copyfile(BYTES, path / "tokenizer.json")
    return model.eval(), path


def settings(**changes):
    base = {"tokens": 8, "sequence": SEQUENCE, "vocabulary": VOCABULARY,
            "sampling": Sampling(temperature=0)}  # fmt: skip
    return {**base, **changes}


def test_greedy_text_is_that_of_transformers(exported):
    theirs, path = exported
    model, _, _ = load_model(path)
    ours = generate(model, PROMPTS, **settings())
    for prompt, added in zip(PROMPTS, ours, strict=True):
        tokens = torch.tensor([prompt])
        whole = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert whole[0, len(prompt) :].tolist() == added


def test_a_text_depends_neither_on_the_batch_nor_on_its_neighbours(exported):
    model, _, _ = load_model(exported[1])
    sampling = Sampling(temperature=0.9, top_p=0.95, seed=7)
    together = generate(model, PROMPTS, **settings(sampling=sampling))
    assert together == generate(model, PROMPTS, **settings(sampling=sampling, batch=1))
    assert together == generate(model, PROMPTS, **settings(sampling=sampling, batch=2))
    assert together[:1] == generate(model, PROMPTS[:1], **settings(sampling=sampling))
    other = generate(model, PROMPTS, **settings(sampling=Sampling(0.9, None, 0.95, 8)))
    assert together != other
    assert len({tuple(text) for text in generate(model, [[5]] * 4, **settings(
        sampling=Sampling(seed=1)))}) > 1  # fmt: skip


def test_a_text_longer_than_the_model_sees_goes_on_from_its_last_tokens(exported):
    model, _, _ = load_model(exported[1])
    long = list(range(100, 130))
    assert generate(model, [long], **settings()) == generate(
        model, [long[-SEQUENCE:]], **settings()
    )


def test_a_text_ends_at_the_end_token_and_others_go_on(exported):
    model, _, _ = load_model(exported[1])
    free = generate(model, PROMPTS, **settings(tokens=12))
    end = free[1][3]
    cut = generate(model, PROMPTS, **settings(tokens=12, end=end))
    for text, whole in zip(cut, free, strict=True):
        length = whole.index(end) + 1 if end in whole else len(whole)
        assert text == whole[:length]
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[1], []], **settings())


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(temperature=0.5), [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_p=0.6), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_p=0.5), [1, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.8), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(temperature=0), [1, 0, 0, 0]),
    ],
)
def test_draws_have_the_probabilities_that_the_settings_leave(sampling, expected):
    order = torch.tensor([2, 0, 3, 1])  # the most probable token is not the first
    logits = torch.empty(4)
    logits[order] = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    random = torch.Generator().manual_seed(5)
    count = 4000
    drawn = Counter(sampling.draw(logits, random) for _ in range(count))
    for token, share in zip(order.tolist(), expected, strict=True):
        if share in (0, 1):
            assert drawn[token] == share * count
        # Six standard deviations.
        assert abs(drawn[token] / count - share) <= 6 * (share * (1 - share) / count) ** 0.5


def part_of(comm, path):
    """What one of several tensor-parallel ranks generates with its part of the model."""
    model, _, _ = load_model(
        path, parallel=TensorParallel(torch.distributed.group.WORLD, comm.rank, comm.world)
    )
    own = sum(parameter.numel() for parameter in model.parameters())
    return own, generate(model, PROMPTS, **settings(agree=comm.broadcast))


def test_tensor_parallel_ranks_generate_what_one_does(exported):
    model, _, _ = load_model(exported[1])
    whole = sum(parameter.numel() for parameter in model.parameters())
    expected = generate(model, PROMPTS, **settings())
    for own, texts in run_ranks(2, part_of, exported[1]):
        assert texts == expected
        assert own < 0.55 * whole  # the vocabulary of 257 is padded to 258


def test_the_command(exported, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"one\r\n\ntwo\n")
    out = tmp_path / "new" / "texts.json"
    arguments = [str(exported[1]), "--prompt", "zero", "--prompts", str(prompts), "--tokens", "5"]
    assert main([*arguments, "--samples", "2", "--json", str(out), "--no-end"]) == 0
    said = capsys.readouterr()
    texts = json.loads(out.read_text())["texts"]
    assert [t["prompt"] for t in texts] == ["zero", "zero", "one", "one", "two", "two"]
    assert all(len(t["tokens"]) == 5 for t in texts)
    assert said.out.count("--- ") == 6 and "--- 6\ntwo" in said.out
    assert all(c.isprintable() or c == "\n" or c == "\t" for c in said.out)
    assert "llama, 2 layers" in said.err and "the model sees the last" not in said.err
    assert main([str(exported[1]), "--tokens", "20", "--temperature", "0"]) == 0  # no prompt
    assert "the model sees the last 16 tokens of a text, of up to 20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompts", "missing.txt"], "cannot be read as text"),
        (["--temperature", "-1"], "at least 0"),
        (["--top-p", "0"], "above 0"),
        (["--top-p", "1.5"], "at most 1"),
        (["--samples", "0"], "of 1 to 10000"),
    ],
)
def test_wrong_arguments(exported, arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main([str(exported[1]), *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status != 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_k": -1},
     {"top_p": 0.0}, {"top_p": 2.0}, {"seed": -1}, {"tokens": 0}, {"tokens": -3},
     {"prompts": ["\ud800"]}, {"prompts": [None]}],
)  # fmt: skip
def test_wrong_numbers_and_prompts_are_refused_by_the_function_as_well(exported, wrong):
    with pytest.raises(ConfigError, match="cannot be used to generate"):
        megagrow.generate_text(exported[1], **{"prompts": ["a"], **wrong})
