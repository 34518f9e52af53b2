"""The base class and common types of all configuration sections."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
# A plan lists every tensor of every layer; for a million layers it would take hours.
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


# Text that is a valid path, whether it exists or not.
PathText = Annotated[str, AfterValidator(_path)]


# Tags for pydantic's Discriminator, for settings that accept more than one type. They are not keys,
# so they are left out of the dotted keys in errors.
SECTION, TEXT, VALUE = "<section>", "<text>", "<value>"


def section_or_value(found: Any) -> str:
    """The tag of a setting that is a section or a scalar."""
    return SECTION if isinstance(found, (dict, BaseModel)) else VALUE


def text_or_value(found: Any) -> str:
    """The tag of a setting that is a word or a value of another type."""
    return TEXT if isinstance(found, str) else VALUE


class Section(BaseModel):
    """Base of all sections: frozen; an unknown key, an infinity or a NaN is an error.

    The text below a setting is its description, in the JSON schema and in the reference.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )
