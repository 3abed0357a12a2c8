"""The court of scorers: from which density on does a scorer know a true explanation?

Units of exact densities from 1 in 10,000 tokens to 1 in 10 on a text of 20,000 words, each the sum
of words of its own; once as they are, once with noise. A scorer passes at a density where it ranks
the true explanation above each kind of false one in 95 % of the units, ties by half. Two kinds are
the tests of NeuronEval (arXiv 2506.05774): half of the labels are missing, or there are twice as
many. A scorer that looks at few records cannot see labels that were added elsewhere: both
explanations then predict the same there, and tie.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

import activation_store as astore
from lmmono.clients.client import Client
from lmmono.errors import ExplainError
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.token_lookup import Lookup, lookup_text
from lmmono.records.record_reader import RecordReader
from lmmono.records.seeds import stream
from lmmono.registry.scorers import find_scorer
from lmmono.scores.score_job import ScoreJob
from lmmono.stats.intervals import wilson
from lmmono.types import Progress, silent

DENSITIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)
"""Shares of tokens on which the units fire."""

NOISES: dict[str, float] = {"exact": 0.0, "noisy": 0.3}
"""Share of firing that is lost, and as much falsely added elsewhere; sizes scatter by as much."""

PASS = 0.95
"""Least share of units whose true explanation ranks first, for each kind of false one."""

FALSE_KINDS: dict[str, tuple[float, float]] = {
    "missing_labels": (0.5, 0.0),
    "extra_labels": (1.0, 1.0),
    "near_miss": (0.5, 0.5),
    "too_broad": (1.0, 2.0),
    "too_narrow": (0.25, 0.0),
    "random": (0.0, 0.0),
}
"""False explanations: the share of the firing that they keep, and the share that they add on other
words. The first two are NeuronEval's. random: the explanation of another unit of the density."""

D_VOCAB, N_CTX, DOCUMENT = 20_000, 128, 400
"""Words, tokens of a row, tokens of a document."""

OWN_WORDS = 0.3
"""Share of a document's tokens that are of its own few words, so that words come in bursts."""

LEAST_WORDS = 4
"""A word carries at most one part in so many of a unit's firing: fewer words than that could not
lose a quarter."""

UNITS_AT_ONCE_ROWS = 256
"""Rows of text whose activations are held together: 0.1 GB at 480 units."""


def hook_of(density: float, noise: str) -> str:
    """Return the hook of the units of a density."""
    return f"court.{noise}.{density:g}"


@dataclass(frozen=True, slots=True)
class CourtUnits:
    """The units of the court and what is said of them."""

    hooks: tuple[str, ...]
    """Hooks, one per density and noise."""
    n_units: int
    """Units of each hook."""


def write_court(
    store: astore.Store,
    *,
    densities: Sequence[float] = DENSITIES,
    n_units: int = 40,
    n_tokens: int = 600_000,
    seed: int = 0,
) -> CourtUnits:
    """Write the text, the units and their true and false explanations into an empty store.

    Args:
        store: A store opened with mode "w".
        densities: Shares of tokens on which units fire.
        n_units: Units of each density and noise.
        n_tokens: Tokens of the text, half of them for scores.
        seed: Seed of all that is drawn.
    """
    rng = stream("court", seed)
    ids, docs = _text(n_tokens, rng)
    share = np.bincount(ids.ravel(), minlength=D_VOCAB) / ids.size
    words = tuple(f" w{i}" for i in range(D_VOCAB))
    store.add_vocabulary(words)
    tables: dict[str, Float[ndarray, "units words"]] = {}
    for density in densities:
        truths = np.stack([_unit(density, share, rng) for _ in range(n_units)])
        tables |= {hook_of(density, noise): truths for noise in NOISES}
    explanations: list[dict[str, Any]] = []
    for density in densities:
        of_kind = _explanations(tables[hook_of(density, "exact")], density, share, rng)
        for noise in NOISES:
            for kind, unit_tables in of_kind.items():
                for unit, table in enumerate(unit_tables):
                    fired = np.flatnonzero(table)
                    program = Lookup(fired, table[fired], 0.0)
                    named = (hook_of(density, noise), unit, explainer_of(kind))
                    text = lookup_text(program, words)
                    explanations.append(Explanation(*named, text, program, seed=seed).row())
    hooks = tuple(tables)
    rows = [astore.Rows(hook, n_units, max_density=1.0) for hook in hooks]
    middle = len(ids) // 2
    with store.writer(rows=rows, n_ctx=N_CTX, seed=seed) as writer:
        for first in range(0, len(ids), UNITS_AT_ONCE_ROWS):
            for part in np.split(np.arange(first, min(first + UNITS_AT_ONCE_ROWS, len(ids))),
                                 [max(middle - first, 0)]):  # fmt: skip
                if len(part):
                    split = "explain" if part[0] < middle else "score"
                    acts = {hook: _fire(tables[hook], ids[part], hook, rng) for hook in hooks}
                    writer.add(part, ids[part], docs[part], split, acts)
    store.append("explanations", explanations)
    return CourtUnits(hooks, n_units)


def explainer_of(kind: str) -> str:
    """Return the explainer that explanations of a kind are stored under; `true` for true ones."""
    return f"court_{kind}"


def _text(n_tokens: int, rng: np.random.Generator) -> tuple[ndarray, ndarray]:
    """Return token and document ids in rows: words by Zipf's law, some of them in bursts."""
    n_rows = n_tokens // N_CTX // 2 * 2
    frequent = 1 / np.arange(1, D_VOCAB + 1)
    frequent /= frequent.sum()
    ids = rng.choice(D_VOCAB, n_rows * N_CTX, p=frequent)
    docs = np.arange(len(ids)) // DOCUMENT
    half = len(ids) // 2
    docs[half:] += docs[half - 1] + 1 - docs[half]  # a document cut in two is two documents
    own = rng.choice(D_VOCAB, (docs[-1] + 1, DOCUMENT // 10), p=frequent)
    is_own = rng.random(len(ids)) < OWN_WORDS
    ids[is_own] = own[docs[is_own], rng.integers(own.shape[1], size=int(is_own.sum()))]
    return ids.reshape(-1, N_CTX), docs.reshape(-1, N_CTX)


def _unit(
    density: float, share: Float[ndarray, " words"], rng: np.random.Generator
) -> Float[ndarray, " words"]:
    """Return the activation of a new unit on each word; its words have the density together."""
    sizes = rng.lognormal(0.0, NOISES["noisy"], len(share))
    fires = _words(density, share, np.zeros(len(share), bool), density, rng)
    return np.where(fires, sizes, 0.0)


def _words(
    mass: float,
    share: Float[ndarray, " words"],
    taken: Bool[ndarray, " words"],
    density: float,
    rng: np.random.Generator,
) -> Bool[ndarray, " words"]:
    """Return words, none of them taken, that are about `mass` of the tokens together."""
    free = np.flatnonzero(~taken & (share > 0) & (share <= density / LEAST_WORDS))
    order = rng.permutation(free)
    total = np.cumsum(share[order])
    n = int(np.searchsorted(total, mass))
    # the word that passes the mass is taken where that comes nearer to it
    if n < len(order) and total[n] - mass < mass - (total[n - 1] if n else 0.0):
        n += 1
    return np.isin(np.arange(len(share)), order[:n])


def _explanations(
    truths: Float[ndarray, "units words"],
    density: float,
    share: Float[ndarray, " words"],
    rng: np.random.Generator,
) -> dict[str, Float[ndarray, "units words"]]:
    """Return the true table of each unit and the false ones, added words sized like true ones."""
    by_kind = {"true": truths, "random": np.roll(truths, 1, axis=0)}
    for kind, (kept_share, added_share) in FALSE_KINDS.items():
        if kind == "random":
            continue
        tables: list[ndarray] = []
        for truth in truths:
            fires = truth > 0
            mass = float(share[fires].sum())
            kept = _words(kept_share * mass, np.where(fires, share, 0.0), ~fires, 1.0, rng)
            kept = fires if kept_share == 1.0 else kept
            added = _words(added_share * mass, share, fires, density, rng)
            added &= added_share > 0
            sizes = rng.choice(truth[fires], len(truth))
            tables.append(np.where(kept, truth, np.where(added, sizes, 0.0)))
        by_kind[kind] = np.stack(tables)
    return by_kind


def _fire(
    tables: Float[ndarray, "units words"],
    ids: Int[ndarray, "rows window"],
    hook: str,
    rng: np.random.Generator,
) -> Float[ndarray, "rows window units"]:
    """Return the activations of a hook's units on some rows."""
    acts = tables.T.astype(np.float32)[ids]
    noise = NOISES[hook.split(".")[1]]
    if noise:
        flat, n_fires = acts.reshape(-1), (acts > 0).sum(axis=(0, 1))
        fires = np.flatnonzero(flat)
        kept = rng.random(len(fires)) >= noise
        flat[fires] *= kept * rng.lognormal(0.0, noise, len(fires)).astype(np.float32)
        for unit, n in enumerate(n_fires):
            places = rng.integers(ids.size, size=rng.poisson(noise * n))
            added = acts.reshape(-1, acts.shape[2])[:, unit]
            places = places[added[places] == 0]
            added[places] = rng.lognormal(0.0, noise, len(places))
    return acts


@dataclass(frozen=True, slots=True)
class CourtVerdict:
    """What the court found of one metric of a scorer."""

    metric: str
    """The metric that ranked."""
    rows: tuple[dict[str, Any], ...]
    """`density`, `noise` and `false` explanation; `ranking`, the share of units whose true
    explanation scores above the false one, ties by half, with `ci_low` and `ci_high` (95 %, Wilson
    over units); `undefined`, the share of units whose true explanation has no defined score; `n`
    units."""

    def passed(self, noise: str = "exact") -> tuple[float, ...]:
        """Return the densities at which every kind of false explanation ranks below the true."""
        worst: dict[float, float] = {}
        for row in self.rows:
            if row["noise"] == noise:
                worst[row["density"]] = min(worst.get(row["density"], 1.0), row["ranking"])
        return tuple(density for density, ranking in sorted(worst.items()) if ranking >= PASS)

    def least_density(self, noise: str = "exact") -> float | None:
        """Return the least density from which on it passes, up to the largest that it passes."""
        densities = sorted({row["density"] for row in self.rows})
        passed, least = self.passed(noise), None
        for density in reversed(densities):
            if density in passed:
                least = density
            elif least is not None:
                break
        return least


def hold_court(
    store: astore.Store,
    units: CourtUnits,
    scorer: str,
    *,
    metrics: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    client: Client | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[CourtVerdict, ...]:
    """Let a scorer score the true and the false explanations; return a verdict for each metric.

    Args:
        store: A store that `write_court` filled.
        units: What it returned.
        scorer: A scorer of explanations that needs neither a model nor labels.
        metrics: Metrics of it that rank; None takes the headline.
        settings: Changed settings of the scorer, `encoder` among them where it needs one.
        client: Judge of a scorer that needs one.
        seed: Seed of the records.
        progress: Called with how far the work is.

    Raises:
        ExplainError: The scorer reads no explanations, needs more than is there, or has no such
            setting.
    """
    record = find_scorer(scorer)
    wanted = tuple(metrics or record.metrics[:1])
    if not record.reads_explanations:
        raise ExplainError(
            f"{scorer} reads no explanations, so it ranks none; see `lmmono ls scorers`"
        )
    at_hand = {
        "explanation",
        "program",
        *(settings or ()),
        *(() if client is None else ("client",)),
    }
    if missing := [need for need in record.needs if need not in at_hand]:
        raise ExplainError(f"{scorer} needs {', '.join(missing)}, which the court has not")
    kinds = ("true", *FALSE_KINDS)
    values = {name: np.zeros((len(units.hooks), units.n_units, len(kinds))) for name in wanted}
    undefined = {name: np.zeros((len(units.hooks), units.n_units), bool) for name in wanted}
    number = {hook: i for i, hook in enumerate(units.hooks)}
    reader, function = RecordReader(store, seed=seed), record.load()
    typed = record.with_settings(changes=settings)
    for done, hook in enumerate(units.hooks, start=1):
        for at, kind in enumerate(kinds):
            # all kinds of one hook after each other: the reader keeps what it read of a hook
            job = ScoreJob(store, hook, reader, tuple(range(units.n_units)), typed,
                           explainer=explainer_of(kind), controls=False, seed=seed,
                           client=client)  # fmt: skip
            for row in function(job):
                if (name := row["metric"]) in values:
                    place = number[hook], row["unit"]
                    values[name][(*place, at)] = row["value"] or 0.0  # undefined ties
                    if kind == "true":
                        is_undefined = row["value"] is None or bool(row.get("nan_fraction"))
                        undefined[name][place] = is_undefined
        progress(f"court {scorer}", done, len(units.hooks))
    return tuple(
        CourtVerdict(name, tuple(_rows(units.hooks, values[name], undefined[name])))
        for name in wanted
    )


def _rows(
    hooks: Sequence[str],
    values: Float[ndarray, "hooks units kinds"],
    undefined: Bool[ndarray, "hooks units"],
) -> Iterator[dict[str, Any]]:
    wins = (values[..., :1] > values[..., 1:]) + 0.5 * (values[..., :1] == values[..., 1:])
    for i, hook in enumerate(hooks):
        _, noise, density = hook.split(".", 2)
        n = wins.shape[1]
        for j, false in enumerate(FALSE_KINDS):
            low, high = wilson(float(wins[i, :, j].sum()), n)
            yield {
                "density": float(density),
                "noise": noise,
                "false": false,
                "ranking": float(wins[i, :, j].mean()),
                "ci_low": low,
                "ci_high": high,
                "undefined": float(undefined[i].mean()),
                "n": n,
            }


def audit_densities(
    scorer: str,
    *,
    n_units: int = 40,
    n_tokens: int = 600_000,
    seed: int = 0,
    progress: Progress = silent,
) -> CourtVerdict:
    """Hold court on one scorer, in a store that is thrown away.

    Raises:
        ExplainError: The scorer needs more than a store.
    """
    with (
        tempfile.TemporaryDirectory() as place,
        astore.open(Path(place) / "court", mode="w") as store,
    ):
        units = write_court(store, n_units=n_units, n_tokens=n_tokens, seed=seed)
        return hold_court(store, units, scorer, seed=seed, progress=progress)[0]
