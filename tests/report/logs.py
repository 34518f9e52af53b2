"""Logs of made-up runs, and a reader of pages, for the tests of reports."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from megagrow.report.log import Line

VOID = {"meta", "br", "link", "img", "input", "hr"}


def step_line(
    step: int, stage: int, *, loss: float = 3.0, tokens: int | None = None, flops: int | None = None
) -> Line:
    """One step, of 100 tokens and 10 kFLOP, of one second."""
    return {
        "event": "step",
        "step": step,
        "tokens": step * 100 if tokens is None else tokens,
        "flops": step * 10_000 if flops is None else flops,
        "loss": loss,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 1000.0,
        "growth_stage": stage,
        "time": 1000.0 + step,
    }


def validation_line(step: int, stage: int, loss: float) -> Line:
    """One validation."""
    return {
        "event": "validation",
        "step": step,
        "tokens": step * 100,
        "flops": step * 10_000,
        "val_loss": loss,
        "growth_stage": stage,
        "time": 1000.0 + step,
    }


def growth_line(
    step: int, stage: int, operator: str = "width", before: float = 2.5, after: float = 2.75
) -> Line:
    """One growth."""
    return {
        "event": "growth",
        "step": step,
        "tokens": step * 100,
        "flops": step * 10_000,
        "operator": operator,
        "state_policy": "sparkling",
        "loss_before": before,
        "loss_after": after,
        "parameters_before": 111_111,
        "parameters_after": 444_444,
        "seconds": 0.5,
        "bytes_moved": 5_333_333,
        "peak_staging_bytes": 1 << 20,
        "growth_stage": stage,
        "model": {"family": "gpt2", "layers": 4, "hidden": 1024, "heads": 8, "ffn": 2048},
        "layout": {"data": 2, "zero": 1},
        "time": 1000.0 + step,
    }


def diagnosed(step: int, **values: Any) -> Line:
    """Diagnostics of one step."""
    line = {"event": "growth_diagnostics", "step": step, "tokens": step * 100}
    return {**line, **values, "time": 1000.0 + step}


def two_stage_run() -> list[Line]:
    """The log of a finished run of two stages."""
    return [
        {"event": "run_start", "version": "9.8.7", "parameters": 111_111, "time": 1000.0},
        *(step_line(step, 0, loss=5.0 - step / 10) for step in range(1, 6)),
        validation_line(5, 0, 4.6),
        *(step_line(step, 0, loss=5.0 - step / 10) for step in range(6, 11)),
        validation_line(10, 0, 4.1),
        growth_line(10, 1),
        validation_line(10, 1, 4.2),
        *(step_line(step, 1, loss=4.0 - step / 10) for step in range(11, 31)),
        validation_line(30, 1, 1.0625),
        {"event": "end", "step": 30, "reason": "all stages done", "time": 1030.0},
    ]


class Page(HTMLParser):
    """Checks that tags are nested; collects the tags, and the cells of each table by its id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str | None, list[list[list[float]]]] = {}
        self._open: list[str] = []
        self._rows: list[list[list[float]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self._open

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag in VOID:
            return
        self._open.append(tag)
        if tag == "table":
            self._rows = self.tables[given["id"]] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append([])
        elif tag == "data" and "table" in self._open:
            self._rows[-1][-1].append(float(str(given["value"])))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
