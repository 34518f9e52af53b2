"""What each optimizer keeps of a tensor and how it steps it: both by the tensor's role."""

from __future__ import annotations

from dataclasses import dataclass

from megagrow.state.catalog import ADAM_SLOTS, MUON_SLOTS, LogicalTensor, Slot
from megagrow.state.roles import MATRICES, Role


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer.

    Attributes:
        name: as written in a configuration.
        slots: the parameter, and what it keeps beside it.
        orthogonal: the roles of the tensors whose updates are orthogonalised matrices; all others
            it steps element by element.
    """

    name: str
    slots: tuple[Slot, ...]
    orthogonal: frozenset[Role] = frozenset()

    def orthogonalises(self, tensor: LogicalTensor) -> bool:
        """Whether the updates of a tensor are orthogonalised matrices."""
        return tensor.training == "trained" and tensor.role in self.orthogonal


ADAMW = OptimizerKind("adamw", ADAM_SLOTS)
LION = OptimizerKind("lion", ADAM_SLOTS[:2])
MUON = OptimizerKind("muon", MUON_SLOTS, MATRICES)

OPTIMIZERS = {kind.name: kind for kind in (ADAMW, LION, MUON)}
