"""Every family against transformers: logits on import, after a round trip, after growths."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megagrow.checkpoint.convert.run import Job, convert
from megagrow.checkpoint.formats.huggingface.adapter import open_source
from megagrow.checkpoint.interface.model_of import model_of
from megagrow.config.growths import GrowConfig
from megagrow.errors import CheckpointError, GrowthError
from megagrow.models.registry import FAMILIES as REGISTERED
from megagrow.models.transformer import Transformer, named_tensors
from megagrow.state.boxes import whole
from megagrow.train.grow_offline import Grow
from tests.toys import FAMILIES, featured_models

SIZES = {
    "num_hidden_layers": 4, "hidden_size": 24, "num_attention_heads": 4, "vocab_size": 53,
    "intermediate_size": 40, "max_position_embeddings": 64, "initializer_range": 0.15,
    "pad_token_id": 0,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 500000.0,
}  # fmt: skip
# The published values of everything but sizes; windows are cut to what a test can hold.
CASES = {
    "llama-1": ("llama", {"rms_norm_eps": 1e-6}),
    "llama-3": ("llama", {**GROUPED, "rms_norm_eps": 1e-5, "rope_theta": 5e5}),
    "llama-3.2": (
        "llama",
        {**GROUPED, "rms_norm_eps": 1e-5, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    ),
    "llama-linear": (
        "llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "smollm2": ("llama", {**GROUPED, "rope_theta": 1e5, "tie_word_embeddings": True}),
    "mistral-0.1": ("mistral", {**GROUPED, "sliding_window": 7, "head_dim": 8}),
    "mistral-0.3": ("mistral", {**GROUPED, "sliding_window": None, "rope_theta": 1e6}),
    "qwen2.5": ("qwen2", {**GROUPED, "rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 10, "rope_theta": 1e6}),
    "olmo2": ("olmo2", {"rope_theta": 5e5}),
    "smollm3": ("smollm3", {**GROUPED, "rope_theta": 5e6, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"sliding_window": 9}),
    "phi4-mini": (
        "phi3",
        {
            **GROUPED, "hidden_size": 32, "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default", "partial_rotary_factor": 0.75, "rope_theta": 1e4,
            },
        },
    ),
    "pythia": (
        "gpt_neox",
        {
            "hidden_size": 32,
            "rope_parameters": {
                "rope_type": "default", "partial_rotary_factor": 0.25, "rope_theta": 1e4,
            },
        },
    ),
    "gemma2": (
        "gemma2",
        {
            **GROUPED, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 5,
            "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
        },
    ),
}  # fmt: skip
# Growths that keep the loss. transformers derives head_dim from hidden and heads in some
# families, so heads grow along.
WIDER = {"hidden": 36, "ffn": 60, "heads": 6}
GROWTHS = {
    "deeper": lambda model: {"operator": "depth_identity", "target": {"layers": 8}},
    "wider": lambda model: {
        "operator": "width_fresh",
        "target": {**WIDER, "hidden": 6 * model.head_dim}
        if model.head_dim_ is None
        else {"hidden": 36, "ffn": 60},
    },
    "copied": lambda model: {"operator": "width", "factor": 2},
}
# What is refused, and where transformers has one eps for norms that grow and for norms that do not.
REFUSED = {("olmo2", "wider"), ("gemma2", "copied")}
SHARED_EPS = {("qwen3", "wider"), ("gemma2", "wider")}


@pytest.fixture(params=CASES, scope="module")
def released(request, tmp_path_factory):
    """(name, directory, transformers' model): norms and biases are random as well."""
    kind, settings = CASES[request.param]
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **settings})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    path = tmp_path_factory.mktemp("released") / request.param
    model.save_pretrained(path)
    return request.param, path, model.eval()


def tokens():
    return torch.randint(SIZES["vocab_size"], (3, 24), generator=torch.manual_seed(2))


def our_logits(path):
    source = open_source(path)
    model = Transformer(model_of(source)).eval()
    with torch.no_grad():
        for name, parameter in named_tensors(model).items():
            parameter.copy_(source.read(name, "master", whole(source.catalog[name].shape)))
        return model.logits(tokens())


def their_logits(path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager", torch_dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(tokens()).logits


def test_logits_on_import(released):
    _, path, theirs = released
    with torch.no_grad():
        wanted = theirs(tokens()).logits
    assert wanted.std() > 0.1
    assert (our_logits(path) - wanted).abs().max() <= 1e-5


def test_there_and_back_is_the_identity(released, tmp_path):
    _, path, theirs = released
    convert(Job(path, tmp_path / "native", "native"))
    convert(Job(tmp_path / "native", tmp_path / "back", "huggingface"))
    found, wanted = (load_file(p / "model.safetensors") for p in (tmp_path / "back", path))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        assert torch.equal(their_logits(tmp_path / "back"), theirs(tokens()).logits)


@pytest.mark.parametrize("growth", GROWTHS)
def test_a_growth_that_keeps_the_loss_can_be_exported(released, tmp_path, growth):
    name, path, theirs = released
    model = model_of(open_source(path))
    section = GROWTHS[growth](model)
    if model.kv_heads and "heads" in section.get("target", {}):
        section["target"]["kv_heads"] = 3
    job = Job(path, tmp_path / "grown", "huggingface", transform=Grow(GrowConfig(**section)))
    if (name, growth) in REFUSED:
        with pytest.raises(GrowthError, match="has no rule for"):
            convert(job)
        return
    convert(job)
    with torch.no_grad():
        wanted = theirs(tokens()).logits
    bound = 1e-3 if (name, growth) in SHARED_EPS else 1e-5
    assert (their_logits(tmp_path / "grown") - wanted).abs().max() <= bound


def test_every_family_is_here():
    kinds = {kind for kind, _ in CASES.values()}
    registered = set(REGISTERED) - {"toy"}  # which other tests add
    assert kinds == registered - {"gpt2"}
    assert set(featured_models()) | set(FAMILIES) == registered


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama-3.2", "rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
        ("llama-3.2", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("phi3", "rope_scaling", {"rope_type": "longrope", "factor": 2.0}),
        ("smollm3", "no_rope_layers", [1, 0, 0, 1]),
        ("gemma2", "layer_types", ["full_attention"] * 4),
        ("qwen3", "layer_types", ["sliding_attention"] * 4),
        ("pythia", "use_parallel_residual", False),
        ("qwen2.5", "use_sliding_window", True),
    ],
)
def test_what_a_family_lacks_is_refused_by_name(tmp_path, name, key, value):
    kind, settings = CASES[name]
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **settings}).to_dict()
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "rope_parameters": None, key: value})
    )
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=key):
        open_source(tmp_path)


# Another value for every setting of the families' configurations.
CHANGED = {
    "architectures": ["X"], "attention_bias": None, "attention_dropout": 0.2,
    "attn_logit_softcapping": 2.0, "bos_token_id": 3, "chunk_size_feed_forward": 2,
    "classifier_dropout": 0.3, "dtype": "float16", "embd_pdrop": 0.3, "eos_token_id": 4,
    "final_logit_softcapping": 2.0, "head_dim": 12, "hidden_act": "relu",
    "hidden_activation": "relu", "hidden_dropout": 0.3, "hidden_size": 48,
    "id2label": {"0": "A"}, "initializer_range": 0.5, "intermediate_size": 20,
    "is_decoder": True, "is_encoder_decoder": True, "label2id": {"A": 0},
    "layer_norm_eps": 0.1, "layer_types": ["full_attention", "sliding_attention"] * 2,
    "max_position_embeddings": 65, "max_window_layers": 1, "mlp_bias": True, "model_type": "opt",
    "no_rope_layer_interval": 2, "no_rope_layers": [1, 0, 1, 0], "num_attention_heads": 8,
    "num_hidden_layers": 3, "num_key_value_heads": 1, "original_max_position_embeddings": 12,
    "output_attentions": True, "output_hidden_states": True, "pad_token_id": 5,
    "pretraining_tp": 2, "problem_type": "regression", "query_pre_attn_scalar": 3,
    "resid_pdrop": 0.3, "return_dict": False, "rms_norm_eps": 0.1,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 123.0, "partial_rotary_factor": 0.5,
    },
    "sliding_window": 3, "tie_word_embeddings": None, "transformers_version": "1.0",
    "use_bidirectional_attention": True, "use_cache": False, "use_parallel_residual": False,
    "use_sliding_window": True, "vocab_size": 54, "_name_or_path": "there",
}  # fmt: skip


def test_every_setting_of_transformers_is_refused_or_computed(released, tmp_path):
    """A new setting in a release of transformers makes this test fail: it needs a decision."""
    _, path, theirs = released
    sound = json.loads((path / "config.json").read_text())
    shutil.copy(path / "model.safetensors", tmp_path)
    refused, compared = [], []
    for key, value in theirs.config.to_dict().items():
        other = CHANGED[key] if CHANGED[key] is not None else not value
        (tmp_path / "config.json").write_text(json.dumps(sound | {key: other}))
        try:
            found = our_logits(tmp_path)
        except CheckpointError:
            refused.append(key)
            continue
        changed = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation="eager", dtype=torch.float32
        )
        changed.config.return_dict = True  # how results are packed
        with torch.no_grad():
            wanted = changed.eval()(tokens()).logits
        assert (found - wanted).abs().max() <= 1e-4, key
        compared.append(key)
    assert {"hidden_size", "is_encoder_decoder"} <= set(refused)
    assert {"eos_token_id", "use_cache"} <= set(compared)
