"""Plans Megatron-LM's classic checkpoints; see `source` for the format.

Names are those of Megatron-Core's model with its own layers (`--transformer-impl local`), the
checkpoint version is 3.0.  Random states are left out (`--no-load-rng`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.containers.pickle_reader import Opaque
from megagrow.checkpoint.containers.torch_writer import NewTensor, number, plan_archive
from megagrow.checkpoint.formats.megatron import names
from megagrow.checkpoint.interface.client_state import KEY, plain_json
from megagrow.checkpoint.interface.format import (
    FilePlan,
    LeftOut,
    Segment,
    SinkRequest,
    Values,
    Zeros,
)
from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.interface.model_of import model_of, optimizer_of, refuse_ramp, section
from megagrow.checkpoint.interface.placed import placed
from megagrow.checkpoint.io.files import naming, write_new
from megagrow.config.optimization import PrecisionConfig
from megagrow.errors import CheckpointError, ConfigError
from megagrow.state.catalog import ADAM_SLOTS, MASTER, LogicalTensor, Rates, Slot
from megagrow.state.precision import PRECISIONS

FILE = "model_optim_rng.pt"
LATEST = "latest_checkpointed_iteration.txt"


class MegatronSink:
    """One file per tensor-parallel rank of each pipeline stage.

    Raises:
        ConfigError: the layers do not divide evenly over the stages.
    """

    def __init__(self, request: SinkRequest) -> None:
        self._request, meta = request, request.meta
        self._layout, self._catalog = meta.layout, meta.catalog
        placed(meta.catalog, request)  # raises if tensor-parallel ranks cannot split it
        refuse_ramp(meta, program="Megatron-LM")
        self._model = model_of(meta)
        if self._model.layers % self._layout.pipeline:
            raise ConfigError(
                f"Megatron-LM shares out layers evenly: {self._model.layers} layers over "
                f"{self._layout.pipeline} pipeline stages",
                fix=f"give --pipeline a divisor of {self._model.layers}",
            )
        held = {slot.name for slot in meta.slots}
        # Megatron's optimizer would train frozen parameters, and has moments of all.
        self._trained = all(slot.name in held for slot in ADAM_SLOTS) and not meta.catalog.frozen
        self.slots: tuple[Slot, ...] = ADAM_SLOTS if self._trained else (MASTER,)
        self._optimizer = optimizer_of(meta)
        precision = section(PrecisionConfig, meta.config.get("precision"))
        # Without an optimizer there are no masters to keep what rounding would lose.
        asked = request.dtype or (PRECISIONS[precision.dtype].dtype if self._trained else None)
        self._dtype = asked or request.dtype_of(names.TOKENS, MASTER.name)
        self._padded = names.padded_vocabulary(self._model.vocabulary, self._layout.tensor)
        stated = meta.run_state.get("optimizer_step")
        self._optimizer_step = stated if isinstance(stated, int) else request.step
        self.left_out = tuple(_not_stored(meta)) if self._trained else ()
        self.files: list[FilePlan] = []
        for pipe in range(self._layout.pipeline):
            for rank in range(self._layout.tensor):
                stage = f"_{pipe:03d}" if self._layout.pipeline > 1 else ""
                name = f"iter_{request.step:07d}/mp_rank_{rank:02d}{stage}/{FILE}"
                self.files.append(plan_archive(name, self._file(pipe, rank)))

    def conclude(self, directory: Path, checksums: Mapping[str, Sequence[str]]) -> None:
        """Write the iteration number."""
        with naming(directory / LATEST, "cannot be written"):
            write_new(directory / LATEST, str(self._request.step).encode())

    def _file(self, pipe: int, rank: int) -> dict[str, Any]:
        request, meta = self._request, self._request.meta
        members = dict(self._members(pipe))
        consumed = meta.run_state.get("consumed_samples")
        args = names.write_args(self._model, self._layout, padded=self._padded)
        args |= {
            "iteration": request.step,
            "consumed_train_samples": consumed if isinstance(consumed, int) else 0,
            "consumed_valid_samples": 0,
            "bf16": self._dtype == torch.bfloat16,
            "fp16": self._dtype == torch.float16,
            "params_dtype": self._dtype,
        }
        file: dict[str, Any] = {
            "args": Opaque("argparse.Namespace", state=args),
            "checkpoint_version": 3.0,
            "iteration": request.step,
            "model": {
                name: self._tensor(tensor, MASTER, rank, self._dtype)
                for name, tensor in members.items()
            },
        }
        if self._trained:
            file["optimizer"] = self._state(members, rank)
        file[KEY] = {
            "step": request.step,
            "config": plain_json(meta.config),
            "run_state": plain_json(meta.run_state),
            "fingerprints": plain_json(meta.fingerprints),
        }
        return file

    def _members(self, pipe: int) -> Iterator[tuple[str, LogicalTensor]]:
        """The parameters of a stage in Megatron-Core's order; the tied copy on the last."""
        each, last = self._model.layers // self._layout.pipeline, self._layout.pipeline - 1
        first = each * pipe

        def order(tensor: LogicalTensor) -> tuple[int, int]:
            place = tensor.places[0]
            if not 0 < place <= self._model.layers:
                return place, 0
            part = tensor.inner.rpartition(".")[0]
            if part not in names.IN_LAYER:
                raise CheckpointError(
                    f"Megatron has no equivalent of {tensor.name} of family {self._model.family}",
                    fix="convert to native or dcp",
                )
            return place, list(names.IN_LAYER).index(part)

        for tensor in sorted(self._catalog, key=order):
            place = tensor.places[0]
            ends = (place == 0 and pipe == 0) or (place == self._model.layers + 1 and pipe == last)
            if ends or first < place <= first + each:
                yield names.megatron_name(tensor.name, first), tensor
        tied = self._catalog[names.TOKENS]
        if self._model.tie_embeddings and last > 0 and pipe == last:
            yield names.TIED_COPIES[0], tied

    def _tensor(
        self, tensor: LogicalTensor, slot: Slot, rank: int, dtype: torch.dtype
    ) -> NewTensor:
        box, shape = names.local_part(tensor, self._layout, rank, self._padded)
        segments: list[Segment] = (
            [] if box is None else [Values(tensor.name, slot.name, box, dtype)]
        )
        padding = math.prod(shape) - (box.volume if box else 0)
        if padding:
            segments.append(Zeros(padding * dtype.itemsize))
        return NewTensor(dtype, shape, tuple(segments))

    def _state(self, members: Mapping[str, LogicalTensor], rank: int) -> dict[str, Any]:
        """Adam's state in torch's numbering: group by group, those with weight decay first."""
        states: dict[int, dict[str, NewTensor]] = {}
        groups, masters = [], []
        for decay in (True, False):
            group = [
                tensor
                for name, tensor in members.items()
                if names.decays(name, len(tensor.shape)) == decay
            ]
            first = len(states)
            for tensor in group:
                moments = {
                    slot.name: self._tensor(tensor, slot, rank, torch.float32)
                    for slot in ADAM_SLOTS[1:]
                }
                states[len(states)] = {"step": number(self._optimizer_step), **moments}
            groups.append(self._hyperparameters(decay, list(range(first, len(states)))))
            masters.append([self._tensor(t, MASTER, rank, torch.float32) for t in group])
        inner = {"state": states, "param_groups": groups}
        if self._dtype == torch.float32:
            return inner
        return {"optimizer": inner, "fp32_from_fp16_params": masters}

    def _hyperparameters(self, decay: bool, params: list[int]) -> dict[str, Any]:
        ours = self._optimizer
        return {
            "lr": ours.lr,
            "max_lr": ours.lr,
            "min_lr": 0.0,
            "betas": tuple(ours.betas),
            "eps": ours.eps,
            "weight_decay": ours.weight_decay if decay else 0.0,
            "step": self._optimizer_step,  # apex and Transformer Engine count here
            "bias_correction": True,
            "wd_mult": 1.0 if decay else 0.0,
            "lr_mult": 1.0,
            "is_expert_parallel": False,
            "is_decoupled_lr": False,
            "default_config": True,
            "params": params,
        }


def _not_stored(meta: CheckpointMeta) -> Iterator[LeftOut]:
    """Per-tensor learning rates: Megatron's groups differ only in weight decay."""
    rules = meta.run_state.get("rules") or {}
    if isinstance(rules, Mapping) and rules.get("factors"):
        yield LeftOut("rates that growths have left to single tensors", "Megatron has one for all")
    if any(tensor.rates != Rates() for tensor in meta.catalog):
        yield LeftOut("rates by the shape (model.mup)", "Megatron has one for all")
