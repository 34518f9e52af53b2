"""The memory that a rank needs, by component, from arithmetic alone.

Parameters, gradients and optimizer state follow from what DeepSpeed 0.19 keeps (checked against
live engines in the tests).  With p the bytes of a parameter in the precision of the model, N the
parameters of a rank before ZeRO partitions them, H those of its ZeRO partition:

                      parameters   master, moments   gradients          temporary
  ZeRO 0, fp32        4 N          0, 8 N            4 N                bucket
  ZeRO 0, 16 bit      2 N          4 N, 8 N          2 N                bucket, 4 N in the step
  ZeRO 1              p N          4 H, 8 H          q N, q H           bucket, or 4 H in the step
  ZeRO 1, bf16        2 N          4 H, 8 H          4 N                gradients reduced at once
  ZeRO 2              p N          4 H, 8 H          q H                bucket, or 4 H in the step
  ZeRO 3              p (H + G)    4 H, 8 H          q H                bucket and 4 H

With F the frozen parameters of a rank and E those of its range, p F (at ZeRO 3, p E and p F while
gathered) come to the parameters, and in 16 bit 4 E to the masters: nothing else. Activations of
layers below the lowest trained one count as 0; above it, those of frozen layers count in full,
although less of them is kept (the inputs of frozen matrices are not).

G is the maximum that ZeRO 3 holds gathered; q is the width in bytes in which gradients are
accumulated over micro-batches. A bucket exists in p bytes and, if different, in the width of the
reduction over ranks. ZeRO 1 in bf16 uses another DeepSpeed optimizer if it accumulates in fp32.
With offload, master, moments, an fp32 copy of the gradients and the partition's own are in host
memory.

Activations follow Korthikanti et al., "Reducing Activation Recomputation in Large Transformer
Models" (arXiv 2205.05198, section 4), which counts for a GPT layer in 16 bit s b h (10 + 24 / t)
bytes with tensor parallelism t, s b h 34 / t with sequence parallelism as well, and
5 a s^2 b / t for the attention matrix.  Fused attention does not keep the matrix, so that term is
absent, and the counts here are those of megagrow's own layers, for any width of the MLP, grouped
key/value heads, SwiGLU, and any precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from megagrow.config import Config, ModelConfig
from megagrow.forecast.cost import STATE_BYTES
from megagrow.state.catalog import Slot
from megagrow.state.layout import Layout
from megagrow.state.placement import FLAT_ALIGNMENT, Placement
from megagrow.state.precision import PRECISIONS

_MASTER = 4
# DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE: gradient elements per reduction.
_REDUCED_AT_ONCE = 500_000_000
# DeepSpeed's stage3_max_live_parameters, which megagrow does not change.
_MAX_LIVE = 10**9


@dataclass(frozen=True)
class RankMemory:
    """Peak bytes on one rank during training.

    Attributes:
        parameters: in the model's precision, including those that ZeRO 3 gathers.
        gradients: kept from the backward pass to the update.
        optimizer: fp32 master parameters, if separate, and both moments.
        activations: kept for the backward pass, for all micro-batches in flight.
        buckets: DeepSpeed's communication buckets, and its temporary copies in the step.
        host: in host memory, with offload.
        early: the part of the gradients that is allocated when the engine starts.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buckets: int
    host: int = 0
    early: int = 0

    @property
    def device(self) -> int:
        """Total on the device."""
        return sum(getattr(self, part) for part in DEVICE_PARTS)

    def on_host(self) -> RankMemory:
        """The total if the device is the host, where offload saves nothing."""
        return replace(self, optimizer=self.optimizer + self.host, host=0)


DEVICE_PARTS = tuple(f.name for f in fields(RankMemory) if f.name not in ("host", "early"))


def rank_memory(
    config: Config,
    model: ModelConfig,
    placement: Placement,
    *,
    pipe: int,
    bucket: int,
    accumulation: int,
    summed: int,
    reduced: int,
    sequence_parallel: bool,
) -> RankMemory:
    """Memory of the fullest rank of a pipeline stage.

    Args:
        config: the run.
        model: of the growth stage.
        placement: of the growth stage.
        pipe: the pipeline stage.
        bucket: elements of DeepSpeed's buckets.
        accumulation: gradient-accumulation steps.
        summed: bytes per element of gradients accumulated over micro-batches.
        reduced: bytes per element of gradients reduced over data ranks.
        sequence_parallel: whether norms see only a part of the sequence.
    """
    layout, p = placement.layout, PRECISIONS[config.precision.dtype].bytes
    groups, frozen = (local_sizes(placement, pipe, frozen=which) for which in (False, True))
    n = sum(sum(sizes) for sizes in groups)
    held = partition_size(layout, groups)
    largest = max((max(sizes) for sizes in groups), default=1)
    master = 0 if layout.zero == 0 and p == 4 else _MASTER * held
    still, still_held = sum(sum(sizes) for sizes in frozen), partition_size(layout, frozen)
    master += 0 if p == 4 else _MASTER * still_held
    kind = config.optimizer.kind
    optimizer = master + STATE_BYTES * slot_elements(placement, pipe, kind.slots[1:])
    step_copy = 4 * held
    # A bucket of gradients, and its copy in the dtype of the reduction.
    bucket_bytes = (p + (reduced if reduced != p else 0)) * bucket
    bf16, early = config.precision.dtype == "bf16", 0
    if layout.zero == 0:
        # DeepSpeed's pipeline in bf16 keeps the accumulated gradients separately.
        twice = bf16 and layout.pipeline > 1
        parameters, gradients = p * (n + still), p * n * (2 if twice else 1)
        # DeepSpeed reduces gradients over the data ranks in flat copies of a bucket's size.
        buckets = (0 if p == 4 else step_copy) + (bucket_bytes if layout.data > 1 else 0)
    elif layout.zero == 1 and bf16 and summed == 4:
        parameters, gradients = p * (n + still), summed * n
        early = gradients
        buckets = reduced * min(n, _REDUCED_AT_ONCE) if layout.data > 1 else 0
    elif layout.zero < 3:
        parameters = p * (n + still)
        gradients = summed * (held + (n if layout.zero == 1 else 0))
        buckets = max(bucket_bytes, step_copy)
    else:
        parameters = p * (held + still_held + min(n + still, _MAX_LIVE))
        gradients = summed * held
        buckets = bucket_bytes + step_copy
    host = 0
    if config.optimizer.offload == "cpu":
        host = optimizer + 4 * held + summed * held
        optimizer = 0
        gradients -= summed * held
        buckets = bucket_bytes + (2 * p * largest if layout.zero < 3 else 0)
    # Muon: the largest matrix tensor, gathered, one matrix of it, and the iteration's temporaries.
    buckets += 4 * _MASTER * max(
        (t.volume for _, tensors in placement.groups(pipe) for t in tensors
         if kind.orthogonalises(t)),
        default=0,
    )  # fmt: skip
    # Below the lowest trained layer nothing is kept for a backward pass.
    lowest = min(t.places[0] for t in placement.catalog if t.training == "trained")
    return RankMemory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=activation_bytes(
            model,
            micro=config.batch.micro,
            width=p,
            tensor=layout.tensor,
            sequence_parallel=sequence_parallel,
            places=range(max(lowest, placement.cuts[pipe]), placement.cuts[pipe + 1]),
            in_flight=micro_batches_in_flight(layout.pipeline, pipe, accumulation),
        ),
        buckets=buckets,
        host=host,
        early=early,
    )


def local_sizes(placement: Placement, pipe: int, *, frozen: bool | None = None) -> list[list[int]]:
    """Elements of a stage's parameters by group, split by tensor parallelism only.

    Args:
        placement: who holds what.
        pipe: the pipeline stage.
        frozen: of the frozen ones alone, or of the others alone; by default of all.
    """
    wanted = {None: ("trained", "frozen"), True: ("frozen",), False: ("trained",)}[frozen]
    sizes = [
        [placement.local(tensor, 0).numel for tensor in tensors if tensor.training in wanted]
        for _, tensors in placement.groups(pipe)
    ]
    return [group for group in sizes if group]


def partition_size(layout: Layout, groups: Sequence[Sequence[int]]) -> int:
    """Elements of such parameter groups in one data rank's ZeRO partition, padding included."""
    if layout.zero == 0:
        return sum(sum(sizes) for sizes in groups)
    if layout.zero == 3:
        return sum(-(-size // layout.data) for sizes in groups for size in sizes)
    unit = FLAT_ALIGNMENT * layout.data
    return sum(-(-sum(sizes) // unit) * FLAT_ALIGNMENT for sizes in groups)


def slot_elements(placement: Placement, pipe: int, slots: Sequence[Slot]) -> int:
    """Elements of some slots in the ZeRO partition of one data rank of a pipeline stage."""
    layout, total = placement.layout, 0
    for slot in slots:
        groups = [
            [placement.local(tensor, 0).numel for tensor in tensors if slot.of(tensor)]
            for _, tensors in placement.groups(pipe)
        ]
        total += partition_size(layout, groups)
    return total


def frozen_beyond_range(placement: Placement, pipe: int, dtype: str) -> int:
    """Bytes of frozen parameters outside its own range that a rank keeps while it grows.

    In fp32 at ZeRO 1 and 2 its range of them is a part of the model's parameters.
    """
    if dtype != "fp32" or placement.layout.zero not in (1, 2):
        return 0
    frozen = local_sizes(placement, pipe, frozen=True)
    return _MASTER * (sum(map(sum, frozen)) - partition_size(placement.layout, frozen))


def micro_batches_in_flight(pipeline: int, pipe: int, accumulation: int) -> int:
    """Micro-batches whose activations a stage holds at the same time, under DeepSpeed's 1F1B."""
    if pipeline == 1:
        return 1
    return max(2, min(pipeline - pipe, accumulation))


def activation_bytes(
    model: ModelConfig,
    *,
    micro: int,
    width: int,
    tensor: int,
    sequence_parallel: bool,
    places: range,
    in_flight: int = 1,
) -> int:
    """Bytes that the forward pass of some layers saves for the backward pass, on one rank.

    Args:
        model: the model configuration.
        micro: micro-batch size in samples.
        width: bytes per activation element.
        tensor: tensor-parallel size.
        sequence_parallel: whether norms and the stream are split over those ranks.
        places: positions in the layer list: 0 is the embedding, the last the head.
        in_flight: simultaneous micro-batches; temporaries count once.
    """
    tokens = micro * model.sequence
    stream = model.hidden / (tensor if sequence_parallel else 1)
    block, recomputed = block_bytes(model, width=width, tensor=tensor, stream=stream)
    last = model.layers + 1
    blocks = sum(1 for place in places if 0 < place < last)
    kept, moment = block * blocks, recomputed if blocks else 0.0
    kept += (
        sum(_mask_bytes(model, place - 1, width) for place in places if 0 < place < last) / micro
    )
    if 0 in places:
        kept += 8  # token ids
    if last in places:
        logits = width * model.vocabulary / tensor
        kept += 2 * width * stream + logits + 8
        moment = max(moment, logits)  # their gradient
    return round(tokens * (kept * in_flight + moment))


def _mask_bytes(model: ModelConfig, layer: int, width: int) -> float:
    """Bytes per token of a single sample that a layer keeps of its mask, if it has a window.

    PyTorch's fused attention keeps it for each layer, as numbers.
    """
    window = model.layer_kind(layer).window
    masked = window is not None and window < model.sequence
    core = model.activation_checkpointing == "none" and model.attention_softcap is None
    return float(width * model.sequence) if masked and core else 0.0


def block_bytes(
    model: ModelConfig, *, width: int, tensor: int, stream: float
) -> tuple[float, float]:
    """Bytes of a block per token: (saved for its backward pass, temporary in it).

    Args:
        model: its model, with activations of `width` bytes.
        width: bytes of an activation.
        tensor: number of tensor-parallel ranks.
        stream: units of the residual stream that a rank holds per token.
    """
    heads = model.heads * model.head_dim / tensor
    keys = model.kv_groups * model.head_dim / tensor
    ffn = model.ffn / tensor
    made = model.architecture
    # Input and output of both norms, then qkv, the output of attention, and the inside of the MLP.
    # Rotated queries and keys.
    turned = heads + keys if made.positions == "rotary" else 0.0
    qkv, inside = heads + 2 * keys, (4 if made.gated else 2) * ffn
    core = width * turned + 4 * model.heads / tensor  # and the softmax's row sums, fp32
    rest = width * (4 * stream + qkv + heads + inside)
    if made.block_norms == "both":
        rest += 2 * width * stream
    if made.head_norm is not None:
        rest += width * (heads + keys)  # their inputs
    scores = 0.0
    if model.attention_softcap is not None:
        # Not fused: tanh and the softmax, in fp32 and rounded, are kept for all pairs of tokens.
        pairs = model.heads / tensor * model.sequence
        core += pairs * (width + 4 + (width if width < 4 else 0))
        scores = 2 * width * pairs  # and their gradients, for a moment
    masks = 2 * stream if model.dropout else 0.0
    everything = rest + core + masks
    if model.activation_checkpointing == "full":
        return width * stream, everything + scores
    if model.activation_checkpointing == "selective":
        return rest + masks, core + scores
    return everything, scores
