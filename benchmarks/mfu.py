"""Model FLOPs utilisation of the bf16 training step, with and without our kernels and compile."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.throughput import LR, engine_of, samples_of, timed
from megagrow.config import LayoutConfig, ModelConfig
from megagrow.engine.comm import Comm
from megagrow.engine.engine import Engine
from megagrow.models.flops import train_flops_per_token
from megagrow.ops import library
from megagrow.state.catalog import MASTER

# Peak dense bf16 FLOP/s, a multiply-add being two FLOPs, as NVIDIA states them.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}

# Name: (model, samples per step).
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


# Name: (implementation of the ops, whether blocks are compiled).
WAYS: Mapping[str, tuple[library.Mode, bool]] = {
    "kernels": ("cuda", False),
    "PyTorch": ("reference", False),
    "kernels, compiled": ("cuda", True),
}


def measure(comm: Comm, dry_run: bool, rounds: int = 3, steps: int = 5) -> dict[str, Any]:
    """Time training steps of each shape: our kernels and PyTorch's own ops, compiled and not."""
    if dry_run:
        rounds = steps = 1
    device = torch.cuda.get_device_name() if comm.device.type == "cuda" else "cpu"
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)
    results = {}
    for name, (shape, batch) in SHAPES.items():
        model = ModelConfig.model_validate(shape | (_TINY if dry_run else {}))
        ways: dict[str, dict[str, Any]] = {}
        # Compilation needs a separate engine; kernels can be toggled within one.
        for compiled in (False,) if dry_run else (False, True):
            modes: dict[str, library.Mode] = {
                way: "emulated" if dry_run and mode == "cuda" else mode
                for way, (mode, how) in WAYS.items()
                if how == compiled
            }
            shaped = model.model_copy(update={"compile": compiled})
            ways |= _measure_engine(comm, shaped, 2 if dry_run else batch, modes, rounds, steps)
        if peak is not None:
            for way in ways.values():
                way["mfu"] = way["flops_per_second"] / peak
        results[name] = ways
    return {"device": device, "peak_flops": peak, "dry_run": dry_run, "models": results}


def _measure_engine(
    comm: Comm,
    model: ModelConfig,
    batch: int,
    modes: Mapping[str, library.Mode],
    rounds: int,
    steps: int,
) -> dict[str, dict[str, Any]]:
    tokens = batch * model.sequence
    samples = samples_of(model, batch)
    engine, _ = engine_of(comm, model, LayoutConfig(zero=1), batch, dtype="bf16")
    _fill(engine, comm)

    def step() -> float:
        return engine.train_step(iter((np.asarray(samples),)), lr=LR, seed=0).loss

    seconds: dict[str, list[float]] = {way: [] for way in modes}
    losses: dict[str, float] = {}
    memory: dict[str, int] = {}
    for number in range(rounds):
        for way in list(modes) if number % 2 == 0 else list(modes)[::-1]:
            with library.using(modes[way]):
                timed(step, comm, steps=1 if number else 2)
                _forget_peak(comm)
                seconds[way].append(timed(step, comm, steps=steps) / steps)
                memory[way] = _peak(comm)
                losses[way] = step()
    engine.close()
    flops = train_flops_per_token(model) * tokens
    return {
        way: {
            "seconds_a_step": times,
            "tokens_per_second": tokens / statistics.median(times),
            "flops_per_second": flops / statistics.median(times),
            "peak_bytes": memory[way],
            "loss": losses[way],
        }
        for way, times in seconds.items()
    }


def _fill(engine: Engine, comm: Comm) -> None:
    """Random parameters, created on the device: their values do not affect the step's time."""
    for shard in engine.placement.shards(comm.rank):
        memory = engine.state.view(shard.tensor, MASTER.name, shard.box)
        init = engine.placement.catalog[shard.tensor].init
        if init.kind == "normal":
            memory.normal_(0.0, init.std)
        else:
            memory.fill_(1.0 if init.kind == "ones" else init.std)
    engine.publish()


def _forget_peak(comm: Comm) -> None:
    if comm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(comm: Comm) -> int:
    """Peak device memory since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if comm.device.type == "cuda" else 0


def table(result: Mapping[str, Any]) -> str:
    """The result as text."""
    lines = [f"{result['device']}, bf16, one process; training step"]
    if result["dry_run"]:
        lines.append("dry run: tiny, on the CPU, emulated; the times mean nothing")
    for name, ways in result["models"].items():
        for way, r in ways.items():
            share = f"{r['mfu']:>8.1%} MFU" if "mfu" in r else ""
            lines.append(
                f"{name:<24}{way:<20}{r['tokens_per_second']:>12,.0f} tokens/s"
                f"{r['flops_per_second'] / 1e12:>9.2f} TFLOP/s{share}"
                f"{r['peak_bytes'] / 2**30:>7.1f} GiB"
            )
    return "\n".join(lines)
