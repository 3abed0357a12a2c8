"""One unit of a store: its statistics, and its exemplars with the tokens around them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from activation_store.read.characters import whole_characters
from activation_store.read.queried import Queried

if TYPE_CHECKING:
    from activation_store.pages.heatmap import Heatmap
else:  # for annotations only: most who open a store look at no page
    Heatmap = object

ExemplarKind = Literal["top", "random", "quantile"]


@dataclass(frozen=True, slots=True)
class Exemplar:
    """A token chosen for a unit, with the tokens around it and the unit's activation on each."""

    rank: int
    """Place within its kind, 1 is first."""
    act: float
    """Activation at the chosen token, in units of the hook."""
    bin: int | None
    """Quantile bin, 0 is lowest; None unless drawn by quantile."""
    doc_id: int
    seq_id: int
    pos: int
    first_pos: int
    """Position of the first of `tokens`."""
    tokens: tuple[str, ...]
    """The tokens around the chosen one, of the same document; a character of several tokens stands
    at one of them, at the chosen one if it can."""
    acts: tuple[float, ...]
    """Stored activation on each of `tokens`; 0 where none is stored."""

    @property
    def text(self) -> str:
        """The excerpt with the chosen token within « »."""
        peak = self.pos - self.first_pos
        return "".join(marked(t) if i == peak else t for i, t in enumerate(self.tokens))

    def __repr__(self) -> str:
        return f"{self.act:10.4g}  {self.text!r}"

    @property
    def heatmap(self) -> Heatmap:
        """Its tokens coloured by activation, the deepest at the largest of them."""
        from activation_store.pages.heatmap import Heatmap

        return Heatmap(
            self.tokens, self.acts, max(self.acts, default=0.0), self.pos - self.first_pos
        )

    def _repr_html_(self) -> str:
        return str(self.heatmap.html)


class Exemplars(list[Exemplar]):
    """Exemplars of a unit: a list, which a notebook shows as coloured text."""

    def __repr__(self) -> str:
        return "\n".join(map(repr, self))

    def _repr_html_(self) -> str:
        from activation_store.pages.heatmap import excerpts_html

        return excerpts_html(exemplar.heatmap for exemplar in self)


def marked(token: str) -> str:
    """Return the token within « »; spaces before it stay before them.

    >>> marked(" cat")
    ' «cat»'
    """
    bare = token.lstrip(" ")
    if not bare.strip():
        return f"«{token}»"
    return " " * (len(token) - len(bare)) + f"«{bare}»"


class Unit:
    """A unit of a store, with the statistics of `unit_stats` as attributes.

    Exemplars are read when they are asked for.
    """

    def __init__(self, store: Queried, stats: Mapping[str, Any]) -> None:
        self._store = store
        self.stats = dict(stats)
        self.hook: str = stats["hook"]
        """Hook of the unit."""
        self.unit: int = stats["unit"]
        """Index of the unit, 0 to d - 1."""
        self.density: float | None = stats["density"]
        """Share of tokens with act > threshold; None where no token was seen."""
        self.max_act: float | None = stats["max_act"]
        """Largest activation seen."""

    def __getattr__(self, name: str) -> Any:
        """Return a column of `unit_stats`, such as `mean` or `q99`."""
        stats: Mapping[str, Any] = self.__dict__.get("stats", {})
        if name in stats:
            return stats[name]
        raise AttributeError(f"a unit has no {name!r}; it has {', '.join(stats)}")

    def exemplars(
        self, k: int = 8, kind: ExemplarKind = "top", *, before: int = 16, after: int = 8
    ) -> Exemplars:
        """Return up to k exemplars of a kind with `before` and `after` tokens of context."""
        return read_exemplars(self._store, self.hook, self.unit, k, kind, before, after)

    def __repr__(self) -> str:
        density = "unknown" if self.density is None else f"{self.density:.4%}"
        head = f"{self.hook} unit {self.unit}: density {density}, max {self.max_act}"
        return "\n".join([head, *(repr(e) for e in self.exemplars())])

    def _repr_html_(self) -> str:
        from activation_store.pages.unit_page import notebook_html, unit_page

        return notebook_html([unit_page(self._store, self.hook, self.unit)])


_WINDOWS = """
SELECT
    rank, act, bin, doc_id, seq_id, pos,
    min(at_pos) AS first_pos, list(token ORDER BY at_pos) AS tokens
FROM exemplar_tokens($hook, $unit, $unit, $kind, $k, $before, $after)
GROUP BY ALL
ORDER BY rank
"""

_ACTS = """
SELECT seq_id, pos, act FROM acts
WHERE hook = $hook AND unit = $unit AND seq_id IN (SELECT unnest($seqs::INTEGER[]))
"""


def read_exemplars(
    store: Queried, hook: str, unit: int, k: int, kind: ExemplarKind, before: int, after: int
) -> Exemplars:
    """Return up to k exemplars of a unit with their tokens and activations, by rank."""
    settings = {"kind": kind, "k": k, "before": before, "after": after}
    rows = store.sql(_WINDOWS, hook=hook, unit=unit, **settings).fetchall()
    seqs = sorted({row[4] for row in rows})
    stored = store.sql(_ACTS, hook=hook, unit=unit, seqs=seqs).fetchall()
    acts = {(seq_id, pos): act for seq_id, pos, act in stored}
    return Exemplars(_exemplar(row, acts) for row in rows)


def _exemplar(row: Sequence[Any], acts: Mapping[tuple[int, int], float]) -> Exemplar:
    rank, act, kind_bin, doc_id, seq_id, pos, first_pos, tokens = row
    start = pos if first_pos is None else first_pos
    texts = [token or "" for token in tokens] if first_pos is not None else []
    shown = tuple(whole_characters(texts, pos - start))
    on_tokens = tuple(acts.get((seq_id, start + i), 0.0) for i in range(len(shown)))
    return Exemplar(rank, act, kind_bin, doc_id, seq_id, pos, start, shown, on_tokens)
