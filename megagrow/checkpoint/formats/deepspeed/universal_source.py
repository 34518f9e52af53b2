"""DeepSpeed's universal checkpoints, which its engine loads with `load_universal`.

    <tag>/zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt   whole parameters, one directory each
    <tag>/zero/optimizer_state.pt                              state not tied to one parameter
    <tag>/[zero_pp_rank_0_]mp_rank_MM_model_states.pt          counters, untrained tensors
    latest_universal                                           the tag

The engine splits a parameter over any number of data-parallel ranks, and over tensor-parallel ones
along the axis that `cat_dim` names.  Parameters have their names in the module, so a pipeline
loads only what was written for a pipeline, and a plain module only what was written for one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megagrow.checkpoint.containers.stored_tensor import StoredTensor
from megagrow.checkpoint.containers.torch_reader import TorchFile, read_torch_file
from megagrow.checkpoint.formats.deepspeed import names
from megagrow.checkpoint.formats.deepspeed.engine_state import (
    KEY,
    is_plain,
    left_out_of,
    read_engine,
)
from megagrow.checkpoint.formats.deepspeed.files import MODEL
from megagrow.checkpoint.formats.deepspeed.saved_optimizer import MOMENTS, Saved
from megagrow.checkpoint.formats.deepspeed.scheme import another_model
from megagrow.checkpoint.formats.deepspeed.universal_sink import LATEST, UniversalSink
from megagrow.checkpoint.interface.accounting import unread_files
from megagrow.checkpoint.interface.client_state import client_state
from megagrow.checkpoint.interface.format import (
    NO_OPTIONS,
    CheckpointSource,
    Format,
    LeftOut,
    ReadOptions,
)
from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.checkpoint.interface.model_of import replayed_model
from megagrow.checkpoint.interface.one_family import require_family
from megagrow.checkpoint.interface.stored_boxes import Record, StoredBox
from megagrow.checkpoint.interface.stored_source import StoredSource
from megagrow.checkpoint.io.files import READING, RESTORE, laid_out, naming
from megagrow.config import ModelConfig
from megagrow.errors import CheckpointError
from megagrow.models.catalog import build_catalog
from megagrow.state.boxes import whole
from megagrow.state.catalog import MASTER, Catalog, Slot
from megagrow.state.layout import Layout

_FILES = {"fp32": MASTER, **{slot.name: slot for slot in MOMENTS}}
_PAYLOAD = {"param", "cat_dim", "vocab_tensor", "param_n_sub_params", "sub_param_shape"}


def open_source(path: Path, options: ReadOptions = NO_OPTIONS) -> CheckpointSource:
    """Open a tag's directory or its parent.

    Args:
        options: the family, where names and shapes fit several.

    Raises:
        CheckpointError: missing, damaged, hostile, or in another layout.
    """
    with laid_out(path, "a universal checkpoint of DeepSpeed 0.19"):
        return _open(find(path) or path, options.family)


class _Tag:
    """The files of a tag, their pickles read.

    Attributes:
        held: by parameter name in the module, then by slot.
        frozen, buffers, aliases: as in `files.Tag`.
        left_out: what the files hold and this class does not expose.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming(path, "cannot be read", READING):
            inside = sorted((path / "zero").iterdir())
            heads = sorted(entry.name for entry in path.iterdir() if MODEL.fullmatch(entry.name))
        modules = [entry.name for entry in inside if entry.is_dir()]
        if not modules or not heads:
            raise _fault(path, "has no parameters" if heads else "has no *_model_states.pt")
        self.files: dict[str, TorchFile] = {}
        self.left_out = [
            LeftOut(f"zero/{entry.name}", "an unknown file")
            for entry in inside
            if not entry.is_dir() and entry.name != "optimizer_state.pt"
        ]
        self.head = self._read(heads[0])
        around = self._read("zero/optimizer_state.pt") if len(inside) > len(modules) else {}
        self.optimizer = Saved(around if isinstance(around, dict) else {})
        self.held = {module: dict(self._slots(module)) for module in modules}
        counts = {
            slot: sum(slot in held for held in self.held.values()) for slot in _FILES.values()
        }
        self.slots = tuple(slot for slot, count in counts.items() if count == len(self.held))
        if MASTER not in self.slots:
            raise _fault(path, "a parameter lacks its fp32.pt")
        self.left_out += [
            LeftOut(f"zero/*/{slot.name}.pt", f"{count} of {len(self.held)} parameters have it")
            for slot, count in counts.items()
            if 0 < count < len(self.held)
        ]
        self.left_out += unread_files(path, ["zero", *heads])
        self.left_out += [item for name in heads[1:] for item in self._beside(name)]
        self.frozen: dict[str, StoredTensor] = {}
        self.buffers: dict[str, StoredTensor] = {}
        self.aliases: dict[str, str] = {}
        self._sort_module()

    def _read(self, name: str) -> Any:
        if name not in self.files:
            self.files[name] = read_torch_file(self.path / name)
        return self.files[name].value

    def _slots(self, module: str) -> Iterator[tuple[Slot, StoredTensor]]:
        for entry in sorted((self.path / "zero" / module).iterdir()):
            name, file = f"zero/{module}/{entry.name}", entry.name.removesuffix(".pt")
            if file in _FILES and entry.name.endswith(".pt"):
                value = self._read(name)
                tensor = value.get("param") if isinstance(value, dict) else value
                if not isinstance(tensor, StoredTensor):
                    raise _fault(self.path, f"{name} holds no parameter", type(value).__name__)
                yield _FILES[file], tensor
                odd = set(value) - _PAYLOAD if isinstance(value, dict) else ()
                self.left_out += [LeftOut(f"{name}: {key}", "unknown") for key in sorted(odd)]
            elif entry.name != "step.pt":
                self.left_out.append(LeftOut(name, "an unknown state"))

    def _beside(self, file: str) -> Iterator[LeftOut]:
        """Entries in another rank's model file that differ from the first rank's."""
        value = self._read(file)
        if not isinstance(value, dict):
            raise _fault(self.path, f"{file} holds no dictionary", type(value).__name__)
        for key, mine in value.items():
            first = self.head.get(key)
            if key == "module":
                held = set(first) if isinstance(first, dict) else set()
                odd = sorted(set(mine) - held - set(self.held)) if isinstance(mine, dict) else ()
                for name in odd:
                    yield LeftOut(f"{file}: {name}", "the first rank's file does not have it")
            elif is_plain(mine) and mine != first:
                yield LeftOut(f"{file}: {str(key)[:100]}", "the first rank's is carried")
            elif key not in self.head:
                yield LeftOut(f"{file}: {str(key)[:100]}", "the first rank's file does not have it")

    def _sort_module(self) -> None:
        """Classify the untrained tensors in the module of the first model file."""
        module = self.head.get("module")
        shared = self.head.get("shared_params") or {}
        buffers = set(self.head.get("buffer_names") or ())
        first: dict[int, str] = {}
        for name, tensor in module.items() if isinstance(module, dict) else ():
            if not isinstance(tensor, StoredTensor):
                self.left_out.append(LeftOut(f"module: {name}", "no tensor"))
            elif name in shared or (tensor.numel and first.setdefault(tensor.start, name) != name):
                self.aliases[name] = shared.get(name) or first[tensor.start]
            elif name in self.held:
                continue
            elif not tensor.numel:
                self.left_out.append(LeftOut(name, "its values are not in the model's file"))
            else:
                (self.buffers if name in buffers else self.frozen)[name] = tensor
        # If the module is empty, only names show what is tied.
        self.aliases |= {n: to for n, to in shared.items() if to in self.held}

    @property
    def step(self) -> int | None:
        """The optimizer's step count."""
        file = f"zero/{next(iter(self.held))}/step.pt"
        if (self.path / file).exists():
            step = self._read(file)
        else:
            base = self.optimizer.value.get("optimizer_state_dict")
            states = base.get("state", {}) if isinstance(base, dict) else {}
            step = states.get(0, {}).get("step")
        if isinstance(step, StoredTensor):
            return int(step.item())
        return step if isinstance(step, int) else None


@dataclass(frozen=True)
class _Scheme:
    """Which tensors they are; `logical` maps a name in the module to the tensor's name."""

    model: ModelConfig | None
    catalog: Catalog
    logical: Mapping[str, str]


def _scheme(tag: _Tag, client: Mapping[str, Any], family: str | None) -> _Scheme:
    groups = tag.head.get("param_shapes") or ()
    shapes = {n: tuple(shape) for group in groups for n, shape in group.items()}
    last = names.last_place(tag.held)
    logical = {module: names.logical_name(module, last) or module for module in tag.held}
    found = {}
    for module, tensors in tag.held.items():
        shape = tensors[MASTER].shape
        # ZeRO 3's own are flat; the model file has their shapes.
        flat = len(shape) == 1 and math.prod(shapes.get(module, ())) == shape[0]
        found[module] = shapes[module] if flat and module in shapes else shape
    local = {logical[module]: shape for module, shape in reversed(found.items())}
    rows = local[names.TOKENS][0] if names.TOKENS in local else None
    written = replayed_model(client["config"], client["run_state"], vocabulary=rows)
    if written is not None:
        require_family(written, where=str(tag.path), family=family)
    model = written or names.recognised_model(local, tensor=1, where=tag.path, family=family)
    catalog = build_catalog(model) if model else None
    if catalog is not None and {t.name: t.shape for t in catalog} == local:
        return _Scheme(model, catalog, logical)
    if written is not None:
        raise another_model(tag.path, build_catalog(written), local, Layout())
    apart = {**tag.frozen, **tag.buffers}
    plain = names.plain_catalog(found | {n: tensor.shape for n, tensor in apart.items()}, {})
    aliases: dict[str, list[str]] = {}
    for other, name in tag.aliases.items():
        aliases.setdefault(name, []).append(other)
    catalog = Catalog(
        tuple(
            replace(
                tensor,
                training="buffer"
                if tensor.name in tag.buffers
                else "frozen"
                if tensor.name in tag.frozen
                else "trained",
                aliases=tuple(aliases.get(tensor.name, ())),
            )
            for tensor in plain
        )
    )
    return _Scheme(None, catalog, {tensor.name: tensor.name for tensor in catalog})


def _open(path: Path, family: str | None) -> CheckpointSource:
    tag = _Tag(path)
    client = client_state(tag.head)
    scheme = _scheme(tag, client, family)
    boxes: dict[tuple[str, str], StoredBox] = {}

    def add(name: str, slot: Slot, stored: StoredTensor) -> None:
        tensor = scheme.catalog[name]
        if stored.numel != tensor.volume:
            raise _fault(path, f"{name}: {slot.name} has another size", stored.numel)
        file = stored.path.relative_to(path).as_posix()
        box = StoredBox(name, slot.name, whole(tensor.shape), file, stored.start, stored.dtype)
        boxes.setdefault((name, slot.name), box)

    for module, tensors in tag.held.items():
        for slot in tag.slots:
            add(scheme.logical[module], slot, tensors[slot])
    apart = {**tag.frozen, **tag.buffers}
    for name, tensor in apart.items() if scheme.model is None else ():
        add(name, MASTER, tensor)
    config, state = dict(client["config"]), dict(client["run_state"])
    if scheme.model:
        config.setdefault("model", scheme.model.model_dump(mode="json", by_alias=True))
        if "model" not in client["config"]:
            tag.left_out.append(names.assumed_settings(scheme.model))
        reason = "the model does not have it"
        tag.left_out += [LeftOut(name, reason) for name in apart]
    if not state and tag.step is not None:
        state["optimizer_step"] = tag.step
    tag.left_out += _optimizer(tag, scheme, state)
    used = sorted({box.file for box in boxes.values()})
    steps = int(tag.head.get("global_steps") or 0)
    return StoredSource(
        path,
        meta=CheckpointMeta(
            scheme.catalog, tag.slots, Layout(zero=1), config, client["fingerprints"], state
        ),
        step=client["step"] if client["step"] is not None else steps,
        sizes={name: tag.files[name].size for name in used},
        boxes=boxes.values(),
        records=[Record(name, *record) for name in used for record in tag.files[name].records],
        left_out=tag.left_out,
    )


def _optimizer(tag: _Tag, scheme: _Scheme, state: dict[str, Any]) -> Iterator[LeftOut]:
    """Add the optimizer's groups and settings to the run state, if the files have them."""
    saved, slots = tag.optimizer, tag.slots
    yield from saved.left_out("zero/optimizer_state.pt", slots)
    yield from left_out_of(saved, tag.head, ours=scheme.model is not None)
    if scheme.model is not None or KEY in state:
        return
    groups = [list(group) for group in tag.head.get("param_shapes") or ()]
    listed = [set(group) - {"params"} for group in saved.groups]
    if len(listed) == len(groups) and any(listed):
        kept = [slot.name for slot in slots[1:]]
        engine = read_engine(saved, tag.head, groups=groups, slots=kept, zero=1)
        state[KEY] = engine.to_json()
    else:
        yield LeftOut("param_groups", "a universal checkpoint does not hold their settings")


def _fault(path: Path, what: str, found: object = None) -> CheckpointError:
    return CheckpointError(f"{path}: {what}", found=found, fix=RESTORE)


def find(path: Path) -> Path | None:
    """The tag's directory for a path: the path itself, or the tag that `latest_universal` names."""
    if (path / "zero").is_dir():
        return path
    latest = path / LATEST
    if latest.is_file() and latest.stat().st_size < 1000:
        named = path / latest.read_text(errors="replace").strip()
        if named.parent == path and (named / "zero").is_dir():
            return named
    return None


FORMAT = Format(
    name="universal",
    find=find,
    open_source=open_source,
    open_sink=UniversalSink,
    open_with=open_source,
    told=frozenset({"family"}),
    options=frozenset({"tensor", "pipeline"}),
)
