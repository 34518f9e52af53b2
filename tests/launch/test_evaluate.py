"""launch/evaluate.py: the protocols against arithmetic done by hand, on every format."""

import importlib.util
import json
import math
import sys
import types

import pytest
import torch
from jobs import REPOSITORY, make_dataset
from states import save_model, to
from toys import build, toy_model

from megagrow.data.dataset import open_dataset
from megagrow.train.detokenizer import wikitext_detokenized
from megagrow.train.evaluation import Scorer, score_lambada

SEQUENCE = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data):
    """(checkpoint, model, tokenizer)."""
    model = toy_model(vocab=320, sequence=SEQUENCE)
    path, state = save_model(tmp_path_factory.mktemp("checkpoint"), model)
    return path, build(model, state).eval(), open_dataset(data).tokenizer


def evaluate(*arguments):
    spec = importlib.util.spec_from_file_location(
        "megagrow_evaluate", REPOSITORY / "launch/evaluate.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


def log_probabilities(model, ids):
    """[S, vocab] of what follows each of some ids."""
    with torch.no_grad():
        return torch.log_softmax(model.logits(torch.tensor([ids]))[0].double(), -1)


def nats_by_hand(model, ids, *, context, stride):
    """One window after the other, one token after the other."""
    tokens = [context, *ids]
    total, done = 0.0, 0
    while done < len(ids):
        end = min(len(ids), done + (SEQUENCE if done == 0 else stride))
        begin = max(0, end - SEQUENCE)
        table = log_probabilities(model, tokens[begin:end])
        total -= sum(float(table[i - begin, tokens[i + 1]]) for i in range(done, end))
        done = end
    return total


@pytest.mark.parametrize("stride", [1, 3, SEQUENCE])
def test_loss_of_a_text(saved, stride):
    _, model, tokenizer = saved
    ids = list(range(5, 42))
    scorer = Scorer(model, SEQUENCE, torch.device("cpu"), batch=3)
    wanted = nats_by_hand(model, ids, context=tokenizer.eod, stride=stride)
    found = scorer.loss(ids, context=tokenizer.eod, stride=stride)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_the_command_by_hand_and_on_other_formats(tmp_path, saved, data, capsys):
    path, model, tokenizer = saved
    text = "ba du ge , ki\nmo na pe ru so ta \u00e9\n"
    (tmp_path / "wiki").write_text(text, encoding="utf-8")
    ids = tokenizer.encode(wikitext_detokenized(text))
    nats = nats_by_hand(model, ids, context=tokenizer.eod, stride=4)
    plain = nats_by_hand(model, tokenizer.encode(text), context=tokenizer.eod, stride=4)
    exported = to(path, tmp_path / "hf", "huggingface")
    universal = to(path, tmp_path / "universal", "universal")
    for checkpoint in (path, exported, universal):
        status = evaluate(
            checkpoint, "--wikitext", tmp_path / "wiki", "--tokenizer", data, "--stride", 4,
            "--json", tmp_path / "a.json",
        )  # fmt: skip
        assert status == 0, capsys.readouterr().err
        [found] = json.loads((tmp_path / "a.json").read_text())["texts"].values()
        assert found["words"] == 12 and found["bytes"] == len(text.encode())
        assert found["word_perplexity"] == pytest.approx(math.exp(nats / 12), rel=1e-4)
    evaluate(path, "--text", tmp_path / "wiki", "--tokenizer", data, "--stride", 4,
             "--json", tmp_path / "a.json")  # fmt: skip
    [found] = json.loads((tmp_path / "a.json").read_text())["texts"].values()
    bits = plain / math.log(2) / len(text.encode())
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_last_words(saved):
    """The word's tokens are compared with the most probable ones, given all that is before."""
    _, model, tokenizer = saved
    scorer = Scorer(model, SEQUENCE, torch.device("cpu"))
    passages, right = [], 0
    for before in ("ba du", "ge ki mo", "na pe ru so ta ba du ge ki mo"):
        for word in ("du", "kimo"):
            ids = tokenizer.encode(f"{before} {word}")
            start = tokenizer.encode(before)
            assert ids[: len(start)] == start
            tail = [tokenizer.eod, *ids][-(SEQUENCE + 1) :]
            table = log_probabilities(model, tail[:-1])
            count = len(ids) - len(start)
            right += table.argmax(-1).tolist()[-count:] == tail[-count:]
            passages.append(f"{before} {word}")
    found = score_lambada(scorer, tokenizer, passages)
    assert (found.passages, found.right) == (6, right)
    # A passage made to be right: its last word is what the model says.
    for first in range(3, 320):
        best = int(log_probabilities(model, [tokenizer.eod, *tokenizer.encode("ba")])[-1].argmax())
        assert scorer.last_word([tokenizer.eod, *tokenizer.encode("ba")], [best])[1]
        wrong = scorer.last_word([tokenizer.eod, *tokenizer.encode("ba")], [first])
        assert wrong[1] == (first == best)
        if first > 6:
            break


def test_lambada_files(tmp_path, saved, data, capsys):
    path = saved[0]
    (tmp_path / "a.jsonl").write_text('{"text": "ba du ge"}\n\n{"text": "ki mo"}\n')
    (tmp_path / "b.txt").write_text("ba du ge\nki mo\n")
    scores = []
    for name in ("a.jsonl", "b.txt"):
        out = tmp_path / "s.json"
        assert evaluate(path, "--lambada", tmp_path / name, "--tokenizer", data,
                        "--json", out) == 0  # fmt: skip
        scores.append(json.loads(out.read_text())["lambada"])
    assert scores[0] == scores[1] and scores[0]["passages"] == 2
    for content, said in (("{broken\n", "line 1: not a passage"), ("\n", "holds no passage"),
                          ("word\n", "no word before the last")):  # fmt: skip
        (tmp_path / "bad").write_text(content)
        capsys.readouterr()
        assert evaluate(path, "--lambada", tmp_path / "bad", "--tokenizer", data) == 1
        assert said in capsys.readouterr().err


def test_what_is_wrong_is_said(tmp_path, saved, data, capsys):
    path = saved[0]
    (tmp_path / "text").write_text("ba du")
    cases = [
        ([path], "nothing to evaluate on"),
        ([path, "--text", tmp_path / "text"], "does not tell its tokenizer"),
        ([path, "--text", tmp_path / "none", "--tokenizer", data], "cannot be read"),
        ([tmp_path, "--text", tmp_path / "text"], "no checkpoint"),
        ([path, "--text", tmp_path / "text", "--tokenizer", data, "--stride", 0], "--stride"),
        (
            [path, "--text", tmp_path / "text", "--tokenizer", data, "--stride", SEQUENCE + 1],
            f"at most the model's sequence, {SEQUENCE}",
        ),
    ]
    for arguments, said in cases:
        capsys.readouterr()
        assert evaluate(*arguments) == 1
        assert said in capsys.readouterr().err
    small, _ = save_model(tmp_path / "small", toy_model(vocab=64))
    assert evaluate(small, "--text", tmp_path / "text", "--tokenizer", data) == 1
    assert "not the tokenizer of this model" in capsys.readouterr().err


def test_tasks_without_the_harness(saved, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert evaluate(saved[0], "--tasks", "piqa") == 1
    assert "pip install lm-eval" in capsys.readouterr().err


def test_tasks_reach_the_harness_with_an_export(saved, data, monkeypatch, capsys):
    """A stand-in for the harness, which is not installed here: what it is called with."""
    transformers = pytest.importorskip("transformers")
    calls = []

    def simple_evaluate(*, model, model_args, tasks, device, batch_size):
        path = model_args.removeprefix("pretrained=")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(path)
        calls.append((model, tasks, device, batch_size, loaded.num_parameters()))
        return {"results": {"piqa": {"acc,none": 0.5}}}

    monkeypatch.setitem(
        sys.modules, "lm_eval", types.SimpleNamespace(simple_evaluate=simple_evaluate)
    )
    status = evaluate(saved[0], "--tasks", "piqa, hellaswag", "--device", "cpu",
                      "--tokenizer", data)  # fmt: skip
    assert status == 0, capsys.readouterr().err
    count = sum(p.numel() for p in saved[1].parameters())
    assert calls == [("hf", ["piqa", "hellaswag"], "cpu", 8, count)]
    assert "piqa: {'acc,none': 0.5}" in capsys.readouterr().out
