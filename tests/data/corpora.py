"""Small corpora, requests to prepare them, and what is in the result."""

import json
from pathlib import Path
from typing import Any

from megagrow.data.dataset import PreparedData
from megagrow.data.prepare import Request


def as_json(text: str) -> str:
    return json.dumps({"text": text})


def request(source: object, output: Path, **options: Any) -> Request:
    options = {"vocab_size": 400, "validation_fraction": 0.1, **options}
    return Request(str(source), output, **options)


def documents(data: PreparedData, split: str) -> list[str]:
    tokens = getattr(data, split)
    return [data.tokenizer.decode(tokens[i].tolist()) for i in range(len(tokens))]


def small(tmp_path: Path) -> Path:
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(as_json(f"some text {n}, and some more\n" * 9) for n in range(20)))
    return path
