"""A model of Hugging Face is imported, grown before its first step, trained and exported."""

import importlib.util

import pytest
import torch
import yaml
from jobs import DEPTH, REPOSITORY, WIDTH, dataset, settings, train, trajectory, write_config  # noqa: F401
from states import to

from megagrow.checkpoint.load import load_model

transformers = pytest.importorskip("transformers")


def command(name, *arguments):
    """`main` of a command, in this process."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


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
def imported(theirs, dataset, tmp_path_factory):  # noqa: F811
    """(the import, the settings of the run that it is for)."""
    home = tmp_path_factory.mktemp("imported")
    model = {"family": "llama", "kv_heads": 1, "tie_embeddings": False, "norm_eps": 1e-6}
    run = settings(dataset, home / "run", model=model, stages=[{"until": {"steps": 3}}])
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
