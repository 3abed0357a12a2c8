"""Tables of units: what is best and worst, beside which controls, and one unit whole."""

import math

import pytest
from small_store import HOOK, small_store

import activation_store as astore
from lmmono.errors import RunError
from lmmono.reports.table import Controls, Interval
from lmmono.reports.unit_tables import (
    excerpts,
    explanation_tables,
    find_unit,
    score_tables,
    unit_tables,
)

KEY = {"metric": "detection", "metric_version": 1, "hook": HOOK, "explainer": "e", "seed": 0}
VALUES = (0.9, 0.5, 0.7, 0.6, 0.8)  # unit 1 is not defined, which counts as 0.5


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Five units explained and scored, four of them defined; their controls are 0.1 lower."""
    small = small_store(tmp_path_factory.mktemp("run") / "run")
    rows = [
        KEY
        | {"unit": unit, "value": value, "n": 10, "nan_fraction": float(unit == 1)}
        | ({"failure": "silent"} if unit == 1 else {"ci_low": value - 0.05, "ci_high": 1.0})
        for unit, value in enumerate(VALUES)
    ]
    controls = [
        row | {"control": "random_explanation", "value": row["value"] - 0.1} for row in rows
    ]
    mean = KEY | {"value": 0.7, "ci_low": 0.6, "ci_high": 0.8, "n": 5, "nan_fraction": 0.2}
    said = [
        {"hook": HOOK, "unit": unit, "explainer": "e", "seed": 0, "rank": 1, "prompt_hash": ""}
        | ({"failure": "silent"} if unit == 1 else {"text": f"says {unit}"})
        for unit in range(5)
    ]
    with astore.open(small.path, "a") as store:
        store.append(
            "all_scores", [*rows, *controls, mean, mean | {"control": "random_explanation"}]
        )
        store.append("explanations", said)
    return astore.open(small.path)


def test_scores_are_ranked_among_the_defined_with_their_controls(store):
    means, units = score_tables(store, "mine")
    assert means.rows == (
        (
            "detection, e",
            HOOK,
            Interval(0.7, 0.6, 0.8),
            Controls(random_explanation=0.7),
            5,
            "20% as 0.5",
        ),
    )
    by_place = {row[0]: row[1:] for row in units.rows}
    assert [by_place[i][0] for i in (1, 2, 3, 4)] == [f"{HOOK}:{u}" for u in (0, 4, 2, 3)]
    for place, unit in ((1, 0), (4, 3)):
        _, score, controls, text, excerpt = by_place[place]
        assert (score.value, score.low) == (VALUES[unit], pytest.approx(VALUES[unit] - 0.05))
        assert controls["random_explanation"] == pytest.approx(VALUES[unit] - 0.1)
        assert text == f"says {unit}" and "«" in excerpt
    assert "Of 4 units" in units.note


def test_excerpts_of_many_units_are_those_of_each(store):
    units = [(HOOK, 3), (HOOK, 0), ("no hook", 1)]
    one_by_one = [store.exemplars(HOOK, u, 1, before=10, after=4)[0].text for u in (3, 0)]
    assert excerpts(store, units) == [*one_by_one, ""]
    assert excerpts(store, []) == []


def test_explanations_say_how_many_failed_and_why(store):
    (table,) = explanation_tables(store, "mine")
    assert {row[2] for row in table.rows} == {f"says {unit}" for unit in (0, 2, 3, 4)}
    assert table.note.startswith("4 units are explained, 1 are not (silent)")


def test_one_unit_is_shown_whole(store):
    tables = {t.title.partition(", ")[2]: t for t in unit_tables(store, HOOK, 1, k=3)}
    unit = store.unit(HOOK, 1)
    assert dict(tables["statistics"].rows)["density"] == unit.density
    assert [row[3] for row in tables["strongest exemplars"].rows] == [
        each.text for each in unit.exemplars(3, before=24, after=12)
    ]
    assert [row[2] for row in tables["explanations"].rows] == ["silent"]
    ((scorer, score, controls, n, why),) = tables["scores"].rows
    assert (scorer, score.value, n, why) == ("detection, e", 0.5, 10, "silent")
    assert math.isnan(score.low) and controls == {"random_explanation": pytest.approx(0.4)}


def test_a_unit_is_named_by_a_part_of_its_hook_or_refused(store):
    assert find_unit(store, "blocks.0:3") == (HOOK, 3)
    for text, told in (("blocks.0", "want HOOK:UNIT"), ("zzz:1", "known: "), (":1", "several")):
        with pytest.raises(RunError, match=told):
            find_unit(store, text)
