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
    """One dataset of a mixture.

    `weight` is its share of the tokens, relative to the other sources'. It is read at most `epochs`
    times; `at_end` says what follows: `refuse` (before training, where that is known)
    or `drop`: the other sources take its share, in proportion.
    """

    path: PathText
    weight: Annotated[float, Field(gt=0.0)]
    epochs: Annotated[float, Field(gt=0.0)] = _PASSES
    at_end: Literal["refuse", "drop"] = "refuse"


Reading = Literal["packed", "mask"]


class StageDataConfig(Section):
    """What is trained on from a stage on: `path`, one prepared dataset, or `sources`, a mixture.

    A `path` of weights and paths in turn, "0.3 a 0.7 b" as Megatron-LM's --data-path takes it, is
    a mixture too. `documents` says whether the documents of a sample see each other: `packed`, they
    do, as in Megatron-LM; `mask`, they do not. What is not given does not change.
    """

    path: PathText | None = None
    sources: Annotated[list[SourceConfig], Field(min_length=1)] | None = None
    documents: Reading | None = None

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
    """The prepared datasets (see launch/prepare_data.py) that a run starts with."""

    documents: Reading = "packed"
    tokenizer: PathText | None = None  # default: the tokenizer of the datasets
    # Further datasets, by name: their validation splits are validated on too, each by itself.
    validation: dict[str, PathText] | None = None
    # Rank 0 reads the datasets at startup and verifies their checksums, about a second per
    # gigabyte; the first step waits for it.
    verify: bool = True

    def _is_complete(self) -> bool:
        return False
