"""What a store holds already: explanations, hooks, densities and the strings of tokens."""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import activation_store as astore
from lmmono.clients.client import UNANSWERED
from lmmono.errors import ExplainError, nearest
from lmmono.explanations.explanation import Explanation, program_from_json
from lmmono.explanations.protocols import escaped
from lmmono.records.record_reader import RecordReader

_COLUMNS = (
    "text",
    "failure",
    "reason",
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
    stored = [str(hook) for (hook,) in store.sql(query).fetchall()]
    if patterns is None:
        return stored
    matching: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {hook for hook in stored if hook == pattern or fnmatchcase(hook, pattern)}
        if not hits:
            way_out = nearest(pattern, stored)
            raise ExplainError(f"{store.path}: no hook {pattern!r} stored as rows; {way_out}")
        matching |= hits
    return [hook for hook in stored if hook in matching]


def read_vocabulary(store: astore.Store) -> tuple[str, ...]:
    """Return the string of each token id; empty where the store has none.

    Raises:
        ExplainError: An id is left out.
    """
    rows = store.sql("SELECT token_id, token FROM vocabulary ORDER BY token_id").fetchall()
    for wanted, (token_id, _) in enumerate(rows):
        if token_id != wanted:
            raise ExplainError(
                f"{store.path}: table vocabulary has no row of token {wanted}; want all ids from 0 "
                f"to {rows[-1][0]}, or none: store.append('vocabulary', ...) adds rows"
            )
    return tuple(token for _, token in rows)


def read_densities(store: astore.Store, hook: str) -> dict[int, float]:
    """Return the share of tokens on which each unit of a hook is active."""
    query = "SELECT unit, density FROM unit_stats WHERE hook = $hook"
    return dict(store.sql(query, hook=hook).fetchall())


def read_maxima(store: astore.Store, hook: str) -> dict[int, float]:
    """Return the largest activation of each unit of a hook, in units of the hook."""
    query = "SELECT unit, coalesce(max_act, 0) FROM unit_stats WHERE hook = $hook"
    return dict(store.sql(query, hook=hook).fetchall())


def stored_explainer(store: astore.Store, explainer: str, hook: str | None = None) -> str:
    """Return the name under which explanations are stored, of that name or of it without the model.

    `llm_max_act` finds `llm_max_act:model=judge@host` where no other model was asked; a name of
    which nothing is stored comes back as it is.

    Raises:
        ExplainError: Several models were asked; says the names to choose from.
    """
    query = """SELECT DISTINCT explainer, model FROM explanations
        WHERE hook = $hook OR $hook IS NULL ORDER BY explainer"""
    names: set[str] = set()
    for name, model in store.sql(query, hook=hook).fetchall():
        if name == explainer:
            return explainer
        model = escaped(model)
        # where in the name the model stands depends on the settings named with it
        ways = [f":model={model},", f",model={model}", f":model={model}"]
        if any(name.replace(way, ":" if way[-1] == "," else "") == explainer for way in ways):
            names.add(name)
    if len(names) > 1:
        raise ExplainError(
            f"{store.path}: {explainer!r} was asked of several language models; name one: "
            f"explainer={' or '.join(map(repr, sorted(names)))}"
        )
    return names.pop() if names else explainer


def answered_units(store: astore.Store, hook: str, explainer: str, seed: int | None) -> set[int]:
    """Return the units that an explainer is done with: those with rows, and none unanswered."""
    query = """SELECT unit FROM explanations WHERE hook = $hook AND explainer = $explainer
        AND seed IS NOT DISTINCT FROM $seed GROUP BY unit
        HAVING NOT coalesce(bool_or(failure IN (SELECT unnest($unanswered))), false)"""
    rows = store.sql(
        query, hook=hook, explainer=explainer, seed=seed, unanswered=list(UNANSWERED)
    ).fetchall()
    return {int(unit) for (unit,) in rows}


def count_failures(
    store: astore.Store, explainer: str, seed: int, units: Mapping[str, Sequence[int]]
) -> tuple[dict[str, int], dict[str, str]]:
    """Return how many units have each type of failure ("" for none), and the first unit's reason.

    Args:
        store: An open store.
        explainer: Name as stored.
        seed: Seed of the explanations.
        units: Units that count, by hook.
    """
    query = """SELECT coalesce(failure, ''), count(DISTINCT unit), arg_min(reason, unit)
        FROM explanations WHERE hook = $hook
        AND explainer = $explainer AND seed = $seed AND unit IN (SELECT unnest($units))
        GROUP BY ALL ORDER BY 1"""
    counts, reasons = dict[str, int](), dict[str, str]()
    for hook, wanted in units.items():
        rows = store.sql(query, hook=hook, explainer=explainer, seed=seed, units=list(wanted))
        for failure, n, reason in rows.fetchall():
            counts[failure] = counts.get(failure, 0) + n
            if reason is not None:
                reasons.setdefault(failure, reason)
    return counts, reasons


def count_outdated(
    store: astore.Store, hook: str, explainer: str, seed: int, units: Sequence[int]
) -> int:
    """Return how many units are explained by other tokens of their split than it holds now."""
    query = """WITH held AS (SELECT split, count(*) AS n FROM token_ids GROUP BY split)
        SELECT count(DISTINCT unit) FROM explanations LEFT JOIN held USING (split)
        WHERE hook = $hook AND explainer = $explainer AND seed = $seed
            AND unit IN (SELECT unnest($units)) AND n_tokens IS DISTINCT FROM n"""
    rows = store.sql(query, hook=hook, explainer=explainer, seed=seed, units=list(units))
    ((n_outdated,),) = rows.fetchall()
    return int(n_outdated)


def explained_units(store: astore.Store, hook: str, explainer: str, seed: int | None) -> list[int]:
    """Return the units that an explainer has rows of, failures included, ascending.

    Raises:
        ExplainError: There are none.
    """
    explainer, seed = _origin(store, hook, explainer, seed)
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
        explainer: Name as stored, with its preset and changed settings; the language model may be
            left out where only one was asked.
        seed: Seed it was made with; where there are none, those of the only other seed are taken.

    Raises:
        ExplainError: There are none; says what there is, and how to make some.
    """
    explainer, seed = _origin(store, hook, explainer, seed)
    # of a unit's candidates the best comes last, and of those of one rank the newest
    query = """SELECT unit, program, {} FROM explanations
        WHERE hook = $hook AND explainer = $explainer AND seed IS NOT DISTINCT FROM $seed
        ORDER BY unit, rank DESC NULLS FIRST, created_at""".format(", ".join(_COLUMNS))
    explanations: dict[int, Explanation] = {}
    rows = store.sql(query, hook=hook, explainer=explainer, seed=seed).fetchall()
    for unit, described, *values in rows:
        program = None if described is None else program_from_json(json.loads(described))
        facts = dict(zip(_COLUMNS, values, strict=True))
        explanations[unit] = Explanation(
            hook=hook, unit=unit, explainer=explainer, program=program, seed=seed, **facts
        )
    return explanations


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


def _origin(
    store: astore.Store, hook: str, explainer: str, seed: int | None
) -> tuple[str, int | None]:
    """Return name and seed under which explanations of a hook are stored."""
    explainer = stored_explainer(store, explainer, hook)
    query = "SELECT DISTINCT seed FROM explanations WHERE hook = $hook AND explainer = $explainer"
    rows = store.sql(query, hook=hook, explainer=explainer).fetchall()
    seeds = {stored_seed for (stored_seed,) in rows}
    if seed in seeds:
        return explainer, seed
    if len(seeds) == 1:
        return explainer, seeds.pop()
    if seeds:
        names = ", ".join(str(stored_seed) for stored_seed in sorted(seeds, key=str))
        raise ExplainError(
            f"{hook}: explanations by {explainer} have seeds {names}, not {seed}; name one"
        )
    query = "SELECT DISTINCT explainer FROM explanations WHERE hook = $hook ORDER BY explainer"
    names = ", ".join(name for (name,) in store.sql(query, hook=hook).fetchall()) or "none"
    raise ExplainError(
        f"{store.path}: no explanations of {hook} by {explainer!r} (stored: {names}); make them: "
        f"lm.explain(store, {hook!r}, explainer={explainer.partition(':')[0]!r})"
    )
