"""Megatron-LM's classic checkpoints: round trips, files as Megatron writes them, and its model."""

import argparse
import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch

from megagrow.checkpoint.convert.registry import get_format
from megagrow.checkpoint.formats.megatron import names
from megagrow.checkpoint.formats.megatron import source as megatron
from megagrow.checkpoint.formats.megatron.arguments import CARRIED, FIXED
from megagrow.checkpoint.formats.megatron.names import write_args
from megagrow.checkpoint.interface.format import NO_OPTIONS, LeftOut, ReadOptions
from megagrow.errors import CheckpointError, ConfigError
from megagrow.models.catalog import build_catalog
from megagrow.models.registry import family_of
from megagrow.state.catalog import ADAM_SLOTS, MASTER
from megagrow.state.layout import Layout
from tests.checkpoint.foreign import WholeSource, differing, open_checkpoint, write_checkpoint
from tests.jobs import REPOSITORY
from tests.toys import random_state, toy_model, toy_models

FORMAT = megatron.FORMAT
LAYOUTS = [Layout(), Layout(tensor=2), Layout(pipeline=2), Layout(tensor=2, pipeline=2, data=2)]
FILE = "model_optim_rng.pt"


def whole_source(model, **options):
    state = random_state(build_catalog(model), seed=5, dtype=torch.float32)
    return WholeSource(model, state, **options)


# Those of families that Megatron has.
MODELS = [(name, model) for name, model in toy_models() if family_of(model).megatron]


@pytest.mark.parametrize(("name", "model"), MODELS, ids=[name for name, _ in MODELS])
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
    """Megatron-Core's names as the classic model's, with its nesting."""
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
    """Names as in Transformer Engine's layers, with their extra state."""
    renamed = {}
    for name, values in parameters.items():
        name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        renamed[name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")] = values
        if "linear" in name:
            renamed[name.rpartition(".")[0] + "._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    return renamed


def megatrons_own(root, model, names, *, version=3.0, half=False, ours=True, **more):
    """A checkpoint written by torch.save; returns its contents as a source.

    Parameters and their order come from our sink (which `test_megatron_core` has compared with
    Megatron's model), the optimizer's state from a real AdamW on them.
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


# --- what Megatron's arguments become -----------------------------------------------------


def arguments():
    """The arguments as our sink writes them."""
    return write_args(toy_model(family="llama", tie_embeddings=False), Layout(), padded=128)


def fate(key, value):
    """Whether an argument is carried, left out or refused (then by name)."""
    args = arguments() | {key: value}
    try:
        left_out = names.read_model(args, where="file", options=NO_OPTIONS)[2]
    except CheckpointError as error:
        return "refused" if key in str(error) else "refused without its name"
    return "left out" if f"args.{key}" in {item.name for item in left_out} else "carried"


# Arguments that change the function that Megatron-Core's model computes of its tensors.
CHANGES_THE_FUNCTION = {
    "activation_func": "relu", "activation_func_clamp_value": 7.0, "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": True, "attention_output_gate": True,
    "experimental_attention_variant": "dsa", "expert_model_parallel_size": 2, "fp4_param": True,
    "fp8_param": True, "gated_linear_unit": True, "glu_linear_offset": 1.0,
    "heterogeneous_block_specs": True, "is_hybrid_model": True,
    "layernorm_zero_centered_gamma": True, "linear_attention_freq": 4, "mrope_section": [2, 1],
    "mtp_num_layers": 1, "multi_latent_attention": True, "no_rope_freq": 4, "num_moe_experts": 8,
    "pipeline_model_parallel_layout": "E|t*2|L", "qk_l2_norm": True, "qk_layernorm": True,
    "quant_recipe": "fp4", "rotary_interleaved": True, "softmax_scale": 0.5,
    "softmax_type": "learnable", "use_kitchen": True, "use_kitchen_attention": True,
    "use_te_activation_func": True, "virtual_pipeline_model_parallel_size": 2,
    "window_attn_skip_freq": 2, "window_size": (8, 0),
}  # fmt: skip


def test_every_field_of_megatron_cores_configuration_has_a_fate():
    """A new field in a release makes this test fail: someone must decide what it does."""
    config = pytest.importorskip("megatron.core.transformer.transformer_config")
    fields = {field.name: field for field in dataclasses.fields(config.TransformerConfig)}
    without = {key for key in fields if key not in CARRIED and key not in FIXED}
    assert {fate(key, "some other value") for key in without} == {"left out"}
    fixed = {key for key in fields if key in FIXED}
    assert fixed == set(CHANGES_THE_FUNCTION)
    for key in fixed:
        default = fields[key].default
        if key != "activation_func":  # a function: arguments hold names instead
            assert fate(key, default) == "carried", key
        assert fate(key, CHANGES_THE_FUNCTION[key]) == "refused", key


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("window_size", (8, 0), "refused"),
        ("window_size", (-1, -1), "carried"),
        ("num_experts", 4, "refused"),
        ("apply_layernorm_1p", True, "refused"),
        ("position_embedding_type", "yarn", "refused"),
        ("encoder_num_layers", 3, "refused"),
        ("retro_add_retriever", True, "refused"),
        ("spec", ["mine", "layer"], "refused"),
        ("adam_beta2", 0.95, "left out"),
        ("moe_router_topk", 8, "left out"),
        ("a_feature_of_tomorrow", True, "refused"),
        ("a_feature_of_tomorrow", 3, "refused"),
        ("a_feature_of_tomorrow", False, "left out"),
        ("a_feature_of_tomorrow", None, "left out"),
    ],
)
def test_an_argument_is_carried_left_out_or_refused(key, value, wanted):
    assert fate(key, value) == wanted


def test_gelu_without_its_fused_kernel_is_another_function():
    args = write_args(toy_model(), Layout(), padded=128)
    names.read_model(args | {"bias_gelu_fusion": True}, where="file", options=NO_OPTIONS)
    with pytest.raises(CheckpointError, match="bias_gelu_fusion: megagrow's GELU is the tanh form"):
        names.read_model(args | {"bias_gelu_fusion": False}, where="file", options=NO_OPTIONS)


def test_a_person_can_say_that_an_argument_changes_nothing():
    args = arguments() | {"mine": 3}
    options = ReadOptions(ignore=("mine",))
    left_out = names.read_model(args, where="file", options=options)[2]
    assert LeftOut("args.mine", "ignored, as you asked") in left_out


def test_a_fractional_rotary_base_comes_back(tmp_path):
    source = whole_source(toy_model(family="llama", rope_theta=12345.75))
    back = open_checkpoint(FORMAT, write_checkpoint(FORMAT, source, tmp_path, Layout()))
    assert back.config["model"]["rope_theta"] == 12345.75


def test_initialisation_by_role_comes_back(tmp_path):
    model = toy_model(init_std={"embedding": 0.5, "matrices": "fan_in"})
    source = whole_source(model, config={"model": model.model_dump(mode="json", by_alias=True)})
    back = open_checkpoint(FORMAT, write_checkpoint(FORMAT, source, tmp_path, Layout(tensor=2)))
    assert back.catalog == build_catalog(model) and back.config == source.config
    assert "init_method_std" not in write_args(model, Layout(), padded=128)
    by_role = toy_model(init_std={"embedding": 0.5, "matrices": 0.1})
    assert write_args(by_role, Layout(), padded=128)["init_method_std"] == 0.1


def test_the_true_vocabulary_can_be_given(tmp_path):
    megatrons_own(tmp_path, toy_model(), classic, ours=False, vocab_size=None)
    source = open_checkpoint(FORMAT, tmp_path)
    assert source.catalog["embedding.token"].shape[0] == 128
    assert any("all 128 rows count as tokens" in item.name for item in source.left_out)
    path = FORMAT.find(tmp_path)
    source = FORMAT.open(path, ReadOptions(vocabulary=13))
    assert source.catalog["embedding.token"].shape[0] == 13
    assert LeftOut("rows 13 to 127 of the token table", "padding of the vocabulary") in (
        source.left_out
    )
    with pytest.raises(CheckpointError, match="at most 128"):
        FORMAT.open(path, ReadOptions(vocabulary=129))
    for name in ("native", "dcp"):
        with pytest.raises(ConfigError, match="leave out --vocab-size"):
            get_format(name).open(path, ReadOptions(vocabulary=13))


# --- copies, and what is left out ---------------------------------------------------------


def changed(file, change):
    """Let a function change the contents of a torch.save file."""
    value = torch.load(file, weights_only=False)
    change(value)
    torch.save(value, file)


@pytest.mark.parametrize(
    ("layout", "file", "stored"),
    [
        (Layout(tensor=2), "mp_rank_01", "decoder.layers.0.input_layernorm.weight"),
        (Layout(tensor=2), "mp_rank_01", "decoder.layers.1.self_attention.linear_proj.bias"),
        (Layout(pipeline=2), "mp_rank_00_001", "output_layer.weight"),
    ],
)
@pytest.mark.parametrize("slot", ["master", "exp_avg"])
def test_copies_that_are_not_alike_are_refused(tmp_path, layout, file, stored, slot):
    source = whole_source(toy_model(), config={"precision": {"dtype": "fp32"}})
    write_checkpoint(FORMAT, source, tmp_path, layout)
    path = tmp_path / "iter_0000007" / file / FILE

    def change(value):
        if slot == "master":
            value["model"][stored].view(-1)[0] += 1
        else:
            plain = [n for n, t in value["model"].items() if n.endswith("bias") or t.dim() == 1]
            order = [n for n in value["model"] if n not in plain] + plain
            value["optimizer"]["state"][order.index(stored)][slot].view(-1)[0] += 1

    changed(path, change)
    with pytest.raises(CheckpointError, match="not the copy that it should be") as caught:
        open_checkpoint(FORMAT, tmp_path)
    assert f"--ignore {stored}" in str(caught.value) and f"slot {slot}" in str(caught.value)
    back = FORMAT.open(FORMAT.find(tmp_path), ReadOptions(ignore=(stored,)))
    assert differing(source, back) is None
    assert any(f"{stored}, slot {slot}" in item.name for item in back.left_out)


def test_what_a_file_holds_besides_is_named(tmp_path):
    megatrons_own(tmp_path, toy_model(), engine, ours=False)
    rank = tmp_path / "iter_0000007/mp_rank_00"

    def change(value):
        value["opt_param_scheduler"] = {"max_lr": 1.0}
        value["model"]["a_note"] = "text"
        value["optimizer"]["state"][0]["max_exp_avg_sq"] = torch.ones(3)
        value["optimizer"]["state"][1]["step"] = torch.tensor(9.0)

    changed(rank / FILE, change)
    (rank / "distrib_optim.pt").write_bytes(b"")
    source = open_checkpoint(FORMAT, tmp_path)
    left_out = {item.name for item in source.left_out}
    assert left_out >= {
        "rng_state", "opt_param_scheduler", "model.a_note", "optimizer.param_groups",
        "optimizer.state.0.max_exp_avg_sq", "optimizer.state.0.step",
        "model.decoder.layers.0.mlp.linear_fc1._extra_state", "mp_rank_00/distrib_optim.pt",
    }  # fmt: skip
    assert "optimizer.state.1.step" not in left_out
    assert source.run_state["optimizer_step"] == 9


def test_a_file_without_the_moments_that_others_have_is_refused(tmp_path):
    write_checkpoint(FORMAT, whole_source(toy_model()), tmp_path, Layout(tensor=2))
    changed(tmp_path / "iter_0000007/mp_rank_01" / FILE, lambda value: value.pop("optimizer"))
    with pytest.raises(CheckpointError, match=r"mp_rank_01.*has no optimizer state"):
        open_checkpoint(FORMAT, tmp_path)


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
    """Its model loads our export, lists its parameters in our order and gives our logits."""
    pytest.importorskip("megatron.core", reason="pip install megatron-core")
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.megatron_client", tmp_path],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("same\n"), done.stderr[-3000:]
