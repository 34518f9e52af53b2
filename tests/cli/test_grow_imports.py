"""A Hugging Face model is imported, grown before its first step, trained and exported."""

from dataclasses import replace

import pytest
import torch
import yaml

from megagrow.checkpoint import NativeCheckpoint
from megagrow.checkpoint.convert.load_model import load_model
from megagrow.config import GrowConfig
from megagrow.config.load import parse_config
from megagrow.errors import CheckpointError
from megagrow.growth.plan import plan_growth
from megagrow.state.boxes import whole
from megagrow.train.agreement import check_agreement
from megagrow.train.grow_offline import OfflineGrowth, plan_offline, write_offline
from megagrow.train.growth_words import describe_sizes
from tests import jobs
from tests.checkpoint.states import save_model, to
from tests.jobs import (
    DEPTH,
    WIDTH,
    make_dataset,
    settings,
    train,
    trajectory,
    write_config,
)
from tests.toys import toy_model

transformers = pytest.importorskip("transformers")


LLAMA = {
    "family": "llama", "kv_heads": 1, "tie_embeddings": False, "norm_eps": 1e-6, "hidden": 8,
    "heads": 2, "ffn": 16, "layers": 2, "sequence": 8,
}  # fmt: skip


def command(name, *arguments):
    """Run a command's `main` in this process."""
    return jobs.command(name).main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, dataset):
    base = tmp_path_factory.mktemp("small")
    stages = [{"until": {"steps": 3}}]
    train(1, write_config(base / "run.yaml", settings(dataset, base / "run", stages=stages)))
    return base / "run"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A directory as `save_pretrained` writes it."""
    torch.manual_seed(1)
    shape = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, max_position_embeddings=8, vocab_size=320, initializer_range=0.2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("theirs") / "hf"
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def imported(theirs, dataset, tmp_path_factory):
    """(the import, the settings of the run that it is for)."""
    home = tmp_path_factory.mktemp("imported")
    run = settings(dataset, home / "run", model=LLAMA, stages=[{"until": {"steps": 3}}])
    config = write_config(home / "run.yaml", run)
    options = ["--to", home / "native", "--to-format", "native", "--config", config]
    assert command("convert", "--from", theirs, *options) == 0
    return home / "native", run


def test_an_import_is_grown_twice_trained_and_exported(imported, tmp_path, capsys):
    """Offline, by two growths at step 0; the same growths inside the run give the same losses."""
    native, run = imported
    wide, deep = tmp_path / "wide", tmp_path / "deep"
    assert command("grow", "--from", native, "--to", wide, "--operator", "width") == 0
    assert command("grow", "--from", wide, "--to", deep, "--operator", "depth_stack") == 0
    printed = yaml.safe_load(capsys.readouterr().out.rpartition("these stages:")[2])
    assert [stage["until"] for stage in printed["stages"]] == [
        {"steps": 0}, {"steps": 0}, {"steps": 3},
    ]  # fmt: skip
    config = write_config(
        tmp_path / "a.yaml", run | printed | {"run": {"dir": str(tmp_path / "a"), "seed": 5}}
    )
    offline = trajectory(train(1, config, resume=deep))
    assert [line[0] for line in offline] == [1, 2, 3]

    inside = [{"until": {"steps": 0}}, {"grow": WIDTH, "until": {"steps": 0}},
              {"grow": DEPTH, "until": {"steps": 3}}]  # fmt: skip
    changed = {"stages": inside, "run": {"dir": str(tmp_path / "b"), "seed": 5}}
    live = train(1, write_config(tmp_path / "b.yaml", run | changed), resume=native)
    assert trajectory(live) == offline

    ours, shape, at = load_model(tmp_path / "a")
    assert (shape.hidden, shape.layers) == (16, 4)
    back = transformers.AutoModelForCausalLM.from_pretrained(
        to(at, tmp_path / "back", "huggingface"), dtype=torch.float32
    )
    tokens = torch.randint(320, (3, 8), generator=torch.manual_seed(2))
    with torch.no_grad():
        wanted, found = ours.logits(tokens), back.eval()(tokens).logits
    assert wanted.std() > 0.1
    assert (found - wanted).abs().max() < 1e-4


def test_weights_without_a_run_are_grown_as_weights(theirs, tmp_path, capsys):
    """The result is of the source's format, or of the one asked for; it computes the same."""
    deeper = ["--operator", "depth_identity", "--factor", "2"]
    asked = ["--from", theirs, "--to", tmp_path / "deeper", *deeper]
    assert command("grow", *asked, "--dry-run") == 0 and not (tmp_path / "deeper").exists()
    said = capsys.readouterr().out
    assert f"from        {theirs} (huggingface, step 0)" in said and "layers 2 -> 4" in said
    assert command("grow", *asked) == 0
    assert f"written     {tmp_path / 'deeper'} (huggingface)" in capsys.readouterr().out
    tokens = torch.randint(320, (3, 8), generator=torch.manual_seed(2))
    small, grown = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (theirs, tmp_path / "deeper")
    )
    assert grown.config.num_hidden_layers == 4
    with torch.no_grad():
        wanted = small(tokens).logits
        assert (wanted - grown(tokens).logits).abs().max() <= 1e-5

    asked[3] = tmp_path / "dcp"
    assert command("grow", *asked, "--format", "dcp") == 0
    ours, shape, _ = load_model(tmp_path / "dcp")
    with torch.no_grad():
        assert shape.layers == 4 and (wanted - ours.logits(tokens)).abs().max() <= 1e-5
    asked[3] = tmp_path / "again"
    assert command("grow", *asked, "--rewarm", "3") == 1
    assert "weights without a run have no optimizer" in capsys.readouterr().err
    # A native import has moments, of zeros, and no run that would know their rates.
    asked[1] = to(theirs, tmp_path / "native", "native")
    assert command("grow", *asked) == 1
    error = capsys.readouterr().err
    assert "has optimizer state but belongs to no run" in error and "with init.from" in error


def test_a_runs_checkpoint_is_grown_into_another_format(small_run, tmp_path, capsys):
    grown = ["--operator", "width", "--state-policy", "sparkling"]
    assert command("grow", "--from", small_run, "--to", tmp_path / "dcp", *grown,
                   "--format", "dcp") == 0  # fmt: skip
    assert "state policy sparkling" in capsys.readouterr().out
    assert command("grow", "--from", small_run, "--to", tmp_path / "native", *grown) == 0
    ours, theirs = (load_model(path)[0] for path in (tmp_path / "dcp", tmp_path / "native"))
    tokens = torch.randint(320, (3, 8), generator=torch.manual_seed(2))
    with torch.no_grad():
        assert torch.equal(ours.logits(tokens), theirs.logits(tokens))


def test_a_runs_growth_does_not_start_from_weights(theirs):
    with pytest.raises(CheckpointError, match=r"of format huggingface(?s:.*)init\.from="):
        plan_offline(theirs, GrowConfig(operator="width"))


def test_a_resume_of_weights_without_a_run_names_the_cause(theirs, imported, dataset, tmp_path):
    path = to(theirs, tmp_path / "native", "native")
    with pytest.raises(
        CheckpointError, match="belongs to no run: it was converted without --config"
    ):
        check_agreement(
            NativeCheckpoint.open(path),
            config=parse_config(imported[1], source="run"),
            data=None,  # not reached
            plan=None,  # not reached
        )


def test_weights_of_another_vocabulary_than_the_runs_are_refused(imported, tmp_path, capsys):
    wide = toy_model(**LLAMA, vocab=400)
    path, _ = save_model(tmp_path, wide, fingerprints={"data": "d"})
    weights = to(path, tmp_path / "hf", "huggingface")
    config = write_config(tmp_path / "run.yaml", imported[1])
    options = ["--to", tmp_path / "native", "--to-format", "native", "--config", config]
    assert command("convert", "--from", weights, *options) == 1
    error = capsys.readouterr().err
    assert "model.vocab: the run's vocabulary is not that of these weights" in error
    assert "set model.vocab: 400" in error
    config = write_config(
        tmp_path / "run.yaml", imported[1] | {"model": imported[1]["model"] | {"vocab": 400}}
    )
    assert command("convert", "--from", weights, *options) == 0


def test_a_longer_sequence_is_a_growth_where_no_tensor_has_it(imported, tmp_path, capsys):
    """Rotary positions have no tensor, but the model accepts longer samples afterwards."""
    grown = ["--to", tmp_path / "long", "--operator", "sequence"]
    assert command("grow", "--from", imported[0], *grown) == 0
    assert "sequence 8 -> 16" in capsys.readouterr().out
    model, shape, _ = load_model(tmp_path / "long/step_00000000")
    assert (
        shape.sequence == 16
        and model.logits(torch.zeros(1, 16, dtype=torch.int64)).isfinite().all()
    )


def test_sizes_that_a_growth_leaves_are_reported(imported, tmp_path, capsys):
    growth = ["--from", imported[0], "--operator", "width", "--target", "hidden=16", "--dry-run"]
    assert command("grow", *growth) == 0
    assert "hidden 8 -> 16; heads 2, kv_heads 1, ffn 16 as before" in capsys.readouterr().out
    path, _ = save_model(tmp_path, toy_model(), fingerprints={"data": "d"})
    plan = OfflineGrowth(
        checkpoint=NativeCheckpoint.open(path), state=None, config=None, small=toy_model(),
        model=toy_model(hidden=16, head_dim=4),
        growth=plan_growth(GrowConfig(operator="width", target={"hidden": 16}), toy_model())[1],
    )  # fmt: skip
    assert "cannot be exported" in describe_sizes(plan)[1]


def test_a_growth_is_not_fitted_on_other_data(imported, tmp_path, monkeypatch):
    other = make_dataset(tmp_path / "other", seed=1)
    plan = plan_offline(imported[0], GrowConfig(operator="ligo", factor=2, fit_steps=1))
    elsewhere = plan.config.model_copy(
        update={"data": plan.config.data.model_copy(update={"path": str(other)})}
    )
    with pytest.raises(CheckpointError, match="was trained on another data"):
        write_offline(replace(plan, config=elsewhere), tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize(
    ("target", "option"),
    [
        ("huggingface", ["--tensor", "2"]),
        ("huggingface", ["--zero", "1"]),
        ("megatron", ["--data", "2"]),
        ("native", ["--tokenizer", "x"]),
        ("native", ["--shard-gib", "1"]),
    ],
)
def test_an_option_that_the_format_has_no_use_for_is_refused(
    theirs, tmp_path, capsys, target, option
):
    out = ["--to", tmp_path / "out", "--to-format", target]
    assert command("convert", "--from", theirs, *out, *option) == 1
    assert f"{option[0]}: format {target} has no such thing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- growth on the way of a conversion -----------------------------------------------------


def logits(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    tokens = torch.arange(16).reshape(2, 8) * 7 % 320
    with torch.no_grad():
        return model(tokens).logits


def test_weights_are_grown_from_format_to_format(theirs, tmp_path, capsys):
    """A growth that keeps the loss keeps the logits, as transformers computes them."""
    target = tmp_path / "wide"
    grow = ["--grow", "operator=depth_identity+width_fresh", "factor=2"]
    options = ["--from", theirs, "--to", target, "--to-format", "huggingface", *grow, "--verify"]
    assert command("convert", *options, "--tokenizer", "none") == 0
    assert "is what the growth makes of the source, bit for bit" in capsys.readouterr().out
    shape = transformers.AutoConfig.from_pretrained(target)
    assert (shape.hidden_size, shape.num_hidden_layers) == (16, 4)
    torch.testing.assert_close(logits(target), logits(theirs), rtol=1e-4, atol=1e-5)


def test_a_run_is_grown_on_the_way_as_it_is_grown_by_itself(small_run, tmp_path):
    options = ["--from", small_run, "--to-format", "native"]
    way = ["--grow", "operator=depth_stack", "factor=2"]
    layout = ["--tensor", "2", "--data", "2", "--zero", "1"]
    assert command("convert", *options, "--to", tmp_path / "way", *way, *layout) == 0
    plan = plan_offline(small_run, GrowConfig(operator="depth_stack", factor=2))
    alone = NativeCheckpoint.open(write_offline(plan, tmp_path / "alone"))
    found = NativeCheckpoint.open(tmp_path / "way")
    assert found.layout.world == 4 and found.layout.tensor == 2
    assert (found.config, found.run_state, found.slots) == (
        alone.config, alone.run_state, alone.slots
    )  # fmt: skip
    for tensor in alone.catalog:
        for slot in alone.slots:
            values = [c.read(tensor.name, slot.name, whole(tensor.shape)) for c in (found, alone)]
            assert torch.equal(*values)


@pytest.mark.parametrize(
    ("grow", "says"),
    [
        (["operator=ligo"], "is fitted on the data of a run"),
        (["operator=width_random"], "under a mask that only a run has"),
        (["operator=width", "mup=true"], "have no optimizer and no schedule"),
        (["operator=width", "state_policy=exact", "rewarm=9"], "grow.rewarm = 9"),
        (["operator=width", "factor=2", "--grow", "operator=depth_stack"], "more than once"),
        (["operator=width", "target={hidden: 8}"], "larger"),
        (["operator=widht"], "widht"),
        (["operator"], "operator"),
    ],
)
def test_a_growth_on_the_way_that_cannot_be(theirs, tmp_path, grow, says, capsys):
    options = ["--from", theirs, "--to", tmp_path / "x", "--to-format", "huggingface"]
    assert command("convert", *options, "--tokenizer", "none", "--grow", *grow) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error
    assert not list(tmp_path.iterdir())


def test_the_run_to_be_is_of_the_grown_model(theirs, tmp_path, dataset, capsys):
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run", model=LLAMA))
    options = ["--from", theirs, "--to", tmp_path / "x", "--to-format", "native"]
    grow = ["--grow", "operator=width_fresh", "factor=2"]
    assert command("convert", *options, "--config", config, *grow) == 1
    assert "as it is after the growth" in capsys.readouterr().err
    wider = {**LLAMA, "hidden": 16, "heads": 4, "kv_heads": 2, "ffn": 32, "norm_eps": 5e-7}
    config = write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run", model=wider))
    assert command("convert", *options, "--config", config, *grow) == 0
