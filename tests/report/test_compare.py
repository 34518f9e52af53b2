import math
import re
from xml.etree import ElementTree

import pytest

from megagrow.cli.compare import main
from megagrow.errors import ConfigError, DataError
from megagrow.report import compare
from megagrow.report.log import encode_line
from tests.report.logs import Page, growth_line, step_line, two_stage_run, validation_line

GROWN = """run: {dir: a, seed: 1}
data: {path: d}
model: {layers: 2}
stages:
- until: {steps: 10}
- grow: {operator: width}
  until: {steps: 30}
"""
SCRATCH = """run: {dir: b, seed: 1}
data: {path: d}
model: {layers: 4}
stages:
- until: {steps: 40}
"""


def scratch_run():
    return [
        {"event": "run_start", "version": "9.8.7", "parameters": 444_444, "time": 1000.0},
        *(step_line(step, 0, loss=5.0 - step / 20, flops=step * 15_000) for step in range(1, 41)),
        {**validation_line(20, 0, 3.0), "flops": 300_000},
        {**validation_line(40, 0, 2.0), "flops": 600_000},
        {"event": "end", "step": 40, "reason": "all stages done", "time": 1040.0},
    ]


def table(text, name):
    """The rows of a table below its head, each the texts of its cells."""
    found = re.search(rf'<table id="{name}">.*?</table>', text, re.DOTALL)[0]
    rows = ElementTree.fromstring(found).find("tbody").iter("tr")
    return [["".join(cell.itertext()) for cell in row] for row in rows]


def put(run_dir, lines, config):
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_bytes(b"".join(encode_line(line) for line in lines))
    if config is not None:
        (run_dir / "config.yaml").write_text(config)
    return run_dir


@pytest.fixture
def pair(tmp_path):
    return [
        put(tmp_path / "x" / "run", scratch_run(), SCRATCH),
        put(tmp_path / "y" / "run", two_stage_run(), GROWN),
    ]


def test_the_page_has_losses_costs_and_the_settings_that_differ(pair, tmp_path, capsys):
    out = tmp_path / "new" / "pair.html"
    assert main([*map(str, pair), "--output", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    text = out.read_text("utf-8")
    Page(text)
    scratch, grown = table(text, "runs")
    assert scratch[0] == "x/run" and grown[0] == "y/run"  # as much of the paths as it takes
    assert [scratch[7], grown[7]] == ["2.0000", "1.0625"]
    assert grown[8].startswith("−0.93")
    # 2.75 after the growth at 100,000 FLOPs, 1.0625 at 300,000: 2.0 at 188,889.
    assert grown[9] == "189 k (−68.5 %)"
    keys = {row[0]: row[1:] for row in table(text, "settings")}
    assert keys == {
        "model.layers": ["4", "2"],
        "stages.0.until.steps": ["40", "10"],
        "stages.1.grow.operator": ["–", "width"],
        "stages.1.until.steps": ["–", "30"],
    }
    assert "may not be comparable" not in text


def test_a_loss_that_is_never_reached_is_said(pair):
    first = compare.open_runs([pair[1], pair[0]])
    assert math.isnan(first[1].cost_of(1.0625))
    assert table(compare.render(first), "runs")[1][9] == "not reached"


def test_runs_on_other_data_are_not_compared_in_silence(pair, tmp_path):
    other = put(tmp_path / "other", two_stage_run(), GROWN.replace("path: d", "path: e"))
    bare = put(tmp_path / "bare", two_stage_run(), None)
    text = Page(compare.render(compare.open_runs([pair[0], other, bare]))).text
    assert "may not be comparable: data.path differ" in text
    assert "No config.yaml in bare" in text


def test_a_growth_is_a_step_of_the_curve(pair):
    grown = compare.open_runs(pair)[1]
    at = [loss for flops, loss in grown.curve("flops") if flops == 100_000]
    assert at == [4.1, 4.2, 2.5, 2.75]
    assert grown.cost_of(4.1) == 100_000


def test_the_figure(pair, tmp_path):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "pair.svg"
    assert main([*map(str, pair), "--output", str(tmp_path / "p.html"), "--svg", str(figure)]) == 0
    words = "".join(ElementTree.parse(figure).getroot().itertext())
    assert "x/run" in words and "y/run" in words and "FLOPs" in words
    assert main([str(pair[1]), "--output", str(tmp_path / "p.html"), "--svg", str(figure)]) == 0
    words = "".join(ElementTree.parse(figure).getroot().itertext())
    assert "width +0.250" in words


def test_wrong_runs_are_refused(pair, tmp_path, capsys):
    with pytest.raises(DataError, match="has no run's log"):
        compare.open_runs([pair[0], tmp_path])
    with pytest.raises(DataError, match="given twice"):
        compare.open_runs([pair[0], pair[0].parent / ".." / "x" / "run"])
    with pytest.raises(DataError, match="at most 7"):
        compare.open_runs([tmp_path / str(n) for n in range(8)])
    (pair[0] / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError):
        compare.open_runs(pair)
    assert main([str(tmp_path), "--output", str(tmp_path / "p.html")]) == 1
    assert "fix:" in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()


def test_names_are_escaped(tmp_path):
    odd = put(tmp_path / "<b>&", [growth_line(1, 1), validation_line(2, 1, 2.0)], "a: <i>\n")
    other = put(tmp_path / "plain", two_stage_run(), "a: 1\n")
    text = compare.render(compare.open_runs([odd, other]))
    assert "<b>&" not in text and "<i>" not in text
    Page(text)


def test_an_output_is_a_page_and_a_figure_never_something_else(pair, tmp_path, capsys):
    """So neither a run's log nor the page itself is overwritten by the other."""
    log = pair[0] / "metrics.jsonl"
    before = log.read_bytes()
    for given in (["--output", str(log)], ["--svg", str(tmp_path / "x.html")]):
        assert main([*map(str, pair), *given]) == 1
        assert "a name that ends in" in capsys.readouterr().err
    assert log.read_bytes() == before and not (tmp_path / "x.html").exists()


def test_a_first_run_without_a_validation_is_nothing_to_reach(pair, tmp_path):
    begun = put(tmp_path / "begun", [two_stage_run()[0]], SCRATCH)
    first, second = table(compare.render(compare.open_runs([begun, pair[1]])), "runs")
    assert (first[9], second[9]) == ("–", "–")


def test_validations_that_are_left_out_are_said(pair, monkeypatch):
    assert "in a row one is used" not in compare.render(compare.open_runs(pair))
    monkeypatch.setattr(compare, "_POINTS", 2)
    assert "in a row one is used" in compare.render(compare.open_runs(pair))


def test_checking_the_data_or_not_does_not_make_losses_incomparable(pair, tmp_path):
    other = put(tmp_path / "z", two_stage_run(), GROWN.replace("path: d", "path: d, verify: false"))
    text = compare.render(compare.open_runs([pair[0], other]))
    assert "data.verify" in text and "may not be comparable" not in text
