"""The section that says which checkpoint a run starts from."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from megagrow.config.section import PathText, Positive, Section


class StartConfig(Section):
    """The checkpoint that a run's first stage starts from, instead of fresh weights."""

    model_config = ConfigDict(serialize_by_alias=True)

    from_: PathText = Field(alias="from")
    """A checkpoint of any format that `megagrow convert` reads."""
    format: Literal["native", "huggingface", "deepspeed", "universal", "megatron", "dcp"] | None = (
        None
    )
    """Its format, where the files could be of several; null: by its files."""
    moments: Literal["auto", "reset"] = "auto"
    """`auto` takes the optimizer's moments and step count if the checkpoint has those of this run's
    optimizer, and says so if not; `reset` starts them at zero."""
    allow_other_tokenizer: bool = False
    """Take weights that were trained with another tokenizer than the data's, or an unknown one."""
    vocab_size: Positive | None = None
    """Vocabulary size without padding, where the checkpoint does not say it."""
    ignore: list[str] = Field(default_factory=list)
    """Settings of the checkpoint that change nothing, or copies of which the first is right."""
