"""Losses on several validation sets: their mean, and each in bits per byte of text."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megagrow.data.run_data import RunData
from megagrow.data.sampler import Int64


def mean_loss(losses: Mapping[str, float], sets: Mapping[str, Int64]) -> float:
    """The mean of the losses on the validation sets, by their samples."""
    if len(losses) == 1:
        return next(iter(losses.values()))
    counts = {name: len(sets[name]) for name in losses}
    return sum(losses[name] * count for name, count in counts.items()) / sum(counts.values())


class BitsPerByte:
    """Converts losses to bits per byte of text.

    Args:
        data: of the run, which knows the texts.
        sets: samples [n, sequence + 1], by name.
    """

    def __init__(self, data: RunData, sets: Mapping[str, Int64]) -> None:
        self._data, self._sets = data, sets
        self._text_bytes: dict[str, int] = {}

    def of(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Losses (nats per token) in bits per byte, by name; sets without text are left out."""
        found = {}
        for name, samples in self._sets.items():
            if name not in self._text_bytes:
                self._text_bytes[name] = self._data.text_bytes(samples)
            if self._text_bytes[name]:
                bits = losses[name] / math.log(2) * samples[:, 1:].size
                found[name] = bits / self._text_bytes[name]
        return found
