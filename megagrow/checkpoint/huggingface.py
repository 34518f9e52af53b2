"""Directories of Hugging Face: GPT-2 and LLaMA, parameters in safetensors files and config.json.

Each stored array is a box of one logical tensor with its axes in another order; the tables say
which.  GPT-2 stores weights of linear layers as [inputs, outputs] and query, key and value as
three blocks of outputs; ours are [kv_group, query + 2, head_dim, embed].  LLaMA has them apart,
and both sides pair rotary features half against half.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megagrow.checkpoint.adapter import FilePlan, Format, Request, Segment, Values
from megagrow.checkpoint.directory import RESTORE, naming, write_new
from megagrow.checkpoint.huggingface_config import read_model, write_config
from megagrow.checkpoint.manifest import CheckpointMeta
from megagrow.checkpoint.safetensors import StoredArray, make_header, read_header, read_json
from megagrow.checkpoint.shape import model_of, refuse_ramp
from megagrow.checkpoint.stored import StoredBox, StoredSource
from megagrow.config import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.layout import Layout
from megagrow.model.catalog import build_catalog
from megagrow.state.boxes import Box, whole
from megagrow.state.catalog import MASTER, Catalog

_CONFIG, _INDEX, _ONE = "config.json", "model.safetensors.index.json", "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Row:
    """One line of a table: a stored array and what it is of a logical tensor.

    Attributes:
        stored, tensor: names; `{i}` is the layer.
        axes: order of the logical axes in the array, or None for their own.
        rows: how many of those make the array's first axis, the others its second; 0 for a vector.
        cut: the part of the logical tensor, by its name in `_cut`.
    """

    stored: str
    tensor: str
    axes: tuple[int, ...] | None = None
    rows: int = 1
    cut: str = ""


_GPT2 = (
    Row("transformer.wte.weight", "embedding.token"),
    Row("transformer.wpe.weight", "embedding.position"),
    Row("transformer.ln_f.weight", "final_norm.weight", rows=0),
    Row("transformer.ln_f.bias", "final_norm.bias", rows=0),
    Row("lm_head.weight", "output.weight"),
)
_GPT2_BLOCK = (
    Row("transformer.h.{i}.ln_1.weight", "layers.{i}.attention.norm.weight", rows=0),
    Row("transformer.h.{i}.ln_1.bias", "layers.{i}.attention.norm.bias", rows=0),
    Row("transformer.h.{i}.attn.c_attn.weight", "layers.{i}.attention.qkv.weight", (3, 1, 0, 2)),
    Row("transformer.h.{i}.attn.c_attn.bias", "layers.{i}.attention.qkv.bias", (1, 0, 2), rows=0),
    Row("transformer.h.{i}.attn.c_proj.weight", "layers.{i}.attention.out.weight", (1, 2, 3, 0), 3),
    Row("transformer.h.{i}.attn.c_proj.bias", "layers.{i}.attention.out.bias", rows=0),
    Row("transformer.h.{i}.ln_2.weight", "layers.{i}.mlp.norm.weight", rows=0),
    Row("transformer.h.{i}.ln_2.bias", "layers.{i}.mlp.norm.bias", rows=0),
    Row("transformer.h.{i}.mlp.c_fc.weight", "layers.{i}.mlp.up.weight", (1, 0)),
    Row("transformer.h.{i}.mlp.c_fc.bias", "layers.{i}.mlp.up.bias", rows=0),
    Row("transformer.h.{i}.mlp.c_proj.weight", "layers.{i}.mlp.down.weight", (1, 0)),
    Row("transformer.h.{i}.mlp.c_proj.bias", "layers.{i}.mlp.down.bias", rows=0),
)
_LLAMA = (
    Row("model.embed_tokens.weight", "embedding.token"),
    Row("model.norm.weight", "final_norm.weight", rows=0),
    Row("lm_head.weight", "output.weight"),
)
_LLAMA_BLOCK = (
    Row("model.layers.{i}.input_layernorm.weight", "layers.{i}.attention.norm.weight", rows=0),
    *(
        Row(
            f"model.layers.{{i}}.self_attn.{cut}_proj.weight",
            "layers.{i}.attention.qkv.weight",
            rows=3,
            cut=cut,
        )
        for cut in "qkv"
    ),
    Row("model.layers.{i}.self_attn.o_proj.weight", "layers.{i}.attention.out.weight"),
    Row("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.mlp.norm.weight", rows=0),
    Row("model.layers.{i}.mlp.gate_proj.weight", "layers.{i}.mlp.up.weight", rows=2, cut="gate"),
    Row("model.layers.{i}.mlp.up_proj.weight", "layers.{i}.mlp.up.weight", rows=2, cut="up"),
    Row("model.layers.{i}.mlp.down_proj.weight", "layers.{i}.mlp.down.weight"),
)
_TABLES = {"gpt2": (_GPT2, _GPT2_BLOCK), "llama": (_LLAMA, _LLAMA_BLOCK)}
# Buffers that old versions stored along: masks and frequencies that follow from the shape.
_DERIVED = re.compile(r"(.*\.)?(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)\Z")


@dataclass(frozen=True)
class Link:
    """A stored array: the box of a logical tensor that it is, the order of axes, its shape."""

    stored: str
    tensor: str
    box: Box
    axes: tuple[int, ...] | None
    shape: tuple[int, ...]


def links(model: ModelConfig, catalog: Catalog) -> Iterator[Link]:
    """Every array of a model, in the order of our catalog."""
    head, block = _TABLES[model.family]
    rows: dict[str, list[tuple[str, Row]]] = {}
    for row in head:
        rows.setdefault(row.tensor, []).append((row.stored, row))
    for i in range(model.layers):
        for row in block:
            rows.setdefault(row.tensor.format(i=i), []).append((row.stored.format(i=i), row))
    for tensor in catalog:
        for stored, row in rows[tensor.name]:
            box = _cut(whole(tensor.shape), row.cut)
            lengths = [box.shape[axis] for axis in row.axes or range(len(box.shape))]
            first, second = lengths[: row.rows], lengths[row.rows :]
            shape = (math.prod(first), math.prod(second)) if row.rows else (math.prod(second),)
            yield Link(stored, tensor.name, box, row.axes, shape)


def _cut(box: Box, name: str) -> Box:
    """The part of a fused tensor: query, key and value lie on axis 1, gate and up on axis 0."""
    if not name:
        return box
    axis = 1 if name in "qkv" else 0
    last = box.shape[axis] - 1
    start, stop = {
        "q": (0, last - 1), "k": (last - 1, last), "v": (last, last + 1),
        "gate": (0, 1), "up": (1, 2),
    }[name]  # fmt: skip
    offset, shape = list(box.offset), list(box.shape)
    offset[axis], shape[axis] = start, stop - start
    return Box(tuple(offset), tuple(shape))


# --- reading ------------------------------------------------------------------------------


def open_source(path: Path) -> StoredSource:
    """Open a directory of Hugging Face.

    Raises:
        CheckpointError: damaged, incomplete, or of a model that megagrow cannot express.
    """
    where = path / _CONFIG
    model = read_model(read_json(where), where=str(where))
    arrays, sizes = _arrays(path)
    if model.layers > len(arrays):
        raise CheckpointError(
            f"{where}: tells of {model.layers} layers, but there are {len(arrays)} tensors in all"
        )
    catalog = build_catalog(model)
    boxes = []
    for link in links(model, catalog):
        array = arrays.pop(_stored_name(link.stored, arrays), None)
        if array is None:
            raise CheckpointError(
                f"{path}: tensor {link.stored} is missing",
                expected=f"shape {list(link.shape)}",
                mend=RESTORE,
            )
        if array.shape != link.shape:
            raise CheckpointError(
                f"{path / array.file}: tensor {link.stored}: shape is not that of config.json",
                found=list(array.shape),
                expected=list(link.shape),
            )
        boxes.append(
            StoredBox(
                link.tensor, MASTER.name, link.box, array.file, array.start, array.dtype, link.axes
            )
        )
    # A tied head is sometimes stored a second time.
    spare = {"lm_head.weight"} if model.tie_embeddings else set()
    odd = sorted(name for name in arrays if name not in spare and not _DERIVED.match(name))
    if odd:
        raise CheckpointError(
            f"{path / arrays[odd[0]].file}: tensor {odd[0][:200]} is not in the model of {_CONFIG}",
            found=f"{len(odd)} such tensors",
        )
    meta = CheckpointMeta(
        catalog=catalog,
        slots=(MASTER,),
        layout=Layout(),
        config={"model": model.model_dump(mode="json", by_alias=True)},
        fingerprints={},
        run_state={},
    )
    return StoredSource(path, meta=meta, step=0, sizes=sizes, boxes=boxes)


def _stored_name(name: str, arrays: Mapping[str, StoredArray]) -> str:
    """The name as this directory spells it: GPT-2's release leaves its prefix out."""
    return name if name in arrays else name.removeprefix("transformer.")


def _arrays(path: Path) -> tuple[dict[str, StoredArray], dict[str, int]]:
    """All arrays by name, and the size of each file."""
    if not (path / _INDEX).exists():
        if not (path / _ONE).exists():
            raise CheckpointError(
                f"{path}: has no {_ONE}",
                found=", ".join(sorted(p.name for p in path.iterdir())[:8]),
                mend="save the model with transformers' save_pretrained, which writes safetensors",
            )
        arrays, size = read_header(path, _ONE)
        return arrays, {_ONE: size}
    where = path / _INDEX
    files = read_json(where).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{where}: has no weight_map", mend=RESTORE)
    arrays, sizes = {}, {}
    names = sorted({str(file) for file in files.values()})
    for file in names:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.safetensors", file):
            raise CheckpointError(
                f"{where}: names a file that is none of this directory", found=repr(file[:200])
            )
    for file in names:
        held, sizes[file] = read_header(path, file)
        named = {name for name, where_to in files.items() if where_to == file}
        if named != set(held):
            odd = sorted(named ^ set(held))[0]
            raise CheckpointError(
                f"{path / file}: tensor {odd[:200]}: index and file disagree",
                found=f"{_INDEX} {'names' if odd in named else 'does not name'} it there",
                mend=RESTORE,
            )
        arrays.update(held)
    return arrays, sizes


# --- writing ------------------------------------------------------------------------------


class HuggingFaceSink:
    """One file of parameters, or several by size with an index; config.json; tokenizer files."""

    slots = (MASTER,)

    def __init__(self, request: Request) -> None:
        refuse_ramp(request.meta, program="transformers")
        model = model_of(request.meta)
        self._tokenizer = list(_tokenizer_files(request.tokenizer))
        shards: list[list[Link]] = [[]]
        filled = 0
        dtypes: set[torch.dtype] = set()
        for link in links(model, request.meta.catalog):
            dtype = request.dtype_of(link.tensor, MASTER.name)
            size = math.prod(link.shape) * dtype.itemsize
            if shards[-1] and filled + size > request.file_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(link)
            filled += size
            dtypes.add(dtype)
        self._config = write_config(model, max(dtypes, key=lambda dtype: dtype.itemsize))
        self._weight_map: dict[str, str] = {}
        self._total = 0
        self.files: list[FilePlan] = []
        for number, shard in enumerate(shards, start=1):
            name = _ONE
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self.files.append(self._plan(name, shard, request))

    def _plan(self, name: str, shard: Sequence[Link], request: Request) -> FilePlan:
        values = {
            link.stored: Values(
                link.tensor,
                MASTER.name,
                link.box,
                request.dtype_of(link.tensor, MASTER.name),
                link.axes,
            )
            for link in shard
        }
        self._weight_map.update(dict.fromkeys(values, name))
        self._total += sum(item.bytes for item in values.values())
        order = sorted(shard, key=lambda link: -values[link.stored].dtype.itemsize)
        head = make_header([(link.stored, values[link.stored].dtype, link.shape) for link in order])
        segments: list[Segment] = [head, *(values[link.stored] for link in order)]
        return FilePlan(name, segments)

    def conclude(self, directory: Path, checksums: Mapping[str, Sequence[str]]) -> None:
        """Write index and configuration, copy the tokenizer."""
        _write_json(directory / _CONFIG, self._config)
        if len(self.files) > 1:
            index = {
                "metadata": {"total_size": self._total},
                "weight_map": dict(sorted(self._weight_map.items())),
            }
            _write_json(directory / _INDEX, index)
        for path in self._tokenizer:
            with naming(directory / path.name, "cannot be written"):
                shutil.copyfile(path, directory / path.name)


def _tokenizer_files(path: Path | None) -> Iterator[Path]:
    """The files of a tokenizer: one file, or those of a directory that are a tokenizer's."""
    if path is None:
        return
    found = [path] if path.is_file() else [path / name for name in TOKENIZER_FILES]
    found = [file for file in found if file.is_file() and file.name in TOKENIZER_FILES]
    if not found:
        raise CheckpointError(
            f"{path}: no tokenizer", expected=f"one of {', '.join(TOKENIZER_FILES)}",
            mend="give --tokenizer such a file, or a directory with some",
        )  # fmt: skip
    yield from found


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    with naming(path, "cannot be written"):
        write_new(path, (json.dumps(value, indent=2) + "\n").encode())


def _find(path: Path) -> Path | None:
    """The directory itself, if it has a config.json beside weights of any kind."""
    weights = (_ONE, _INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
    held = (path / _CONFIG).is_file() and any((path / name).exists() for name in weights)
    return path if held else None


FORMAT = Format(
    name="huggingface",
    about="GPT-2 and LLaMA directories of Hugging Face: parameters in safetensors, config.json",
    find=_find,
    open_source=open_source,
    open_sink=HuggingFaceSink,
    axes=(),
)
