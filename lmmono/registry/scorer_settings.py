"""The settings of scorers: one frozen class per kind, a sentence under each field.

The same classes check the keywords of `lm.score`, the entries of a recipe's `score.scorers` and
make the tables of `docs/settings.md`. Plain dataclasses: pydantic is imported where values come
in, not by whoever lists scorers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lmmono.errors import ExplainError, nearest

Settings = TypeVar("Settings", bound="ScorerSettings")

Side = Literal["active", "predicted", "random"]
"""Where records are drawn. active: the unit fires in them. predicted: the explanation predicts that
it does. random: anywhere."""


def _least(least: float | int, default: Any) -> Any:
    """Return a field with a default that takes numbers from `least` on."""
    return field(default=default, metadata={"least": least})


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerSettings:
    """A scorer without settings of its own; the others add theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SidedSettings(ScorerSettings):
    """Records of both sides, by what the unit does and by what its explanation predicts."""

    sides: tuple[Side, ...] = ()
    """Records of which sides are scored besides, as `_recall`, `_precision`, `_f1`, `_weighted`:
    `active`, `predicted`, `random`."""
    per_side: int = _least(1, 20)
    """Most records of each side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings(SidedSettings):
    """Records that are simulated, and by whom."""

    top: int = _least(0, 20)
    """Records of the largest activations, one per document."""
    random: int = _least(0, 20)
    """Records drawn from all, firing or not."""
    window: int = _least(1, 64)
    """Most tokens per record."""
    protocol: str | None = None
    """Records as in a paper, `openai` or `openai_crate`; None takes the two numbers above."""
    simulator: str = "program"
    """What predicts: `program`, `llm`, or `llm_calibrated`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastSettings(SidedSettings):
    """Records in which the unit fires, next to silent ones."""

    n: int = _least(1, 50)
    """Most records of each class."""
    window: int = _least(1, 32)
    """Most tokens per record."""
    ranked: bool = False
    """Call the strongest tenth firing and the weaker half silent, for units never silent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationSettings(ContrastSettings):
    """Records that a judge tells apart."""

    batch: int = _least(1, 5)
    """Records per question to a language model."""
    max_tokens: int | None = _least(1, None)
    """Most tokens of an answer; None takes what a list of labels needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FuzzSettings(ClassificationSettings):
    """Marked tokens that a judge tells apart."""

    sides: tuple[Literal["active", "predicted"], ...] = ()
    """Records of which sides are scored besides, as `_recall`, `_precision`, `_f1`: `active`, in
    which firing tokens are marked, and `predicted`, in which predicted ones are. A random record
    has no marks to judge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingSettings(ContrastSettings):
    """Texts that are placed next to the explanation."""

    encoder: Any = "sentence-transformers/all-MiniLM-L6-v2"
    """Sentence encoder: a name, or a `SentenceEncoder`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SurprisalSettings(ContrastSettings):
    """Texts that a language model reads twice."""

    n: int = _least(1, 20)
    """Most records of each class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSettings(ScorerSettings):
    """Trials, each of some records and one intruder."""

    trials: int = _least(1, 20)
    """Most trials of a unit."""
    size: int = _least(2, 5)
    """Records of a trial, the intruder included."""
    window: int = _least(1, 32)
    """Most tokens per record."""
    ranked: bool = False
    """Call the strongest tenth firing and the weaker half silent, for units never silent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedTrialSettings(TrialSettings):
    """Trials that a language model is asked about."""

    max_tokens: int | None = _least(1, None)
    """Most tokens of an answer; None takes what a number needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalSettings(SidedSettings):
    """Who predicts the short examples of all levels. Those of the sides are as short."""

    simulator: str = "program"
    """What predicts: `program`, `llm`, or `llm_calibrated`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PopulationSettings(ScorerSettings):
    """How programs read every stored token."""

    window: int = _least(1, 64)
    """Most tokens that a program reads at once, where it looks at more than one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringSettings(ScorerSettings):
    """How a unit is steered."""

    prompts: int = _least(1, 8)
    """Most prompts."""
    prompt: int = _least(1, 32)
    """Tokens of a prompt."""
    kl: float = _least(0.0, 0.5)
    """KL in nats that steering aims at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsSettings(ScorerSettings):
    """What a unit's tokens are counted by."""

    ngram: int = _least(1, 2)
    """Tokens of an n-gram."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecorrelationSettings(ScorerSettings):
    """Which tokens are compared."""

    tokens: int = _least(1, 4096)
    """Most tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledItemSettings(ScorerSettings):
    """Which labelled items are looked at."""

    items: int = _least(1, 20_000)
    """Most tokens or texts of a split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSettings(LabelledItemSettings):
    """How consistency is measured."""

    permutations: int = _least(1, 20)
    """Shuffles of the labels that chance is measured by."""
    top_share: float = _least(0.0, 0.01)
    """Share of the items that count as the strongest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FmsSettings(LabelledItemSettings):
    """How trees are grown."""

    per_class: int = _least(1, 500)
    """Most items of each class."""
    depth: int = _least(1, 4)
    """Depth of the tree that may use any unit."""


def changed(settings: Settings, scorer: str, changes: Mapping[str, Any]) -> Settings:
    """Return settings with some changed, each checked by the type and the least of its field.

    Raises:
        ExplainError: No such setting, or a value of another type or below the least.

    >>> changed(TrialSettings(), "intruder", {"size": 3}).size
    3
    """
    from pydantic import ValidationError

    kinds, by_name = _hints(type(settings)), {setting.name: setting for setting in fields(settings)}
    taken: dict[str, Any] = {}
    for name, value in changes.items():
        if name not in by_name:
            way_out = nearest(name, by_name) if by_name else "it has none"
            raise ExplainError(f"{scorer}: no setting {name!r}; {way_out}")
        least = by_name[name].metadata.get("least")
        # a list of a recipe or a command line stands for a tuple
        taken[name] = tuple(value) if isinstance(value, list) else value
        try:
            _checker(kinds[name], least).validate_python(taken[name])
        except ValidationError:
            wanted = _wanted(kinds[name]) + ("" if least is None else f" >= {least:g}")
            raise ExplainError(f"{scorer}: {name}: want {wanted}, got {value!r}") from None
    return replace(settings, **taken)


@cache
def _hints(kind: type[ScorerSettings]) -> dict[str, Any]:
    return get_type_hints(kind)


@cache
def _checker(kind: Any, least: float | int | None) -> Any:
    """Return what checks values of a field; strictly, so that a bool is no number."""
    from pydantic import ConfigDict, Field, TypeAdapter

    checked: Any = kind if least is None else Annotated[kind, Field(ge=least)]
    return TypeAdapter(checked, config=ConfigDict(strict=True, arbitrary_types_allowed=True))


_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _wanted(kind: Any) -> str:
    """Return a type as a message says it."""
    if get_origin(kind) in (UnionType, Union):
        return " or ".join(_wanted(part) for part in get_args(kind))
    if get_origin(kind) is tuple:
        return f"any of {', '.join(map(repr, get_args(get_args(kind)[0])))}"
    return "null" if kind is type(None) else _PLAIN.get(kind, "anything")
