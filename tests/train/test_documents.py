"""Runs whose samples have documents that do not see each other (`data.documents: mask`)."""

import dataclasses

import numpy as np
import pytest

from megagrow.cli.prepare_data import main as prepare_data
from megagrow.config.load import load_config
from megagrow.data.dataset import open_dataset
from megagrow.models.flops import train_flops_per_token
from megagrow.models.registry import FAMILIES
from megagrow.train.run_plan import plan_run
from megagrow.train.step_cost import StepCost
from tests.jobs import events, launch, log_of, main, settings, train, trajectory, write_config

SEQUENCE = 64  # the documents have about as many tokens


def mapping(dataset, run_dir, documents="mask", **changes):
    """Train, widen, train, deepen, train."""
    made = settings(dataset, run_dir, **changes)
    made["model"]["sequence"] = SEQUENCE
    made["data"]["documents"] = documents
    return made


LAYOUTS = {
    "data": {"zero": 1},
    "tensor": {"tensor": 2, "sequence_parallel": True},
    "pipeline": {"pipeline": 2},
}


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    """The steps of one process, by how documents are read."""
    home, found = tmp_path_factory.mktemp("alone"), {}
    for name in ("mask", "packed"):
        config = write_config(home / f"{name}.yaml", mapping(dataset, home / name, name))
        found[name] = events(train(1, config), "step")
    return found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_run_grows_and_is_resumed_bit_for_bit(dataset, tmp_path, layout, alone):
    config = write_config(tmp_path / "run.yaml", mapping(dataset, tmp_path / "run", layout=layout))
    straight, chain = (["--config", config, f"run.dir={tmp_path / n}"] for n in ("one", "two"))
    stops = [[*chain, f"train.stop_after_steps={n}"] for n in (2, 5)]
    outcomes = launch(2, straight, *stops, chain, timeout=300.0)
    assert [ranks[0].status for ranks in outcomes] == [0] * 4, outcomes
    assert (
        "stage 0: documents of a sample do not see each other (one document" in outcomes[0][0].err
    )
    one, two = (log_of(config, f"run.dir={tmp_path / n}") for n in ("one", "two"))
    assert trajectory(one) == trajectory(two) and len(trajectory(one)) == 10
    assert len(events(one, "growth")) == 2
    for a, b, c in zip(events(one, "step"), alone["mask"], alone["packed"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["loss"] != pytest.approx(c["loss"], rel=1e-5)
        assert a["flops"] == c["flops"], "a budget counts whole samples"


def test_a_stage_may_change_how_documents_are_read(dataset, tmp_path):
    runs = {}
    for name, first, second in (
        ("changed", "packed", {"documents": "mask"}),
        ("named", "packed", {"path": str(dataset), "documents": "mask"}),
        ("packed", "packed", None),
    ):
        made = mapping(dataset, tmp_path / name, first)
        made["stages"] = [{"until": {"steps": 3}}, {"until": {"steps": 5}}, {"until": {"steps": 6}}]
        if second is not None:
            made["stages"][1]["data"] = second
        config = write_config(tmp_path / f"{name}.yaml", made)
        dry = main(["--config", config, "--dry-run"])
        runs[name] = trajectory(train(1, config))
        assert dry.out.count("  documents   do not see each other") == 2 * (second is not None)
    assert runs["changed"] == runs["named"]
    assert runs["changed"][:3] == runs["packed"][:3]
    assert all(a != b for a, b in zip(runs["changed"][3:], runs["packed"][3:], strict=True))


def test_the_dry_run_says_how_they_attend(dataset, tmp_path):
    config = write_config(tmp_path / "run.yaml", mapping(dataset, tmp_path / "run"))
    outcome = main(["--config", config, "--dry-run"])
    assert outcome.status == 0, outcome.err
    [line, *others] = [x for x in outcome.out.splitlines() if x.startswith("  documents")]
    assert "(one document after the other); budgets in FLOPs count whole samples" in line
    assert len(others) == 2
    outcome = main(["--config", config, "--dry-run", "data.documents=packed"])
    assert outcome.status == 0 and "\n  documents" not in outcome.out


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.documents=masked"], "data.documents"),
        (["data.documents=null"], "data.documents"),
        (['stages.1.data={"documents": "no"}'], "stages[1].data.documents"),
        (['stages.1.data={"sources": null}'], "path is missing"),
        (['stages.0.data={"documents": "mask"}'], "stages[0].data: what a run starts with"),
    ],
)
def test_bad_values_are_refused(dataset, tmp_path, overrides, said):
    config = write_config(tmp_path / "run.yaml", mapping(dataset, tmp_path / "run"))
    outcome = main(["--config", config, "--dry-run", *overrides])
    assert outcome.status == 1 and said in outcome.err, outcome.err


def test_data_without_an_end_token_is_refused(dataset, tmp_path):
    data = open_dataset(dataset)
    tokens = data.train.tokens.astype("<u2")
    (tmp_path / "old").mkdir()
    tokens[tokens != data.eod].tofile(tmp_path / "old" / "a.bin")
    taken = tmp_path / "taken"
    command = ["--tokens", str(tmp_path / "old"), "--output", str(taken), "--tokenizer",
               str(dataset / "tokenizer.model")]  # fmt: skip
    assert prepare_data(command) == 0
    config = write_config(tmp_path / "run.yaml", mapping(taken, tmp_path / "run"))
    outcome = main(["--config", config, "--dry-run"])
    assert outcome.status == 1
    assert "data.documents is mask, but no document ends" in outcome.err
    # Both ways out, as the error words them.
    assert main(["--config", config, "--dry-run", "data.documents=packed"]).status == 0
    tokens.tofile(tmp_path / "old" / "a.bin")
    assert prepare_data([*command, "--overwrite"]) == 0
    assert main(["--config", config, "--dry-run"]).status == 0


def test_a_family_whose_layers_know_no_documents_is_refused(dataset, tmp_path, monkeypatch):
    own = dataclasses.replace(FAMILIES["gpt2"], layers=lambda model: FAMILIES["gpt2"].layers(model))
    monkeypatch.setitem(FAMILIES, "gpt2", own)
    config = write_config(tmp_path / "run.yaml", mapping(dataset, tmp_path / "run"))
    outcome = main(["--config", config, "--dry-run"])
    assert (
        outcome.status == 1 and "layers of family gpt2 do not keep documents apart" in outcome.err
    )


def test_a_rate_counts_what_documents_compute(dataset, tmp_path):
    config = load_config(
        write_config(
            tmp_path / "run.yaml", mapping(dataset, tmp_path / "run", model={"vocab": 320})
        )
    )
    stage = plan_run(config, world=2, vocabulary=320).stages[0]

    def a_token(length):
        return train_flops_per_token(stage.model.model_copy(update={"sequence": length}))

    samples = np.full((1, SEQUENCE + 1), 9)
    cost = StepCost(stage, 7)
    cost.add(samples)
    assert cost.take() == SEQUENCE * a_token(SEQUENCE)
    samples[0, [3, 50, SEQUENCE]] = 7  # the last is no input
    cost.add(samples)
    assert cost.take() == 4 * a_token(4) + 47 * a_token(47) + 13 * a_token(13)
    packed = StepCost(stage, None)
    packed.add(samples)
    assert 2 * packed.take() == stage.plan.flops_per_step
