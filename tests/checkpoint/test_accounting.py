"""Nothing in a source is dropped silently: every name is carried, or left out and printed, or
refused."""

import json
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from megagrow.checkpoint.convert.load_model import load_model
from megagrow.checkpoint.convert.registry import FORMATS
from megagrow.checkpoint.convert.run import Job, survey
from megagrow.checkpoint.convert.summary import describe
from megagrow.checkpoint.interface.accounting import account, enumerated, summary
from megagrow.checkpoint.interface.format import LeftOut
from megagrow.errors import CheckpointError
from megagrow.state.boxes import whole
from tests.checkpoint.states import opened, save_model, to
from tests.jobs import command
from tests.toys import toy_model


def test_a_name_without_a_fate_is_a_defect_of_the_reader():
    left = LeftOut("c", "nobody wants it")
    assert account("abc", carried="a", derived="b", left_out=[left]) == (left,)
    with pytest.raises(AssertionError, match="'d' has no fate"):
        account("abcd", carried="a", derived="b", left_out=[left])
    with pytest.raises(AssertionError, match="'c' has a fate and is not in the source"):
        account("ab", carried="a", derived="b", left_out=[left])


def test_names_with_one_reason_share_a_line():
    items = [LeftOut(f"n{i}", "noise") for i in range(9)] + [LeftOut("x", "other")]
    assert summary(items) == ["n0, n1, n2, n3 and 5 more (noise)", "x (other)"]
    assert enumerated(list("abcde")) == "a, b, c, d, e"


# --- a source with something that its reader has never heard of ---------------------------


def hf_array(path):
    file = path / "model.safetensors"
    save_file(load_file(file) | {"surprise": torch.ones(3)}, file)


def hf_setting(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"surprise": 3}))


def hf_token(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": 3}))


def any_file(path):
    (path / "surprise.bin").write_bytes(b"1")


def in_rank(change, pattern="model_optim_rng.pt"):
    def changed(path):
        file = next(path.rglob(pattern))
        value = torch.load(file, weights_only=False)
        change(value)
        torch.save(value, file)

    return changed


def in_state(key, value):
    return in_rank(lambda file: file["optimizer"]["state"][0].__setitem__(key, value))


def again(**more):
    """As torch saves the same state dict with more in it."""

    def changed(path):
        metadata = pickle.loads((path / ".metadata").read_bytes())
        state = {
            name: torch.empty(stated.size, dtype=stated.properties.dtype)
            for name, stated in metadata.state_dict_metadata.items()
        }
        dcp.load(state, checkpoint_id=str(path), no_dist=True)
        shutil.rmtree(path)
        named = {name.replace("__", "."): value for name, value in more.items()}
        dcp.save(state | named, checkpoint_id=str(path), no_dist=True)

    return changed


def in_head(change):
    return in_rank(change, "mp_rank_00_model_states.pt")


def in_tag(path):
    any_file(next(path.glob("global_step*")))


def zero_file(path):
    any_file(next(path.rglob("zero")))


def beside_a_parameter(path):
    torch.save(torch.ones(3), next(path.rglob("*token/fp32.pt")).with_name("surprise.pt"))


def in_module(file):
    file["module"] = (file["module"] or {}) | {"surprise": torch.ones(3)}


def in_saved_state(file):
    state = file["optimizer"]["state"][0]
    state["surprise"] = torch.ones_like(state["exp_avg"])


# (format, what is added): how, and the name to be printed, or None if refused by name.
SURPRISES = {
    ("native", "file"): (any_file, "surprise.bin"),
    ("huggingface", "array"): (hf_array, None),
    ("huggingface", "setting"): (hf_setting, None),
    ("huggingface", "token"): (hf_token, "config.json: eos_token_id"),
    ("huggingface", "file"): (any_file, "surprise.bin"),
    ("megatron", "array"): (
        in_rank(lambda file: file["model"].__setitem__("surprise", torch.ones(3))), None,
    ),
    ("megatron", "buffer"): (
        in_rank(lambda file: file["model"].__setitem__("surprise", "text")), "model.surprise",
    ),
    ("megatron", "slot"): (in_state("surprise", torch.ones(3)), "optimizer.state.0.surprise"),
    ("megatron", "argument"): (
        in_rank(lambda file: setattr(file["args"], "surprise", 3)), None,
    ),
    ("megatron", "unset argument"): (
        in_rank(lambda file: setattr(file["args"], "surprise", None)), "args.surprise",
    ),
    ("megatron", "section"): (in_rank(lambda file: file.update(surprise={"a": 1})), "surprise"),
    ("dcp", "slot"): (
        again(optimizer__state__embedding__token__surprise=torch.ones(3)),
        "optimizer.state.embedding.token.surprise",
    ),
    ("dcp", "moment of nothing"): (
        again(optimizer__state__surprise__exp_avg=torch.ones(3)),
        "optimizer.state.surprise.exp_avg",
    ),
    ("dcp", "bytes"): (again(surprise=3), "surprise"),
    ("dcp", "file"): (any_file, "surprise.bin"),
    ("deepspeed", "file"): (in_tag, "surprise.bin"),
    ("deepspeed", "array"): (in_head(in_module), None),
    ("deepspeed", "key"): (in_head(lambda file: file.update(surprise=3)), "surprise"),
    ("deepspeed", "slot"): (in_head(in_saved_state), "rank 0: optimizer state surprise"),
    ("universal", "file"): (in_tag, "surprise.bin"),
    ("universal", "file of the optimizer"): (zero_file, "zero/surprise.bin"),
    ("universal", "slot"): (beside_a_parameter, "zero/layers.0.token/surprise.pt"),
    ("universal", "array"): (in_head(in_module), "surprise"),
    ("universal", "key"): (in_head(lambda file: file.update(surprise=3)), "surprise"),
    ("universal", "key of another rank"): (
        in_rank(lambda file: file.update(surprise=3), "zero_pp_rank_0_mp_rank_00_model_states.pt"),
        "zero_pp_rank_0_mp_rank_00_model_states.pt: surprise",
    ),
}  # fmt: skip


def test_every_format_is_tried():
    assert {name for name, _ in SURPRISES} == set(FORMATS)


@pytest.fixture(scope="module", name="sound")
def sound_checkpoints(tmp_path_factory):
    """One checkpoint of each format, by format name."""
    root = tmp_path_factory.mktemp("sound")
    path, _ = save_model(root / "run")
    return {"native": path} | {
        name: to(path, root / name, name) for name in sorted(set(FORMATS) - {"native"})
    }


@pytest.mark.parametrize("case", SURPRISES, ids=" ".join)
def test_a_surprise_is_named_or_refused(sound, tmp_path, case):
    change, name = SURPRISES[case]
    path = shutil.copytree(sound[case[0]], tmp_path / sound[case[0]].name)
    for seal in path.rglob("megagrow.checksums.json"):
        seal.unlink()
    assert not any("surprise" in item.name for item in opened(path).left_out)
    change(path)
    if name is None:
        with pytest.raises(CheckpointError, match="surprise"):
            opened(path)
        return
    source = opened(path)
    assert name in {item.name for item in source.left_out}
    # and every command that opens the source says so
    about = survey(Job(path, tmp_path / "new", "native"))
    assert name in {item.name for item in about.left_out}
    assert "left out" in describe(source, format_name=case[0], checksums="")
    if case[0] != "dcp":
        lines = []
        load_model(path, say=lines.append)
        assert lines == [f"left out: {line}" for line in summary(source.left_out)]


# --- what is said -------------------------------------------------------------------------
def test_the_command_claims_no_more_than_it_compared(tmp_path, capsys):
    """With slots left out, slots made of zeros and state that the format cannot hold."""
    path, _ = save_model(tmp_path / "run")
    (path / "note.txt").write_text("x")
    assert command("convert").main(
        ["--from", str(path), "--to", str(tmp_path / "hf"), "--to-format", "huggingface",
         "--verify"]
    ) == 0  # fmt: skip
    first, second = capsys.readouterr().out.split("verified: every value ", 1)
    assert second.startswith("that the result holds is the source's, bit for bit\n")
    for line in (
        "left out: note.txt (no file that this format reads)",
        "left out: exp_avg, exp_avg_sq (no place in format huggingface)",
    ):
        assert line in first and line in second
    assert "verified: fingerprints\n" in second
    assert "not the source's, or not held: step, configuration, run state\n" in second
    assert "but as --config says" not in second
    assert command("convert").main(
        ["--from", str(tmp_path / "hf"), "--to", str(tmp_path / "back"), "--to-format", "native",
         "--verify"]
    ) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("zeros: exp_avg, exp_avg_sq (the source has none)") == 2
    assert "verified: step, configuration, fingerprints\n" in said
    assert "not the source's, but as --config says or as of a new run: run state\n" in said
    assert said.count("left out: config.json: bos_token_id") == 2


def test_inspect_and_evaluate_print_what_is_left_out(tmp_path, capsys, monkeypatch):
    path, _ = save_model(tmp_path / "run")
    (path / "note.txt").write_text("x")
    monkeypatch.setattr("sys.argv", ["inspect.py", str(path)])
    assert command("inspect").main() == 0
    assert "left out      note.txt (no file that this format reads)" in capsys.readouterr().out
    text = tmp_path / "text.txt"
    text.write_text("a few words")
    assert command("evaluate").main([str(path), "--text", str(text)]) == 1  # has no tokenizer
    assert "left out: note.txt (no file that this format reads)" in capsys.readouterr().out


def test_a_setting_that_the_target_has_no_place_for_is_named(tmp_path):
    for family, count in (("llama", 1), ("gpt2", 0)):
        path, _ = save_model(tmp_path / family, toy_model(family=family, dropout=0.1))
        about = survey(Job(path, tmp_path / "hf", "huggingface"))
        assert [item.name for item in about.left_out].count("dropout 0.1") == count


def test_zeros_of_single_tensors_are_named(tmp_path):
    state = {"a": torch.ones(2), "b": torch.ones(2)}
    state |= {f"optimizer.state.a.{slot}": torch.ones(2) for slot in ("exp_avg", "exp_avg_sq")}
    dcp.save(state, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    source = opened(tmp_path / "dcp")
    assert "exp_avg of b, exp_avg_sq of b" in describe(source, format_name="dcp", checksums="")
    assert not source.read("b", "exp_avg", whole((2,))).any()
