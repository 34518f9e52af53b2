"""Model FLOPs utilisation of the whole training step in bf16, with the own kernels and without."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megagrow.bench.throughput import _samples, _timed
from megagrow.config import Config, ModelConfig
from megagrow.engine.comm import Comm
from megagrow.model.flops import train_flops_per_token
from megagrow.ops import library
from megagrow.train.grow import fill_fresh, start_engine
from megagrow.train.plan import plan_run
from megagrow.train.state import RunState

# Dense bf16 multiply-adds a second, two FLOPs each, as NVIDIA states them.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}

# Name: (shape, samples in a step).
SHAPES: Mapping[str, tuple[dict[str, Any], int]] = {
    "GPT-2 medium, 0.35 B": (
        {
            "family": "gpt2", "layers": 24, "hidden": 1024, "heads": 16, "ffn": 4096,
            "sequence": 1024, "vocab": 50304,
        },
        32,
    ),
    "LLaMA shape, 1.1 B": (
        {
            "family": "llama", "layers": 22, "hidden": 2048, "heads": 16, "kv_heads": 16,
            "ffn": 5632, "sequence": 2048, "vocab": 32000, "tie_embeddings": False,
        },
        16,
    ),
}  # fmt: skip
_TINY = {
    "layers": 2,
    "hidden": 16,
    "heads": 2,
    "kv_heads": 2,
    "ffn": 24,
    "sequence": 8,
    "vocab": 40,
}


def measure(comm: Comm, dry_run: bool, rounds: int = 3, steps: int = 5) -> dict[str, Any]:
    """Time some training steps of each shape, by kernels and by PyTorch's own ops in turn."""
    kernels = "emulated" if dry_run else "cuda"
    shapes = {
        name: (shape | (_TINY if dry_run else {}), 2 if dry_run else batch)
        for name, (shape, batch) in SHAPES.items()
    }
    if dry_run:
        rounds = steps = 1
    device = torch.cuda.get_device_name() if comm.device.type == "cuda" else "cpu"
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)
    results = {}
    for name, (shape, batch) in shapes.items():
        model = ModelConfig.model_validate(shape)
        results[name] = _measure_shape(comm, model, batch, (kernels, "reference"), rounds, steps)
        if peak is not None:
            for way in results[name].values():
                way["mfu"] = way["flops_per_second"] / peak
    return {"device": device, "peak_flops": peak, "dry_run": dry_run, "models": results}


def _measure_shape(
    comm: Comm, model: ModelConfig, batch: int, modes: Sequence[str], rounds: int, steps: int
) -> dict[str, Any]:
    tokens = batch * model.sequence
    samples = _samples(model, batch)
    config = Config.model_validate(
        {
            "model": model.model_dump(by_alias=True),
            "layout": {"zero": 1},
            "precision": {"dtype": "bf16"},
            "data": {"path": "none"},
            "optimizer": {"lr": 1e-4},
            "schedule": {"warmup": 1},
            "batch": {"global": batch, "micro": batch},
            "stages": [{"until": {"steps": 10}}],
        }
    )
    stage = plan_run(config, world=comm.world, vocabulary=None).stages[0]
    engine = start_engine(config=config, stage=stage, state=RunState(), comm=comm)
    fill_fresh(engine, config=config, comm=comm)

    def step() -> float:
        return engine.train_step(iter((np.asarray(samples),)), lr=1e-4, seed=0).loss

    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    losses: dict[str, float] = {}
    for number in range(rounds):
        for mode in modes if number % 2 == 0 else modes[::-1]:
            with library.using(mode):  # type: ignore[arg-type]
                _timed(step, comm, steps=1 if number else 2)
                seconds[mode].append(_timed(step, comm, steps=steps) / steps)
                losses[mode] = step()
    engine.close()
    flops = train_flops_per_token(model) * tokens
    return {
        "kernels" if mode != "reference" else "PyTorch": {
            "seconds_a_step": times,
            "tokens_per_second": tokens / statistics.median(times),
            "flops_per_second": flops / statistics.median(times),
            "loss": losses[mode],
        }
        for mode, times in seconds.items()
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as text."""
    lines = [f"{result['device']}, bf16, one process; training step"]
    if result["dry_run"]:
        lines.append("dry run: tiny, on the CPU, emulated; the times mean nothing")
    for name, ways in result["models"].items():
        for way, r in ways.items():
            share = f"{r['mfu']:>8.1%} MFU" if "mfu" in r else ""
            lines.append(
                f"{name:<24}{way:<10}{r['tokens_per_second']:>12,.0f} tokens/s"
                f"{r['flops_per_second'] / 1e12:>9.2f} TFLOP/s{share}"
            )
    return "\n".join(lines)
