"""The court: units of exact density, lies as false as they say, verdicts by hand."""

import json

import numpy as np
import pytest
from explained_store import HOOK, planted_store

import activation_store as astore
import lmmono as lm
from lmmono.registry.least_densities import COURT
from lmmono.scores.court import (
    DENSITIES,
    FALSE_KINDS,
    CourtVerdict,
    hold_court,
    hook_of,
    write_court,
)


@pytest.fixture(scope="module")
def court(tmp_path_factory):
    path = tmp_path_factory.mktemp("court") / "store"
    with astore.open(path, mode="w") as store:
        units = write_court(store, densities=(1e-3, 1e-1), n_units=8, n_tokens=60_000)
        yield store, units


def test_units_fire_as_often_as_the_court_says(court):
    store, _ = court
    for density in (1e-3, 1e-1):
        query = "SELECT avg(density) FROM unit_stats WHERE hook = $hook"
        for noise in ("exact", "noisy"):
            ((found,),) = store.sql(query, hook=hook_of(density, noise)).fetchall()
            assert found == pytest.approx(density, rel=0.15)


def test_false_explanations_keep_and_add_what_their_kind_says(court):
    store, _ = court
    query = """SELECT t.token_id, count(*) FROM token_ids t GROUP BY 1"""
    counts = np.zeros(20_000)
    for token, n in store.sql(query).fetchall():
        counts[token] = n
    said = {}
    for kind in ("true", *FALSE_KINDS):
        rows = store.sql(
            "SELECT program->>'tokens' FROM explanations WHERE hook = $hook AND explainer = $name "
            "ORDER BY unit",
            hook=hook_of(0.1, "exact"), name=f"court_{kind}",
        ).fetchall()  # fmt: skip
        said[kind] = [set(map(int, tokens.strip("[]").split(","))) for (tokens,) in rows]
    for kind, (kept, added) in FALSE_KINDS.items():
        if kind != "random":
            for true, false in zip(said["true"], said[kind], strict=True):
                mass = counts[list(true)].sum()
                assert counts[list(true & false)].sum() / mass == pytest.approx(kept, abs=0.1)
                assert counts[list(false - true)].sum() / mass == pytest.approx(added, abs=0.2)
    assert said["random"][1] == said["true"][0]


def test_the_population_knows_every_truth_and_few_random_records_do_not(court):
    store, units = court
    (population,) = hold_court(store, units, "population")
    assert population.passed("exact") == population.passed("noisy") == (1e-3, 1e-1)
    assert population.least_density() == 1e-3
    (few,) = hold_court(store, units, "simulation_random", settings={"random": 5})
    assert 1e-3 not in few.passed("exact")
    tied = [row for row in few.rows if row["density"] == 1e-3 and row["noise"] == "exact"]
    assert all(0.2 < row["ranking"] < 0.95 for row in tied)


def test_the_least_density_is_where_the_run_of_passed_densities_ends():
    def verdict(*rankings):
        pairs = zip(DENSITIES, rankings, strict=True)
        return CourtVerdict(
            "m", tuple({"noise": "exact", "density": d, "ranking": r} for d, r in pairs)
        )

    assert verdict(0.5, 0.96, 0.5, 0.95, 1.0, 0.97).least_density() == 3e-3
    assert verdict(0.5, 0.5, 0.96, 0.95, 1.0, 0.5).least_density() == 1e-3  # dense units fail
    assert verdict(*[0.9] * 6).least_density() is None


def test_units_rarer_than_the_least_density_are_flagged_and_count_in_no_mean(tmp_path, monkeypatch):
    """Units 0 and 1 fire on 2 to 3 % of the tokens; the silent one is undefined, not rare."""
    planted = planted_store(tmp_path / "run")
    monkeypatch.setitem(COURT, "simulation_tar", {"exact": 0.03, "noisy": None})
    with astore.open(planted.path, mode="a") as store:
        lm.explain(store, HOOK)
        scores = lm.score(store, HOOK, controls=False)
        query = "SELECT unit, is_below FROM scores WHERE metric = 'simulation_tar'"
        assert dict(store.sql(query).fetchall()) == {unit: unit < 2 for unit in range(6)}
        query = (
            "SELECT n, details FROM hook_scores WHERE metric = 'simulation_tar' AND hook = $hook"
        )
        ((n, details),) = store.sql(query, hook=HOOK).fetchall()
        assert n == 4 and json.loads(details)["n_below"] == 2
        assert "33.3% too rare for it left out" in repr(scores)
        found = lm.compare(store, store, hooks=HOOK)
        assert found.below == (pytest.approx(1 / 3),) * 2
        assert "left out: 33% and 33% of the units" in repr(found)
        assert lm.compare(store, store, hooks=HOOK, rare=True).below == (0.0, 0.0)
