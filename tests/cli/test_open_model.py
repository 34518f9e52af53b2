"""The tutorial docs/grow-an-open-model.md: its commands, on a small model of the architecture."""

import os
import re
import shlex
from pathlib import Path

import pytest
import torch

from megagrow.report.log import read_metrics
from tests import jobs

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

PAGE = Path(__file__).parent.parent.parent / "docs" / "grow-an-open-model.md"
# SmolLM2's sizes on the page, and those of the model here.
SIZES = {
    "layers: 45": "layers: 3", "hidden: 1152": "hidden: 48", "heads: 18": "heads: 6",
    "kv_heads: 6": "kv_heads: 2", "ffn: 3072": "ffn: 96", "sequence: 1024": "sequence: 16",
    "layers=45": "layers=3",
}  # fmt: skip
TEXT = "a model that grows while it trains keeps what it has learnt and reads on\n"


def blocks(kind):
    """The page's blocks of a language, with the sizes of the small model."""
    text = PAGE.read_text(encoding="utf-8")
    for theirs, ours in SIZES.items():
        assert theirs in text
        text = re.sub(rf"(?<![\w_]){re.escape(theirs)}\b", ours, text)
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def run(command):
    """Run a command of the page: in this process, or on the ranks that a launcher would start."""
    words = shlex.split(command.replace("\\\n", " "))
    at = next(i for i, word in enumerate(words) if word.startswith("launch/"))
    script, arguments = Path(words[at]).stem, words[at + 1 :]
    if "deepspeed" in words:
        world = int(words[words.index("--num_gpus") + 1])
        assert script == "pretrain"
        [outcomes] = jobs.launch(world, arguments, hook=(_in_directory, os.getcwd()))
        assert [o.status for o in outcomes] == [0] * world, outcomes[0].err
        return
    assert words[:at] == ["python"]
    assert jobs.command(script).main(arguments) == 0, command


def _in_directory(rank, path):
    os.chdir(path)


def save_small(path):
    """SmolLM2's published settings with small sizes, and a byte-level tokenizer as it has one."""
    shape = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=24, num_attention_heads=3, num_key_value_heads=1,
        intermediate_size=48, max_position_embeddings=64, vocab_size=320, rope_theta=1e5,
        rms_norm_eps=1e-5, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(shape)
    model.save_pretrained(path)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([TEXT], trainer)
    made.save(str(path / "tokenizer.json"))
    return model.eval()


def test_the_tutorial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = save_small(Path("models/SmolLM2-135M"))
    Path("corpus.txt").write_text(TEXT * 400, encoding="utf-8")
    [config] = blocks("yaml")
    Path("grow-smollm2.yaml").write_text(config, encoding="utf-8")
    download, prepare, dry_run, train, export, grow = blocks("sh")
    assert download.startswith("hf download")
    run(prepare)
    capsys.readouterr()
    run(dry_run)
    said = capsys.readouterr().out
    assert "start: from models/SmolLM2-135M (huggingface" in said
    assert "that of the data is the checkpoint's, by its SHA-256" in said
    run(train)

    lines = read_metrics(Path("runs/smollm2-grown/metrics.jsonl"))
    first, *_, last = [line["val_loss"] for line in jobs.events(lines, "validation")]
    assert abs(first - _loss(small)) <= 1e-5
    steps = jobs.events(lines, "step")
    assert steps[-1]["step"] == 200 and last < first - 1
    assert steps[0]["loss"] < first + 0.5

    run(export)
    [generate] = blocks("python")
    found = {}
    exec(generate, found)
    assert found["text"].startswith("The model") and len(found["text"]) > len("The model") + 5
    shape = found["model"].config
    assert (shape.num_hidden_layers, shape.hidden_size, shape.num_attention_heads) == (3, 48, 6)
    assert abs(_loss(found["model"].float().eval()) - last) <= 1e-4

    run(grow)
    deeper = transformers.AutoModelForCausalLM.from_pretrained("models/SmolLM2-deeper")
    assert deeper.config.num_hidden_layers == 3 and abs(_loss(deeper) - first) <= 1e-5


def _loss(model):
    """transformers' mean loss on the run's validation samples."""
    from megagrow.data.dataset import open_dataset
    from megagrow.data.sampler import validation_samples

    data = open_dataset("data/open")
    samples = validation_samples(data.validation, sequence=16, count=64)
    tokens = torch.from_numpy(samples.astype("int64"))
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits.flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).item()


def test_the_readme_names_the_page():
    readme = (PAGE.parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"docs/{PAGE.name}" in readme and "init: {from: MODEL}" in readme
