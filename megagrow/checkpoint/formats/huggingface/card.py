"""The model card of an export, README.md: a stub with what is known, for its user to complete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import megagrow
from megagrow.checkpoint.interface.history import Record
from megagrow.config import ModelConfig
from megagrow.models.catalog import build_catalog

CARD, SOURCE_CARD = "README.md", "README.source.md"


def files_of_card(
    stub: str, *, carried: bytes | None, changed: bool
) -> tuple[dict[str, bytes], str]:
    """The files of a card, and a note for the user.

    Args:
        stub: ours.
        carried: the source's card, if it has one.
        changed: whether the model is another than the source's.
    """
    if carried is None:
        return {CARD: stub.encode()}, f"{CARD}: a model card stub, without a licence; complete it"
    if not changed:
        return {CARD: carried}, f"{CARD}: the source's own model card"
    note = f"{CARD}: a model card stub, without a licence; the source's own card is {SOURCE_CARD}"
    return {CARD: stub.encode(), SOURCE_CARD: carried}, note


def stub_of(
    model: ModelConfig,
    *,
    records: Sequence[Record],
    fingerprints: Mapping[str, str],
    run_state: Mapping[str, Any],
    step: int,
) -> str:
    """A card that says what is known of a model and what its user has to say.

    Args:
        model: of the weights.
        records: its history.
        fingerprints: of its data and tokenizer.
        run_state: of its run, if it has one.
        step: number of optimizer steps.
    """
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- megagrow",
        *_base_model(records),
        "---",
        "",
        f"# {model.family}, {build_catalog(model).parameters:,} parameters",
        "",
        f"This model card is a stub that megagrow {megagrow.__version__} wrote with the export. It "
        "says what",
        "the checkpoint records. Complete it before you share the model.",
        "",
        "## Model",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _sizes(model)),
        "",
        "## History",
        "",
        *_history(records, run_state=run_state, step=step),
        "",
        "## Training data",
        "",
        *_data(fingerprints),
        "",
        "## Licence",
        "",
        "Not stated. megagrow does not know the licences of the source model and of the data,",
        "which may bind this model. State its licence here, and as `license:` at the top.",
        "",
    ]
    return "\n".join(lines)


def _base_model(records: Sequence[Record]) -> Iterator[str]:
    names = [record["source"]["name"] for record in records if "source" in record]
    if names and names[0].count("/") == 1 and "/step_" not in names[0]:
        yield f"base_model: {names[0]}"


def _sizes(model: ModelConfig) -> Iterator[tuple[str, object]]:
    yield "layers", model.layers
    yield "hidden", model.hidden
    yield "heads (key/value heads)", f"{model.heads} ({model.kv_groups})"
    yield "feed-forward", model.ffn
    yield "vocabulary", model.vocabulary
    yield "sequence", model.sequence
    yield "tied embeddings", "yes" if model.tie_embeddings else "no"


def _history(
    records: Sequence[Record], *, run_state: Mapping[str, Any], step: int
) -> Iterator[str]:
    for record in records:
        yield f"- {_in_words(record)}"
    tokens = run_state.get("tokens")
    if step or tokens:
        trained = f"{tokens:,} tokens" if isinstance(tokens, int) else "tokens not recorded"
        yield f"- trained to step {step:,} of its last run ({trained})"
    elif not records:
        yield "- not recorded"


def _in_words(record: Record) -> str:
    if "source" in record:
        source = record["source"]
        known = [str(source["format"])] if source.get("format") else []
        known += [f"step {source['step']:,}"] if source.get("step") else []
        known += [f"SHA-256 of its description `{source['sha256']}`"] if "sha256" in source else []
        return f"started from `{source['name']}`" + (f" ({', '.join(known)})" if known else "")
    if "growth" not in record:
        return str(record.get("unknown", record))
    growth = record["growth"]
    before, after = growth["parameters"]
    when = ""
    if "step" in growth:
        when = f" at step {growth['step']:,}"
        if "tokens" in growth:
            when += f" ({growth['tokens']:,} tokens)"
    settings = ", ".join(f"{key} {value}" for key, value in growth.get("settings", {}).items())
    return (
        f"grown{when} by `{growth['operator']}`: {growth['sizes'] or 'no size changed'}; "
        f"{before:,} -> {after:,} parameters" + (f" ({settings})" if settings else "")
    )


def _data(fingerprints: Mapping[str, str]) -> Iterator[str]:
    names = {"data": "dataset", "tokenizer": "tokenizer"}
    found = [f"- SHA-256 of the {what}: `{fingerprints[key]}`" for key, what in names.items()
             if key in fingerprints]  # fmt: skip
    yield from found
    yield "- not recorded by name: say here what the data was" if found else "- not recorded"
