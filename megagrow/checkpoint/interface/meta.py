"""What a checkpoint says of its run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megagrow.state.catalog import Catalog, Slot
from megagrow.state.layout import Layout


@dataclass(frozen=True)
class CheckpointMeta:
    """Everything that a checkpoint tells of its run, besides step and values.

    Attributes:
        catalog, slots, layout: of the state that is saved.
        config: the resolved configuration.
        fingerprints: of what the run must find again unchanged, e.g. ``tokenizer``, ``data``.
        run_state: what the training loop needs to go on.

    `config` and `run_state` hold what JSON holds: numbers (finite), texts, truth values,
    None, lists and string-keyed dictionaries.  Tuples come back as lists.
    """

    catalog: Catalog
    slots: tuple[Slot, ...]
    layout: Layout
    config: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    run_state: Mapping[str, Any]
