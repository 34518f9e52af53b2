"""Every use of what DeepSpeed and torch.distributed do not document, and every patch of them.

Names that begin with an underscore, attributes that no page of their documentation mentions,
functions that are replaced: all are here, and in no other file of megagrow/engine
(tests/engine/test_privates.py).  Each function says what it needs them for and why the public
API does not serve.  They were checked with the versions in `CHECKED`.

`@uses` lists, in front of a function, what the function needs to exist.  The same test looks each
of them up in the installed versions.  When it fails after an update: read the function's
docstring, find in the new version what took the place of the missing name, change the function
and its list, run tests/engine, and enter the new version in `CHECKED`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed.ops
import deepspeed.utils.groups
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn
from torch.distributed import distributed_c10d

CHECKED = {"deepspeed": "0.19.8", "torch": "2.13.0"}

# What each function or class below needs, by its name: dotted names from the module on.  The last
# part is an attribute of a module or a class, or one that the class's code gives to its objects,
# or (`module: .name`) one that the module's code reads from or gives to parameters.
USES: dict[str, tuple[str, ...]] = {}

_Item = TypeVar("_Item", bound=Callable[..., Any])

_ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
_PIPELINE_ENGINE = "deepspeed.runtime.pipe.engine.PipelineEngine"
_PIPELINE = "deepspeed.runtime.pipe.module.PipelineModule"
_UNFUSED = "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer"
_ZERO_1_2 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
_ZERO_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
_BF16 = "deepspeed.runtime.bf16_optimizer.BF16_Optimizer"
_INIT = "deepspeed.runtime.zero.partition_parameters.Init"
_MUON = "deepspeed.runtime.zero.muon.original_muon"
_C10D = "torch.distributed.distributed_c10d"


def uses(*names: str) -> Callable[[_Item], _Item]:
    """Note in `USES` what a function or a class needs of DeepSpeed or torch.distributed."""

    def note(item: _Item) -> _Item:
        USES[item.__name__] = names
        return item

    return note


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Temporarily replace an attribute of a module or class."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# --- the job ------------------------------------------------------------------------------


@uses("deepspeed.ops.__compatible_ops__", "deepspeed.comm.torch: .__compatible_ops__")
def skip_shared_memory_op() -> None:
    """Keep `deepspeed.init_distributed` from compiling its shared-memory op.

    Only DeepSpeed's inference uses it.  Compiling takes a minute and a lock file, and a job that is
    killed during it leaves the lock behind, so that every later job would hang on it.  There is no
    setting for it: `DS_BUILD_OPS` governs the installation alone.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@uses("deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported")
def allow_fp16_on_cpu() -> None:
    """Accept fp16 on every CPU.

    DeepSpeed refuses it where the processor lacks fp16 instructions, with no setting to the
    contrary; PyTorch computes it without them.
    """
    get_accelerator().is_fp16_supported = lambda: True


@uses(_MUON)
def import_early() -> None:
    """Import what the first engine would import anyway, and PyTorch's compiler with it.

    So that `gc.freeze` after it covers all libraries.
    """
    importlib.import_module(_MUON)


@uses(f"{_C10D}._get_default_store")
def default_store() -> Any:
    """The job's key-value store; PyTorch has no public way from a process group to its store."""
    return distributed_c10d._get_default_store()


@uses(f"{_C10D}._world", f"{_C10D}._World.pg_map", f"{_C10D}._set_pg_timeout")
def limit_collectives(seconds: float) -> None:
    """Set the timeout of every process group that exists.

    PyTorch takes a timeout publicly only where a group is made, and this one has to change during
    the run; DeepSpeed's own groups have to be reached as well.
    """
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


# --- start of an engine -------------------------------------------------------------------


@uses("deepspeed.utils.groups.mpu")
def forget_last_groups() -> None:
    """Remove the last engine's `mpu`, which a purely data-parallel layout must not see.

    DeepSpeed keeps it in a global, which `initialize(mpu=None)` leaves as it is.
    """
    deepspeed.utils.groups.mpu = None


@uses(
    f"{_ENGINE}._broadcast_model",
    f"{_INIT}._zero_init_param",
    f"{_INIT}._convert_to_deepspeed_param",
    f"{_ZERO_1_2}.initialize_optimizer_states",
    f"{_ZERO_1_2}.cpu_offload",
    "deepspeed.runtime.bf16_optimizer.see_memory_usage",
    "deepspeed.runtime.zero.partition_parameters: .partition",
)
@contextlib.contextmanager
def lean_start() -> Iterator[None]:
    """Engines created here broadcast no parameters, allocate no dummy gradients, print nothing.

    `deepspeed.initialize` expects an initialised model, and none of this can be switched off: it
    broadcasts rank 0's parameters and flattens them into its own buffers.  Ours are filled by a
    transfer afterwards; until then they share one small buffer, so that there is never a second
    copy of the model.
    """

    def partition(init: Any, parameter: Any) -> None:
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()

    original = DeepSpeedZeroOptimizer.initialize_optimizer_states

    def make_gradients(optimizer: Any) -> None:
        # Without offload they are allocated, and freed at once.
        if optimizer.cpu_offload:
            original(optimizer)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (DeepSpeedEngine, "_broadcast_model", lambda engine: None),
            (Init, "_zero_init_param", partition),
            (DeepSpeedZeroOptimizer, "initialize_optimizer_states", make_gradients),
            # It prints, and first collects garbage, twice for each parameter group.
            (bf16_optimizer, "see_memory_usage", lambda message, force=False: None),
        ):
            stack.enter_context(replaced(owner, name, value))
        yield


@uses(
    f"{_ENGINE}.enable_backward_allreduce", f"{_PIPELINE_ENGINE}.pipeline_enable_backward_allreduce"
)  # fmt: skip
def skip_gradient_average(engine: Any) -> None:
    """Average no gradients: there is one data rank, and ZeRO is off.

    DeepSpeed would copy them into buckets and back; it has no setting that goes by the group's
    size.
    """
    engine.enable_backward_allreduce = False
    engine.pipeline_enable_backward_allreduce = False


@uses("deepspeed.runtime.utils: .tensor_model_parallel")
def mark_split(parameter: Any) -> None:
    """Each tensor-parallel rank holds another part, so each part counts in the gradient norm.

    Megatron's mark; DeepSpeed reads it and documents no other way to say so.
    """
    parameter.tensor_model_parallel = True


@uses("deepspeed.runtime.zero.stage_1_and_2: .ds_pipe_replicated")
def mark_replica(parameter: Any, *, replica: bool) -> None:
    """Whether an earlier pipeline stage counts the same weight in the gradient norm.

    `PipelineModule` sets the mark itself only on modules that are tied as a whole.
    """
    parameter.ds_pipe_replicated = replica


def counts_in_norm(parameter: Any, *, tensor_rank: int) -> bool:
    """Whether this rank counts a parameter in the gradient norm, by the two marks above."""
    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    return tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False)


@uses("deepspeed.runtime.bf16_optimizer.get_global_norm_of_tensors")
def allow_ranks_without_gradients() -> None:
    """Let the norm of no gradients be 0 in `BF16_Optimizer`, as the other optimizers do.

    A pipeline stage may have nothing to train, and a tensor-parallel rank nothing that it counts.
    """
    norm = bf16_optimizer.get_global_norm_of_tensors
    if getattr(norm, "of_none", False):
        return

    def norm_or_zero(input_tensors: Sequence[torch.Tensor], *args: Any, **more: Any) -> Any:
        nothing = [torch.zeros(1, device=get_accelerator().current_device_name())]
        return norm(input_tensors or nothing, *args, **more)

    norm_or_zero.of_none = True  # type: ignore[attr-defined]
    bf16_optimizer.get_global_norm_of_tensors = norm_or_zero


# --- a running engine ---------------------------------------------------------------------


@uses(f"{_ENGINE}.basic_optimizer")
def inner_optimizer(engine: Any) -> Any:
    """Our own optimizer, inside the one that DeepSpeed wraps around it."""
    return engine.basic_optimizer


@uses(
    f"{_UNFUSED}._global_grad_norm", f"{_ZERO_1_2}._global_grad_norm",
    f"{_ZERO_3}._global_grad_norm", f"{_BF16}._global_grad_norm",
)  # fmt: skip
def grad_norm(engine: Any) -> float:
    """The global gradient norm as soon as it is known; negative if a gradient is not finite.

    The public `get_global_grad_norm()` has it only after the update, and it decides whether
    to apply the update; the optimizer has it before.
    """
    return float(getattr(engine.optimizer, "_global_grad_norm", None) or 0.0)


@uses(f"{_PIPELINE_ENGINE}.total_loss", f"{_PIPELINE_ENGINE}.micro_batches")
def pipeline_loss(engine: Any) -> torch.Tensor | None:
    """Mean loss of the step's micro-batches on the last pipeline stage; None on the others.

    `train_batch` returns it after the update; it is needed before.
    """
    total = engine.total_loss
    return None if total is None else total / engine.micro_batches


# What determines the future of a loss scale.
SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@uses(
    f"{_UNFUSED}.loss_scale_config",
    "deepspeed.runtime.fp16.loss_scaler.LossScaleConfig.dynamic_loss_scale",
    *(f"deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler.{name}" for name in SCALE_FIELDS),
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler.dynamic",
    f"{_ZERO_1_2}.loss_scaler",
    f"{_ZERO_3}.loss_scaler",
)
def loss_scaler(engine: Any) -> Any | None:
    """The object with fp16's dynamic loss scale, some of `SCALE_FIELDS`; None without one.

    DeepSpeed gives out the scale alone, and a resumed run needs its counters too.
    """
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        config = engine.optimizer.loss_scale_config
        return config if config.dynamic_loss_scale else None
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


@uses(f"{_MUON}.ns_compute_dtype", f"{_MUON}.zeropower_via_gram_newtonschulz")
def newton_schulz(matrix: torch.Tensor, *, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """DeepSpeed's Newton-Schulz iteration in a chosen element type, uncompiled.

    It chooses the type by the processor and has no argument for it.  It compiles the iteration,
    and then the last bits depend on the order in which shapes were first seen, so a resumed run
    could diverge.
    """
    # Importing it initialises torch.compile, which no other optimizer needs.
    from deepspeed.runtime.zero.muon import original_muon

    with (
        replaced(original_muon, "ns_compute_dtype", lambda method="gram": dtype),
        torch.compiler.set_stance("force_eager"),
    ):
        return original_muon.zeropower_via_gram_newtonschulz(matrix, steps=steps)


# --- where the masters are ----------------------------------------------------------------
#
# Every DeepSpeed optimizer holds the fp32 master of a parameter, or this rank's flat range of it,
# inside a tensor that the wrapped torch optimizer steps; the moments are stored under that
# tensor's key.  The optimizers and what each keeps:
#   (none)                          fp32, ZeRO 0: the parameter is its own master
#   FP16_UnfusedOptimizer           16 bit, ZeRO 0: one master per parameter
#   DeepSpeedZeroOptimizer          ZeRO 1 and 2: one flat partition per parameter group
#   BF16_Optimizer                  bf16, ZeRO 1: the same
#   DeepSpeedZeroOptimizer_Stage3   ZeRO 3: a flat range of each parameter, concatenated
#
# The public `safe_get_local_fp32_param` and its kind return copies or lack layouts; a transfer
# reads and writes the memory in place, at known positions.


@dataclass(frozen=True)
class Fragment:
    """A rank's part of one local parameter.

    Attributes:
        start: first flat position in the local parameter.
        owner: the tensor that holds this part and that the torch optimizer steps.
        offset: the part's position in `owner`.
        length: number of elements, padding included.
    """

    start: int
    owner: torch.Tensor
    offset: int
    length: int


@uses(
    f"{_BF16}.fp32_groups_flat_partition", f"{_ZERO_1_2}.single_partition_of_fp32_groups"
)  # fmt: skip
def find_fragments(engine: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, Fragment]:
    """This rank's part of every parameter; parameters of which it holds nothing are omitted.

    Args:
        engine: a DeepSpeedEngine.
        parameters: its module's parameters by logical name.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return {name: _stage3_fragment(optimizer, p) for name, p in parameters.items()}
    if isinstance(optimizer, BF16_Optimizer):
        return _mapped_fragments(parameters, optimizer.fp32_groups_flat_partition)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return _mapped_fragments(parameters, optimizer.single_partition_of_fp32_groups)
    masters: dict[int, torch.Tensor] = {id(p): p for p in parameters.values()}
    masters |= {id(low): high for low, high in unfused_masters(engine)}
    return {name: Fragment(0, masters[id(p)], 0, p.numel()) for name, p in parameters.items()}


@uses(
    "deepspeed.utils.tensor_fragment: ._hp_mapping",
    "deepspeed.utils.tensor_fragment.tensor_fragment.lp_fragment_address",
    "deepspeed.utils.tensor_fragment.tensor_fragment.hp_fragment_address",
    "deepspeed.utils.tensor_fragment.tensor_fragment.param_group_index",
    "deepspeed.utils.tensor_fragment.fragment_address.start",
    "deepspeed.utils.tensor_fragment.fragment_address.numel",
)
def _mapped_fragments(
    parameters: Mapping[str, nn.Parameter], partitions: Sequence[torch.Tensor]
) -> dict[str, Fragment]:
    fragments = {}
    for name, parameter in parameters.items():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            owner = partitions[mapping.param_group_index]
            fragments[name] = Fragment(low.start, owner, high.start, low.numel)
    return fragments


@uses(
    f"{_ZERO_3}.grad_position",
    f"{_ZERO_3}.get_param_id",
    f"{_ZERO_3}.fp32_partitioned_groups_flat",
    "deepspeed.runtime.zero.partition_parameters: .ds_tensor",
    "deepspeed.runtime.zero.partition_parameters: .ds_numel",
    "deepspeed.runtime.zero.partition_parameters: .ds_process_group",
)
def _stage3_fragment(optimizer: Any, parameter: Any) -> Fragment:
    group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    rank = parameter.ds_tensor.ds_numel * dist.get_rank(parameter.ds_process_group)
    return Fragment(rank, optimizer.fp32_partitioned_groups_flat[group], offset, length)


@uses(
    "deepspeed.runtime.zero.partition_parameters: .ds_tensor",
    "deepspeed.runtime.zero.partition_parameters: .ds_numel",
    "deepspeed.runtime.zero.partition_parameters: .ds_process_group",
)
def own_partition(parameter: Any) -> tuple[int, torch.Tensor] | None:
    """This rank's range of a parameter under ZeRO 3, which no optimizer need have.

    Returns:
        (its first flat position, its memory, padding included); None without ZeRO 3.
    """
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return None
    return part.ds_numel * dist.get_rank(parameter.ds_process_group), part.data.view(-1)


@uses(
    f"{_ZERO_1_2}._lazy_init_hp_params_optimizer_state",
    f"{_BF16}._lazy_init_hp_params_optimizer_state",
)
def link_optimizer_state(engine: Any) -> None:
    """Tell DeepSpeed that optimizer state exists, as only its own first step would."""
    if isinstance(engine.optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


@dataclass(frozen=True)
class Partitions:
    """A parameter group under ZeRO 1 or 2.

    Attributes:
        master: this rank's fp32 partition, flat.
        parts: the partitions of all data ranks, contiguous in the memory of the model's parameters.
        group: the data ranks.
    """

    master: torch.Tensor
    parts: Sequence[torch.Tensor]
    group: dist.ProcessGroup


@uses(
    f"{_BF16}.bf16_partitioned_groups",
    f"{_BF16}.real_dp_process_group",
    f"{_ZERO_1_2}.parallel_partitioned_bit16_groups",
    f"{_ZERO_1_2}.real_dp_process_group",
)
def partitions(engine: Any) -> list[Partitions]:
    """The parameter groups under ZeRO 1 or 2, and none otherwise.

    `update_lp_params` would gather a whole group at once, for which gloo needs a second copy.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        masters, parts = optimizer.fp32_groups_flat_partition, optimizer.bf16_partitioned_groups
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        masters = optimizer.single_partition_of_fp32_groups
        parts = optimizer.parallel_partitioned_bit16_groups
    else:
        return []
    groups = optimizer.real_dp_process_group
    return [Partitions(*items) for items in zip(masters, parts, groups, strict=True)]


@uses(f"{_UNFUSED}.fp16_groups", f"{_UNFUSED}.fp32_groups")
def unfused_masters(engine: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each 16-bit parameter with its master at ZeRO 0, and none otherwise."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, FP16_UnfusedOptimizer):
        return []
    return [
        (low, high)
        for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for low, high in zip(lows, highs, strict=True)
    ]


@uses(
    f"{_ZERO_3}.fp16_groups",
    f"{_ZERO_3}._reassign_or_swap_out_partitioned_parameters",
    f"{_ZERO_3}.persistent_parameters",
    "deepspeed.runtime.zero.partition_parameters: .partition",
    "deepspeed.runtime.zero.partition_parameters: .all_gather",
)
def publish_stage3(engine: Any) -> None:
    """Copy the masters into the model's parameters at ZeRO 3; no effect otherwise."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    # Small parameters stay gathered between steps, so their gathered copies are stale now.
    persistent = optimizer.persistent_parameters
    if persistent:
        persistent[0].partition(persistent, has_been_updated=False)
        persistent[0].all_gather(persistent)


# --- pipelines ----------------------------------------------------------------------------


@uses(
    f"{_PIPELINE}._partition_layers",
    f"{_PIPELINE}._set_bounds",
    f"{_PIPELINE}.parts",
    f"{_PIPELINE}._index_tied_modules",
    f"{_PIPELINE}.get_tied_weights_and_groups",
    f"{_PIPELINE}.stage_id",
    f"{_PIPELINE}.num_stages",
    f"{_PIPELINE}.forward_funcs",
)
class CutPipeline(PipelineModule):
    """A `PipelineModule` with given cuts, whose first and last stage may share one weight.

    `partition_method` cuts by a rule of DeepSpeed's, not where a placement has; `TiedLayerSpec`
    ties a module as a whole, where two different layers share a weight here.

    Args:
        cuts: stage s runs layers cuts[s] to cuts[s + 1].
        tied: the shared weight of a layer; None if nothing is shared.
        ends: the ranks on the first and the last stage that hold the same part of it.
        options: of `PipelineModule`.
    """

    def __init__(
        self,
        *,
        cuts: Sequence[int],
        tied: Callable[[Any], nn.Parameter] | None,
        ends: dist.ProcessGroup | None,
        **options: Any,
    ) -> None:
        # Before PipelineModule.__init__, which calls the methods below.
        self._cuts, self._tied, self._ends = list(cuts), tied, ends
        super().__init__(**options)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._cuts
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def stage_layers(self) -> list[nn.Module]:
        """The layers of this stage, in order."""
        return list(self.forward_funcs)

    def _index_tied_modules(self) -> dict[str, Any]:
        for weight, _ in self.get_tied_weights_and_groups():
            mark_replica(weight, replica=self.stage_id > 0)
        return {}

    def get_tied_weights_and_groups(self) -> list[tuple[Any, dist.ProcessGroup | None]]:
        """The shared weight, if this stage holds a copy of it; its gradients are summed."""
        if self._tied is None or self.stage_id not in (0, self.num_stages - 1):
            return []
        weight = self._tied(self.forward_funcs[0 if self.stage_id == 0 else -1])
        return [(weight, self._ends)] if weight.requires_grad else []


@uses(
    f"{_PIPELINE_ENGINE}._INSTRUCTION_MAP",
    f"{_PIPELINE_ENGINE}.pipe_buffers",
    f"{_PIPELINE_ENGINE}.stage_id",
    *(f"deepspeed.runtime.pipe.schedule.{name}" for name in
      ("RecvActivation", "SendGrad", "RecvGrad", "BackwardPass")),
)  # fmt: skip
def end_backward_at(engine: Any, *, lowest: int) -> None:
    """End the backward pass of a pipeline at the lowest stage that has something to train.

    DeepSpeed takes every stage's inputs as needing gradients, sends these down to the first stage,
    and runs a backward pass of outputs that may not depend on any trained parameter, which
    PyTorch refuses.  Its map of instructions is an attribute that each engine can have of its own.

    Args:
        engine: a PipelineEngine.
        lowest: the first pipeline stage with a trained parameter.
    """
    if engine.stage_id > lowest:
        return
    receive = engine._INSTRUCTION_MAP[schedule.RecvActivation]

    def receive_constant(engine: Any, buffer_id: int) -> None:
        receive(engine, buffer_id)
        inputs = engine.pipe_buffers["inputs"][buffer_id]
        for tensor in inputs if isinstance(inputs, tuple) else (inputs,):
            tensor.requires_grad_(False)

    def forget(*names: str) -> Callable[[Any, int], None]:
        def drop(engine: Any, buffer_id: int) -> None:
            for name in names:
                engine.pipe_buffers[name][buffer_id] = None

        return drop

    changed = {schedule.RecvActivation: receive_constant, schedule.SendGrad: forget("inputs")}
    if engine.stage_id < lowest:
        changed |= {
            schedule.RecvGrad: forget(),
            schedule.BackwardPass: forget("outputs", "output_tensors"),
        }
    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, **changed}
