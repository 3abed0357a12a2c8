"""What a store holds already: explanations, hooks, densities and the strings of tokens."""

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase

import activation_store as astore
from lmmono.errors import ExplainError, nearest
from lmmono.explanations.explanation import Explanation, program_from_json
from lmmono.records.record_reader import RecordReader

_COLUMNS = (
    "text",
    "failure",
    "split",
    "n_records",
    "complexity",
    "rank",
    "model",
    "prompt_hash",
)


def match_stored_hooks(store: astore.Store, patterns: str | Sequence[str] | None) -> list[str]:
    """Return the hooks stored as rows that match any of the names or globs; None matches all.

    Raises:
        ExplainError: A pattern matches nothing; says the nearest names.
    """
    query = "SELECT hook FROM hooks WHERE kind = 'rows' ORDER BY hook"
    known = [str(hook) for (hook,) in store.sql(query).fetchall()]
    if patterns is None:
        return known
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {hook for hook in known if hook == pattern or fnmatchcase(hook, pattern)}
        if not hits:
            way_out = nearest(pattern, known)
            raise ExplainError(f"{store.path}: no hook {pattern!r} stored as rows; {way_out}")
        found |= hits
    return [hook for hook in known if hook in found]


def read_vocabulary(store: astore.Store) -> tuple[str, ...]:
    """Return the string of each token id; empty where the store has none."""
    rows = store.sql("SELECT token_id, token FROM vocabulary ORDER BY token_id").fetchall()
    assert [token_id for token_id, _ in rows] == list(range(len(rows))), "ids have no gaps"
    return tuple(token for _, token in rows)


def read_densities(store: astore.Store, hook: str) -> dict[int, float]:
    """Return the share of tokens on which each unit of a hook is active."""
    query = "SELECT unit, density FROM unit_stats WHERE hook = $hook"
    return dict(store.sql(query, hook=hook).fetchall())


def read_maxima(store: astore.Store, hook: str) -> dict[int, float]:
    """Return the largest activation of each unit of a hook, in units of the hook."""
    query = "SELECT unit, coalesce(max_act, 0) FROM unit_stats WHERE hook = $hook"
    return dict(store.sql(query, hook=hook).fetchall())


def explained_units(store: astore.Store, hook: str, explainer: str, seed: int | None) -> list[int]:
    """Return the units that an explainer has rows of, failures included, ascending.

    Raises:
        ExplainError: There are none.
    """
    seed = _stored_seed(store, hook, explainer, seed)
    query = """SELECT DISTINCT unit FROM explanations WHERE hook = $hook
        AND explainer = $explainer AND seed IS NOT DISTINCT FROM $seed ORDER BY unit"""
    rows = store.sql(query, hook=hook, explainer=explainer, seed=seed).fetchall()
    return [int(unit) for (unit,) in rows]


def read_explanations(
    store: astore.Store, hook: str, explainer: str, seed: int | None
) -> dict[int, Explanation]:
    """Return the best explanation of each unit by one explainer, failures included.

    Args:
        store: An open store.
        hook: Hook of the units.
        explainer: Name as stored, with its preset and changed settings.
        seed: Seed it was made with; where there are none, those of the only other seed are taken.

    Raises:
        ExplainError: There are none; says what there is, and how to make some.
    """
    seed = _stored_seed(store, hook, explainer, seed)
    query = """SELECT unit, program, {} FROM explanations
        WHERE hook = $hook AND explainer = $explainer AND seed IS NOT DISTINCT FROM $seed
        ORDER BY unit, rank DESC NULLS FIRST""".format(", ".join(_COLUMNS))
    found: dict[int, Explanation] = {}
    rows = store.sql(query, hook=hook, explainer=explainer, seed=seed).fetchall()
    for unit, described, *values in rows:
        program = None if described is None else program_from_json(json.loads(described))
        facts = dict(zip(_COLUMNS, values, strict=True))
        found[unit] = Explanation(
            hook=hook, unit=unit, explainer=explainer, program=program, seed=seed, **facts
        )
    return found


def kept_explanations(reader: RecordReader, hook: str, explainer: str) -> dict[int, Explanation]:
    """Return the same with the reader's seed, read once for all who score this hook.

    Raises:
        ExplainError: There are none.
    """
    return reader.once(
        hook,
        ("explanations", explainer),
        lambda: read_explanations(reader.store, hook, explainer, reader.seed),
    )


def _stored_seed(store: astore.Store, hook: str, explainer: str, seed: int | None) -> int | None:
    query = "SELECT DISTINCT seed FROM explanations WHERE hook = $hook AND explainer = $explainer"
    seeds = {each for (each,) in store.sql(query, hook=hook, explainer=explainer).fetchall()}
    if seed in seeds:
        return seed
    if len(seeds) == 1:
        return seeds.pop()
    raise ExplainError(_missing(store, hook, explainer, seed, seeds))


def _missing(
    store: astore.Store, hook: str, explainer: str, seed: int | None, seeds: set[int | None]
) -> str:
    if seeds:
        known = ", ".join(str(each) for each in sorted(seeds, key=str))
        return f"{hook}: explanations by {explainer} have seeds {known}, not {seed}; name one"
    query = "SELECT DISTINCT explainer FROM explanations WHERE hook = $hook ORDER BY explainer"
    known = ", ".join(name for (name,) in store.sql(query, hook=hook).fetchall()) or "none"
    return (
        f"{store.path}: no explanations of {hook} by {explainer!r} (there: {known}); make them: "
        f"lm.explain(store, {hook!r}, explainer={explainer.partition(':')[0]!r})"
    )
