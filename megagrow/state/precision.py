"""The number formats that a model may compute in, by their names in a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class NumberFormat:
    """A floating-point format.

    Attributes:
        name: in a configuration (`precision.dtype`).
        element: PyTorch's name of it.
        bytes: of one element.
    """

    name: str
    element: str
    bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """PyTorch's type; imported only here, so that arithmetic alone does not load PyTorch."""
        import torch

        dtype: torch.dtype = getattr(torch, self.element)
        return dtype


PRECISIONS = {
    one.name: one
    for one in (
        NumberFormat("fp32", "float32", 4),
        NumberFormat("bf16", "bfloat16", 2),
        NumberFormat("fp16", "float16", 2),
    )
}
ELEMENTS = tuple(one.element for one in PRECISIONS.values())


def format_of(dtype: torch.dtype) -> NumberFormat | None:
    """The number format of an element type; None if no model computes in it."""
    return next((one for one in PRECISIONS.values() if one.dtype == dtype), None)
