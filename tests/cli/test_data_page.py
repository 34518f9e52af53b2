"""The page docs/data.md: its commands and configurations, on small data."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import yaml

from megagrow.data.dataset import open_dataset
from tests import jobs
from tests.cli.pages import DOCS, blocks

PAGE = "data.md"
TEXT = "a model that grows while it trains keeps what it has learnt and reads on"


def run(command):
    """A command of the page, in this process."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "python"
    assert jobs.command(Path(words[1]).stem).main(words[2:]) == 0, command


def test_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    order = np.random.default_rng(1)
    texts = [" ".join(order.choice(TEXT.split(), 40)) for _ in range(400)]
    with open("books.jsonl", "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    Path("code.txt").write_text("\n\n".join(reversed(texts[:150])), encoding="utf-8")
    books, code, old, dry_run = blocks(PAGE, "sh")
    run(books.replace("512", "280"))
    run(code)
    Path("old").mkdir()
    whole = open_dataset("data/books").train
    whole.tokens.astype("<u2").tofile("old/corpus.bin")
    run(old)
    run("python launch/prepare_data.py --input code.txt --output data/held "
        "--tokenizer data/books/tokenizer.model --validation-fraction 0.5")  # fmt: skip
    data, stages = map(yaml.safe_load, blocks(PAGE, "yaml"))
    made = jobs.settings("data/books", "runs/mixed", stages=stages["stages"])
    made["data"] = data["data"]
    jobs.write_config(Path("mixed.yaml"), made)
    capsys.readouterr()
    run(dry_run)
    said = capsys.readouterr().out
    assert "books: " in said and "code: " in said and "old: " in said
    made["stages"] = [
        {**stage, "until": {"steps": 3 * (n + 1)}} for n, stage in enumerate(made["stages"])
    ]
    lines = jobs.train(1, jobs.write_config(Path("short.yaml"), made))
    last = jobs.events(lines, "validation")[-1]
    assert set(last["losses"]) == {"books", "code", "old", "held"}
    assert set(last["tokens_by_source"]) == {"books", "code", "old"}
    made = jobs.settings("data/books", "runs/blend", stages=[{"until": {"steps": 2}}])
    [blend] = re.findall(r'data\.path="([^"]+)"', (DOCS / PAGE).read_text(encoding="utf-8"))
    made["data"] = {"path": blend}
    lines = jobs.train(1, jobs.write_config(Path("blend.yaml"), made))
    assert set(jobs.events(lines, "validation")[-1]["losses"]) == {"books", "code"}
