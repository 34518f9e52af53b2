"""An export's tokenizer gives transformers the same ids as in training, and marks text ends."""

import argparse
import hashlib
import json
from pathlib import Path

import pytest
import torch

from megagrow.checkpoint.convert.run import Job, convert
from megagrow.checkpoint.formats.huggingface.tokenizer import Carried, compare
from megagrow.checkpoint.interface.own_tokenizer import NO_TOKENIZER
from megagrow.data.tokenizer import load_tokenizer, train_sentencepiece
from megagrow.data.tokenizer_json import from_sentencepiece, probe_texts
from megagrow.errors import CheckpointError, DataError
from tests.checkpoint.states import opened, save_model, to
from tests.toys import FAMILIES, toy_model

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "def f(x):\n    return x  # two  spaces\n\tprint('\u00e9 \u4f60\u597d')\n"
END = "<|endoftext|>"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def byte_level(path, *, template=False, end=END):
    """A byte-level tokenizer.json with spaces in its pieces, as many trainers make it."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(
        [TEXT * 4, "  \n" * 9],
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=[end, "<s>"], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    if template:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
        made.enable_truncation(4)
    made.save(str(path))
    return path


def saved(root, tokenizer, *, family="gpt2", **settings):
    """A checkpoint of a run that used this tokenizer."""
    model = toy_model(family=family, vocab=320)
    held = {"data": "d0", "tokenizer": sha256(tokenizer)}
    return save_model(root, model, fingerprints=held, **settings)[0]


def agrees(directory, tokenizer, texts):
    loaded = transformers.AutoTokenizer.from_pretrained(directory)
    loaded.model_max_length = 1 << 30
    for text in texts:
        assert loaded(text)["input_ids"] == tokenizer.encode(text), text
    return loaded


@pytest.mark.parametrize("family", FAMILIES)
def test_a_runs_own_tokenizer_goes_along_and_gives_the_same_ids(tmp_path, dataset, family):
    """Found through the data's path, compared by SHA-256, written for transformers."""
    own = dataset / "tokenizer.model"
    path = saved(tmp_path, own, family=family, data=dataset)
    out = to(path, tmp_path / "hf", "huggingface")
    ours = load_tokenizer(own)
    texts = [TEXT, f"a {END} b", "", " ", "a\u2581b", *probe_texts(ours, special=True)]
    loaded = agrees(out, ours, texts)
    assert loaded.decode(loaded(TEXT)["input_ids"]) == TEXT
    assert (loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id) == (ours.eod,) * 3
    assert sha256(out / "tokenizer.model") == sha256(own)
    # The export recognises its tokenizer in either form, and the run's.
    assert sha256(own) in opened(out).fingerprints.values()
    again = to(out, tmp_path / "half", "huggingface", dtype=torch.float16)
    agrees(again, ours, texts[:5])


def test_any_tokenizer_json_gives_the_same_ids(tmp_path):
    own = byte_level(tmp_path / "tokenizer.json")
    path = saved(tmp_path, own)
    out = to(path, tmp_path / "hf", "huggingface", tokenizer=own)
    agrees(out, load_tokenizer(own), [TEXT, f"a {END} b", "<s>"])
    assert sha256(out / "tokenizer.json") == sha256(own)


def test_what_training_does_without_is_left_out_of_it(tmp_path):
    """Tokens that the tokenizer adds before a text, and truncation."""
    own = byte_level(tmp_path / "tokenizer.json", template=True)
    path = saved(tmp_path, own)
    report = convert(Job(path, tmp_path / "hf", "huggingface", tokenizer=own))
    assert any("without truncation, post_processor" in note for note in report.notes)
    agrees(tmp_path / "hf", load_tokenizer(own), [TEXT])
    # For comparisons it is still the same tokenizer.
    to(tmp_path / "hf", tmp_path / "again", "huggingface", tokenizer=own)


def test_a_directorys_own_configuration_is_carried_and_compared(tmp_path):
    shelf = tmp_path / "theirs"
    shelf.mkdir()
    own = byte_level(shelf / "tokenizer.json", template=True)
    theirs = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": END}
    (shelf / "tokenizer_config.json").write_text(json.dumps(theirs))
    (shelf / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.5}')
    path = saved(tmp_path, own)
    report = convert(Job(path, tmp_path / "hf", "huggingface", tokenizer=shelf))
    assert "ids of the tokenizer: the same by transformers, on probe texts" in report.notes
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (shelf / name).read_bytes()
    stated = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert (stated["eos_token_id"], stated["temperature"]) == (0, 0.5)
    # A class that leads transformers to other ids, as GPT-2's does here, is refused.
    theirs["tokenizer_class"] = "GPT2Tokenizer"
    (shelf / "tokenizer_config.json").write_text(json.dumps(theirs | {"add_prefix_space": True}))
    with pytest.raises(CheckpointError, match="transformers gives other ids than in training"):
        convert(Job(path, tmp_path / "other", "huggingface", tokenizer=shelf))
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_that_is_not_the_models_is_refused_or_asked_for(tmp_path):
    own = byte_level(tmp_path / "tokenizer.json")
    (tmp_path / "other").mkdir()
    other = byte_level(tmp_path / "other/tokenizer.json", end="<eos>")
    path = saved(tmp_path, own)
    job = Job(path, tmp_path / "hf", "huggingface", tokenizer=other)
    with pytest.raises(
        CheckpointError, match=r"is not the tokenizer of this model(.|\n)*allow-other"
    ):
        convert(job)
    asked = Job(**vars(job) | {"allow_other_tokenizer": True})
    assert any("NOT the model's own" in note for note in convert(asked).notes)
    # The weights remember the tokenizer that they were exported with.
    with pytest.raises(CheckpointError, match="is not the tokenizer of this model"):
        convert(Job(job.target, tmp_path / "b", "huggingface", tokenizer=own))
    # A run accepts weights only with its own tokenizer.
    run = {"model": toy_model(vocab=320).model_dump(mode="json", by_alias=True)}
    for prints, works in ((sha256(other), True), (sha256(own), False)):
        job_of_run = Job(
            job.target, tmp_path / prints, "native", config=run,
            fingerprints={"data": "d1", "tokenizer": prints},
        )  # fmt: skip
        if works:
            convert(job_of_run)
        else:
            with pytest.raises(CheckpointError, match="trained with another tokenizer"):
                convert(job_of_run)


def test_a_dataset_that_was_made_again_does_not_lend_its_tokenizer(tmp_path, dataset):
    own = byte_level(tmp_path / "tokenizer.json")
    path = saved(tmp_path, own, data=dataset)
    note, _ = convert(Job(path, tmp_path / "hf", "huggingface")).notes  # and the card's
    assert "is not the model's: its SHA-256 differs" in note and "does not stop" in note
    assert not (tmp_path / "hf/tokenizer.json").exists()


def test_generation_ends_at_the_end_of_a_document(tmp_path, dataset):
    """A model that always predicts "end of document": generation stops after one token."""
    own = dataset / "tokenizer.model"
    eod = load_tokenizer(own).eod
    path = saved(tmp_path, own, data=dataset)
    out = to(path, tmp_path / "hf", "huggingface")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[eod] * 100)
    prompt = torch.tensor([[5, 6]])
    found = model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert found.tolist() == [[5, 6, eod]]
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (eod,) * 3
    unended = to(path, tmp_path / "none", "huggingface", tokenizer=NO_TOKENIZER)
    assert json.loads((unended / "config.json").read_text())["eos_token_id"] is None


def test_a_sentencepiece_model_of_another_kind(tmp_path):
    """With a prefix before the text, as LLaMA's: also the same ids; rewritten text: refused."""
    import sentencepiece

    lines = [TEXT, "ba du ge ki mo na pe ru so ta", "one two three"] * 30
    for name, settings, works in (
        (
            "prefix",
            {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
            True,
        ),
        ("rewritten", {}, False),
    ):
        path = tmp_path / name / "tokenizer.model"
        path.parent.mkdir()
        with open(path, "wb") as stream:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter("\n".join(lines).split("\n")), model_writer=stream,
                model_type="bpe", vocab_size=330, byte_fallback=True, minloglevel=2, **settings,
            )  # fmt: skip
        if not works:
            with pytest.raises(DataError, match="cannot be written as"):
                from_sentencepiece(path)
            continue
        (path.parent / "tokenizer.json").write_text(json.dumps(from_sentencepiece(path)))
        made = tokenizers.Tokenizer.from_file(str(path.parent / "tokenizer.json"))
        ours = load_tokenizer(path)
        for text in (TEXT, "  two  blanks", "ba du", ""):
            assert made.encode(text, add_special_tokens=False).ids == ours.encode(text)
            assert made.decode(ours.encode(text)) == text


def test_where_transformers_is_not_installed_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    ours = load_tokenizer(byte_level(tmp_path / "tokenizer.json"))
    said = compare(tmp_path, Carried(tokenizer=ours, made=True))
    assert "not compared" in said and "not installed" in said
    assert "not compared" in compare(tmp_path, Carried())


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(tmp_path, dataset):
    own = dataset / "tokenizer.model"
    small = save_model(
        tmp_path, toy_model(vocab=64), fingerprints={"tokenizer": sha256(own)}, data=dataset
    )[0]
    with pytest.raises(CheckpointError, match="is not the tokenizer of this model"):
        convert(Job(small, tmp_path / "hf", "huggingface"))


def test_merges_are_sentencepieces_own(tmp_path):
    """A larger vocabulary, on a whole module's source."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_sentencepiece([text], vocab_size=1500))
    made = tokenizers.Tokenizer.from_str(json.dumps(from_sentencepiece(path)))
    ids = load_tokenizer(path).encode(text)
    assert len(ids) > 10_000
    assert made.encode(text).ids == ids
    assert made.decode(ids) == text
