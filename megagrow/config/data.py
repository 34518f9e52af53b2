"""The section that says what a run trains on: one dataset, or a mixture."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megagrow.config.section import PathText, Section

# Up to four passes over text are nearly as good as new text (Muennighoff et al. 2023,
# arXiv 2305.16264).
_PASSES = 4.0
_BLEND = re.compile(r"(?:\s*\d+(?:\.\d*)?(?:[eE][-+]?\d+)?\s+\S+)+\s*")


class SourceConfig(Section):
    """One dataset of a mixture."""

    path: PathText
    """Directory of a prepared dataset."""
    weight: Annotated[float, Field(gt=0.0)]
    """Share of the tokens, relative to the other sources'."""
    epochs: Annotated[float, Field(gt=0.0)] = _PASSES
    """Number of times that the dataset is read at most; 4 by arXiv 2305.16264."""
    at_end: Literal["refuse", "drop"] = "refuse"
    """What follows then: an error, before training where that is known, or the other sources take
    its share, in proportion."""


Reading = Literal["packed", "mask"]


class StageDataConfig(Section):
    """What is trained on from a stage on; what is not given does not change."""

    path: PathText | None = None
    """Directory of a prepared dataset, or weights and directories in turn ("0.3 a 0.7 b", as
    Megatron-LM's --data-path), which is a mixture."""
    sources: Annotated[list[SourceConfig], Field(min_length=1)] | None = None
    """The datasets of a mixture."""
    documents: Reading | None = None
    """Whether the documents of a sample see each other from this stage on: `packed` or `mask`."""

    @model_validator(mode="before")
    @classmethod
    def _weights_and_paths(cls, found: Any) -> Any:
        if not isinstance(found, dict) or not isinstance(found.get("path"), str):
            return found
        words = found["path"].split()
        if len(words) < 2 or not _BLEND.fullmatch(found["path"]):
            return found
        if found.get("sources"):
            raise ValueError("both path and sources are given; leave one out")
        pairs = zip(words[::2], words[1::2], strict=True)
        sources = [{"path": path, "weight": float(weight)} for weight, path in pairs]
        return {**found, "path": None, "sources": sources}

    @model_validator(mode="after")
    def _one_of_both(self) -> StageDataConfig:
        if self.path is not None and self.sources is not None:
            raise ValueError("both path and sources are given; leave one out")
        if self.path is None and self.sources is None and not self._is_complete():
            raise ValueError(
                "path is missing (one dataset, for instance data.path=data/stdlib), or sources (a "
                "mixture of several)"
            )
        paths = self.paths
        twice = sorted({path for path in paths if paths.count(path) > 1})
        if twice:
            raise ValueError(f"sources: {', '.join(twice)} twice; give one, with both weights")
        return self

    def _is_complete(self) -> bool:
        """Whether something is said, if neither path nor sources are."""
        return self.documents is not None

    @property
    def paths(self) -> list[str]:
        """The directories of all datasets."""
        return [self.path] if self.path else [source.path for source in self.sources or ()]


class DataConfig(StageDataConfig):
    """The prepared datasets (see `megagrow prepare`) that a run starts with."""

    documents: Reading = "packed"
    """Whether the documents of a sample see each other: `packed`, they do, as in Megatron-LM;
    `mask`, they do not, and positions start at each (docs/data.md)."""
    tokenizer: PathText | None = None
    """The tokenizer; null: that of the datasets."""
    validation: dict[str, PathText] | None = None
    """Further datasets, by name: their validation splits are validated on too, each by itself."""
    verify: bool = True
    """Rank 0 reads the datasets at the start and compares their checksums, about a second for a
    gigabyte; the first step waits for it."""

    def _is_complete(self) -> bool:
        return False
