"""Hugging Face model directories: parameters in safetensors files and a config.json.

Each stored array is a box of one logical tensor with its axes permuted; a table for each family
says which.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.containers.duplicates import require_frequencies, same_values
from megagrow.checkpoint.containers.safetensors import StoredArray, make_header, read_header
from megagrow.checkpoint.containers.stored_tensor import StoredTensor
from megagrow.checkpoint.formats.huggingface.card import CARD, files_of_card, stub_of
from megagrow.checkpoint.formats.huggingface.config import read_model, stored_as, write_config
from megagrow.checkpoint.formats.huggingface.names import Link, links
from megagrow.checkpoint.formats.huggingface.tokenizer import carried, compare
from megagrow.checkpoint.interface.accounting import account, unread_files
from megagrow.checkpoint.interface.format import (
    NO_OPTIONS,
    FilePlan,
    Format,
    LeftOut,
    ReadOptions,
    Segment,
    SinkRequest,
    Values,
)
from megagrow.checkpoint.interface.history import KEY, history
from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.interface.model_of import model_of, refuse_ramp
from megagrow.checkpoint.interface.own_tokenizer import fingerprints_beside
from megagrow.checkpoint.interface.stored_boxes import StoredBox
from megagrow.checkpoint.interface.stored_source import StoredSource
from megagrow.checkpoint.interface.tokenizer_files import COMPANIONS, FILES, OwnTokenizer
from megagrow.checkpoint.io.files import RESTORE, naming, read_small, write_new
from megagrow.checkpoint.io.strict_json import read_json
from megagrow.config import InitConfig, ModelConfig
from megagrow.errors import CheckpointError, ConfigError
from megagrow.models.catalog import build_catalog
from megagrow.models.common.rotary import Rotary
from megagrow.state.catalog import MASTER
from megagrow.state.layout import Layout

_CONFIG, _INDEX, _ONE = "config.json", "model.safetensors.index.json", "model.safetensors"
_RUN = "megagrow.json"  # fingerprints of the training run, and the model's history
# Files that an export to Hugging Face takes along.
_CARRIED_ALONG = {
    **dict.fromkeys(
        (*FILES, *COMPANIONS), "the tokenizer's, which formats with a place for it carry along"
    ),
    CARD: "the model card, which an export to huggingface carries along",
}


# --- reading ------------------------------------------------------------------------------


def open_source(path: Path, options: ReadOptions = NO_OPTIONS) -> StoredSource:
    """Open a Hugging Face model directory.

    Args:
        options: settings of config.json to ignore.

    Raises:
        CheckpointError: damaged, incomplete, or with a model that megagrow cannot express.
    """
    where = path / _CONFIG
    if options.vocabulary is not None:
        raise ConfigError(
            f"{where} already gives the vocabulary size", fix="leave out --vocab-size"
        )
    model, settings = read_model(read_json(where), where=str(where), ignore=options.ignore)
    arrays, sizes = _arrays(path)
    held = set(arrays)
    if model.layers > len(arrays):
        raise CheckpointError(
            f"{where}: tells of {model.layers} layers, but there are {len(arrays)} tensors in all"
        )
    catalog = build_catalog(model)
    stored, boxes, carried = stored_as(model), [], set()
    for parts in links(stored, model, catalog):
        link = parts[0]
        name = _stored_name(link.stored, arrays, prefix=stored.prefix)
        array = arrays.pop(name, None)
        if array is None:
            raise CheckpointError(
                f"{path}: tensor {link.stored} is missing",
                expected=f"shape {list(link.shape)}",
                fix=RESTORE,
            )
        if array.shape != link.shape:
            raise CheckpointError(
                f"{path / array.file}: tensor {link.stored}: shape is not that of config.json",
                found=list(array.shape),
                expected=list(link.shape),
            )
        carried.add(name)
        for part in parts:
            start = array.start + part.start * array.dtype.itemsize
            boxes.append(
                StoredBox(
                    part.tensor, MASTER.name, part.box, array.file, start, array.dtype, part.axes
                )
            )
    derived = {name for name, array in arrays.items() if _follows(path, name, array, model, boxes)}
    masks = {name for name in set(arrays) - derived if stored.masks.fullmatch(name)}
    odd = sorted(set(arrays) - derived - masks)
    if odd:
        raise CheckpointError(
            f"{path / arrays[odd[0]].file}: tensor {odd[0][:200]} is not in the model of {_CONFIG}",
            found=f"{len(odd)} such tensors",
        )
    recorded, records = _record(path)
    meta = CheckpointMeta(
        catalog=catalog,
        slots=(MASTER,),
        layout=Layout(),
        config={
            "model": model.model_dump(mode="json", by_alias=True),
            **({KEY: records} if records else {}),
        },
        fingerprints={**recorded, **fingerprints_beside(path)},
        run_state={},
    )
    left_out = account(
        held,
        carried=carried,
        derived=derived,
        left_out=[LeftOut(name, "a mask, which transformers does not load") for name in masks],
    )
    files = [
        LeftOut(item.name, _CARRIED_ALONG.get(item.name, item.reason))
        for item in unread_files(path, {_CONFIG, _INDEX, _RUN, *sizes})
    ]
    return StoredSource(
        path, meta=meta, step=0, sizes=sizes, boxes=boxes, left_out=(*left_out, *settings, *files)
    )


def _follows(
    path: Path, name: str, array: StoredArray, model: ModelConfig, boxes: Sequence[StoredBox]
) -> bool:
    """Whether an array follows from what is carried: a tied head, or rotary frequencies.

    Raises:
        CheckpointError: it should follow but has other values.
    """
    at = f"{path / array.file}: tensor {name}"
    stored = StoredTensor(path / array.file, array.start, array.dtype, array.shape)
    if model.tie_embeddings and name in _heads(model):
        table = build_catalog(model).of("embedding")
        [box] = [box for box in boxes if table is not None and box.tensor == table.name]
        token = StoredTensor(path / box.file, box.start, box.dtype, box.box.shape)
        if not same_values(stored, token):
            raise CheckpointError(
                f"{at}: is an untied head, but {_CONFIG} says that it is the token table",
                found="tie_word_embeddings: true, and other values in the head",
                fix=f"set tie_word_embeddings: false in a copy of {_CONFIG} to keep the head, or "
                "save the model without it",
            )
        return True
    if stored_as(model).frequencies.fullmatch(name):
        require_frequencies(stored, Rotary.of(model).frequencies(torch.device("cpu")), at=at)
        return True
    return False


def _record(path: Path) -> tuple[dict[str, str], list[Any]]:
    """The fingerprints of the run and the model's history, if megagrow wrote the directory."""
    if not (path / _RUN).is_file():
        return {}, []
    content = read_json(path / _RUN)
    found, records = content.get("fingerprints"), content.get(KEY, [])
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise CheckpointError(f"{path / _RUN}: damaged", fix=RESTORE)
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        raise CheckpointError(f"{path / _RUN}: damaged", fix=RESTORE)
    return found, records


def _heads(model: ModelConfig) -> set[str]:
    """The stored names of an untied head."""
    apart = build_catalog(model.model_copy(update={"tie_embeddings": False})).of("head")
    return {row.stored for row in stored_as(model).ends if apart and row.tensor == apart.name}


def _stored_name(name: str, arrays: Mapping[str, StoredArray], *, prefix: str) -> str:
    """The name as this directory spells it, possibly without the family's prefix."""
    return name if name in arrays else name.removeprefix(prefix)


def _arrays(path: Path) -> tuple[dict[str, StoredArray], dict[str, int]]:
    """All arrays by name, and the size of each file."""
    if not (path / _INDEX).exists():
        if not (path / _ONE).exists():
            raise CheckpointError(
                f"{path}: has no {_ONE}",
                found=", ".join(sorted(p.name for p in path.iterdir())[:8]),
                fix="save the model with transformers' save_pretrained, which writes safetensors",
            )
        arrays, size = read_header(path, _ONE)
        return arrays, {_ONE: size}
    where = path / _INDEX
    files = read_json(where).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{where}: has no weight_map", fix=RESTORE)
    arrays, sizes = {}, {}
    names = sorted({str(file) for file in files.values()})
    for file in names:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.safetensors", file):
            raise CheckpointError(
                f"{where}: names a file outside this directory", found=repr(file[:200])
            )
    for file in names:
        held, sizes[file] = read_header(path, file)
        named = {name for name, where_to in files.items() if where_to == file}
        if named != set(held):
            odd = sorted(named ^ set(held))[0]
            raise CheckpointError(
                f"{path / file}: tensor {odd[:200]}: index and file disagree",
                found=f"{_INDEX} {'names' if odd in named else 'does not name'} it there",
                fix=RESTORE,
            )
        arrays.update(held)
    return arrays, sizes


# --- writing ------------------------------------------------------------------------------


class HuggingFaceSink:
    """One file of parameters, or several by size with an index; config.json; tokenizer files."""

    slots = (MASTER,)
    left_out: tuple[LeftOut, ...] = ()

    def __init__(self, request: SinkRequest) -> None:
        refuse_ramp(request.meta, program="transformers")
        model = model_of(request.meta)
        self._tokenizer = carried(
            request.tokenizer, vocabulary=model.vocabulary, sequence=model.sequence
        )
        fingerprints = dict(request.meta.fingerprints)
        if isinstance(request.tokenizer, OwnTokenizer) and request.tokenizer.sha256:
            fingerprints["tokenizer"] = request.tokenizer.sha256
        shards: list[list[list[Link]]] = [[]]
        filled = 0
        dtypes: set[torch.dtype] = set()
        for parts in links(stored_as(model), model, request.meta.catalog):
            dtype = request.dtype_of(parts[0].tensor, MASTER.name)
            size = math.prod(parts[0].shape) * dtype.itemsize
            if shards[-1] and filled + size > request.file_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(parts)
            filled += size
            dtypes.add(dtype)
        self.left_out = tuple(_not_stored(model))
        dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
        self._config = write_config(model, dtype) | dict(self._tokenizer.ids)
        self._weight_map: dict[str, str] = {}
        self._total = 0
        self.files: list[FilePlan] = []
        for number, shard in enumerate(shards, start=1):
            name = _ONE
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self.files.append(self._plan(name, shard, request))
        self._sharded = len(shards) > 1
        records = history(request.meta)
        if fingerprints or records:
            # It gets sidecar checksums, as the weights do.
            record = {"fingerprints": fingerprints, **({KEY: records} if records else {})}
            text = json.dumps(record, indent=2) + "\n"
            self.files.append(FilePlan(_RUN, [text.encode()]))
        stub = stub_of(
            model,
            records=records,
            fingerprints=fingerprints,
            run_state=request.meta.run_state,
            step=request.step,
        )
        self._card = files_of_card(stub, carried=request.card, changed=request.changed)

    def _plan(self, name: str, shard: Sequence[Sequence[Link]], request: SinkRequest) -> FilePlan:
        values = {
            parts[0].stored: [
                Values(
                    part.tensor,
                    MASTER.name,
                    part.box,
                    request.dtype_of(part.tensor, MASTER.name),
                    part.axes,
                )
                for part in parts
            ]
            for parts in shard
        }
        self._weight_map.update(dict.fromkeys(values, name))
        self._total += sum(part.bytes for parts in values.values() for part in parts)
        shapes = {parts[0].stored: parts[0].shape for parts in shard}
        order = sorted(shapes, key=lambda stored: -values[stored][0].dtype.itemsize)
        head = make_header([(stored, values[stored][0].dtype, shapes[stored]) for stored in order])
        segments: list[Segment] = [head, *(part for stored in order for part in values[stored])]
        return FilePlan(name, segments)

    def conclude(self, directory: Path, checksums: Mapping[str, Sequence[str]]) -> Sequence[str]:
        """Write index, configurations and tokenizer files; check that transformers agrees."""
        _write_json(directory / _CONFIG, self._config)
        if self._sharded:
            index = {
                "metadata": {"total_size": self._total},
                "weight_map": dict(sorted(self._weight_map.items())),
            }
            _write_json(directory / _INDEX, index)
        card, said = self._card
        for name, content in {**card, **self._tokenizer.files}.items():
            with naming(directory / name, "cannot be written"):
                write_new(directory / name, content)
        compared = [compare(directory, self._tokenizer)] if self._tokenizer.files else []
        return [*self._tokenizer.notes, *compared, said]


def _not_stored(model: ModelConfig) -> Iterator[LeftOut]:
    """Training settings that a config.json cannot express."""
    for what, reason in stored_as(model).not_stored(model):
        yield LeftOut(what, reason)
    if isinstance(model.init_std, InitConfig):
        stds = model.init_std.model_dump(exclude_none=True)
        listed = ", ".join(f"{role} {std}" for role, std in stds.items())
        reason = "initializer_range is one number: that of the matrices"
        if model.stds.matrices is None:
            reason = "initializer_range is one number: transformers' default, 0.02"
        yield LeftOut(f"init_std by role ({listed}), of fresh parameters", reason)
    if model.mup is not None:
        reason = "only for further training; the weights are those of a plain model"
        yield LeftOut("mup: initialisation and rates by the shape", reason)


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    with naming(path, "cannot be written"):
        write_new(path, (json.dumps(value, indent=2) + "\n").encode())


def _find(path: Path) -> Path | None:
    """The directory itself, if it has a config.json and weights of any kind.

    For a model in Hugging Face's cache (models--NAME), its revision `main`.
    """
    main = path / "refs" / "main"
    if main.is_file() and (path / "snapshots").is_dir():
        revision = read_small(main, 1000).decode(errors="replace").strip()
        if re.fullmatch(r"[0-9a-f]{6,64}", revision):
            path = path / "snapshots" / revision
    weights = (_ONE, _INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
    held = (path / _CONFIG).is_file() and any((path / name).exists() for name in weights)
    return path if held else None


FORMAT = Format(
    name="huggingface",
    find=_find,
    open_source=open_source,
    open_sink=HuggingFaceSink,
    open_with=open_source,
    told=frozenset({"vocab-size", "ignore"}),
    options=frozenset({"tokenizer", "shard-gib"}),
)
