"""DeepSpeed's names for our tensors, and the model that names and shapes imply.

A plain module's parameter is `layers.<place>.<name in its layer>`, a pipeline's `<place>.<...>`,
where place is the index in the layer list: 0 the embedding, 1 to L the blocks, L + 1 the head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from megagrow.checkpoint.interface.format import LeftOut
from megagrow.checkpoint.interface.one_family import one_family
from megagrow.config import ModelConfig
from megagrow.models.catalog import build_catalog
from megagrow.models.registry import FAMILIES
from megagrow.state.catalog import Catalog, Init, LogicalTensor

TOKENS = "embedding.token"
_UNTOLD_SEQUENCE = 2048  # used without a position table, when tensors do not reveal the length
_OURS = re.compile(r"(?:layers\.)?(\d+)\.(.+)")


def module_name(name: str, place: int, last: int, *, pipelined: bool) -> str:
    """The parameter's name in the module; `last` is the head's index."""
    inner = layer_name(name, place, last)
    return f"{place}.{inner}" if pipelined else f"layers.{place}.{inner}"


def layer_name(name: str, place: int, last: int) -> str:
    """The parameter's name in its layer."""
    if place == 0:
        return name.removeprefix("embedding.")
    return name if place == last else name.removeprefix(f"layers.{place - 1}.")


def logical_name(module: str, last: int) -> str | None:
    """Inverse of `module_name`; None for a name of another form."""
    match = _OURS.fullmatch(module)
    if match is None:
        return None
    place, inner = int(match[1]), match[2]
    if place == 0:
        return f"embedding.{inner}"
    return inner if place == last else f"layers.{place - 1}.{inner}"


def last_place(modules: Iterable[str]) -> int:
    """The head's index, if the names are ours; -1 if any has another form."""
    matches = [_OURS.fullmatch(module) for module in modules]
    return max((int(m[1]) if m else -1 for m in matches), default=-1) if all(matches) else -1


def recognised_model(
    shapes: Mapping[str, tuple[int, ...]], *, tensor: int, where: Path, family: str | None = None
) -> ModelConfig | None:
    """The model implied by the shapes of one tensor-parallel rank's parameters, if any.

    With several tensor-parallel ranks the vocabulary includes its padding, and with rotary
    positions the sequence length is a guess: no shape reveals either.

    Args:
        shapes: by logical name.
        tensor: number of tensor-parallel ranks.
        where: the checkpoint, for errors.
        family: the model's family, if the user says it.

    Raises:
        CheckpointError: they fit several families, or not the given one.
    """
    found = {
        name: model
        for name in FAMILIES
        if (model := _as_family(name, shapes, tensor=tensor)) is not None
    }
    return one_family(found, where=str(where), family=family)


def assumed_settings(model: ModelConfig) -> LeftOut:
    """What was assumed of a model that only shapes describe."""
    settings = {"norm_eps": model.norm_eps}
    if model.architecture.positions == "rotary":
        settings |= {"sequence": model.sequence, "rope_theta": model.rope_theta}
    settings |= {key: getattr(model, key) for key in sorted(model.architecture.settings)}
    shown = ", ".join(f"{key} {'unset' if n is None else n}" for key, n in settings.items())
    return LeftOut(
        "settings of the model",
        f"the files have none, and shapes do not tell: assumed {shown}",
    )


def _as_family(
    family: str, shapes: Mapping[str, tuple[int, ...]], *, tensor: int
) -> ModelConfig | None:
    """The model of a family that has parameters of these names and shapes."""
    try:
        groups, queries, head_dim, hidden = shapes["layers.0.attention.qkv.weight"]
        up, token = shapes["layers.0.mlp.up.weight"], shapes[TOKENS]
        position = shapes.get("embedding.position")
        blocks = {name.split(".")[1] for name in shapes if name.startswith("layers.")}
        model = ModelConfig.model_validate(
            {
                "family": family,
                "layers": len(blocks),
                "hidden": hidden,
                "heads": groups * tensor * (queries - 2),
                "kv_heads": groups * tensor,
                "head_dim": head_dim,
                "ffn": up[-2] * tensor,
                "sequence": position[0] if position else _UNTOLD_SEQUENCE,
                "vocab": token[0] * tensor,
                "tie_embeddings": "output.weight" not in shapes,
            }
        )
    except (KeyError, ValueError, IndexError):
        return None
    axes = {t.name: len(t.shape) for t in build_catalog(model)}
    return model if axes == {name: len(shape) for name, shape in shapes.items()} else None


def plain_catalog(shapes: Mapping[str, tuple[int, ...]], decayed: Mapping[str, bool]) -> Catalog:
    """The catalog of a foreign model: whole tensors under their own names."""
    return Catalog(
        tuple(
            LogicalTensor(
                name=name,
                shape=shape,
                axes=tuple(f"axis{i}" for i in range(len(shape))),
                init=Init("normal", 0.02),
                decay=decayed.get(name, len(shape) > 1),
                places=(0,),
            )
            for name, shape in shapes.items()
        )
    )
