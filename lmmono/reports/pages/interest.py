"""Which units of a store are worth a look first, and why: a ranked list with one criterion.

A unit's place is the lower end of its score's 95 % interval, less the largest of its controls (and
not less than 0 of them). So a unit whose score is high by chance, or as high on shuffled tokens,
stands low. Units that fired fewer than `MIN_ACTIVATIONS` times are left out, and detectors of one
token come last; the page says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import activation_store as astore
from activation_store.pages import PageOptions, UnitPage, unit_pages
from activation_store.pages.templating import percent, token_text
from activation_store.printable import number

MIN_ACTIVATIONS = 100
"""A unit that fired less often is not listed: rare firing looks selective by chance."""
ONE_TOKEN = 0.75
"""Share of its activation from which a unit counts as the detector of one token."""

CRITERION = (
    "Ranked by the lower end of the 95 % interval of {metric} less its largest control. "
    "Units that fired on fewer than {least} tokens are left out: rare firing looks selective by "
    "chance. Detectors of one token, which carries {share} of their activation, come last: they "
    "are the easiest to be selective. A high place says that a unit knows its tokens, not that it "
    "matters to the model."
)

RANKED = """
WITH real AS (
    SELECT hook, unit, value, ci_low, ci_high, n FROM all_scores
    WHERE metric = $metric AND control IS NULL AND unit IS NOT NULL AND value IS NOT NULL
        AND coalesce(nan_fraction, 0) = 0
    QUALIFY row_number() OVER (PARTITION BY hook, unit ORDER BY created_at DESC) = 1
),
controls AS (
    SELECT hook, unit, max(value) AS control, arg_max(control, value) AS control_name
    FROM all_scores
    WHERE metric = $metric AND unit IS NOT NULL AND control IS NOT NULL
        AND control <> 'untrained_model'
    GROUP BY hook, unit
),
alike AS (
    -- a guess from excerpts of every part of its range, which is cheap: the commonest token's share
    SELECT hook, unit, max(n) / sum(n) AS share
    FROM (
        SELECT e.hook, e.unit, t.token_id, count(*) AS n
        FROM exemplars e JOIN token_ids t ON t.seq_id = e.seq_id AND t.pos = e.pos
        WHERE e.kind = 'quantile' GROUP BY ALL
    )
    GROUP BY hook, unit
)
SELECT r.hook, r.unit, r.value, r.ci_low, r.ci_high, c.control, c.control_name, s.n_active,
    s.density, s.kurtosis,
    coalesce(r.ci_low, r.value) - greatest(coalesce(c.control, 0), 0) AS margin
FROM real r
JOIN unit_stats s ON s.hook = r.hook AND s.unit = r.unit
LEFT JOIN controls c ON c.hook = r.hook AND c.unit = r.unit
LEFT JOIN alike a ON a.hook = r.hook AND a.unit = r.unit
WHERE s.n_active >= $least AND ($hook IS NULL OR r.hook = $hook)
QUALIFY row_number() OVER (
    PARTITION BY r.hook ORDER BY coalesce(a.share, 0) >= $one, margin DESC, r.unit
) <= $n
ORDER BY coalesce(a.share, 0) >= $one, margin DESC, r.hook, r.unit
"""

_WORDS = PageOptions(top_k=0, quantile_k=0, random_k=0, list_k=3)
"""What a sentence needs of a unit's page."""


@dataclass(frozen=True, slots=True)
class Interesting:
    """A unit with what makes it worth a look."""

    hook: str
    unit: int
    metric: str
    """Score that it is ranked by."""
    value: float
    ci_low: float | None
    """Lower end of the 95 % interval."""
    ci_high: float | None
    control: float | None
    """Largest value of the same score under a control."""
    control_name: str | None
    margin: float
    """Lower end less control: what it is ranked by."""
    density: float | None
    """Share of tokens that it fires on."""
    why: str
    """What it fires on and writes, in a sentence."""
    is_one_token: bool
    """Whether one token carries `ONE_TOKEN` of its activation: a look at that token says it all."""

    @property
    def control_says(self) -> str:
        """What the control comes to, in a sentence."""
        if self.control is None:
            return "It has no control, so its place says little."
        beside = f"{self.control_name} gives {number(self.control)}"
        ends = f"[{number(self.ci_low)}, {number(self.ci_high)}]"
        clear = "clear of it" if self.margin > 0 else "not clear of it"
        score = f"{self.metric} {number(self.value)} {ends}"
        return f"{score}. Control: {beside}, so the score is {clear}."


def interesting(
    store: astore.Store,
    n: int = 20,
    hook: str | None = None,
    *,
    metric: str = "token_selectivity",
) -> list[Interesting]:
    """Return the units that are worth a look first, best first.

    Args:
        store: Open store.
        n: How many at most.
        hook: Of one hook; None takes all.
        metric: Score of units to rank by; `lmmono run` always measures `token_selectivity`.
    """
    rows = ranked(store, 2 * n, hook, metric=metric)[: 2 * n]
    units_of: dict[str, list[int]] = {}
    for row in rows:
        units_of.setdefault(row["hook"], []).append(row["unit"])
    pages = {
        (page.hook, page.unit): page
        for each, units in units_of.items()
        for page in unit_pages(store, each, units, options=_WORDS)
    }
    return best_of(rows, pages, metric=metric)[:n]


def best_of(
    rows: Sequence[Mapping[str, Any]],
    pages: Mapping[tuple[str, int], UnitPage],
    *,
    metric: str = "token_selectivity",
) -> list[Interesting]:
    """Return what rows of `ranked` and the pages of their units come to, best first."""
    found: list[Interesting] = []
    for row in rows:
        page = pages[row["hook"], row["unit"]].data
        fields = {name: row[name] for name in Interesting.__dataclass_fields__ if name in row}
        is_one = bool(page["tokens"]) and page["tokens"][0]["mass"] >= ONE_TOKEN
        found.append(Interesting(**fields, metric=metric, why=_why(page), is_one_token=is_one))
    found.sort(key=lambda each: each.is_one_token)  # stable: the ranking stays within each part
    return found


def ranked(
    store: astore.Store, n: int, hook: str | None = None, *, metric: str = "token_selectivity"
) -> list[dict[str, Any]]:
    """Return the n units of each hook of the largest margins, as rows; of one token come last."""
    asked = {"metric": metric, "least": MIN_ACTIVATIONS, "hook": hook, "n": n, "one": ONE_TOKEN}
    result = store.sql(RANKED, **asked)
    return [dict(zip(result.columns, row, strict=True)) for row in result.fetchall()]


def _why(page: dict[str, Any]) -> str:
    """Return what a unit fires on and writes, and what is said of it, in a sentence."""
    parts = [f"Fires on {percent(page['stats']['density'])} of tokens"]
    shares = [f"{token_text(row['token'])} ({percent(row['mass'])})" for row in page["tokens"][:3]]
    if shares:
        parts.append(f"its activation falls on {', '.join(shares)}")
    if page["promotes"]["up"]:
        best = page["promotes"]["up"][0]
        beside = f"(logit {number(best['logit'])}, random mixtures {number(best['control'])})"
        parts.append(f"it promotes {token_text(best['token'])} {beside}")
    said = [row["text"] for row in page["explanations"] if row["text"]]
    parts += [f"an explainer says: {said[0]}"] if said else []
    return "; ".join(parts) + "."
