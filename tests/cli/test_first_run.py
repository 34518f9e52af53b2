"""The tutorial docs/first-run.md: its commands, as they stand, on a small text."""

import os
import re
import shlex
from pathlib import Path

import pytest

from megagrow.cli import main as megagrow
from megagrow.report.log import read_metrics
from tests import jobs
from tests.cli.pages import blocks

transformers = pytest.importorskip("transformers")

PAGE = "first-run.md"
TEXT = "a model that grows while it trains keeps what it has learnt and reads on"


def run(command):
    """A command of the page: in this process, or on the ranks that a launcher would start."""
    words = shlex.split(command.replace("\\\n", " "))
    at = words.index("megagrow")
    if words[at + 1] != "train" or "--dry-run" in words:
        assert at == 0 and megagrow.main(words[1:]) == 0, command
        return
    world = int(words[words.index("--num_gpus") + 1]) if at else 1
    [outcomes] = jobs.launch(world, words[at + 2 :], hook=(_in_directory, os.getcwd()))
    assert [o.status for o in outcomes] == [0] * world, outcomes[0].err


def _in_directory(rank, path):
    os.chdir(path)


def test_the_tutorial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("\n\n".join([TEXT] * 3000), encoding="utf-8")
    [config] = blocks(PAGE, "yaml")
    # The page's shape and stages; a twentieth of its steps.
    short = re.sub(r"(steps|every): (\d+)", lambda m: f"{m[1]}: {int(m[2]) // 20}", config)
    Path("mine.yaml").write_text(short, encoding="utf-8")
    prepare, dry_run, train, both, used, grow = blocks(PAGE, "sh")
    run(prepare)
    run(dry_run)
    assert "grows by    depth_interleave x2" in capsys.readouterr().out
    run(train)
    run(both)
    for name in ("mine", "two"):
        assert [
            g["operator"] for g in jobs.growths(read_metrics(Path(f"runs/{name}/metrics.jsonl")))
        ]
    for command in used.strip().splitlines():
        run(command)
    [generate] = blocks(PAGE, "python")
    found = {}
    exec(generate, found)
    assert found["text"].startswith("The ") and len(found["text"]) > 10
    run(grow)
    deeper = transformers.AutoModelForCausalLM.from_pretrained("deeper")
    assert deeper.config.num_hidden_layers == 8
