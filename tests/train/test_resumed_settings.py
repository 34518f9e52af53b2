"""Settings that differ when a run is resumed: refused if they would make it wrong, else said."""

import pytest

from megagrow.train import checkpoints
from tests.jobs import main, settings, train, write_config

STAGES = [
    {"until": {"steps": 5}},
    {"until": {"steps": 8}, "grow": {"operator": "width", "factor": 2}},
]


@pytest.fixture(scope="module")
def config(dataset, tmp_path_factory):
    """A run that has been stopped at step 4, in its first stage."""
    home = tmp_path_factory.mktemp("resumed")
    mapping = settings(dataset, home / "run", stages=STAGES)
    path = write_config(home / "run.yaml", mapping)
    train(1, path, "train.stop_after_steps=4")
    return path


def again(config, *overrides):
    return main(["--config", config, "--dry-run", *overrides])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stages.0.until.steps=2", "stages.1.until.steps=4"],
         "is at step 4 in stage 0, and the configuration ends all stages at step 4"),
        (["stages.0.until.steps=2", "stages.1.until.steps=3"], "no step left for stages[1]"),
        (["model.norm_eps=1e-3"], "model.norm_eps: the run's model is not the one of these"),
        (["optimizer.betas=[0.5, 0.6]"], "AdamW's bias correction still counts for moments"),
        (["model.ffn=24"], "holds another model than stage 0"),
    ],
)  # fmt: skip
def test_what_would_be_wrong_is_refused(config, overrides, said):
    outcome = again(config, *overrides)
    assert outcome.status == 1 and said in outcome.err, outcome.err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stages.0.until.steps=2"], "changed since then: stages[0].until.steps: 5 -> 2"),
        (["model.init_std=0.5"], "changed since then: model.init_std: 0.2 -> 0.5"),
        (["optimizer.name=lion"], "exp_avg_sq of the checkpoint: left out, lion has no such"),
        (["optimizer.lr=0.5"], "changed since then: optimizer.lr"),
        (["data.documents=mask"], "changed since then: data.documents: packed -> mask"),
    ],
)
def test_what_may_change_is_said(config, overrides, said):
    outcome = again(config, *overrides)
    assert outcome.status == 0 and said in outcome.out, outcome.err + outcome.out


@pytest.mark.parametrize("also", [(), ("run", "wait"), ("train", "prometheus_address")])
def test_what_an_earlier_version_lacked_has_not_changed(config, monkeypatch, also):
    """Before `data.documents`, documents saw each other; so for any other setting."""
    opened = checkpoints.open_checkpoint

    def older(path):
        checkpoint = opened(path)
        del checkpoint.config["data"]["documents"]
        if also:
            checkpoint.config[also[0]].pop(also[1], None)
        return checkpoint

    monkeypatch.setattr(checkpoints, "open_checkpoint", older)
    outcome = again(config)
    assert outcome.status == 0 and "data.documents" not in outcome.out, outcome.err
    assert [line for line in outcome.out.splitlines() if "changed since then" in line] == [
        "       changed since then: train.stop_after_steps: 4 -> None"
    ]
    assert "data.documents: packed -> mask" in again(config, "data.documents=mask").out


def test_a_stage_that_is_over_by_now_grows_at_once(config):
    """It has steps left in the stages after it."""
    lines = train(1, config, "stages.0.until.steps=2", "stages.1.until.steps=6")
    assert [line["step"] for line in lines if line["event"] == "growth"] == [4]
