"""Reads Megatron-LM's classic checkpoints (`--ckpt-format torch`): a tensor x pipeline grid.

    iter_0000007/mp_rank_TT[_PPP]/model_optim_rng.pt    or release/mp_rank_...
    latest_checkpointed_iteration.txt                   the iteration, or `release`

Fused matrices have had our order since checkpoint version 2.0: rows of QKV are [key/value group,
its queries + key + value, head width]; of a SwiGLU input each rank has its part of the gate, then
of the other half.  Older versions order the axes of QKV differently.  The token table is padded
to a multiple of `make_vocab_size_divisible_by` times the tensor-parallel size.  A tied table is
on the first stage and, with a pipeline, again on the last.

Optimizer state is read and written if it is torch's or apex's Adam on whole parameters, inside
Megatron's 16-bit optimizer or not.  The distributed optimizer's state is in separate files and
is left out.  For writing see `sink`; for the distributed format `distributed`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from megagrow.checkpoint.containers.duplicates import same_values
from megagrow.checkpoint.containers.stored_tensor import StoredTensor
from megagrow.checkpoint.formats.megatron import names
from megagrow.checkpoint.formats.megatron.distributed import open_distributed
from megagrow.checkpoint.formats.megatron.files import (
    RANK,
    RankFile,
    arguments_of,
    check_rank,
    flat,
    read_ranks,
)
from megagrow.checkpoint.formats.megatron.optimizer import counts_of, has_moments, states_of
from megagrow.checkpoint.formats.megatron.sink import FILE, LATEST, MegatronSink
from megagrow.checkpoint.interface.accounting import account, unread_files
from megagrow.checkpoint.interface.client_state import KEY, client_state
from megagrow.checkpoint.interface.format import (
    NO_OPTIONS,
    CheckpointSource,
    Format,
    LeftOut,
    ReadOptions,
)
from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.interface.model_of import family_in, replayed_model
from megagrow.checkpoint.interface.stored_boxes import Record, StoredBox
from megagrow.checkpoint.interface.stored_source import StoredSource
from megagrow.checkpoint.interface.torch_dist import is_torch_dist
from megagrow.checkpoint.io.files import RESTORE, laid_out
from megagrow.errors import CheckpointError
from megagrow.models.catalog import build_catalog
from megagrow.state.catalog import ADAM_SLOTS, MASTER, Catalog, LogicalTensor
from megagrow.state.layout import Layout

_ITERATION = re.compile(r"iter_(\d{7,9})")
# Order of the axes of QKV [group, projection, head width, embed] before version 2.0.
_OLD_QKV = {0.0: (1, 0, 2), 1.0: (0, 2, 1)}


def open_source(path: Path, options: ReadOptions = NO_OPTIONS) -> CheckpointSource:
    """Open an iteration's directory or its parent.

    Args:
        options: the true vocabulary; the family, where arguments fit several; names of
            arguments, and of copies that may differ, to ignore.

    Raises:
        CheckpointError: missing, damaged, incomplete, hostile, in another of Megatron's formats,
            or of a foreign model.
    """
    with laid_out(path, "Megatron-LM lays out its checkpoints"):
        return _open(find(path) or path, options)


def _open(path: Path, options: ReadOptions) -> CheckpointSource:
    if is_torch_dist(path):
        return open_distributed(path, options)
    ranks = read_ranks(path)
    first = ranks[0]
    args = arguments_of(first)
    version = float(first.value.get("checkpoint_version", 0.0))
    if version not in (0.0, 1.0, 2.0, 3.0):
        raise CheckpointError(
            f"{first.where}: checkpoint_version", found=version, expected="0 to 3"
        )
    client = client_state(first.value)
    written = family_in(client["config"])
    model, padded, left_out = names.read_model(
        args, where=first.where, options=options, written=written
    )
    ours = replayed_model(client["config"], client["run_state"], vocabulary=model.vocab)
    if ours is not None:  # Megatron's arguments have one std for all parameters
        model = model.model_copy(update={"init_std": ours.init_std, "mup": ours.mup})
    layout = Layout(
        tensor=1 + max(rank.tensor for rank in ranks), pipeline=1 + max(rank.pipe for rank in ranks)
    )
    for rank in ranks:
        check_rank(rank, first, layout, version)
    catalog = build_catalog(model)
    with_moments = [rank for rank in ranks if has_moments(rank.value, args)]
    if with_moments and len(with_moments) < len(ranks):
        bare = next(rank for rank in ranks if rank not in with_moments)
        raise CheckpointError(
            f"{bare.where}: has no optimizer state, but {with_moments[0].where} has", fix=RESTORE
        )
    moments = bool(with_moments)
    slots = ADAM_SLOTS if moments else (MASTER,)
    grid = _Grid(path, catalog, layout, padded, version, options.ignore)
    boxes: list[StoredBox] = []
    for rank in ranks:
        carried: set[str] = set()
        states = states_of(rank.value, rank.parameters, where=rank.where) if moments else {}
        boxes += grid.boxes(rank, states, carried)
        left_out += _left_out(rank, carried, moments, bool(client["run_state"]))
        folder = rank.file.path.parent
        left_out += [
            LeftOut(f"{folder.name}/{item.name}", item.reason)
            for item in unread_files(folder, {FILE})
        ]
    left_out += [*grid.differing, *unread_files(path, {r.file.path.parent.name for r in ranks})]
    config = {**client["config"]}
    config.setdefault("model", model.model_dump(mode="json", by_alias=True))
    iteration = first.value.get("iteration")
    step = client["step"] if client["step"] is not None else _count(iteration)
    consumed = args.get("consumed_train_samples")
    updates = max(counts_of(first.value).values(), default=step) if moments else step
    state = client["run_state"] or {
        "optimizer_step": updates,
        **({"consumed_samples": consumed} if isinstance(consumed, int) else {}),
    }
    files = {rank.file.path.relative_to(path).as_posix(): rank.file for rank in ranks}
    return StoredSource(
        path,
        meta=CheckpointMeta(catalog, slots, layout, config, client["fingerprints"], state),
        step=step,
        sizes={name: file.size for name, file in sorted(files.items())},
        boxes=boxes,
        records=[Record(name, *record) for name, file in files.items() for record in file.records],
        left_out=tuple(dict.fromkeys(left_out)),  # ranks repeat many names
    )


def _count(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0


# --- values -------------------------------------------------------------------------------


class _Grid:
    """Makes boxes from the files' tensors; compares replicas held by several files.

    Attributes:
        differing: replicas that differ and were to be ignored.
    """

    def __init__(
        self,
        path: Path,
        catalog: Catalog,
        layout: Layout,
        padded: int,
        version: float,
        ignore: Collection[str],
    ) -> None:
        self._path, self._catalog, self._layout = path, catalog, layout
        self._padded, self._version, self._ignore = padded, version, ignore
        self._first: dict[tuple[str, str, int], StoredTensor] = {}
        self.differing: list[LeftOut] = []

    def boxes(
        self,
        rank: RankFile,
        states: Mapping[str, Mapping[str, tuple[str, StoredTensor]]],
        carried: set[str],
    ) -> Iterator[StoredBox]:
        """The boxes of a file; adds the names they are made from to `carried`."""
        file = rank.file.path.relative_to(self._path).as_posix()
        for stored, value in rank.parameters.items():
            copy = _is_copy(stored, self._catalog)
            name = names.TOKENS if copy else names.logical_name(stored, rank.first_layer)
            if name is None or name not in self._catalog:
                raise CheckpointError(f"{rank.where}: {stored[:200]}: not in the model of its args")
            tensor = self._catalog[name]
            box, shape = names.local_part(tensor, self._layout, rank.tensor, self._padded)
            carried.add(f"model.{stored}")
            held = {MASTER.name: ("", value), **states.get(stored, {})}
            for slot, (at, found) in held.items():
                if at:
                    carried.add(at)
                if found.shape != shape:
                    raise CheckpointError(
                        f"{rank.where}: {stored}, slot {slot}: shape",
                        found=list(found.shape),
                        expected=list(shape),
                        fix=RESTORE,
                    )
                whole = box is not None and box.shape == tensor.shape
                key = (name, slot, 0 if whole else rank.tensor)
                if key in self._first:
                    self._compare(rank, stored, slot, self._first[key], found)
                    continue
                self._first[key] = found
                if box is not None:  # otherwise it is all padding
                    axes = _qkv_axes(tensor, self._version)
                    yield StoredBox(name, slot, box, file, found.start, found.dtype, axes)

    def _compare(
        self, rank: RankFile, stored: str, slot: str, first: StoredTensor, copy: StoredTensor
    ) -> None:
        """Compare a replica on another tensor rank, or the last stage's tied token table."""
        if same_values(first, copy):
            return
        if stored not in self._ignore:
            raise CheckpointError(
                f"{rank.where}: {stored}, slot {slot}: is not the copy that it should be",
                found=f"other values than in {first.path}",
                expected="the same values, bit for bit",
                fix=f"to take those of {first.path.parent.name}: --ignore {stored}",
            )
        name = f"{rank.file.path.parent.name}: {stored}, slot {slot}"
        self.differing.append(LeftOut(name, "differs from the first copy; ignored, as you asked"))


def _is_copy(stored: str, catalog: Catalog) -> bool:
    """Whether it is the last stage's copy of a tied token table."""
    return catalog.of("head") is None and stored.removeprefix("language_model.") in (
        names.TIED_COPIES
    )


def _qkv_axes(tensor: LogicalTensor, version: float) -> tuple[int, ...] | None:
    if "projection" not in tensor.axes or version not in _OLD_QKV:
        return None
    if tensor.shape[1] != 3:
        raise ValueError(f"checkpoint_version {version} knows no grouped queries")
    return _OLD_QKV[version] + tuple(range(3, len(tensor.shape)))


# --- what is not carried ------------------------------------------------------------------

_OF_THE_RUN = {
    "rng_state": "random states: a run of megagrow derives its own",
    "opt_param_scheduler": "the learning-rate schedule: it is in a run's configuration",
    "lr_scheduler": "the learning-rate schedule: it is in a run's configuration",
}
_READ = {"args", "checkpoint_version", "iteration", "model", "optimizer", KEY}
_HYPERPARAMETERS = "optimizer hyperparameters: they are in a run's configuration"


def _left_out(
    rank: RankFile, carried: set[str], moments: bool, carries: bool
) -> tuple[LeftOut, ...]:
    """What a file holds and is not carried."""
    held = [key for key in rank.value if key not in {"model", "optimizer"}]
    left = [
        LeftOut(key, _OF_THE_RUN.get(key, "megagrow has no equivalent"))
        for key in held
        if key not in _READ
    ]
    for stored, value in flat(rank.value["model"]):
        name = f"model.{stored}"
        held.append(name)
        if name in carried:
            continue
        reason = "no parameter" if isinstance(value, StoredTensor) else "no tensor"
        left.append(LeftOut(name, reason))
    optimizer = rank.value.get("optimizer")
    if optimizer is not None and not moments:
        held.append("optimizer")
        where = "distributed: its moments are in separate files"
        apart = arguments_of(rank).get("use_distributed_optimizer")
        left.append(LeftOut("optimizer", where if apart else "has no moments of Adam"))
    elif optimizer is not None:
        counts = counts_of(rank.value)
        latest = max(counts.values(), default=0)
        for stored, _ in flat(optimizer):
            name = f"optimizer.{stored}"
            held.append(name)
            if name in carried or (not carries and counts.get(name) == latest):
                carried.add(name)
            elif name in counts:
                reason = "the run's count is carried" if carries else f"{latest} is carried"
                left.append(LeftOut(name, f"a count of updates: {reason}"))
            else:
                slot = ".state." in f".{stored}"
                left.append(
                    LeftOut(name, "a slot that Adam does not have" if slot else _HYPERPARAMETERS)
                )
    return account(held, carried=(carried | _READ) & set(held), left_out=left)


# --- finding ------------------------------------------------------------------------------


def find(path: Path) -> Path | None:
    """The iteration's directory for a path: the path itself, or the one that the tracker names."""
    if _is_iteration(path):
        return path
    tracker = path / LATEST
    if tracker.is_file() and tracker.stat().st_size < 100:
        text = tracker.read_text(errors="replace").strip()
        name = f"iter_{int(text):07d}" if text.isascii() and text.isdigit() else text
        if (name == "release" or _ITERATION.fullmatch(name)) and _is_iteration(path / name):
            return path / name
    return None


def _is_iteration(path: Path) -> bool:
    if not path.is_dir():
        return False
    if is_torch_dist(path):
        return True
    ranks = (entry for entry in path.iterdir() if RANK.match(entry.name) and entry.is_dir())
    return any((rank / FILE).exists() for rank in ranks)


FORMAT = Format(
    name="megatron",
    find=find,
    open_source=open_source,
    open_sink=MegatronSink,
    open_with=open_source,
    told=frozenset({"vocab-size", "ignore", "family"}),
    options=frozenset({"tensor", "pipeline"}),
)
