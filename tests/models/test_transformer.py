"""Whole models in one process: compared with Hugging Face's, in parts, and in lower precision."""

import pytest
import torch
import torch.nn.functional as F

from megagrow.config import ModelConfig
from megagrow.models.catalog import build_catalog
from megagrow.models.common.blocks import Head
from megagrow.models.common.parallel import SERIAL
from megagrow.models.transformer import (
    Transformer,
    layer_list,
    layer_types,
    named_tensors,
    next_token_loss,
)
from tests.models.parts import gradients, module_with, random_parameters

VOCABULARY = 13


def make(family="gpt2", **changes):
    sizes = {"layers": 2, "hidden": 16, "heads": 4, "ffn": 24, "sequence": 8, "vocab": VOCABULARY}
    return ModelConfig(family=family, **(sizes | changes))


def samples(rows=3, length=9):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(4))


FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama"])
MODELS = pytest.mark.parametrize(
    "model",
    [
        make(),
        make(tie_embeddings=False),
        make("llama"),
        make("llama", tie_embeddings=False),
        make("gpt2", kv_heads=2),
        make("llama", kv_heads=2, head_dim=6),
        make("llama", kv_heads=1),
    ],
    ids=str,
)


# --- names and parts ---


@MODELS
def test_named_tensors_are_the_catalog(model):
    catalog = build_catalog(model)
    found = named_tensors(Transformer(model))
    assert {name: tuple(p.shape) for name, p in found.items()} == {
        tensor.name: tensor.shape for tensor in catalog
    }
    assert list(found) == [tensor.name for tensor in catalog]


@MODELS
def test_layers_built_alone_hold_the_tensors_of_their_place(model):
    catalog = build_catalog(model)
    for place, kind in enumerate(layer_types(model)):
        alone = named_tensors([kind(model, SERIAL, place)])
        assert set(alone) == {t.name for t in catalog if place in t.places}
    assert place == model.layers + 1


def test_a_tied_head_uses_the_embeddings_parameter():
    first, *_, last = layer_list(make())
    assert isinstance(last, Head) and last.embedding.token is first.token
    assert len(list(Transformer(make()).parameters())) == len(build_catalog(make()))


@MODELS
def test_loss_is_the_cross_entropy_of_the_logits(model):
    module = module_with(model, random_parameters(model))
    x = samples()
    logits = module.logits(x[:, :-1])
    wanted = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(module(x), wanted, rtol=0, atol=1e-12)
    y, labels = x[:, :-1], x[:, 1:]
    for layer in module.layers:
        y = layer(y)
    torch.testing.assert_close(next_token_loss(model)(y, labels), wanted, rtol=0, atol=1e-12)


@MODELS
def test_no_logit_sees_a_later_token(model):
    module = module_with(model, random_parameters(model))
    x = samples()[:, :-1]
    changed = x.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % VOCABULARY
    before, after = module.logits(x), module.logits(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-12)
    assert (before[:, 5:] - after[:, 5:]).abs().amax(-1).min() > 1e-6


@FAMILIES
def test_grouped_queries_are_repeated_keys_and_values(family):
    grouped, plain = make(family, kv_heads=2), make(family)
    parameters = random_parameters(grouped)
    repeated = dict(parameters)
    for name, value in parameters.items():
        if ".attention.qkv." in name:
            # [group, 2 queries + key + value, ...] -> [head, query + key + value, ...]
            query, key, value = value.split((2, 1, 1), dim=1)
            query = query.flatten(0, 1).unsqueeze(1)
            key, value = (x.repeat_interleave(2, dim=0) for x in (key, value))
            repeated[name] = torch.cat((query, key, value), 1)
        elif name.endswith(".attention.out.weight"):
            repeated[name] = value.flatten(1, 2).unsqueeze(2)
    x = samples()[:, :-1]
    torch.testing.assert_close(
        module_with(grouped, parameters).logits(x),
        module_with(plain, repeated).logits(x),
        rtol=0,
        atol=1e-12,
    )


# --- Hugging Face ---


def copy_to_hugging_face(parameters, state, names):
    """Fill a Hugging Face state dict; `names` maps to megagrow's name and the reshaping."""
    for theirs, value in state.items():
        value.copy_(names(theirs, parameters).reshape(value.shape))


def gpt2_tensor(theirs, ours):
    if theirs in ("transformer.wte.weight", "lm_head.weight"):
        return ours["embedding.token"]
    if theirs == "transformer.wpe.weight":
        return ours["embedding.position"]
    if theirs.startswith("transformer.ln_f"):
        return ours["final_norm" + theirs.removeprefix("transformer.ln_f")]
    _, _, layer, part = theirs.split(".", 3)
    name, kind = part.rsplit(".", 1)
    name = {
        "ln_1": "attention.norm", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out",
        "ln_2": "mlp.norm", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down",
    }[name]  # fmt: skip
    value = ours[f"layers.{layer}.{name}.{kind}"]
    if name == "attention.qkv":
        value = value.transpose(0, 1)  # queries of all heads, then keys, then values
    if kind == "weight" and "norm" not in name:
        rows = value.flatten(1).shape[0] if name != "attention.qkv" else value[..., 0].numel()
        return value.reshape(rows, -1).T  # GPT-2 keeps its matrices transposed
    return value


def llama_tensor(theirs, ours, queries=2):
    fixed = {
        "model.embed_tokens.weight": "embedding.token", "lm_head.weight": "output.weight",
        "model.norm.weight": "final_norm.weight",
    }  # fmt: skip
    if theirs in fixed:
        return ours[fixed[theirs] if fixed[theirs] in ours else "embedding.token"]
    _, _, layer, part = theirs.split(".", 3)
    name = part.removesuffix(".weight")
    attention, mlp = f"layers.{layer}.attention", f"layers.{layer}.mlp"
    if name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        q, k, v = ours[f"{attention}.qkv.weight"].split((queries, 1, 1), dim=1)
        return {"q": q, "k": k, "v": v}[name[10]]
    gate, up = ours[f"{mlp}.up.weight"]
    return {
        "self_attn.o_proj": ours[f"{attention}.out.weight"],
        "input_layernorm": ours[f"{attention}.norm.weight"],
        "post_attention_layernorm": ours[f"{mlp}.norm.weight"],
        "mlp.gate_proj": gate,
        "mlp.up_proj": up,
        "mlp.down_proj": ours[f"{mlp}.down.weight"],
    }[name]


def same_logits_and_loss(model, theirs, names):
    parameters = random_parameters(model)
    theirs = theirs.double().eval()
    with torch.no_grad():
        copy_to_hugging_face(parameters, theirs.state_dict(), names)
    module, x = module_with(model, parameters), samples()
    # There rotary positions are computed in fp32, hence the tolerance.
    wanted = theirs(input_ids=x[:, :-1]).logits
    torch.testing.assert_close(module.logits(x[:, :-1]), wanted, rtol=1e-5, atol=1e-5)
    loss = theirs(input_ids=x, labels=x).loss
    torch.testing.assert_close(module(x).double(), loss.double(), rtol=1e-5, atol=1e-5)


def test_gpt2_is_hugging_faces():
    transformers = pytest.importorskip("transformers")
    model = make("gpt2")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=9, n_embd=16, n_layer=2, n_head=4, n_inner=24,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = make("gpt2", sequence=9)
    same_logits_and_loss(model, transformers.GPT2LMHeadModel(config), gpt2_tensor)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_is_hugging_faces(tied):
    transformers = pytest.importorskip("transformers")
    model = make("llama", kv_heads=2, head_dim=6, rope_theta=500.0, tie_embeddings=tied)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        max_position_embeddings=8, tie_word_embeddings=tied,
    )  # fmt: skip
    same_logits_and_loss(model, transformers.LlamaForCausalLM(config), llama_tensor)


# --- recomputation, precision, compilation ---


def loss_and_gradients(model, parameters):
    module = module_with(model, parameters).train()
    torch.manual_seed(6)
    loss = module(samples())
    loss.backward()
    return {"loss": loss.detach(), **gradients(module)}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recompute", ["selective", "full"])
@FAMILIES
def test_recomputation_changes_no_bit(family, recompute, dropout):
    plain = make(family, dropout=dropout)
    parameters = random_parameters(plain)
    wanted = loss_and_gradients(plain, parameters)
    model = plain.model_copy(update={"activation_checkpointing": recompute})
    found = loss_and_gradients(model, parameters)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def kept_bytes(model):
    """Memory of the activations that autograd keeps for the backward pass."""
    module, kept = module_with(model, random_parameters(model)), {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = module(samples(length=model.sequence + 1))
    loss.backward()
    return sum(kept.values())


def test_recomputation_keeps_less():
    model = make("llama", layers=4, sequence=64)
    none, selective, full = (
        kept_bytes(model.model_copy(update={"activation_checkpointing": recompute}))
        for recompute in ("none", "selective", "full")
    )
    # Selective: at least the rotated queries and keys of each layer, [B, S, E] in fp64.
    assert none - selective >= 4 * 2 * (3 * 64 * 16 * 8)
    assert full < none / 4


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_train(family, dtype):
    model = make(family, kv_heads=2)
    parameters = random_parameters(model)
    reference = module_with(model, parameters)
    wanted = reference(samples())
    wanted.backward()
    module = module_with(model, parameters).to(dtype)
    loss = module(samples())
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - wanted.item()) < 0.05 * wanted.item()
    for name, gradient in gradients(reference).items():
        mine = gradients(module)[name]
        assert mine.dtype == dtype
        if gradient.norm() > 1e-3:  # key biases have none
            assert F.cosine_similarity(mine.double().flatten(), gradient.flatten(), 0) > 0.98, name


def test_dropout_acts_while_training_only():
    model = make(dropout=0.5)
    module = module_with(model, random_parameters(model))
    x = samples()
    assert module.train()(x) != module(x)
    assert module.eval()(x) == module(x)


@pytest.mark.slow
@FAMILIES
def test_compiled_blocks_compute_the_same(family):
    plain = make(family, kv_heads=2)
    parameters = random_parameters(plain)
    wanted = loss_and_gradients(plain, parameters)
    model = plain.model_copy(update={"compile": True})
    found = loss_and_gradients(model, parameters)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10)
