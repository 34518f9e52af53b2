"""Megatron-LM's classic checkpoints: round trips, files as Megatron writes them, and its model."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foreign import WholeSource, differing, open_checkpoint, write_checkpoint
from toys import random_state, toy_model, toy_models

from megagrow.checkpoint import megatron
from megagrow.errors import CheckpointError, ConfigError
from megagrow.layout import Layout
from megagrow.model.catalog import build_catalog
from megagrow.state.catalog import ADAM_SLOTS, MASTER

FORMAT = megatron.FORMAT
LAYOUTS = [Layout(), Layout(tensor=2), Layout(pipeline=2), Layout(tensor=2, pipeline=2, data=2)]
FILE = "model_optim_rng.pt"


def whole_source(model, **options):
    state = random_state(build_catalog(model), seed=5, dtype=torch.float32)
    return WholeSource(model, state, **options)


@pytest.mark.parametrize(
    ("name", "model"), list(toy_models()), ids=[name for name, _ in toy_models()]
)
def test_what_is_written_is_read_again(name, model, tmp_path):
    for number, layout in enumerate(LAYOUTS):
        source = whole_source(model, config={"precision": {"dtype": ("fp32", "bf16")[number % 2]}})
        path = write_checkpoint(FORMAT, source, tmp_path / str(number), layout)
        back = open_checkpoint(FORMAT, path)
        back.verify()
        assert differing(source, back) is None, layout
        assert (back.layout.tensor, back.layout.pipeline) == (layout.tensor, layout.pipeline)
        assert back.step == source.step and back.run_state == source.run_state
        assert back.config == source.config and back.fingerprints == source.fingerprints


def test_parameters_alone(tmp_path):
    source = whole_source(toy_model(family="llama"))
    source.slots = (MASTER,)
    path = write_checkpoint(FORMAT, source, tmp_path, Layout(tensor=2), dtype=torch.float32)
    back = open_checkpoint(FORMAT, path)
    assert back.slots == (MASTER,) and differing(source, back) is None


def test_layers_that_do_not_share_out_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="3 layers over 2 pipeline stages"):
        write_checkpoint(FORMAT, whole_source(toy_model(layers=3)), tmp_path, Layout(pipeline=2))


# --- as Megatron writes them --------------------------------------------------------------

CLASSIC = {
    "input_layernorm": "input_norm", "pre_mlp_layernorm": "post_attention_norm",
    "linear_qkv": "query_key_value", "linear_proj": "dense",
    "linear_fc1": "dense_h_to_4h", "linear_fc2": "dense_4h_to_h",
    "final_layernorm": "final_norm",
}  # fmt: skip


def classic(parameters):
    """Megatron-Core's names as those of the classic model, nested as it nests them."""
    model = {"embedding": {}, "encoder": {}}
    for name, values in parameters.items():
        if name.startswith("embedding."):
            _, part, kind = name.split(".")
            model["embedding"][part] = {kind: values}
        elif name.startswith("decoder."):
            for ours, theirs in CLASSIC.items():
                name = name.replace(ours, theirs)
            model["encoder"][name.removeprefix("decoder.")] = values
        else:
            model["output_layer"] = {"weight": values}
    return {"language_model": model}


def engine(parameters):
    """Names as Transformer Engine's layers have them, with their extra state."""
    renamed = {}
    for name, values in parameters.items():
        name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        renamed[name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")] = values
        if "linear" in name:
            renamed[name.rpartition(".")[0] + "._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    return renamed


def megatrons_own(root, model, names, *, version=3.0, half=False, ours=True, **more):
    """A checkpoint that torch.save wrote; returns the source that it holds.

    Parameters and their order are taken from what our sink writes (as `test_megatron_core` has
    compared with Megatron's model), the optimizer's state from a real AdamW over them.
    """
    source = whole_source(model)
    path = write_checkpoint(FORMAT, source, root, Layout()) / "iter_0000007" / "mp_rank_00" / FILE
    file = torch.load(path, weights_only=False)
    parameters = {name: torch.nn.Parameter(v) for name, v in file["model"].items()}
    if version < 2.0:
        for name in [n for n in parameters if "linear_qkv" in n]:
            values = parameters[name].detach().view(model.heads, 3, model.head_dim, -1)
            order = (1, 0, 2, 3) if version == 0.0 else (0, 2, 1, 3)
            turned = values.permute(order).reshape(parameters[name].shape)
            parameters[name] = torch.nn.Parameter(turned)
    plain = [n for n, p in parameters.items() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters[n] for n in parameters if n not in plain], "wd_mult": 1.0},
            {"params": [parameters[n] for n in plain], "wd_mult": 0.0},
        ]
    )
    for p in parameters.values():
        p.grad = torch.randn(p.shape)
    optimizer.step()
    values = {name: p.detach().clone() for name, p in parameters.items()}
    state = optimizer.state_dict()
    if half:
        masters = [[p.detach().clone() for p in g["params"]] for g in optimizer.param_groups]
        state = {"optimizer": state, "fp32_from_fp16_params": masters}
        values = {name: p.bfloat16() for name, p in values.items()}
    args = argparse.Namespace(
        **(vars(file["args"]) | {"iteration": 7, "params_dtype": None} | more)
    )
    rng = [{"random_rng_state": (3, (1, 2), None), "torch_rng_state": torch.get_rng_state()}]
    kept = {"megagrow": file["megagrow"]} if ours else {}
    torch.save(
        {"args": args, "checkpoint_version": version, "iteration": 7, "model": names(values),
         "optimizer": state, "rng_state": rng, **kept},
        path,
    )  # fmt: skip
    moments = {
        slot.name: {n: optimizer.state[p][slot.name] for n, p in parameters.items()}
        for slot in ADAM_SLOTS[1:]
    }
    return {MASTER.name: {n: p.detach() for n, p in parameters.items()}, **moments}


@pytest.mark.parametrize(
    ("family", "names", "version", "half"),
    [("gpt2", classic, 2.0, False), ("llama", classic, 3.0, True), ("gpt2", engine, 3.0, True),
     ("llama", engine, 3.0, False), ("gpt2", classic, 0.0, False), ("gpt2", classic, 1.0, True)],
)  # fmt: skip
def test_what_megatron_writes_is_read(family, names, version, half, tmp_path):
    model = toy_model(family=family, tie_embeddings=family == "gpt2")
    saved = megatrons_own(tmp_path, model, names, version=version, half=half)
    back = open_checkpoint(FORMAT, tmp_path)
    back.verify()
    assert back.slots == ADAM_SLOTS and back.config["model"]["family"] == family
    for slot, tensors in saved.items():
        for stored, values in tensors.items():
            name = megatron.names.logical_name(stored, 0)
            tensor = back.catalog[name]
            found = back.read(name, slot, megatron_box(tensor))
            if version < 2.0 and "linear_qkv" in stored:
                order = (1, 0, 2, 3) if version == 0.0 else (0, 2, 1, 3)
                shape = [(model.heads, 3, model.head_dim)[axis] for axis in order[:3]]
                values = values.view(*shape, -1).permute(order)
            values = values.reshape(-1)[: tensor.volume]
            assert torch.equal(found.reshape(-1), values), (slot, stored)


def megatron_box(tensor):
    from megagrow.state.boxes import whole

    return whole(tensor.shape)


def test_what_it_cannot_be_is_refused_by_name(tmp_path):
    for key, value in {
        "num_experts": 8, "swiglu": True, "rotary_percent": 0.5, "normalization": "RMSNorm",
        "qk_layernorm": True, "hidden_size": 24, "padded_vocab_size": 64, "num_layers": 3,
        "tensor_model_parallel_size": 2, "num_attention_heads": "many",
    }.items():  # fmt: skip
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        megatrons_own(tmp_path / "x", toy_model(), classic, ours=False, **{key: value})
        with pytest.raises(CheckpointError, match=r"args|model_optim_rng|layers\.2"):
            open_checkpoint(FORMAT, tmp_path / "x")
    shutil.rmtree(tmp_path / "x")
    megatrons_own(tmp_path / "x", toy_model(), classic, use_distributed_optimizer=True)
    assert open_checkpoint(FORMAT, tmp_path / "x").slots == (MASTER,)


def test_the_tracker_cannot_lead_outside(tmp_path):
    source = whole_source(toy_model())
    write_checkpoint(FORMAT, source, tmp_path / "a", Layout())
    (tmp_path / "b").mkdir()
    for text in ("../a/iter_0000007", "7", "/etc", "release"):
        (tmp_path / "b" / megatron.LATEST).write_text(text)
        assert FORMAT.find(tmp_path / "b") is None
    assert FORMAT.find(tmp_path / "a") == tmp_path / "a" / "iter_0000007"
    (tmp_path / "a" / "iter_0000007").rename(tmp_path / "a" / "release")
    (tmp_path / "a" / megatron.LATEST).write_text("release\n")
    assert differing(source, open_checkpoint(FORMAT, tmp_path / "a")) is None


# --- Megatron-Core's own model ------------------------------------------------------------


def test_megatron_core(tmp_path):
    """Its model takes our export, lists its parameters in our order and gives our logits."""
    pytest.importorskip("megatron.core", reason="pip install megatron-core")
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "megatron_client.py", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("same\n"), done.stderr[-3000:]
