"""What all settings are made of: the base class, names from a registry, and faults of fields."""

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of all settings: strict types, unknown keys refused, never changed after loading.

    Sentences under fields are read from the source where they are shown, by
    `lmmono.recipe.reference`: pydantic would parse every class at every start.
    """

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        # only what is used is built: `lmmono check` answers a tenth sooner; so defaults that are
        # sections are made by factories
        defer_build=True,
    )


def named_by(field: str) -> BeforeValidator:
    """Let a section be written as the value of one field: `typos` for `{kind: typos}`."""

    def whole(entry: Any) -> Any:
        return entry if isinstance(entry, dict | Section) else {field: entry}

    return BeforeValidator(whole)


class OneOf:
    """Text that is one of some names, as a `Literal` of them; the names come from a registry."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        """Return the schema that pydantic makes of a `Literal`."""
        return core_schema.literal_schema(self.names)


def clash(message: str, *fields: str) -> PydanticCustomError:
    """Return the fault of fields that do not fit each other; the first is the one to change.

    Fields are dotted, relative to the section whose validator raises the fault.
    """
    return PydanticCustomError("clash", "{message}", {"message": message, "fields": fields})
