"""What a store holds already: explanations, hooks, densities and the strings of tokens."""

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase

import activation_store as astore
from lmmono.errors import ExplainError, nearest
from lmmono.explaining.explanation import Explanation
from lmmono.explaining.programs import program_from_json


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
    query = """SELECT seed, unit, text, program, failure, split, n_records, complexity, rank, model,
            prompt_hash
        FROM explanations WHERE hook = $hook AND explainer = $explainer
        ORDER BY seed, unit, rank DESC NULLS FIRST"""
    rows = store.sql(query, hook=hook, explainer=explainer).fetchall()
    seeds = {row[0] for row in rows}
    if seed not in seeds and len(seeds) == 1:
        (seed,) = seeds
    if seed not in seeds:
        raise ExplainError(_missing(store, hook, explainer, seed, seeds))
    columns = ("text", "failure", "split", "n_records", "complexity", "rank", "model")
    at = {"text": 2, "failure": 4, "split": 5, "n_records": 6, "complexity": 7, "rank": 8}
    at |= {"model": 9, "prompt_hash": 10}
    found: dict[int, Explanation] = {}
    for row in rows:
        if row[0] == seed:
            program = None if row[3] is None else program_from_json(json.loads(row[3]))
            facts = {name: row[at[name]] for name in (*columns, "prompt_hash")}
            found[row[1]] = Explanation(
                hook=hook, unit=row[1], explainer=explainer, program=program, seed=seed, **facts
            )
    return found


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
