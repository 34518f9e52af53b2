"""The scripts of examples/, as a user starts them, on small text and a small model."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TEXT = "a model that grows while it trains keeps what it has learnt and reads on\n"


def start(name, *arguments, home, changes=()):
    """Run a script in `home`, with some of its text changed; returns what it printed."""
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    script = home / name
    script.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=420,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory in which the first example has run, with a tenth of its steps."""
    home = tmp_path_factory.mktemp("examples")
    (home / "corpus.txt").write_text(TEXT * 2000, encoding="utf-8")
    fewer = [(f"steps: {n}0}}", f"steps: {n}}}") for n in (15, 30, 45)]
    said = start("grow_a_tiny_model.py", "corpus.txt", home=home, changes=fewer)
    assert "depth_stack x2" in said and "width_fresh to hidden 96" in said
    assert re.search(r"^def ", said, re.MULTILINE)
    return home


def test_a_checkpoint_in_every_format(home):
    said = start("convert_a_checkpoint.py", "runs/tiny", home=home)
    assert said.count("weights equal: True") == 6 and "False" not in said


def test_an_open_model_grows(home):
    transformers = pytest.importorskip("transformers")
    model = home / "model"
    shape = transformers.LlamaConfig(
        num_hidden_layers=4, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64, vocab_size=257, eos_token_id=256,
        bos_token_id=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(model)
    shutil.copyfile(ROOT / "configs/tokenizers/bytes.json", model / "tokenizer.json")
    start("grow_an_open_model.py", "model", "corpus.txt", "--steps", 3, "--sequence", 32, home=home)
    larger = transformers.AutoModelForCausalLM.from_pretrained(home / "exports/larger")
    assert larger.config.num_hidden_layers == 5


def test_a_budget_is_planned(home):
    said = start("plan_a_budget.py", home=home)
    assert [said.count(f"--- {law}\n") for law in ("kaplan", "chinchilla", "epoch")] == [1, 1, 1]


def test_each_is_short_and_there_are_four():
    assert len(EXAMPLES) == 4
    assert all(len(path.read_text("utf-8").splitlines()) < 60 for path in EXAMPLES)
