"""The model card of an export: what the checkpoint records, and never over the source's own."""

import re

import pytest
import yaml

from megagrow.checkpoint.convert.registry import detect
from megagrow.checkpoint.interface.history import history, source_name
from megagrow.data.dataset import open_dataset
from tests.jobs import command, settings, train, write_config
from tests.train.released import run_from, save_released


def export(source, target, *more):
    status = command("convert").main(
        ["--from", str(source), "--to", str(target), "--to-format", "huggingface", *map(str, more)]
    )
    assert status == 0
    return (target / "README.md").read_text(encoding="utf-8")


def section(card, name):
    return re.search(rf"## {name}\n\n(.*?)(\n\n##|\Z)", card, re.DOTALL)[1]


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """A run that grows twice."""
    home = tmp_path_factory.mktemp("run")
    config = write_config(home / "run.yaml", settings(dataset, home / "run"))
    train(1, config)
    return home / "run"


def test_a_run_tells_its_growths(run, dataset, tmp_path, capsys):
    card = export(run, tmp_path / "out")
    said = capsys.readouterr().out
    assert "README.md: a model card stub, without a licence; complete it" in said
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "license" not in front
    lines = section(card, "History").splitlines()
    # 8 samples of 8 tokens a step; growths after steps 3 and 7 of 10.
    assert lines[0].startswith("- grown at step 3 (192 tokens) by `width`: hidden 8 -> 16")
    assert lines[1].startswith("- grown at step 7 (448 tokens) by `depth_stack`: layers 2 -> 4")
    assert "state_policy sparkling, rewarm 3" in lines[0]
    assert lines[2] == "- trained to step 10 of its last run (640 tokens)"
    data = open_dataset(dataset)
    assert data.fingerprint in card and data.content.tokenizer_sha256 in card
    assert "Not stated." in section(card, "Licence")
    assert str(tmp_path.parent) not in card and str(dataset) not in card


def test_the_sources_card_stays_as_long_as_the_model_does(dataset, tmp_path, capsys):
    source = save_released(tmp_path / "owner-model", "llama-3.2", dataset)
    (source / "README.md").write_text("# Theirs\n", encoding="utf-8")
    assert export(source, tmp_path / "same", "--dtype", "bfloat16") == "# Theirs\n"
    assert "README.md: the source's own model card" in capsys.readouterr().out
    grow = ["--grow", "operator=depth_identity", "target.layers=3"]
    card = export(source, tmp_path / "deeper", *grow)
    said = capsys.readouterr().out
    assert "the source's own card is README.source.md" in said
    kept = (tmp_path / "deeper" / "README.source.md").read_text(encoding="utf-8")
    assert kept == "# Theirs\n"
    lines = section(card, "History").splitlines()
    assert lines[0] == "- started from `owner-model`"
    assert lines[1].startswith("- grown by `depth_identity`: layers 2 -> 3; ")
    # Grown again: the history goes on, and the first stub is kept as the source's card.
    again = export(tmp_path / "deeper", tmp_path / "more", "--grow", "operator=untie")
    assert section(again, "History").splitlines()[:2] == lines
    assert "untied head" in section(again, "History").splitlines()[2]
    assert (tmp_path / "more" / "README.source.md").read_text(encoding="utf-8") == card


def test_a_run_from_a_grown_model_tells_the_whole_way(dataset, tmp_path):
    source = save_released(tmp_path / "theirs", "pythia", dataset)
    export(source, tmp_path / "deeper", "--grow", "operator=depth_identity", "target.layers=3")
    stages = [
        {"until": {"steps": 1}},
        {"grow": {"operator": "depth_stack", "factor": 2}, "until": {"steps": 2}},
    ]
    config = write_config(
        tmp_path / "run.yaml",
        run_from(tmp_path / "deeper", dataset, tmp_path / "run", stages=stages),
    )
    train(1, config)
    card = export(tmp_path / "run", tmp_path / "out")
    lines = section(card, "History").splitlines()
    assert [line.split(" by ")[0].split(" (")[0] for line in lines] == [
        "- started from `theirs`", "- grown", "- started from `deeper`", "- grown at step 1",
        "- trained to step 2 of its last run",
    ]  # fmt: skip
    found, path = detect(tmp_path / "out")
    assert [next(iter(one)) for one in history(found.open_source(path))] == [
        "source", "growth", "source", "growth"
    ]  # fmt: skip


def test_names_without_paths():
    cached = "/a/hub/models--Owner--Model-1B/snapshots/0123"
    assert source_name(cached) == "Owner/Model-1B"
    assert source_name("/home/me/models/Tiny") == "Tiny"
    assert source_name("runs/a/checkpoints/step_00000300") == "a/step_00000300"


def test_a_damaged_record_is_refused(run, tmp_path, capsys):
    export(run, tmp_path / "out")
    (tmp_path / "out" / "megagrow.json").write_text('{"fingerprints": {}, "history": 3}')
    found, path = detect(tmp_path / "out")
    with pytest.raises(Exception, match=r"megagrow\.json: damaged"):
        found.open_source(path)
