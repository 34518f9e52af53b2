"""Bad input stops a run with a helpful error, and changes nothing on disk."""

import shutil

import pytest
import yaml

from tests.jobs import files_below, main, make_dataset, settings, write_config


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A dataset of other text, with its own tokenizer."""
    return make_dataset(tmp_path_factory.mktemp("other") / "toy", seed=1)


def refused(tmp_path, dataset, *overrides, says, mapping=None):
    """Run `main` and check that it fails, says all of `says`, and changes nothing."""
    config = write_config(tmp_path / "run.yaml", mapping or settings(dataset, tmp_path / "run"))
    before = files_below(dataset)
    outcome = main(["--config", config, *overrides])
    assert outcome.status == 1
    assert outcome.out == "" and outcome.err.count("error: ") == 1
    for words in says:
        assert words in outcome.err, f"{words!r} is not in\n{outcome.err}"
    assert not (tmp_path / "run").exists() and files_below(dataset) == before


SETTINGS = {
    "unknown key": ["optimizer.lrr=1"],
    "unknown section": ["optimiser.lr=1"],
    "wrong type": ["model.hidden=wide"],
    "heads do not divide": ["model.hidden=9"],
    "batch does not divide": ["batch.global=9"],
    "vocabulary too small": ["model.vocab=100"],
    "unknown operator": ["stages.1.grow.operator=widht"],
    "unknown policy": ["stages.1.grow.state_policy=sparking"],
    "policy does not fit": ["stages.2.grow.state_policy=exact"],
    "bound falls": ["stages.1.until.steps=2"],
    "warm-up too long": ["schedule.warmup=9"],
    "clash with DeepSpeed": ["deepspeed.zero_optimization.stage=3"],
    "clash in a list": ["deepspeed.train_batch_size=3"],
    "override without a value": ["model.hidden"],
    "world without dry run": ["--world", "2"],
}
SAYS = {
    "unknown key": ["optimizer.lrr", "unknown", "did you mean optimizer.lr?"],
    "unknown section": ["optimiser.lr", "unknown", "optimizer"],
    "wrong type": ["model.hidden", "wide", "integer"],
    "heads do not divide": ["hidden = 9", "heads = 2", "set model.hidden"],
    "batch does not divide": ["global = 9", "micro = 2", "set batch.global"],
    "vocabulary too small": ["model.vocab", "found:    100", "at least 320", "leave model.vocab"],
    "unknown operator": ["stages[1].grow.operator", "widht", "set grow.operator to w"],
    "unknown policy": ["stages[1].grow.state_policy", "sparking", "exact", "to sparkling"],
    "policy does not fit": ["grow.state_policy", "'depth_stack'", "'exact'", "set grow.state_pol"],
    "bound falls": ["stages[1].until.steps", "at least 3", "raise stages[1]"],
    "warm-up too long": ["schedule.warmup = 9", "at most 8", "set schedule.warmup lower"],
    "clash with DeepSpeed": ["deepspeed.zero_optimization.stage", "found:    3", "expected: 1"],
    "clash in a list": ["deepspeed.train_batch_size", "found:    3", "expected: 8", "remove"],
    "override without a value": ["model.hidden", "key"],
    "world without dry run": ["--world 2", "--dry-run"],
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(tmp_path, dataset, case):
    refused(tmp_path, dataset, *SETTINGS[case], says=SAYS[case])


def test_a_clash_in_a_later_stage(tmp_path, dataset):
    """What conflicts only with the second stage's layout is rejected before the first begins."""
    mapping = settings(dataset, tmp_path / "run", deepspeed={"zero_optimization": {"stage": 1}})
    mapping["stages"][1]["layout"] = {"zero": 2}
    refused(tmp_path, dataset, mapping=mapping, says=["deepspeed.zero_optimization.stage", "2"])


def test_the_first_stage_cannot_grow(tmp_path, dataset):
    mapping = settings(dataset, tmp_path / "run")
    mapping["stages"] = mapping["stages"][1:]
    refused(tmp_path, dataset, mapping=mapping, says=["stages[0].grow", "stages[1]"])


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "no settings"), ("model: [", "run.yaml"), ("- 1", "list")],
)
def test_no_configuration(tmp_path, text, says):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    outcome = main(["--config", config])
    assert outcome.status == 1 and str(config) in outcome.err and says in outcome.err
    missing = main(["--config", tmp_path / "none.yaml"])
    assert missing.status == 1 and "none.yaml" in missing.err and "--config" in missing.err


def test_a_missing_dataset(tmp_path, dataset):
    nowhere = tmp_path / "nowhere"
    refused(
        tmp_path, dataset, f"data.path={nowhere}",
        says=[str(nowhere), "not a prepared dataset", "python launch/prepare_data.py"],
    )  # fmt: skip
    assert not nowhere.exists()


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[3] ^= 255
    path.write_bytes(content)


DAMAGE = {
    "tokens cut off": ("train.bin", _cut),
    "index cut off": ("validation.idx", _cut),
    "index of another kind": ("train.idx", _flip),
    "tokens missing": ("validation.bin", lambda path: path.unlink()),
    "manifest cut off": ("dataset.json", _cut),
    "tokenizer changed": ("tokenizer.model", _flip),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_corrupt_dataset(tmp_path, dataset, case):
    name, damage = DAMAGE[case]
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    damage(copy / name)
    refused(tmp_path, copy, says=[str(copy / name), "prepare_data.py", "--overwrite"])
    refused(tmp_path, copy, "--dry-run", says=[str(copy / name)])


def test_a_tokenizer_that_is_not_the_datasets(tmp_path, dataset, other):
    tokenizer = other / "tokenizer.model"
    refused(
        tmp_path, dataset, f"data.tokenizer={tokenizer}",
        says=[str(tokenizer), "disagree", str(dataset), "leave out data.tokenizer"],
    )  # fmt: skip
    refused(tmp_path, dataset, "data.tokenizer=none.model", says=["none.model"])


def test_a_batch_that_the_processes_do_not_divide(tmp_path, dataset):
    refused(
        tmp_path, dataset, "--dry-run", "--world", "3",
        says=["batch.global", "data-parallel size = 3", "a multiple of", "set batch.global=6"],
    )  # fmt: skip


def test_options_in_any_order_and_only_rank_0_speaks(tmp_path, dataset, monkeypatch):
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run"))
    mixed = main(["run.seed=1", "--config", config, "model.ffn=8", "--dry-run", "run.seed=x"])
    assert mixed.status == 1 and "run.seed" in mixed.err and "x" in mixed.err
    assert main(["--config", config, "--nonsense"]).status == 2
    monkeypatch.setenv("RANK", "1")
    for arguments in (["--nonsense"], ["--help"]):
        outcome = main(arguments)
        assert outcome.out == outcome.err == ""
    # Possibly known to this rank only, since the ranks have not joined yet.
    alone = main(["--config", config, "model.ffn=x"])
    assert (alone.status, alone.out) == (1, "") and alone.err.startswith("rank 1: error: ")
    dry = main(["--config", config, "--dry-run"])
    assert (dry.status, dry.out) == (0, "")


def test_the_written_configuration_is_the_given_one(tmp_path, dataset):
    """A check on the helper above: the same settings, unmodified, are accepted."""
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run"))
    assert yaml.safe_load(config.read_text())["data"]["path"] == str(dataset)
    assert main(["--config", config, "--dry-run"]).status == 0
