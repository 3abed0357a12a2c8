"""An explanation: text for people and, where there is one, the program that simulates the unit.

A failure is an explanation of its own: a row with its type, never a sentence that a scorer could
mistake for a meaning.
"""

import zlib
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from jaxtyping import Float, Int
from numpy import ndarray

from lmmono.clients.client import Failed, Usage
from lmmono.errors import ExplainError
from lmmono.registry.lookup import find, load
from lmmono.types import Split

Failure = Literal["too_few_records", "silent", "unparsed", "refused", "no_answer"]
"""Why there is no explanation.

too_few_records: fewer records than the explainer wants. silent: the unit never fires in the split.
The others are those of a language model's answer; see `lmmono.clients.client.AnswerFailure`.
"""


class Program(ABC):
    """What simulates a unit from tokens alone."""

    kind: ClassVar[str]
    """Name in the stored JSON."""
    reads_one_token: ClassVar[bool] = False
    """Whether a prediction depends on its token alone: then a table of the vocabulary says all."""

    @abstractmethod
    def simulate(
        self, token_ids: Int[ndarray, "records window"]
    ) -> Float[ndarray, "records window"]:
        """Return the predicted activation on each token, in units of the hook; 0 on padding."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return JSON values that `from_json` reads; `kind` is added by the store."""

    @classmethod
    @abstractmethod
    def from_json(cls, values: dict[str, Any]) -> "Program":
        """Return the program that `to_json` described."""


PROGRAMS: dict[str, str] = {
    "token_lookup": "lmmono.explanations.token_lookup:Lookup",
    "constant": "lmmono.explanations.explanation_controls:Constant",
    "context": "lmmono.explanations.contexts:Context",
}
"""`module:class` of each kind of program."""


def program_from_json(values: dict[str, Any]) -> Program:
    """Return the program that a row of table `explanations` holds.

    Raises:
        ExplainError: No such kind of program, or its values are damaged.
    """
    kind = str(values.get("kind"))
    program = load(find("program", kind, PROGRAMS, ExplainError))
    try:
        return program.from_json({key: value for key, value in values.items() if key != "kind"})
    except (KeyError, TypeError, ValueError, zlib.error) as fault:
        raise ExplainError(
            f"a stored program of kind {kind!r} is damaged ({fault!r}); explain its unit anew: "
            "lm.explain(..., overwrite=True)"
        ) from fault


@dataclass(frozen=True, slots=True)
class Explanation:
    """What an explainer says of one unit."""

    hook: str
    """Hook of the unit."""
    unit: int
    """Index of the unit."""
    explainer: str
    """Name of the explainer."""
    text: str | None = None
    """For people; None where it failed."""
    program: Program | None = None
    """What simulates the unit; None for text alone."""
    failure: Failure | None = None
    """Why there is no text; None where there is."""
    reason: str | None = None
    """What went wrong, in words; None where the failure says all."""
    split: Split = "explain"
    """Split that the records came from."""
    n_records: int = 0
    """Records shown to the explainer."""
    complexity: float | None = None
    """Size of the program in terms."""
    seed: int | None = None
    """Seed, where the explainer draws."""
    rank: int | None = None
    """Place among several candidates, 1 is best."""
    model: str | None = None
    """Language model that wrote it."""
    prompt_hash: str | None = None
    """sha256 of the prompt."""
    usage: Usage = field(default_factory=Usage)
    """What it took."""

    def __post_init__(self) -> None:
        assert (self.text is None) == (self.failure is not None), "a text, or a failure"

    @property
    def failed(self) -> Failed | None:
        """Failure and reason; None where there is a text."""
        return self.failure and Failed(self.failure, self.reason)

    def row(self) -> dict[str, Any]:
        """Return the row of table `explanations`."""
        values = {key: getattr(self, key) for key in self.__slots__}
        usage = asdict(values.pop("usage"))
        program = values.pop("program")
        described = None if program is None else {"kind": program.kind, **program.to_json()}
        return {**values, **usage, "program": described}
