"""Small worlds to save: a catalog, values cut over ranks, ranks as threads."""

import hashlib
import json
import random
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint import CheckpointMeta, Piece, SoloGroup, save
from megagrow.checkpoint.native.collective import Group
from megagrow.state.boxes import Box, flat_range_boxes
from megagrow.state.catalog import ADAM_SLOTS, Catalog, Init, LogicalTensor
from megagrow.state.layout import Layout

CHUNK = 256  # bytes: small files then have many chunks


def logical(name: str, *shape: int) -> LogicalTensor:
    axes = tuple(f"axis{i}" for i in range(len(shape)))
    return LogicalTensor(name, shape, axes, Init("normal", 0.02), decay=True, places=(0,))


CATALOG = Catalog(
    (
        logical("scale"),
        logical("norm", 7),
        logical("up", 13, 9),
        logical("qkv", 3, 4, 2, 5),
    )
)


def meta(catalog: Catalog = CATALOG, world: int = 1, **run_state: Any) -> CheckpointMeta:
    return CheckpointMeta(
        catalog=catalog,
        slots=ADAM_SLOTS,
        layout=Layout(data=world, zero=1),
        config={"model": {"family": "gpt2", "layers": 2}, "betas": (0.9, 0.95)},
        fingerprints={"tokenizer": "t0", "data": "d0"},
        run_state={"consumed_samples": 320, **run_state},
    )


def random_values(
    seed: int, catalog: Catalog = CATALOG, dtype: torch.dtype = torch.float32
) -> dict[tuple[str, str], torch.Tensor]:
    """Values by (tensor, slot); every second tensor with strides that are not row-major."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for index, tensor in enumerate(catalog):
        for slot in ADAM_SLOTS:
            drawn = torch.randn(tensor.shape, generator=generator).to(dtype)
            if index % 2 and drawn.dim() > 1:
                drawn = drawn.mT.contiguous().mT
            values[tensor.name, slot.name] = drawn
    return values


def random_cuts(
    values: Mapping[tuple[str, str], torch.Tensor], world: int, seed: int
) -> list[list[Piece]]:
    """Pieces of each rank: every tensor cut into flat ranges at random, the same for all slots."""
    rng = random.Random(seed)
    ranks: list[list[Piece]] = [[] for _ in range(world)]
    cuts_of: dict[str, list[int]] = {}
    for (name, slot), tensor in values.items():
        numel = tensor.numel()
        if name not in cuts_of:
            inner = sorted(rng.randint(0, numel) for _ in range(world - 1))
            cuts_of[name] = [0, *inner, numel]
        cuts = cuts_of[name]
        for rank in range(world):
            for box, _ in flat_range_boxes(tuple(tensor.shape), cuts[rank], cuts[rank + 1]):
                ranks[rank].append(Piece(name, slot, box, tensor[box.slices]))
    return ranks


def random_box(shape: Sequence[int], rng: random.Random) -> Box:
    offset, length = [], []
    for n in shape:
        start = rng.randrange(n)
        offset.append(start)
        length.append(rng.randint(1, n - start))
    return Box(tuple(offset), tuple(length))


class _Meeting:
    def __init__(self, world: int) -> None:
        self.world = world
        self.barrier = threading.Barrier(world, timeout=60)
        self.posts: list[Any] = [None] * world


class ThreadGroup:
    """A rank of a group whose ranks are threads of one process."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self.rank = rank
        self.world = meeting.world
        self._meeting = meeting

    def gather(self, obj: Any) -> list[Any] | None:
        self._meeting.posts[self.rank] = obj
        self.barrier()
        posts = list(self._meeting.posts)
        self.barrier()
        return posts if self.rank == 0 else None

    def broadcast(self, obj: Any) -> Any:
        if self.rank == 0:
            self._meeting.posts[0] = obj
        self.barrier()
        found = self._meeting.posts[0]
        self.barrier()
        return found

    def barrier(self) -> None:
        self._meeting.barrier.wait()


def save_outcomes(
    root: Path,
    step: int,
    ranks: Sequence[Sequence[Piece]],
    *,
    about: CheckpointMeta | None = None,
    chunk_bytes: int = CHUNK,
) -> list[Path | Exception]:
    """Save with one thread per rank; what each rank returned or raised."""
    about = about or meta(world=len(ranks))
    outcomes: dict[int, Path | Exception] = {}
    meeting = _Meeting(len(ranks))

    def work(rank: int, group: Group) -> None:
        try:
            outcomes[rank] = save(
                root,
                step=step,
                pieces=ranks[rank],
                meta=about,
                group=group,
                chunk_bytes=chunk_bytes,
            )
        except Exception as error:
            outcomes[rank] = error

    if len(ranks) == 1:
        work(0, SoloGroup())
        return [outcomes[0]]
    threads = [
        threading.Thread(target=work, args=(rank, ThreadGroup(meeting, rank)))
        for rank in range(len(ranks))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[rank] for rank in range(len(ranks))]


def save_world(
    root: Path,
    step: int,
    *,
    world: int = 2,
    seed: int = 0,
    about: CheckpointMeta | None = None,
    chunk_bytes: int = CHUNK,
) -> tuple[Path, dict[tuple[str, str], torch.Tensor]]:
    """Save random values; returns (path, values)."""
    values = random_values(seed)
    ranks = random_cuts(values, world, seed)
    outcomes = save_outcomes(root, step, ranks, about=about, chunk_bytes=chunk_bytes)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    [path] = {outcome for outcome in outcomes if isinstance(outcome, Path)}
    return path, values


def reseal(body: Any) -> bytes:
    """manifest.json of a body (bytes or plain data) with a correct digest, as a forger would."""
    if not isinstance(body, bytes):
        body = json.dumps(body, separators=(",", ":"), sort_keys=True).encode()
    digest = hashlib.sha256(body).hexdigest().encode()
    return b'{"sha256":"' + digest + b'","body":' + body + b"}\n"
