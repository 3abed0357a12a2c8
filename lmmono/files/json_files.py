"""One way to read a JSON file of ours: checked whole, and a fault names the file and the place."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lmmono.errors import LmmonoError

MAX_JSON_BYTES = 64_000_000
"""Largest file that is read: a tokenizer of 250,000 tokens has 17 million bytes."""

MAX_TOLD = 5
"""Faults of one file that are told: one that is of another kind has them all."""

Content = TypeVar("Content")


def read_json(
    path: Path, content: type[Content], error: type[LmmonoError], *, way_out: str = ""
) -> Content:
    """Return what a JSON file holds.

    pydantic reads the bytes itself: depth, digits and characters that `json` answers with a
    RecursionError or ValueError are faults like any other.

    Args:
        path: The file.
        content: What it must hold: a pydantic model, a dataclass, or `dict` for any mapping.
        error: What to raise.
        way_out: What to do about a file at fault, the end of the message.

    Raises:
        LmmonoError: As `error`, if it is missing, unreadable, too long, no JSON, or not that.
    """
    end = f"; {way_out}" if way_out else ""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as fault:
        raise error(f"{path}: cannot be read: {fault.strerror}{end}") from fault
    if len(text) > MAX_JSON_BYTES:
        raise error(f"{path}: want at most {MAX_JSON_BYTES:,} bytes of JSON, got more{end}")
    try:
        return TypeAdapter[Content](content).validate_json(text)
    except ValidationError as fault:
        faults = [_fault_line(detail) for detail in fault.errors(include_url=False)]
        more = f"; and {len(faults) - MAX_TOLD} more" if len(faults) > MAX_TOLD else ""
        raise error(f"{path}: damaged: {'; '.join(faults[:MAX_TOLD])}{more}{end}") from None


def settings_faults(what: str, error: ValidationError) -> str:
    """Return a line for each fault of the settings of a call: `what: place: wanted, got`."""
    return "\n".join(f"{what}: {_fault_line(fault)}" for fault in error.errors(include_url=False))


def _fault_line(fault: Any) -> str:
    """Return one fault of pydantic's: place, what was wanted, what was there."""
    # of fields that clash, the first is the one to change
    clashing = fault.get("ctx", {}).get("fields", ())[:1]
    place = ".".join(map(str, (*fault["loc"], *clashing)))
    if fault["type"] == "json_invalid":
        return str(fault["msg"])
    if clashing:
        return f"{place}: {fault['msg']}"
    got = "" if fault["type"] == "missing" else f", got {_shortened(fault['input'])}"
    return f"{place}: {fault['msg']}{got}" if place else f"{fault['msg']}{got}"


def _shortened(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > 200:  # repr refuses more than 4,300 digits
        return "a huge number"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
