"""Which state each optimizer keeps for a tensor and how it updates it, by the tensor's role."""

from __future__ import annotations

from dataclasses import dataclass

from megagrow.state.catalog import ADAM_SLOTS, MUON_SLOTS, LogicalTensor, Slot
from megagrow.state.roles import MATRICES, Role


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer.

    Attributes:
        name: its name in the configuration.
        slots: the parameter and the optimizer state.
        orthogonal: roles of the tensors whose updates are orthogonalised; all others are updated
            element-wise.
        bias_corrected: whether it divides its moments by 1 - beta^step.
    """

    name: str
    slots: tuple[Slot, ...]
    orthogonal: frozenset[Role] = frozenset()
    bias_corrected: bool = True

    def orthogonalises(self, tensor: LogicalTensor) -> bool:
        """Whether the updates of a tensor are orthogonalised."""
        return tensor.training == "trained" and tensor.role in self.orthogonal


ADAMW = OptimizerKind("adamw", ADAM_SLOTS)
LION = OptimizerKind("lion", ADAM_SLOTS[:2], bias_corrected=False)
MUON = OptimizerKind("muon", MUON_SLOTS, MATRICES)

OPTIMIZERS = {kind.name: kind for kind in (ADAMW, LION, MUON)}
