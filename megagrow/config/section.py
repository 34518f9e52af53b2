"""What all sections of a configuration have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
# A plan names every tensor of every layer; with a million of them it would take hours.
Layers = Annotated[int, Field(gt=0, le=4096)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _path(text: str) -> str:
    try:
        longest = max(len(part.encode()) for part in text.split("/"))
    except UnicodeEncodeError:
        longest = 0
    if not text.strip() or "\0" in text or not 0 < longest <= 255:
        raise ValueError("not a path of a file system; write another")
    return text


# What can be a path, whether it is there or not.
PathText = Annotated[str, AfterValidator(_path)]


# Tags of what a setting may be that takes more than one kind of value, for pydantic's
# Discriminator.  They are no keys, so no dotted key of an error shows them.
SECTION, TEXT, VALUE = "<section>", "<text>", "<value>"


def section_or_value(found: Any) -> str:
    """The tag of a setting that is a section or one value."""
    return SECTION if isinstance(found, (dict, BaseModel)) else VALUE


def text_or_value(found: Any) -> str:
    """The tag of a setting that is a word or another value."""
    return TEXT if isinstance(found, str) else VALUE


class Section(BaseModel):
    """Base of all sections: frozen; an unknown key, an infinity or a NaN is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True
    )
