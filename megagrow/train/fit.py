"""Fit the learned maps of a growth (`ligo`) on training samples, live or from a checkpoint.

Every process holds the whole small and the whole large model while fitting, and all do the same
work; so both must fit into one process, whatever the run's layouts before and after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from megagrow.config import BatchConfig, ModelConfig
from megagrow.data.run_data import Samples
from megagrow.growth.operators.ligo import Maps
from megagrow.growth.plan import Growth
from megagrow.models.common.documents import Separator
from megagrow.models.flops import train_flops_per_token
from megagrow.models.transformer import Transformer, named_tensors
from megagrow.state.catalog import MASTER
from megagrow.transfer.whole_state import MemoryState

Tensors = Mapping[str, torch.Tensor]
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class GrowthFit:
    """The result of a fit.

    Attributes:
        parameters: of the large model, by name.
        losses: mean loss of every step, before its update.
        flops: of all steps: the large model's and the maps' own.
        samples: number of samples used.
    """

    parameters: dict[str, torch.Tensor]
    losses: tuple[float, ...]
    flops: int
    samples: int


def fit(
    maps: Maps,
    model: ModelConfig,
    parameters: Tensors,
    batches: Iterable[Sequence[np.ndarray]],
    *,
    steps: int,
    lr: float = LEARNING_RATE,
    eod: int | None = None,
) -> GrowthFit:
    """Fit maps with Adam, at a learning rate that decays to 0.

    Args:
        maps: freshly created; modified in place.
        model: the large model.
        parameters: of the small model, whole, by name.
        batches: the micro-batches of every step, each [micro, sequence + 1] token ids.
        steps: number of steps.
        lr: the initial learning rate.
        eod: the end token, if documents of a sample do not see each other.
    """
    device = next(iter(parameters.values())).device
    maps.to(device)
    dtype = next(iter(parameters.values())).dtype
    separator = Separator.of(model, eod, device=device, dtype=dtype)
    module = Transformer(model, separator=separator).to(device)
    names = {id(p): name for name, p in module.named_parameters()}
    inside = {name: names[id(p)] for name, p in named_tensors(module).items()}
    optimizer = torch.optim.Adam(maps.parameters(), lr=lr)
    losses, tokens, taken, sequence = [], 0, 0, model.sequence
    for number, micro_batches in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * (1 - number / steps)
        optimizer.zero_grad()
        grown = maps(parameters)
        # The maps are differentiated once per step, whatever the number of micro-batches.
        leaves = {name: values.detach().requires_grad_() for name, values in grown.items()}
        placed = {inside[name]: values for name, values in leaves.items()}
        total = 0.0
        for batch in micro_batches:
            samples = torch.from_numpy(batch).to(device)
            loss = functional_call(module, placed, (samples,)) / len(micro_batches)
            loss.backward()
            total += loss.item()
            taken, sequence = taken + samples.shape[0], samples.shape[1] - 1
            tokens += samples.shape[0] * sequence
        torch.autograd.backward(list(grown.values()), [p.grad for p in leaves.values()])
        optimizer.step()
        losses.append(total)
    with torch.no_grad():
        result = {name: values.contiguous() for name, values in maps(parameters).items()}
    flops = tokens * _flops_per_token(model, sequence) + len(losses) * _map_flops(maps, parameters)
    return GrowthFit(result, tuple(losses), flops, taken)


def fit_flops(growth: Growth, *, model: ModelConfig, samples: int, sequence: int) -> int:
    """FLOPs that fitting a growth will take, by arithmetic.

    Args:
        growth: a growth that is fitted.
        model: the large model.
        samples: per step.
        sequence: tokens per sample.
    """
    with torch.device("meta"):
        maps = Maps(growth.small, growth.target)
        parameters = {t.name: torch.empty(t.shape) for t in growth.small}
        of_maps = _map_flops(maps, parameters)
    return growth.fit_steps * (samples * sequence * _flops_per_token(model, sequence) + of_maps)


def _flops_per_token(model: ModelConfig, sequence: int) -> int:
    return train_flops_per_token(model.model_copy(update={"sequence": sequence}))


def _map_flops(maps: Maps, parameters: Tensors) -> int:
    """FLOPs of the maps' own products in one step, forward and backward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        maps(parameters)
    return 3 * counter.get_total_flops()


def fit_growth(
    growth: Growth,
    *,
    model: ModelConfig,
    small: MemoryState,
    samples: Samples,
    first: int,
    batch: BatchConfig,
) -> tuple[MemoryState, GrowthFit]:
    """Fit a growth's maps on the next samples, which are thereby consumed.

    Args:
        growth: the growth.
        model: the large model.
        small: the small model's parameters, whole.
        samples: the run's.
        first: index of the first sample.
        batch: samples per step and per forward pass.

    Returns:
        The large model's parameters, and the result of the fit.
    """
    torch.manual_seed(0)  # for dropout: every process must draw the same
    parameters = {t.name: small.tensors[t.name, MASTER.name] for t in growth.small}

    def batches() -> Iterator[list[np.ndarray]]:
        for step in range(growth.fit_steps):
            start = first + step * batch.global_
            yield [
                samples.batch(start + done, batch.micro)
                for done in range(0, batch.global_, batch.micro)
            ]

    done = fit(
        Maps(growth.small, growth.target),
        model,
        parameters,
        batches(),
        steps=growth.fit_steps,
        eod=samples.eod,
    )
    return MemoryState({(n, MASTER.name): values for n, values in done.parameters.items()}), done
