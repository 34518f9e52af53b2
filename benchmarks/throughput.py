"""Tokens/s of a training step: megagrow's engine, its model in a plain loop, and other GPTs.

All contenders get the same samples, shapes, threads, precision (fp32), fused AdamW and gradient
clipping, and take turns within one run, so that other load on the machine affects all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.minimal_gpt import MinimalGPT
from megagrow.config import Config, LayoutConfig, ModelConfig
from megagrow.engine.comm import Comm
from megagrow.engine.engine import Engine
from megagrow.models.catalog import build_catalog
from megagrow.models.transformer import Transformer, named_tensors
from megagrow.train.grow_live import fill_fresh, start_engine
from megagrow.train.run_plan import plan_run
from megagrow.train.state import RunState

Step = Callable[[], float]
LR, _CLIP = 1e-4, 1.0
_MICRO_BATCHES_OF_A_PIPELINE = 4
_EOD, _DOCUMENTS = 0, 4  # the end token, and how many documents a sample has


def measure_alone(
    comm: Comm, model: ModelConfig, batch: int, rounds: int, steps: int, rivals: Sequence[str]
) -> dict[str, Any]:
    """One process: the engine against plain loops.

    Args:
        comm: the job of one process.
        model: the configuration, of family gpt2.
        batch: samples per step.
        rounds: timed turns per contender, after one to warm up.
        steps: training steps per turn.
        rivals: names of `RIVALS` to compare with.
    """
    samples = samples_of(model, batch)
    contenders: dict[str, Step] = {}
    for zero in (0, 1):
        engine = _engine(comm, model, LayoutConfig(zero=zero), batch)
        runs = "" if engine.layout.zero == zero else f" (runs as ZeRO {engine.layout.zero})"
        contenders[f"engine, layout.zero={zero}{runs}"] = _engine_step(engine, samples)
    apart = _engine(comm, model, LayoutConfig(zero=0), batch, eod=_EOD)
    length = model.sequence // _DOCUMENTS
    contenders[f"engine, documents of {length} tokens apart"] = _engine_step(
        apart, _in_documents(samples, length)
    )
    tokens = torch.from_numpy(samples).to(comm.device)
    for name in rivals:
        rival = RIVALS[name](model).to(comm.device)
        contenders[name] = _plain_step(rival, tokens)
    return _take_turns(contenders, comm, rounds=rounds, steps=steps, tokens=batch * model.sequence)


def measure_layouts(
    comm: Comm,
    model: ModelConfig,
    batch: int,
    rounds: int,
    steps: int,
    layouts: Sequence[LayoutConfig],
) -> dict[str, Any]:
    """Several processes: the engine in each layout, against the minimal GPT under torch's DDP.

    Engines of different layouts cannot exist at the same time, so each layout is set up again for
    every round.  `batch` is the total over all processes.
    """
    samples = samples_of(model, batch)
    share = batch // comm.world
    mine = torch.from_numpy(samples[comm.rank * share : (comm.rank + 1) * share]).to(comm.device)
    yardstick = nn.parallel.DistributedDataParallel(MinimalGPT(model).to(comm.device))
    reference = _plain_step(yardstick, mine)
    seconds: dict[str, list[float]] = {"minimal GPT under DDP": []}
    for _ in range(rounds):
        timed(reference, comm, steps=1)
        seconds["minimal GPT under DDP"].append(timed(reference, comm, steps=steps))
        for layout in layouts:
            engine = _engine(comm, model, layout, batch)
            step = _engine_step(engine, samples)
            timed(step, comm, steps=1)
            times = seconds.setdefault(f"engine, {describe(layout, comm.world)}", [])
            times.append(timed(step, comm, steps=steps))
            engine.close()
            del engine, step
    return _summary(seconds, steps=steps, tokens=batch * model.sequence, comm=comm)


def describe(layout: LayoutConfig, world: int) -> str:
    """A short description of a layout."""
    data = world // (layout.tensor * layout.pipeline)
    sizes = {"tensor": layout.tensor, "pipeline": layout.pipeline, "data": data}
    cut = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    sequence = ", sequence parallel" if layout.sequence_parallel else ""
    return f"{cut or 'one process'}, ZeRO {layout.zero}{sequence}"


# --- contenders -----------------------------------------------------------------------------


def _plain_model(model: ModelConfig) -> nn.Module:
    transformer = Transformer(model)
    catalog = build_catalog(model)
    for name, parameter in named_tensors(transformer).items():
        init = catalog[name].init
        if init.kind == "normal":
            nn.init.normal_(parameter, std=init.std)
        else:
            nn.init.ones_(parameter)
    return transformer


class _HuggingFace(nn.Module):
    """GPT2LMHeadModel with fused attention and without dropout."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.model = GPT2LMHeadModel._from_config(
            GPT2Config(
                vocab_size=model.vocabulary,
                n_positions=model.sequence,
                n_embd=model.hidden,
                n_layer=model.layers,
                n_head=model.heads,
                n_inner=model.ffn,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
                bos_token_id=0,
                eos_token_id=0,
            ),
            attn_implementation="sdpa",
        )

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        tokens, labels = samples[:, :-1], samples[:, 1:]
        logits = self.model(tokens).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


RIVALS: Mapping[str, Callable[[ModelConfig], nn.Module]] = {
    "megagrow's model, plain loop": _plain_model,
    "minimal GPT, plain loop": MinimalGPT,
    "Hugging Face GPT-2, plain loop": _HuggingFace,
}


def _plain_step(model: nn.Module, samples: torch.Tensor) -> Step:
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step() -> float:
        loss = model(samples)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def engine_of(
    comm: Comm,
    model: ModelConfig,
    layout: LayoutConfig,
    batch: int,
    *,
    dtype: str = "fp32",
    eod: int | None = None,
) -> tuple[Engine, Config]:
    """An engine for steps of `batch` samples, its parameters not filled, and its configuration.

    With `eod`, documents of a sample do not see each other.
    """
    data = comm.world // (layout.tensor * layout.pipeline)
    micro = batch // data
    if layout.pipeline > 1:
        micro = max(1, micro // _MICRO_BATCHES_OF_A_PIPELINE)
    config = Config.model_validate(
        {
            "model": model.model_dump(by_alias=True),
            "layout": layout.model_dump(),
            "precision": {"dtype": dtype},
            "data": {"path": "none"},
            "optimizer": {"lr": LR, "grad_clip": _CLIP},
            "schedule": {"warmup": 1},
            "batch": {"global": batch, "micro": micro},
            "stages": [{"until": {"steps": 10}}],
        }
    )
    stage = plan_run(config, world=comm.world, vocabulary=None).stages[0]
    state = RunState()
    return start_engine(config=config, stage=stage, state=state, comm=comm, eod=eod), config


def _engine(
    comm: Comm, model: ModelConfig, layout: LayoutConfig, batch: int, *, eod: int | None = None
) -> Engine:
    engine, config = engine_of(comm, model, layout, batch, eod=eod)
    fill_fresh(engine, config=config, comm=comm)
    return engine


def _engine_step(engine: Engine, samples: np.ndarray) -> Step:
    share = len(samples) // engine.layout.data
    mine = samples[engine.coordinates.data * share :][:share]
    micro = share // engine.accumulation

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, share, micro):
            yield mine[start : start + micro]

    def step() -> float:
        return engine.train_step(batches(), lr=LR, seed=0).loss

    return step


def samples_of(model: ModelConfig, batch: int) -> np.ndarray:
    """[batch, sequence + 1]: random tokens, the same in every process."""
    generator = np.random.default_rng(0)
    return generator.integers(0, model.vocabulary, (batch, model.sequence + 1))


def _in_documents(samples: np.ndarray, length: int) -> np.ndarray:
    """The same samples, with an end token after every `length` tokens and nowhere else."""
    ends = np.arange(samples.shape[1]) % length == length - 1
    return np.where(ends, _EOD, np.maximum(samples, _EOD + 1))


# --- turns ----------------------------------------------------------------------------------


def _take_turns(
    contenders: Mapping[str, Step], comm: Comm, *, rounds: int, steps: int, tokens: int
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for step in contenders.values():
        timed(step, comm, steps=1)
    for number in range(rounds):
        order = list(contenders.items())
        # Rotate the order, so that no contender is always first or always follows the same one.
        for name, step in order[number % len(order) :] + order[: number % len(order)]:
            seconds[name].append(timed(step, comm, steps=steps))
    return _summary(seconds, steps=steps, tokens=tokens, comm=comm)


def timed(step: Step, comm: Comm, *, steps: int) -> float:
    """Seconds for some steps, on the slowest rank."""
    if dist.get_world_size() > 1:
        comm.barrier()
    _synchronize(comm)
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    _synchronize(comm)
    return max(comm.gather_floats(time.perf_counter() - begin))


def _synchronize(comm: Comm) -> None:
    if comm.device.type == "cuda":
        torch.cuda.synchronize(comm.device)


def _summary(
    seconds: Mapping[str, Sequence[float]], *, steps: int, tokens: int, comm: Comm
) -> dict[str, Any]:
    return {
        "world": comm.world,
        "threads": torch.get_num_threads(),
        "device": str(comm.device),
        "steps_a_round": steps,
        "tokens_a_step": tokens,
        "seconds": {name: list(times) for name, times in seconds.items()},
        "tokens_per_second": {
            name: {
                "median": steps * tokens / statistics.median(times),
                "min": steps * tokens / max(times),
                "max": steps * tokens / min(times),
            }
            for name, times in seconds.items()
        },
    }


def table(result: Mapping[str, Any]) -> str:
    """Tokens/s, and how each contender compares with every plain loop.

    A ratio is the median of the rounds' own ratios.
    """
    seconds = result["seconds"]
    yardsticks = [name for name in seconds if not name.startswith("engine")]
    speeds = result["tokens_per_second"]
    lines = [
        f"{result['world']} processes x {result['threads']} threads, {result['device']}, fp32, "
        f"{result['tokens_a_step']} tokens a step; tokens/s: median (min to max)",
        *(f"  [{i + 1}] {name}" for i, name in enumerate(yardsticks)),
        f"{'':<40}{'tokens/s':>10}{'':>22}"
        + "".join(f"{f'x [{i + 1}]':>9}" for i in range(len(yardsticks))),
    ]
    for name, speed in speeds.items():
        spread = f"({speed['min']:,.0f} to {speed['max']:,.0f})"
        ratios = (
            statistics.median(b / a for a, b in zip(seconds[name], seconds[other], strict=True))
            for other in yardsticks
        )
        lines.append(
            f"{name:<40}{speed['median']:>10,.0f}{spread:>22}"
            + "".join(f"{ratio:>9.3f}" for ratio in ratios)
        )
    return "\n".join(lines)
