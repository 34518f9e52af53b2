"""Measures one update of a grown model: gradient and update shares, twins, rank, dead units.

It works on whatever part of a matrix a rank holds, under ZeRO, tensor and pipeline parallelism,
and never assembles a matrix.  A matrix W of [outputs, inputs] is observed through W Z, where Z is
[inputs, k] with orthonormal columns times sqrt(inputs / k): each rank adds its own part, and one
sum over all ranks completes it.  If k = inputs, everything derived from it is exact;
otherwise inner products of rows are estimates (Johnson and Lindenstrauss), and so is the
participation ratio, from Hutchinson's estimate of tr (W^T W)^2 = E |W^T W z|^2.  Sums of squares
are exact.

Memory: a copy of this rank's part of the watched matrices, and at most `_STAGING` bytes of
sketches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from megagrow.engine.optimizers.generations import regions
from megagrow.growth.diagnostics import UNITS, Watched
from megagrow.state.boxes import Box

_COLUMNS = 64  # maximum number of sketch columns
_STAGING = 2**24
_DEAD = 1e-3  # of the median unit's gradient
Sum = Callable[[torch.Tensor], None]
# Per matrix: number of elements and sums of squares, each for all elements and for the new ones.
_PARAMETERS, _GRADIENT, _UPDATE, _WEIGHT = range(4)


class Probe:
    """Observes one update of the optimizer and reports on it.

    Args:
        watched: the matrices to observe, the same on every rank.
        shards: the parts of them in this rank's optimizer tensors: (name, box in logical
            coordinates, flat position), each contiguous there.
        device: where sums over the ranks are computed.
    """

    def __init__(
        self,
        watched: Sequence[Watched],
        shards: Mapping[torch.Tensor, Sequence[tuple[str, Box, int]]],
        *,
        device: torch.device,
    ) -> None:
        self._watched = {one.tensor.name: one for one in watched}
        self._shards, self._device = dict(shards), device
        self._sums = {name: torch.zeros(4, 2, dtype=torch.float64) for name in self._watched}
        units = [one for one in watched if one.has_units]
        rows = sum(one.tensor.volume // one.tensor.shape[-1] for one in units)
        self._columns = max(1, min(_COLUMNS, _STAGING // (8 * max(rows, 1))))
        self._weights = {one.tensor.name: self._sketch(one) for one in units}
        self._gradients = {one.tensor.name: self._sketch(one) for one in units}
        self._held: list[tuple[str, Box, torch.Tensor]] = []
        self._seen = False

    def _sketch(self, one: Watched) -> torch.Tensor:
        """Zeros for W Z: [outputs..., k]."""
        *outputs, inputs = one.tensor.shape
        return torch.zeros(*outputs, min(self._columns, inputs))

    @contextmanager
    def update(self, groups: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """Wraps the update of parameter groups whose gradients are in ``.grad``."""
        before: list[tuple[str, Box, torch.Tensor, torch.Tensor]] = []
        for parameter in (p for group in groups for p in group["params"]):
            for name, box, start in self._shards.get(parameter, ()):
                part = slice(start, start + box.volume)
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.reshape(-1)[part].view(box.shape).float()
                values = parameter.detach().view(-1)[part].view(box.shape)
                self._add(name, box, _GRADIENT, gradient)
                self._project(self._gradients, name, box, gradient)
                before.append((name, box, values, values.clone()))
        yield
        for name, box, values, old in before:
            self._add(name, box, _UPDATE, values - old)
            self._add(name, box, _WEIGHT, values)
            self._project(self._weights, name, box, values)
            self._held.append((name, box, values))
        self._seen = True

    def _add(self, name: str, box: Box, what: int, values: torch.Tensor) -> None:
        _, new = regions(self._watched[name].kept, box)
        parts, sums = [values[index] for index in new], self._sums[name]
        sums[what, 0] += _squares([values])
        sums[what, 1] += _squares(parts)
        if what == _WEIGHT:
            sums[_PARAMETERS, 0] += values.numel()
            sums[_PARAMETERS, 1] += sum(part.numel() for part in parts)

    def _project(
        self, sketches: Mapping[str, torch.Tensor], name: str, box: Box, values: torch.Tensor
    ) -> None:
        if name not in sketches:
            return
        sketch, inputs = sketches[name], self._watched[name].tensor.shape[-1]
        z = _directions(inputs, sketch.shape[-1])[box.slices[-1]].to(values)
        sketch[box.slices[:-1]] += (values @ z).cpu()

    def finish(self, total: Sum) -> dict[str, float]:
        """Report on the update; collective: all ranks call it after a step.

        Args:
            total: sums a tensor over all ranks, in place.

        Returns:
            Empty if no update was applied.  Otherwise
            parameter_share, gradient_share, update_share: the share of the new elements, in the
            number of elements and in the sums of squares of the gradient and of the update;
            twin_cosine: mean cosine between the rows of a unit and its copy, over all pairs and all
            matrices that have any; participation: mean of (tr G)^2 / tr G^2, G = W^T W, between
            1 and the number of inputs; dead_units: share of units whose gradient is less than a
            thousandth of the median unit's.
        """
        if not self._seen:
            return {}
        sums = torch.stack([*self._sums.values()]).to(self._device)
        total(sums)
        sums = sums.cpu()
        # Each element was counted once for every rank that holds it.
        copies = {
            name: float(sums[i, _PARAMETERS, 0]) / one.tensor.volume
            for i, (name, one) in enumerate(self._watched.items())
        }
        sums /= torch.tensor([*copies.values()], dtype=torch.float64)[:, None, None]
        numbers = {
            "parameter_share": _share(sums[:, _PARAMETERS]),
            "gradient_share": _share(sums[:, _GRADIENT]),
            "update_share": _share(sums[:, _UPDATE]),
        }
        if self._weights:
            self._whole(self._weights, copies, total)
            self._whole(self._gradients, copies, total)
            weights = dict(zip(self._watched, sums[:, _WEIGHT, 0].tolist(), strict=True))
            numbers |= {
                "twin_cosine": self._twins(),
                "dead_units": self._dead(),
                "participation": self._participation(weights, copies, total),
            }
        return {key: value for key, value in numbers.items() if value is not None}

    def _whole(
        self, parts: dict[str, torch.Tensor], copies: Mapping[str, float], total: Sum
    ) -> None:
        """Sum partial tensors over all ranks, in one message."""
        flat = torch.cat([part.reshape(-1) for part in parts.values()]).to(self._device)
        total(flat)
        pieces = flat.cpu().split([part.numel() for part in parts.values()])
        for (name, part), piece in zip(parts.items(), pieces, strict=True):
            parts[name] = piece.view(part.shape) / copies[name]

    def _rows(self, sketch: torch.Tensor, name: str) -> torch.Tensor:
        """A sketch with one row per unit: [units, the rest]."""
        at = self._watched[name].tensor.axes.index(UNITS)
        return sketch.movedim(at, 0).flatten(1)

    def _twins(self) -> float | None:
        found = []
        for name, sketch in self._weights.items():
            pairs = torch.tensor(self._watched[name].twins, dtype=torch.int64)
            if len(pairs):
                one, other = self._rows(sketch, name)[pairs].unbind(1)
                found.append(torch.cosine_similarity(one, other, dim=1).mean().item())
        return sum(found) / len(found) if found else None

    def _dead(self) -> float:
        dead = units = 0
        for name, sketch in self._gradients.items():
            lengths = self._rows(sketch, name).norm(dim=1)
            dead += int((lengths <= _DEAD * lengths.median()).sum())
            units += len(lengths)
        return dead / units

    def _participation(
        self, squares: Mapping[str, float], copies: Mapping[str, float], total: Sum
    ) -> float | None:
        """From W^T (W Z): each rank's own part again, and a second sum."""
        found = {
            name: torch.zeros(self._watched[name].tensor.shape[-1], sketch.shape[-1])
            for name, sketch in self._weights.items()
        }
        for name, box, values in self._held:
            if name in found:
                part = self._weights[name][box.slices[:-1]].to(values).flatten(0, -2)
                found[name][box.slices[-1]] += (values.flatten(0, -2).T @ part).cpu()
        self._whole(found, copies, total)
        traces = {name: float(values.double().pow(2).sum()) for name, values in found.items()}
        ratios = [squares[name] ** 2 / trace for name, trace in traces.items() if trace > 0]
        return sum(ratios) / len(ratios) if ratios else None


@lru_cache(maxsize=4)
def _directions(inputs: int, columns: int) -> torch.Tensor:
    """Orthonormal columns times sqrt(inputs / columns), the same everywhere: [inputs, columns]."""
    generator = torch.Generator().manual_seed(inputs)
    q, _ = torch.linalg.qr(torch.randn(inputs, columns, generator=generator))
    return q * math.sqrt(inputs / columns)


def _squares(parts: Sequence[torch.Tensor]) -> float:
    return sum(
        float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
        for part in parts
        if part.numel()
    )


def _share(rows: torch.Tensor) -> float | None:
    """The share of the new elements in all: [matrices, (all, new)]."""
    every, new = rows.sum(0).tolist()
    return new / every if every > 0 else None
