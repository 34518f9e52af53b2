"""Execute a transfer: fill, copy locally, and exchange the rest in messages of bounded size.

No rank ever holds more than its old shard, its new shard and the staging
buffers (the no-gather law).  A transfer communicates only through a `Channel`, so this package does
not import torch.distributed.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product

import numpy as np
import torch

from megagrow import ops
from megagrow.background import Pool
from megagrow.state.boxes import Box, split_box
from megagrow.state.catalog import Slot, slots_of
from megagrow.state.fresh import fresh, normals
from megagrow.state.placement import Placement
from megagrow.transfer.ends import Channel, Source, Target
from megagrow.transfer.moves import (
    Holder,
    Locator,
    Move,
    distinct_elements,
    merged,
    messages,
    plan_receives,
    plan_sends,
)
from megagrow.transfer.state_map import Copy, Drawn, Level, StateMap
from megagrow.transfer.statistics import Statistics, measure, measuring_bytes, required

_FRESH_BYTES_AN_ELEMENT = 48  # float64 temporaries of the generator, see fresh.py
_NOISE_ELEMENTS = 1 << 18  # noise values generated at a time
_LANDINGS = 256  # local copies per kernel launch

Landing = tuple[Move, torch.Tensor]  # a move and its values
MakeNoise = Callable[[Copy, Box], np.ndarray]  # for a part of a block, in block coordinates


@dataclass(frozen=True)
class TransferReport:
    """Statistics of one rank's part of a transfer (bytes, seconds).

    Attributes:
        bytes_written: new state that was copied from old state.
        bytes_received: the part of `bytes_written` that came from other ranks.
        bytes_crossed: bytes received over the channel; a value used twice is sent once.
        bytes_least: the lower bound: every value that the rank needs and does not hold, once.
        peak_staging_bytes: peak staging memory.
        seconds: wall time.
    """

    bytes_written: int = 0
    bytes_received: int = 0
    bytes_crossed: int = 0
    bytes_least: int = 0
    peak_staging_bytes: int = 0
    seconds: float = 0.0


def transfer_between_ranks(
    *,
    state_map: StateMap,
    old: Source,
    old_placement: Placement,
    new: Target,
    new_placement: Placement,
    slots: Sequence[Slot],
    channel: Channel,
    seed: int,
    staging_bytes: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TransferReport:
    """Make the new state of all ranks out of the old state of all ranks.

    A collective call: every rank of the job must make it. Each of the two staging buffers takes at
    most half of `staging_bytes`.
    """
    begin = time.perf_counter()
    rank = channel.rank
    plan = {"slots": slots, "rank": rank}
    needed = required(state_map, slots)
    statistics = measure(
        needed, old=old, locator=old_placement, rank=rank, channel=channel, device=device,
        staging_bytes=staging_bytes,
    )  # fmt: skip
    staged = max(measuring_bytes(needed, staging_bytes, device), fill_uncovered(
        state_map=state_map, new=new, placement=new_placement, slots=slots, rank=rank, seed=seed,
        staging_bytes=staging_bytes, statistics=statistics,
    ))  # fmt: skip
    noise = partial(_noise, seed=seed, statistics=statistics)
    # By term of a sum, and the other rank: a term is added everywhere before the next one.
    incoming: dict[int, dict[int, list[Move]]] = defaultdict(lambda: defaultdict(list))
    added: dict[int, list[Move]] = defaultdict(list)
    written = 0
    here: list[Landing] = []
    for move in plan_receives(state_map, old_placement, new_placement, **plan):  # type: ignore[arg-type]
        written += move.part.volume
        if move.holder == rank and move.copy.term:
            added[move.copy.term].append(move)
        elif move.holder == rank:
            here.append((move, _piece(old, move)))
            # A kernel takes many at once; otherwise one at a time, since a piece may own its
            # memory.
            if len(here) == _LANDINGS or not ops.own("copy_boxes", here[0][1]):
                _land_all(here, new, noise)
                here = []
        else:
            incoming[move.copy.term][move.holder].append(move)
    _land_all(here, new, noise)
    outgoing: dict[int, dict[int, list[Move]]] = defaultdict(lambda: defaultdict(list))
    if channel.world > 1:
        for move in plan_sends(state_map, old_placement, new_placement, **plan):  # type: ignore[arg-type]
            if move.receiver != rank:
                outgoing[move.copy.term][move.receiver].append(move)

    crossing = (moves for term in incoming.values() for moves in term.values())
    least = distinct_elements(move for moves in crossing for move in moves)
    width = torch.empty((), dtype=dtype).element_size()
    limit = max(1, staging_bytes // (2 * width))
    received = crossed = 0
    terms = sorted({0, *added, *incoming, *outgoing})
    # In step s, rank r sends to r+s and receives from r-s: each pair meets once in a term, and all
    # ranks go through terms and steps in the same order, so there is no deadlock.
    for term, step in product(terms, range(channel.world)):
        if step == 0:
            for move in added.pop(term, []):
                _land(move, _piece(old, move), new, noise)
            continue
        to, source = (rank + step) % channel.world, (rank - step) % channel.world
        sends = messages(merged(outgoing[term].pop(to, [])), limit)
        receives = messages(merged(incoming[term].pop(source, [])), limit)
        send_buffer = _buffer(sends, dtype, device)
        receive_buffer = _buffer(receives, dtype, device)
        staged = max(staged, (send_buffer.numel() + receive_buffer.numel()) * width)
        for turn in range(max(len(sends), len(receives))):
            packed = _pack(sends[turn], old, send_buffer) if turn < len(sends) else None
            received_flat = None
            if turn < len(receives):
                received_flat = receive_buffer[: sum(move.part.volume for move in receives[turn])]
            channel.exchange(send=packed, to=to, receive=received_flat, source=source)
            if received_flat is not None:
                crossed += received_flat.numel()
                received += _unpack(receives[turn], received_flat, new, noise)
    return TransferReport(
        bytes_written=written * width,
        bytes_received=received * width,
        bytes_crossed=crossed * width,
        bytes_least=least * width,
        peak_staging_bytes=staged,
        seconds=time.perf_counter() - begin,
    )


def transfer_from_storage(
    *,
    state_map: StateMap,
    old: Source,
    locator: Locator,
    new: Target,
    new_placement: Holder,
    slots: Sequence[Slot],
    rank: int,
    seed: int,
    staging_bytes: int,
    statistics: Statistics | None = None,
) -> TransferReport:
    """Make one rank's new state from storage that any rank can read.

    Args:
        statistics: the statistics that the state map needs; None: measure them, which reads their
            tensors completely, a piece at a time.
    """
    begin = time.perf_counter()
    if statistics is None:
        needed = required(state_map, slots)
        statistics = measure(needed, old=old, locator=locator, staging_bytes=staging_bytes)
    staged = fill_uncovered(
        state_map=state_map, new=new, placement=new_placement, slots=slots, rank=rank, seed=seed,
        staging_bytes=staging_bytes, statistics=statistics,
    )  # fmt: skip
    written = 0
    noise = partial(_noise, seed=seed, statistics=statistics)
    moves = plan_receives(state_map, locator, new_placement, slots=slots, rank=rank)
    for batch in messages(list(moves), max(1, staging_bytes // 8)):
        for move in batch:
            memory = _memory(new, move)
            written += memory.numel() * memory.element_size()
            if _reads_straight(move, old, memory):
                box = move.source_box
                old.read(move.copy.source, move.slot.name, box, out=memory)
                if move.copy.coefficient != 1.0:
                    memory.mul_(move.copy.coefficient)
                _add(move, memory, noise)
                continue
            piece = _piece(old, move)
            staged = max(staged, move.source_box.volume * piece.element_size())
            _land(move, piece, new, noise)
    return TransferReport(
        bytes_written=written, peak_staging_bytes=staged, seconds=time.perf_counter() - begin
    )


def fill_uncovered(
    *,
    state_map: StateMap,
    new: Target,
    placement: Holder,
    slots: Sequence[Slot],
    rank: int,
    seed: int,
    staging_bytes: int,
    statistics: Statistics,
) -> int:
    """Fill every element that no block covers; returns the peak staging bytes."""
    staged = sum(values.nbytes for values in statistics.values())
    with Pool(torch.get_num_threads(), "fresh values") as pool:
        for shard in placement.shards(rank):
            tensor = state_map.target[shard.tensor]
            for slot in slots_of(tensor, slots):
                rule = state_map.fill(tensor, slot)
                if rule == "covered":
                    continue
                memory = new.view(tensor.name, slot.name, shard.box)
                if rule == "zeros":
                    memory.zero_()
                elif isinstance(rule, Level):
                    _fill_level(rule, shard.box, memory, statistics)
                else:
                    make = partial(fresh, tensor, seed=seed)
                    if isinstance(rule, Drawn):
                        std = rule.std * statistics[rule.statistic].item()
                        make = partial(_drawn, tensor.shape, name=rule.name, std=std, seed=seed)
                    used = _fill_made(make, shard.box, memory, pool, staging_bytes)
                    staged = max(staged, used)
    return staged


def _fill_level(rule: Level, box: Box, memory: torch.Tensor, statistics: Statistics) -> None:
    memory.zero_()
    # A block without a source tensor: its source is the statistic.
    block = Copy("", rule.axes, rule.coefficient)
    part = block.from_target(box)
    if part is None:
        return
    kept = rule.statistic.kept
    lines = block.source_slices(part, (0,) * len(kept))
    at = tuple(s if n > 1 else slice(0, 1) for s, n in zip(lines, kept, strict=True))
    values = statistics[rule.statistic][at] * rule.coefficient + rule.shift
    place = memory[block.target_slices(part, box.offset)]
    place.copy_(values.expand(part.shape))


def _drawn(shape: Sequence[int], box: Box, *, name: str, std: float, seed: int) -> np.ndarray:
    return normals(shape, box, name=name, seed=seed) * std


def _fill_made(
    make: Callable[[Box], np.ndarray],
    box: Box,
    memory: torch.Tensor,
    pool: Pool,
    staging_bytes: int,
) -> int:
    """Generate the values of a box, in several threads; returns the peak staging bytes."""
    threads = torch.get_num_threads()
    limit = max(1, staging_bytes // (threads * _FRESH_BYTES_AN_ELEMENT))
    pieces = list(split_box(box, limit))
    longest = sum(piece.volume for piece in pieces[:threads])
    staging = torch.empty(longest, dtype=memory.dtype, pin_memory=memory.is_cuda)

    def put(pair: tuple[Box, torch.Tensor]) -> None:
        piece, place = pair
        place.numpy()[...] = make(piece).reshape(-1)

    for first in range(0, len(pieces), threads):
        turn = pieces[first : first + threads]
        ends = list(accumulate(piece.volume for piece in turn))
        places = [staging[e - p.volume : e] for p, e in zip(turn, ends, strict=True)]
        pool.map(put, zip(turn, places, strict=True))
        for piece, place in zip(turn, places, strict=True):
            inside = piece.relative_to(box.offset)
            memory[inside.slices].copy_(place.view(piece.shape))
    return longest * _FRESH_BYTES_AN_ELEMENT


def _memory(new: Target, move: Move) -> torch.Tensor:
    return new.view(move.tensor, move.slot.name, move.target_box)[move.target_index()]


def _reads_straight(move: Move, old: Source, memory: torch.Tensor) -> bool:
    """Whether a piece can be read directly into the target: same shape, order and dtype."""
    return (
        move.copy.term == 0
        and move.source_box.shape == tuple(memory.shape)
        and all(part.step in (None, 1) for part in move.source_index())
        and old.dtype(move.copy.source, move.slot.name) == memory.dtype
    )


def _piece(old: Source, move: Move) -> torch.Tensor:
    return old.read(move.copy.source, move.slot.name, move.source_box)[move.source_index()]


def _land_all(landings: Sequence[Landing], new: Target, noise: MakeNoise) -> None:
    """Write pieces to the target: many per kernel launch if possible, otherwise one by one."""
    plain = [(m, p) for m, p in landings if m.copy.scales_only and ops.own("copy_boxes", p)]
    if plain:
        memory = [_memory(new, m) for m, _ in plain]
        same = {(p.dtype, p.device) for _, p in plain} | {(t.dtype, t.device) for t in memory}
        if len(same) == 1 and all(t.dim() <= ops.BOX_AXES for t in memory):
            ops.copy_boxes_(memory, [p for _, p in plain], [m.copy.coefficient for m, _ in plain])
            done = {id(m) for m, _ in plain}
            landings = [(m, p) for m, p in landings if id(m) not in done]
    for move, piece in landings:
        _land(move, piece, new, noise)


def _land(move: Move, piece: torch.Tensor, new: Target, noise: MakeNoise) -> None:
    memory = _memory(new, move)
    scale = move.copy.coefficient
    if move.copy.term:
        # Rounded twice, as a product and as a sum, whatever the shape of the piece is.
        memory.add_(piece.to(memory, copy=True).mul_(scale))
        _add(move, memory, noise)
        return
    # Scaled in the target's precision, so the product is the same in every layout.
    if scale != 1.0 and piece.dtype == memory.dtype and piece.device == memory.device:
        torch.mul(piece, scale, out=memory)
    else:
        memory.copy_(piece)
        if scale != 1.0:
            memory.mul_(scale)
    _add(move, memory, noise)


def _add(move: Move, memory: torch.Tensor, noise: MakeNoise) -> None:
    """Add the block's shift and noise."""
    if move.copy.shift != 0.0:
        memory.add_(move.copy.shift)
    if move.copy.noise is None:
        return
    for box in split_box(move.part, _NOISE_ELEMENTS):
        inside = box.relative_to(move.part.offset).slices
        memory[inside] += torch.from_numpy(noise(move.copy, box)).to(memory)


def _noise(copy: Copy, box: Box, *, seed: int, statistics: Statistics) -> np.ndarray:
    """The noise that is added to a part of a block."""
    rule = copy.noise
    assert rule is not None
    unit = 1.0 if rule.statistic is None else statistics[rule.statistic].item()
    return _drawn(copy.shape, box, name=rule.name, std=rule.std * unit, seed=seed)


def _buffer(
    batches: Sequence[Sequence[Move]], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    longest = max((sum(move.part.volume for move in batch) for batch in batches), default=0)
    return torch.empty(longest, dtype=dtype, device=device)


def _pack(batch: Iterable[Move], old: Source, buffer: torch.Tensor) -> torch.Tensor:
    position = 0
    for move in batch:
        stop = position + move.part.volume
        buffer[position:stop].view(move.part.shape).copy_(_piece(old, move))
        position = stop
    return buffer[:position]


def _unpack(batch: Iterable[Move], buffer: torch.Tensor, new: Target, noise: MakeNoise) -> int:
    """Write a received message to the target; returns the number of elements written."""
    position = written = 0
    landings: list[Landing] = []
    for move in batch:
        stop = position + move.part.volume
        values = buffer[position:stop].view(move.part.shape)
        landings += [(landing, values) for landing in (move, *move.twins)]
        written += values.numel() * (1 + len(move.twins))
        position = stop
    _land_all(landings, new, noise)
    return written
