"""How transformers might store toys: their own names, orders of axes and settings."""

from typing import Any

from megagrow.config import ModelConfig
from megagrow.models.common.huggingface import COMMON, HuggingFace, Row, keys

_ENDS = (
    Row("toy.tokens", "embedding.token"),
    Row("toy.places", "embedding.position"),
    Row("toy.last.gain", "final_norm.weight", rows=0),
    Row("toy.head", "output.weight"),
)
_BLOCK = (
    Row("toy.{i}.look.gain", "layers.{i}.attention.norm.weight", rows=0),
    *(
        Row(f"toy.{{i}}.look.{cut}", "layers.{i}.attention.qkv.weight", rows=3, cut=cut)
        for cut in "qkv"
    ),
    Row("toy.{i}.look.out", "layers.{i}.attention.out.weight", (1, 2, 3, 0), 3),
    Row("toy.{i}.think.gain", "layers.{i}.mlp.norm.weight", rows=0),
    Row("toy.{i}.think.in", "layers.{i}.mlp.up.weight", (1, 0)),
    Row("toy.{i}.think.out", "layers.{i}.mlp.down.weight"),
)
# Settings of config.json, by megagrow's settings.
_SETTINGS = {
    "layers": "depth", "hidden": "width", "heads": "heads", "kv_heads": "kv_heads",
    "head_dim": "head_width", "ffn": "inner", "sequence": "places", "norm_eps": "eps",
}  # fmt: skip


def _read(config: Any, where: Any) -> dict[str, Any]:
    model = {ours: config[theirs] for ours, theirs in _SETTINGS.items()}
    return model | {
        "family": "toy",
        "vocab": config["vocab_size"],
        "tie_embeddings": config["tie_word_embeddings"],
        "init_std": config["initializer_range"],
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    fields = model.model_dump(by_alias=True)
    return {theirs: fields[ours] for ours, theirs in _SETTINGS.items()}


HUGGINGFACE = HuggingFace(
    model_type="toy",
    architecture="ToyForCausalLM",
    title="Toy",
    ends=_ENDS,
    block=_BLOCK,
    read=_read,
    write=_write,
    carried=keys("model_type vocab_size tie_word_embeddings initializer_range")
    | set(_SETTINGS.values()),
    only={**COMMON, "hidden_act": ("silu",)},
)
