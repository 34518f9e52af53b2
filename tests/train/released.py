"""Tiny models of transformers, saved as `save_pretrained` does, for runs that start from them."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from megagrow.data.dataset import open_dataset
from megagrow.data.sampler import validation_samples
from tests.jobs import settings

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "vocab_size": 320,
    "intermediate_size": 40, "max_position_embeddings": 16, "initializer_range": 0.15,
    "pad_token_id": 0,
}  # fmt: skip
ROPE = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8, "rope_theta": 500000.0,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2": (
        "llama",
        {
            "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_parameters": ROPE,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 10, "rope_theta": 1e6}),
    "pythia": (
        "gpt_neox",
        {
            "hidden_size": 32,
            "rope_parameters": {
                "rope_type": "default", "partial_rotary_factor": 0.25, "rope_theta": 1e4,
            },
        },
    ),
    "gpt2": ("gpt2", {"n_inner": 40}),
}  # fmt: skip


def save_released(path: Path, name: str, dataset: Path | None = None, **changes: Any) -> Path:
    """Save a model with random norms and biases; with the tokenizer of a dataset, if given."""
    kind, given = MODELS[name]
    sizes = {key: n for key, n in SIZES.items() if kind != "gpt2" or key != "intermediate_size"}
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **given, **changes})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(path)
    if dataset is not None:
        file = Path(dataset) / open_dataset(dataset).content.tokenizer_file
        shutil.copy(file, path / f"tokenizer{file.suffix}")
    return path


def run_from(path: Path, dataset: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a run that starts from a checkpoint, with no section `model`."""
    base = settings(dataset, run_dir, **{"stages": [{"until": {"steps": 4}}], **changes})
    given = changes.get("model")
    del base["model"]
    if given is not None:
        base["model"] = given
    init = changes.get("init", {})
    return base | {"init": {"from": str(path), **init}}


def their_loss(path: Path, dataset: Path, *, sequence: int = 16, count: int = 10) -> float:
    """transformers' mean loss on the validation samples of a run."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float32
    )
    samples = validation_samples(open_dataset(dataset).validation, sequence=sequence, count=count)
    tokens = torch.from_numpy(samples.astype("int64"))
    with torch.no_grad():
        logits = model.eval()(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).double(), tokens[:, 1:].flatten()
    ).item()
