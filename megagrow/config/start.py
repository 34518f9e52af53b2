"""The section that says which checkpoint a run starts from."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from megagrow.config.section import PathText, Positive, Section


class StartConfig(Section):
    """The checkpoint that a run's first stage starts from, instead of fresh weights.

    `from` is a checkpoint of any format that `launch/convert.py` reads; `format` names it where
    the files could be of several. `moments: auto` takes the optimizer's moments and step count if
    the checkpoint has those of this run's optimizer, and says so if not; `reset` starts them at
    zero. `vocab_size` and `ignore` are those of `launch/convert.py`.
    `allow_other_tokenizer: true` takes weights that were trained with another tokenizer than the
    data's, or with an unknown one.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    from_: PathText = Field(alias="from")
    format: Literal["native", "huggingface", "deepspeed", "universal", "megatron", "dcp"] | None = (
        None
    )
    moments: Literal["auto", "reset"] = "auto"
    allow_other_tokenizer: bool = False
    vocab_size: Positive | None = None
    ignore: list[str] = Field(default_factory=list)
