"""Models of transformers, imported, grown and exported, give the same logits as before."""

import pytest
import torch

from megagrow.config import GrowConfig, ModelConfig
from megagrow.growth.plan import plan_growth
from megagrow.growth.registry import OPERATORS
from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.transfer.whole_state import MemoryState
from tests.toys import mapped, token_batches

transformers = pytest.importorskip("transformers")

GPT2 = ModelConfig(family="gpt2", layers=2, hidden=16, heads=2, ffn=40, sequence=12, vocab=29)
LLAMA = ModelConfig(
    family="llama", layers=2, hidden=24, heads=4, kv_heads=2, ffn=40, sequence=12, vocab=29,
    tie_embeddings=False,
)  # fmt: skip


def _gpt2(model):
    config = transformers.GPT2Config(
        n_layer=model.layers, n_embd=model.hidden, n_head=model.heads, n_inner=model.ffn,
        n_positions=model.sequence, vocab_size=model.vocabulary, initializer_range=0.3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, layer_norm_epsilon=model.norm_eps,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _llama(model):
    config = transformers.LlamaConfig(
        num_hidden_layers=model.layers, hidden_size=model.hidden, intermediate_size=model.ffn,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_groups,
        head_dim=model.head_dim, max_position_embeddings=model.sequence, initializer_range=0.3,
        vocab_size=model.vocabulary, rms_norm_eps=model.norm_eps, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _gpt2_names(model):
    """Their names: (ours, into ours, back)."""
    heads, size, width = model.heads, model.head_dim, model.hidden

    def qkv(weight):  # [E, 3 * heads * D] -> [heads, 3, D, E]; a bias without E
        rows = weight.t() if weight.dim() == 2 else weight
        return rows.reshape(3, heads, size, *rows.shape[1:]).transpose(0, 1)

    def qkv_back(weight):
        rows = weight.transpose(0, 1).reshape(3 * heads * size, *weight.shape[3:])
        return rows.t() if rows.dim() == 2 else rows

    def turned(weight):
        return weight.t()

    def same(weight):
        return weight

    def out(weight):
        return weight.t().reshape(width, heads, 1, size)

    def out_back(weight):
        return weight.reshape(width, heads * size).t()

    names = {"transformer.wte.weight": ("embedding.token", same, same)}
    names["transformer.wpe.weight"] = ("embedding.position", same, same)
    for part in ("weight", "bias"):
        names[f"transformer.ln_f.{part}"] = (f"final_norm.{part}", same, same)
        matrix = (turned, turned) if part == "weight" else (same, same)
        heads_out = (out, out_back) if part == "weight" else matrix
        for i in range(model.layers):
            theirs, ours = f"transformer.h.{i}", f"layers.{i}"
            for a, b, *change in (
                ("ln_1", "attention.norm", same, same),
                ("attn.c_attn", "attention.qkv", qkv, qkv_back),
                ("attn.c_proj", "attention.out", *heads_out),
                ("ln_2", "mlp.norm", same, same),
                ("mlp.c_fc", "mlp.up", *matrix),
                ("mlp.c_proj", "mlp.down", *matrix),
            ):  # fmt: skip
                names[f"{theirs}.{a}.{part}"] = (f"{ours}.{b}.{part}", *change)
    return names


def _import_gpt2(model, weights):
    return {ours: into(weights[theirs]) for theirs, (ours, into, _) in _gpt2_names(model).items()}


def _export_gpt2(model, ours):
    return {theirs: back(ours[name]) for theirs, (name, _, back) in _gpt2_names(model).items()}


_LLAMA_NAMES = {"input_layernorm": "attention.norm", "post_attention_layernorm": "mlp.norm"}


def _import_llama(model, weights):
    groups, size, width = model.kv_groups, model.head_dim, model.hidden
    queries = model.heads // groups
    ours = {
        "embedding.token": weights["model.embed_tokens.weight"],
        "final_norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    for i in range(model.layers):
        their, our = f"model.layers.{i}", f"layers.{i}"
        for a, b in _LLAMA_NAMES.items():
            ours[f"{our}.{b}.weight"] = weights[f"{their}.{a}.weight"]
        q, k, v = (weights[f"{their}.self_attn.{x}_proj.weight"] for x in "qkv")
        parts = [q.view(groups, queries, size, width)]
        parts += [x.view(groups, 1, size, width) for x in (k, v)]
        ours[f"{our}.attention.qkv.weight"] = torch.cat(parts, dim=1)
        out = weights[f"{their}.self_attn.o_proj.weight"]
        ours[f"{our}.attention.out.weight"] = out.view(width, groups, queries, size)
        gate, up = (weights[f"{their}.mlp.{x}_proj.weight"] for x in ("gate", "up"))
        ours[f"{our}.mlp.up.weight"] = torch.stack([gate, up])
        ours[f"{our}.mlp.down.weight"] = weights[f"{their}.mlp.down_proj.weight"]
    return ours


def _export_llama(model, ours):
    queries = model.heads // model.kv_groups
    weights = {
        "model.embed_tokens.weight": ours["embedding.token"],
        "model.norm.weight": ours["final_norm.weight"],
        "lm_head.weight": ours["output.weight"],
    }
    for i in range(model.layers):
        their, our = f"model.layers.{i}", f"layers.{i}"
        for a, b in _LLAMA_NAMES.items():
            weights[f"{their}.{a}.weight"] = ours[f"{our}.{b}.weight"]
        parts = ours[f"{our}.attention.qkv.weight"].split((queries, 1, 1), dim=1)
        for x, part in zip("qkv", parts, strict=True):
            weights[f"{their}.self_attn.{x}_proj.weight"] = part.flatten(0, 2)
        out = ours[f"{our}.attention.out.weight"]
        weights[f"{their}.self_attn.o_proj.weight"] = out.flatten(1)
        gate, up = ours[f"{our}.mlp.up.weight"]
        weights[f"{their}.mlp.gate_proj.weight"] = gate
        weights[f"{their}.mlp.up_proj.weight"] = up
        weights[f"{their}.mlp.down_proj.weight"] = ours[f"{our}.mlp.down.weight"]
    return weights


FAMILIES = {
    "gpt2": (GPT2, _gpt2, _import_gpt2, _export_gpt2),
    "llama": (LLAMA, _llama, _import_llama, _export_llama),
}
# A model in a ramp cannot be expressed in transformers.
# transformers' GPT-2 has one key to a query and hidden = heads * head_dim.
NOT_IN_GPT2 = {"head_dim", "kv_groups"}
CASES = [
    (family, name)
    for family in FAMILIES
    for name, operator in OPERATORS.items()
    if operator.keeps != "nothing"
    and not operator.ramp
    and not (family == "gpt2" and name in NOT_IN_GPT2)
    and not (family == "llama" and name == "untie")  # which is not tied here
]


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize(("family", "operator"), CASES)
def test_grown_models_of_transformers_keep_their_logits(family, operator, factor):
    model, make, import_, export = FAMILIES[family]
    torch.manual_seed(0)
    theirs = make(model).eval()
    weights = {name: value.detach() for name, value in theirs.state_dict().items()}
    ours = import_(model, weights)
    small = build_catalog(model)
    assert {t.name: t.shape for t in small} == {n: tuple(v.shape) for n, v in ours.items()}
    state = MemoryState.empty(small, ADAM_SLOTS)
    for (name, slot), values in state.tensors.items():
        values.copy_(ours[name] if slot == "master" else torch.zeros(values.shape))
    large, growth = plan_growth(GrowConfig(operator=operator, factor=factor), model)
    new = mapped(growth, small, state)
    grown = make(large).eval()
    exported = export(large, {t.name: new.tensors[t.name, "master"] for t in growth.target})
    missing, unexpected = grown.load_state_dict(exported, strict=False)
    assert not unexpected and all(name == "lm_head.weight" for name in missing)
    grown.tie_weights()
    tokens = torch.from_numpy(token_batches(model, samples=3, seed=1)[0])[:, :-1]
    with torch.no_grad():
        before, after = theirs(tokens).logits, grown(tokens).logits
    assert before.std() > 0.1
    assert (after[..., : model.vocabulary] - before).abs().max() <= 1e-4
