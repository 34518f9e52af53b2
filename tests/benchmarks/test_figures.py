"""The figures that are stored with results are the ones that their JSON gives."""

import json
import shutil

import pytest

from benchmarks.command_line import main
from tests.jobs import REPOSITORY

STORED = REPOSITORY / "benchmarks"
DRAWN = {
    "dynamics": ["dynamics"],
    "operators": ["operators_width", "operators_depth", "operators_policies"],
    "savings_2x48": ["savings_2x48", "savings_2x48_losses"],
    "savings_2x48_depth": ["savings_2x48_depth", "savings_2x48_depth_losses"],
}


@pytest.mark.parametrize("result", DRAWN)
def test_figures_are_drawn_again(result, tmp_path, capsys):
    shutil.copy(STORED / f"{result}.json", tmp_path)
    assert main(["figures", str(tmp_path / f"{result}.json")]) == 0
    names = [f"{name}.svg" for name in DRAWN[result]]
    assert capsys.readouterr().out.split() == [
        word for name in names for word in ("written:", str(tmp_path / name))
    ]
    for name in names:
        made, stored = ((folder / name).read_text() for folder in (tmp_path, STORED))
        assert _words(made) == _words(stored)


def _words(svg):
    """The texts of a figure; how lines are written may differ from one matplotlib to another."""
    return [part.partition("</text>")[0].rpartition(">")[2] for part in svg.split("<text")[1:]]


def test_what_has_no_figure_is_refused(tmp_path, capsys):
    cases = {
        "no JSON": ("{", "is no result of a benchmark"),
        "kernels": (json.dumps({"benchmark": "kernels"}), "kernels"),
        "an older one": (json.dumps({"benchmark": "savings"}), "savings version 1"),
        "a list": ("[1]", "is no result of a benchmark"),
    }
    for name, (text, says) in cases.items():
        path = tmp_path / f"{name}.json"
        path.write_text(text)
        assert main(["figures", str(path)]) == 1, name
        assert says in capsys.readouterr().err
    assert main(["figures", str(tmp_path / "missing.json")]) == 1
    assert "missing.json" in capsys.readouterr().err
