"""launch/evaluate.py: the protocols against hand-written arithmetic, on every format."""

import json
import math
import sys
import types

import pytest
import torch

from megagrow.cli import generate
from megagrow.data.dataset import open_dataset
from megagrow.evaluation.detokenizer import wikitext_detokenized
from megagrow.evaluation.scores import Scorer, score_lambada
from tests.checkpoint.states import save_model, to
from tests.jobs import command, make_dataset
from tests.toys import FAMILIES, build, toy_model

SEQUENCE = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data):
    """(checkpoint, model, tokenizer)."""
    model = toy_model(vocab=320, sequence=SEQUENCE)
    tokenizer = open_dataset(data).tokenizer
    held = {"data": "d0", "tokenizer": tokenizer.fingerprint()}
    path, state = save_model(tmp_path_factory.mktemp("checkpoint"), model, fingerprints=held)
    return path, build(model, state).eval(), tokenizer


def evaluate(*arguments):
    return command("evaluate").main([str(argument) for argument in arguments])


def log_probabilities(model, ids):
    """[S, vocab] log probabilities of what follows each id."""
    with torch.no_grad():
        return torch.log_softmax(model.logits(torch.tensor([ids]))[0].double(), -1)


def nats_by_hand(model, ids, *, context, stride):
    """One window after another, one token after another."""
    tokens = [context, *ids]
    total, done = 0.0, 0
    while done < len(ids):
        end = min(len(ids), done + (SEQUENCE if done == 0 else stride))
        begin = max(0, end - SEQUENCE)
        table = log_probabilities(model, tokens[begin:end])
        total -= sum(float(table[i - begin, tokens[i + 1]]) for i in range(done, end))
        done = end
    return total


def test_progress_counts_the_batches_of_windows(saved):
    seen = []

    def track(batches):
        for batch in batches:
            seen.append(batch)
            yield batch

    plain = Scorer(saved[1], SEQUENCE, torch.device("cpu"), batch=3)
    shown = Scorer(saved[1], SEQUENCE, torch.device("cpu"), batch=3, track=track)
    ids = list(range(5, 45))
    assert shown.loss(ids, context=0, stride=2) == plain.loss(ids, context=0, stride=2)
    assert len(seen) == 1 + -(-(len(ids) - SEQUENCE) // 2 // 3)


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


@pytest.mark.parametrize(
    ("first", "later", "apart"),
    [
        ("mask", None, True),
        ("packed", "mask", True),
        ("mask", "packed", False),
        (None, None, False),
    ],
)
def test_documents_are_read_as_in_training(tmp_path, data, capsys, first, later, apart):
    """With documents apart a text does not see the end token that stands before it."""
    model = toy_model(vocab=320, sequence=SEQUENCE)
    tokenizer = open_dataset(data).tokenizer
    stages = [{}, {} if later is None else {"data": {"documents": later}}, {"data": {"path": "x"}}]
    path, state = save_model(
        tmp_path / "checkpoint",
        model,
        fingerprints={"data": "d0", "tokenizer": tokenizer.fingerprint()},
        config={
            "model": model.model_dump(mode="json", by_alias=True),
            "data": {} if first is None else {"documents": first},
            "stages": stages,
        },
        run_state={"growth_stage": 2},
    )
    plain = build(model, state).eval()
    text = "ba du ge ki"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    ids = tokenizer.encode(text)
    assert len(ids) < SEQUENCE
    scores = [tokenizer.eod, *ids]
    wanted = -sum(float(log_probabilities(plain, scores[: i + 1])[-1, ids[i]])
                  for i in range(len(ids)))  # fmt: skip
    if apart:
        wanted = -float(log_probabilities(plain, [tokenizer.eod])[-1, ids[0]])
        wanted -= sum(float(log_probabilities(plain, ids[:i])[-1, ids[i]])
                      for i in range(1, len(ids)))  # fmt: skip
    status = evaluate(path, "--text", tmp_path / "text", "--tokenizer", data,
                      "--json", tmp_path / "a.json")  # fmt: skip
    said = capsys.readouterr()
    assert status == 0, said.err
    line = "documents: do not see each other, as in training"
    assert (line in said.out) == apart
    # Generation opens a model's tokenizer by the same call.
    greedy = ["--tokenizer", str(data), "--temperature", "0", "--tokens", "3", "--no-end"]
    assert generate.main([str(path), *greedy, "--json", str(tmp_path / "b.json")]) == 0
    assert (line in capsys.readouterr().err) == apart
    [made] = json.loads((tmp_path / "b.json").read_text())["texts"]
    tokens: list[int] = []
    for _ in range(3):
        seen = tokens if apart and tokens else [tokenizer.eod, *tokens]
        tokens.append(int(log_probabilities(plain, seen)[-1, : tokenizer.vocab_size].argmax()))
    assert made["tokens"] == tokens
    [found] = json.loads((tmp_path / "a.json").read_text())["texts"].values()
    assert found["nats"] == pytest.approx(wanted, rel=1e-5)


def test_last_words(saved):
    """The word's tokens are compared with the most probable ones, given the text before them."""
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
    # A passage that must be correct: its last word is what the model predicts.
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
        ([path, "--text", tmp_path / "text"], "tokenizer is not found"),
        ([path, "--text", tmp_path / "none", "--tokenizer", data], "cannot be read"),
        ([tmp_path, "--text", tmp_path / "text"], "no checkpoint"),
        (
            [path, "--text", tmp_path / "text", "--tokenizer", data, "--stride", SEQUENCE + 1],
            f"at most the model's sequence, {SEQUENCE}",
        ),
        ([path, "--text", tmp_path / "text", "--device", "gpu"], "cpu, cuda or cuda:N"),
        ([path, "--text", tmp_path / "text", "--device", "cuda:99"], "--device cpu"),
    ]
    for arguments, said in cases:
        capsys.readouterr()
        assert evaluate(*arguments) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate(path, "--text", tmp_path / "text", "--tokenizer", data, "--stride", 0)
    assert "--stride: '0' is not a whole number of at least 1" in capsys.readouterr().err
    held = {"tokenizer": saved[2].fingerprint()}
    small, _ = save_model(tmp_path / "small", toy_model(vocab=64), fingerprints=held)
    assert evaluate(small, "--text", tmp_path / "text", "--tokenizer", data) == 1
    assert "not the tokenizer of this model" in capsys.readouterr().err


def test_a_tokenizer_that_is_not_the_models_is_refused_or_asked_for(tmp_path, saved, data, capsys):
    """Of the same size, so that only its SHA-256 differs; the model's own needs no option."""
    other = make_dataset(tmp_path / "other", seed=1)
    (tmp_path / "text").write_text("ba du")
    arguments = [saved[0], "--text", tmp_path / "text", "--tokenizer", other]
    assert evaluate(*arguments) == 1
    said = capsys.readouterr().err
    assert "is not the tokenizer of this model" in said and saved[2].fingerprint() in said
    assert evaluate(*arguments, "--allow-other-tokenizer") == 0
    assert "NOT the model's own" in capsys.readouterr().out
    held = {"data": "d0", "tokenizer": saved[2].fingerprint()}
    model = toy_model(vocab=320, sequence=SEQUENCE)
    path, _ = save_model(tmp_path / "run", model, fingerprints=held, data=data)
    assert evaluate(path, "--text", tmp_path / "text") == 0
    assert "the model's own, by its SHA-256" in capsys.readouterr().out


def test_tasks_without_the_harness(saved, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert evaluate(saved[0], "--tasks", "piqa") == 1
    assert "pip install lm-eval" in capsys.readouterr().err


class StandIn:
    """The part of the harness that is used; it is not installed here, and this scores like it."""

    def __init__(self):
        self.calls = []
        self.tasks = types.SimpleNamespace(TaskManager=self.manager)

    def manager(self, *, include_path):
        known = [
            "piqa",
            "hellaswag",
            *([f"own_{include_path.rpartition('/')[2]}"] if include_path else []),
        ]
        return types.SimpleNamespace(
            all_tasks=known, match_tasks=lambda names: [n for n in names if n in known]
        )

    def simple_evaluate(self, *, model, model_args, **settings):
        transformers = pytest.importorskip("transformers")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model_args["pretrained"]).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_args["pretrained"])
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = torch.tensor([[first, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            table = torch.log_softmax(loaded(ids[:, :-1]).logits[0].double(), -1)
        nats = -float(table.gather(1, ids[0, 1:, None]).sum())
        assert model == "hf" and settings["task_manager"].all_tasks
        self.calls.append(settings)
        return {"results": {"piqa": {"bits": nats / math.log(2) / len(TEXT.encode())}}}


TEXT = "ba  du\n\u00e9"


@pytest.fixture
def harness(monkeypatch):
    pytest.importorskip("transformers")
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "lm_eval", stand_in)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", stand_in.tasks)
    return stand_in


@pytest.mark.parametrize("family", FAMILIES)
def test_the_harness_scores_what_we_score(tmp_path, data, harness, capsys, family):
    """Bits per byte of one text by our own evaluation, and by transformers on the export."""
    held = {"tokenizer": open_dataset(data).tokenizer.fingerprint()}
    model = toy_model(family=family, vocab=320, sequence=16)
    path, _ = save_model(tmp_path, model, fingerprints=held, data=data)
    (tmp_path / "text").write_bytes(TEXT.encode())
    status = evaluate(path, "--tasks", "piqa, hellaswag", "--text", tmp_path / "text",
                      "--device", "cpu", "--json", tmp_path / "s.json")  # fmt: skip
    assert status == 0, capsys.readouterr().err
    scores = json.loads((tmp_path / "s.json").read_text())
    [ours] = scores["texts"].values()
    assert scores["tasks"]["piqa"]["bits"] == pytest.approx(ours["bits_per_byte"], rel=1e-5)
    assert "ids of the tokenizer: the same by transformers" in capsys.readouterr().out
    [call] = harness.calls
    assert call["tasks"] == ["piqa", "hellaswag"] and call["batch_size"] == 8
    assert call["num_fewshot"] is None and call["limit"] is None


def test_options_of_the_harness(tmp_path, saved, data, harness, capsys):
    (tmp_path / "mine").mkdir()
    always = [saved[0], "--tokenizer", data, "--device", "cpu"]
    assert evaluate(*always, "--tasks", "own_mine", "--num-fewshot", 3, "--limit", 0.5,
                    "--include-path", tmp_path / "mine") == 0  # fmt: skip
    [call] = harness.calls
    assert (call["num_fewshot"], call["limit"], call["tasks"]) == (3, 0.5, ["own_mine"])
    for more, said in (
        (["--tasks", "helaswag"], "for instance hellaswag"),
        (["--tasks", "piqa", "--include-path", tmp_path / "none"], "no such directory"),
        (["--lambada", "x", "--num-fewshot", 2], "--num-fewshot: for --tasks alone"),
    ):
        capsys.readouterr()
        assert evaluate(*always, *more) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate(*always, "--tasks", "piqa", "--limit", 0)
    assert "--limit: '0' is not a number above 0" in capsys.readouterr().err
    assert len(harness.calls) == 1
