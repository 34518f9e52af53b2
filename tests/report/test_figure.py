"""Figures as SVG files: equal data gives equal bytes, and what cannot be drawn is said."""

import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from megagrow.errors import ConfigError
from megagrow.report import figure as figures
from megagrow.report.axis import axis
from megagrow.report.chart import Marker, Series, Span
from megagrow.report.figure import figure

SERIES = [
    Series("a$_b & <c>", [(10.0, 0.2), (20.0, -0.1)], "c1", spans=[Span(10.0, 0.1, 0.3)]),
    Series("dots", [(10.0, 0.0), (20.0, math.nan), (40.0, 0.1)], "dots"),
]


def drawn(series=SERIES, **more):
    return figure(
        title="A title", note="a note", x=axis([10, 40], log=True, snap=True),
        y=axis([-0.1, 0.3], snap=True), x_label="tokens", series=series, **more,
    )  # fmt: skip


def texts(svg):
    return {
        "".join(node.itertext()).strip()
        for node in ElementTree.fromstring(svg).iter()
        if node.tag.endswith("}text")
    }


def test_a_figure_has_its_words_as_text():
    found = texts(drawn(markers=[Marker(20.0, "grows", "not shown")]))
    words = ["A title", "a note", "tokens", "10", "40", "0.2", "a$_b & <c>", "dots", "grows"]
    assert set(words) <= found
    assert texts(drawn(SERIES[:1])) & {"a$_b & <c>"} == set()  # one curve needs no legend


def test_equal_data_gives_equal_bytes_in_every_process():
    code = "import sys; from test_figure import drawn; sys.stdout.write(drawn())"
    run = [sys.executable, "-c", code]
    path = [*sys.path, __file__.rpartition("/")[0]]
    made = [
        subprocess.run(
            run, env={"PYTHONPATH": ":".join(path), "PYTHONHASHSEED": seed}, check=True,
            capture_output=True, text=True, timeout=120,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert made[0] == made[1] == drawn() != drawn(SERIES[:1])
    assert "<dc:date>" not in made[0]


def test_nothing_is_drawn_of_nothing():
    assert drawn([Series("a", [(1.0, math.nan)], "c1"), Series("b", [], "c2")]) == ""


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"matplotlib(.|\n)*pip install 'megagrow\[benchmark\]'"):
        drawn()


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, megagrow.savings.command; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
