"""Metadata of a checkpoint: the run, its configuration and its state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megagrow.state.catalog import Catalog, Slot
from megagrow.state.layout import Layout


@dataclass(frozen=True)
class CheckpointMeta:
    """Everything that a checkpoint stores about its run besides step and values.

    Attributes:
        catalog, slots, layout: of the saved state.
        config: the resolved configuration.
        fingerprints: of what must be unchanged when the run resumes, e.g. ``tokenizer``, ``data``.
        run_state: the training loop's state for resuming.

    `config` and `run_state` hold JSON values: finite numbers, strings, booleans,
    None, lists and string-keyed dictionaries.  Tuples come back as lists.
    """

    catalog: Catalog
    slots: tuple[Slot, ...]
    layout: Layout
    config: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    run_state: Mapping[str, Any]
