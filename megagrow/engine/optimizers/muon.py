"""Muon: orthogonalised momentum for the matrices of the blocks, AdamW for everything else.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).  A matrix moves
by lr * sqrt(max(1, rows / columns)) * NS(m), where m is its Nesterov momentum and NS brings the
singular values near 1, by DeepSpeed's own Newton-Schulz iteration.  Queries, keys, values, gates
and their counterparts are each a matrix (`megagrow.state.matrices`).

Momentum is stored as the layout says: in flat ranges under ZeRO, in slices under tensor
parallelism.  For the update, each tensor in turn is assembled on all ranks that share it, by a sum
in which each rank contributes its own part and zeros.  That is exact, so all layouts
orthogonalise the same matrix; it takes memory for one whole tensor, and every rank repeats the
iteration.

The momentum starts at 0 without bias correction, since its length does not matter.
New blocks therefore start with a small share of the matrix's momentum and need no step count of
their own; a matrix is orthogonalised whole, old and new parameters together, and the update of
the new ones is scaled by their own learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megagrow.engine.deepspeed.privates import newton_schulz
from megagrow.engine.optimizers.blockwise import BlockAdamW
from megagrow.engine.optimizers.generations import Index, generations
from megagrow.growth.optimizer_rules import YoungBlocks
from megagrow.state.boxes import Box
from megagrow.state.matrices import Matrix

_NS_STEPS = 5
Collect = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class SharedTensor:
    """A tensor of matrices, and this rank's part of it.

    Attributes:
        shape: of the whole logical tensor.
        matrices: the matrices it contains.
        shards: (box in logical coordinates, flat position in the parameter that holds it), each
            contiguous there; empty if the rank holds no part.
        young: the blocks that earlier growths added.
    """

    shape: tuple[int, ...]
    matrices: tuple[Matrix, ...]
    shards: tuple[tuple[Box, int], ...]
    young: YoungBlocks | None


class BlockMuon(BlockAdamW):
    """Muon with new blocks.

    Groups with ``orthogonal`` true hold matrices, which must be passed to `set_matrices`; all other
    groups are stepped by AdamW.

    Args:
        groups: the parameter groups.
        betas: AdamW's.
        momentum: of the matrices.
        iteration: the element type of the Newton-Schulz iteration.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float],
        momentum: float,
        iteration: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(groups, betas=betas)
        self._momentum, self._iteration = momentum, iteration
        self._shared: dict[torch.Tensor, Sequence[SharedTensor]] = {}
        self._collect: Collect = lambda whole: None
        self._device: torch.device | None = None

    def set_matrices(
        self,
        shared: Mapping[torch.Tensor, Sequence[SharedTensor]],
        *,
        collect: Collect,
        device: torch.device | None = None,
    ) -> None:
        """Set which tensors the parameters hold parts of.

        Args:
            shared: by parameter, in the same order on all ranks that share the tensors.
            collect: sums a tensor over these ranks, in place.
            device: where matrices are assembled, if not on the parameters' device.
        """
        self._shared, self._collect, self._device = dict(shared), collect, device

    def _update_all(self, closure: Any) -> Any:
        if not self.state:
            return  # DeepSpeed in 16 bit at ZeRO 0 steps once only to create state
        every = self.param_groups
        for group in every:
            for parameter in group["params"] if group["orthogonal"] else ():
                if parameter.grad is not None:
                    for tensor in self._shared.get(parameter, ()):
                        self._step_matrices(group, parameter, tensor)
                    self.state[parameter]["step"] += 1
        self.param_groups = [group for group in every if not group["orthogonal"]]
        try:
            super()._update_all(closure)
        finally:
            self.param_groups = every

    def _step_matrices(
        self, group: Mapping[str, Any], parameter: torch.Tensor, tensor: SharedTensor
    ) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        flat = [t.view(-1) for t in (parameter, gradient, state["exp_avg"])]
        pieces = [
            (box, [t[start : start + box.volume].view(box.shape) for t in flat])
            for box, start in tensor.shards
        ]
        device = self._device or parameter.device
        whole = torch.zeros(tensor.shape, dtype=parameter.dtype, device=device)
        for box, (_, g, momentum) in pieces:
            momentum.lerp_(g, 1 - self._momentum)
            whole[box.slices].copy_(torch.lerp(g, momentum, self._momentum))
        self._collect(whole)
        for matrix in tensor.matrices:
            part = whole[matrix.index]
            update = orthogonalised(
                part.reshape(matrix.rows, matrix.columns), iteration=self._iteration
            )
            part.copy_(update.mul_(matrix.scale).view(part.shape))
        step = int(state["step"]) + 1
        for box, (p, _, _) in pieces:
            update = whole[box.slices].to(p.device)
            rates: list[tuple[Index, float]] = [((), 1.0)]
            if tensor.young is not None:
                rates = [
                    (index, 1.0 if young is None else young.lr_factor(step))
                    for index, young in generations(tensor.young, box)
                ]
            for index, factor in rates:
                lr = group["lr"] * factor
                p[index].mul_(1 - lr * group["weight_decay"]).sub_(update[index], alpha=lr)


def orthogonalised(matrix: torch.Tensor, *, iteration: torch.dtype) -> torch.Tensor:
    """The matrix with its singular values near 1, in its own dtype; zeros stay zeros.

    Runs DeepSpeed's iteration in the element type that the run chose, not in DeepSpeed's default.
    """
    # The iteration divides by |M| + 1e-7, so the update of a small gradient would depend on its
    # norm; normalised to 1 it cannot.
    norm = torch.linalg.vector_norm(matrix)
    unit = matrix / norm.clamp_min(torch.finfo(matrix.dtype).tiny)
    return newton_schulz(unit, steps=_NS_STEPS, dtype=iteration).to(matrix.dtype)
