"""The exemplars of all units of a hook with tokens and acts, some units at a time."""

from collections.abc import Iterator
from typing import Any

from activation_store.read.characters import whole_characters
from activation_store.read.queried import Queried

_UNITS = 256  # units whose exemplars are looked up together

_WINDOWS = """
WITH fired AS (
    SELECT a.unit, a.seq_id, a.pos, a.act
    FROM acts a
    WHERE a.hook = $hook AND a.unit >= $first AND a.unit < $stop
)
SELECT
    n.unit, n.kind, n.rank, n.bin, n.act,
    count(*) FILTER (WHERE n.at_pos < n.pos) AS own,
    list(n.token ORDER BY n.at_pos) AS tokens,
    list(coalesce(f.act, 0)::DOUBLE ORDER BY n.at_pos) AS acts
FROM exemplar_tokens($hook, $first, $stop - 1, NULL, 2147483647, $before, $after) n
LEFT JOIN fired f ON f.unit = n.unit AND f.seq_id = n.seq_id AND f.pos = n.at_pos
WHERE n.at_pos IS NOT NULL
GROUP BY n.unit, n.kind, n.rank, n.bin, n.act
ORDER BY n.unit, n.kind, n.rank
"""


def records(
    store: Queried, hook: str, before: int, after: int
) -> Iterator[tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]]:
    """Yield, unit by unit, its row of `unit_stats` and its exemplars by kind, best first.

    An exemplar is a dict of bin, act, own, tokens and acts: the tokens of its document around it,
    the unit's act on each, 0 where none is stored, and which of them is the exemplar's own.
    """
    query = "FROM unit_stats WHERE hook = $hook ORDER BY unit"
    stats = store.sql(query, hook=hook).to_arrow_table().to_pylist()
    for begin in range(0, len(stats), _UNITS):
        some = stats[begin : begin + _UNITS]
        rows = store.sql(
            _WINDOWS,
            hook=hook,
            first=some[0]["unit"],
            stop=some[-1]["unit"] + 1,
            before=before,
            after=after,
        )
        of_unit: dict[int, dict[str, list[dict[str, Any]]]] = {
            row["unit"]: {"top": [], "random": [], "quantile": []} for row in some
        }
        for row in rows.to_arrow_table().to_pylist():
            row["tokens"] = whole_characters(row["tokens"], row["own"])
            of_unit[row["unit"]][row["kind"]].append(row)
        for row in some:
            yield row, of_unit[row["unit"]]
