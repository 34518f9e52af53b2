"""Megatron-Core's GPT model on a CPU loads our export: names, order, logits.

Usage: python -m tests.checkpoint.megatron_client DIRECTORY [CHECKPOINT...]

It prints `same` at the end.  Native checkpoints replace the toy models.  Megatron's
model asks for a GPU in three places that do not affect what it computes; they are stubbed here.
"""

import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megagrow.checkpoint.convert.load_model import load_model
from megagrow.checkpoint.formats.megatron.source import FORMAT
from megagrow.checkpoint.interface.model_of import model_of
from megagrow.models.catalog import build_catalog
from megagrow.state.layout import Layout
from tests.checkpoint.foreign import Readable, WholeSource, write_checkpoint
from tests.checkpoint.states import opened
from tests.toys import build, random_state, toy_model


def their_model(args: Any) -> GPTModel:
    """The model that Megatron's own arguments describe."""
    llama = args.swiglu
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=llama,
        activation_func=torch.nn.functional.silu if llama else their_gelu,
        add_bias_linear=args.add_bias_linear,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
    )


def their_gelu(x: torch.Tensor) -> torch.Tensor:
    """What its fused kernel (the default, which needs a GPU) computes."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def main() -> None:
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    tensor_parallel.get_cuda_rng_tracker().fork = lambda *a, **k: contextlib.nullcontext()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(1, 1)
    kinds: list[dict[str, Any]] = [{"family": "gpt2"}, {"family": "llama", "tie_embeddings": False},
             {"family": "llama", "heads": 4, "kv_heads": 2, "head_dim": 4}]  # fmt: skip
    cases: list[Any] = sys.argv[2:] or kinds
    for number, kind in enumerate(cases):
        source: Readable
        if isinstance(kind, str):
            source = opened(Path(kind))
            model, ours = model_of(source), load_model(Path(kind))[0]
        else:
            model = toy_model(**kind)
            state = random_state(build_catalog(model), seed=number, dtype=torch.float32)
            source, ours = WholeSource(model, state), build(model, state)
        path = write_checkpoint(FORMAT, source, Path(sys.argv[1]) / str(number), Layout())
        file = torch.load(
            path / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False
        )
        theirs = their_model(file["args"])
        names = [name for name, _ in theirs.named_parameters()]
        assert names == list(file["model"]), (names, list(file["model"]))
        theirs.load_state_dict(file["model"], strict=True)
        tokens = torch.randint(model.vocabulary, (3, model.sequence))
        places = torch.arange(model.sequence).expand_as(tokens)
        mask = torch.ones(model.sequence, model.sequence).triu(1).bool()[None, None]
        with torch.no_grad():
            found = theirs(tokens, places, mask)[..., : model.vocabulary]
            expected = ours.logits(tokens)
        difference = float((found - expected).abs().max())
        assert difference < 1e-4, (kind, difference)
        groups = file["optimizer"]["param_groups"]
        order = [n for n in names if theirs.get_parameter(n).dim() > 1]
        order += [n for n in names if theirs.get_parameter(n).dim() == 1]
        shapes = [tuple(file["optimizer"]["state"][i]["exp_avg"].shape)
                  for group in groups for i in group["params"]]  # fmt: skip
        assert shapes == [tuple(theirs.get_parameter(n).shape) for n in order]
    print("same")


if __name__ == "__main__":
    main()
