"""Explainers: what they say of units whose meaning is known, and how it is kept."""

import json

import numpy as np
import pytest
from explained_store import (
    CAT,
    D_VOCAB,
    DENSE,
    HOOK,
    NOISE,
    ON_CAT,
    ON_PAIR,
    OTHER,
    PAIR_FIRST,
    PAIR_THEN,
    SILENT,
    TWO_DOCUMENTS,
    planted_store,
)
from scipy.stats import pearsonr

import activation_store as astore
import lmmono as lm
from lmmono.errors import ExplainError
from lmmono.explanations.contexts import Context
from lmmono.explanations.explanation import PROGRAMS, program_from_json
from lmmono.explanations.explanation_controls import NEAREST, Constant, other_units
from lmmono.explanations.stored_explanations import read_explanations
from lmmono.explanations.token_lookup import Lookup, shrink

PROGRAM_EXPLAINERS = ("token_lookup", "context_rules", "context_boosted", "constant")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_store(tmp_path_factory.mktemp("explainers") / "run")


@pytest.fixture(scope="module")
def explained(planted):
    with astore.open(planted.path, mode="a") as store:
        yield {name: lm.explain(store, HOOK, explainer=name) for name in PROGRAM_EXPLAINERS}


def correlation(planted, program, unit):
    """Pearson of a unit and its program over the score split, a row as one excerpt."""
    mine = planted.rows("score")
    predicted = program.simulate(planted.token_ids[mine])
    return pearsonr(predicted.reshape(-1), planted.acts[mine, :, unit].reshape(-1))[0]


def test_a_unit_of_one_token_is_explained_by_that_token(planted, explained):
    for name in ("token_lookup", "context_rules", "context_boosted"):
        found = explained[name].of(HOOK)[ON_CAT]
        assert correlation(planted, found.program, ON_CAT) > 0.999, name
    assert explained["token_lookup"].of(HOOK)[ON_CAT].text == f"tokens ' w{CAT}'"
    rules = explained["context_rules"].of(HOOK)[ON_CAT]
    assert rules.text.startswith(f"' w{CAT}'")


def test_a_unit_of_a_pair_needs_the_token_before(planted, explained):
    lookup = explained["token_lookup"].of(HOOK)[ON_PAIR]
    rules = explained["context_rules"].of(HOOK)[ON_PAIR]
    boosted = explained["context_boosted"].of(HOOK)[ON_PAIR]
    by_token = correlation(planted, lookup.program, ON_PAIR)
    assert 0.3 < by_token < 0.8
    assert correlation(planted, rules.program, ON_PAIR) > 0.98
    assert correlation(planted, boosted.program, ON_PAIR) > by_token + 0.1
    assert f"' w{PAIR_THEN}' after ' w{PAIR_FIRST}'" in rules.text


def test_rules_end_at_their_limits_and_report_their_size(planted, explained):
    for found in explained["context_rules"].of(HOOK).values():
        if found.program is not None:
            sizes = [len(table.keys) for table in found.program.tables]
            assert len(sizes) <= 8
            assert max(sizes, default=0) <= 12
            assert found.complexity == sum(sizes)
    noise = explained["context_rules"].of(HOOK)[NOISE]
    assert abs(correlation(planted, noise.program, NOISE)) < 0.2, "noise has no meaning to find"
    with astore.open(planted.path, mode="a") as store:
        tight = lm.explain(store, HOOK, explainer="context_rules", max_rules=1, max_terms=1)
        on_pair = tight.of(HOOK)[ON_PAIR]
    assert tight.explainer == "context_rules:max_rules=1,max_terms=1"
    assert on_pair.complexity == 1
    assert correlation(planted, on_pair.program, ON_PAIR) > 0.98


def test_silence_and_rare_units_are_failures_of_their_own_type(explained):
    for name, handle in explained.items():
        found = handle.of(HOOK)
        assert found[SILENT].failure == "silent"
        assert found[TWO_DOCUMENTS].failure == "too_few_records"
        assert found[SILENT].text is None and found[SILENT].program is None
        assert handle.failures == {"silent": 1, "too_few_records": 1}
        assert handle.n_explained == 4
        said = "4 units of 1 hooks explained, failed: 1 silent, 1 too_few_records"
        assert f"{name}: {said}" in repr(handle)


def test_explanations_stand_when_documents_are_added_and_are_counted_as_outdated(tmp_path):
    planted = planted_store(tmp_path / "run", n_rows=10)
    mine = planted.rows("explain")
    with astore.open(planted.path, mode="a") as store:
        made = lm.explain(store, HOOK, units=[ON_CAT, DENSE])
        assert (made.n_found, made.n_outdated) == (0, 0)
        query = "SELECT DISTINCT n_tokens FROM explanations"
        assert store.sql(query).fetchall() == [(planted.token_ids[mine].size,)]
        again = lm.explain(store, HOOK, units=[ON_CAT, DENSE])
        assert (again.n_found, again.n_outdated) == (2, 0)
        rows = [astore.Rows(hook, 6, max_density=1.0) for hook in (HOOK, OTHER)]
        with store.writer(rows=rows, n_ctx=planted.token_ids.shape[1]) as writer:
            new = np.arange(2) + len(planted.token_ids)
            acts = {hook: planted.acts[:2] for hook in (HOOK, OTHER)}
            writer.add(new, planted.token_ids[:2], planted.doc_ids[:2], "explain", acts)
        later = lm.explain(store, HOOK, units=[ON_CAT, DENSE, NOISE])
        assert (later.n_found, later.n_outdated) == (2, 2)
        assert "2 were stored already, 2 from other documents than now" in repr(later)
        assert lm.explain(store, HOOK, units=[ON_CAT, DENSE], overwrite=True).n_outdated == 0
        assert lm.explain(store, HOOK, units=[ON_CAT, DENSE]).n_outdated == 0


def test_programs_come_back_from_json_as_they_were(planted, explained):
    ids = planted.token_ids[planted.rows("score")]
    kinds = set()
    for handle in explained.values():
        for found in handle.of(HOOK).values():
            if found.program is None:
                continue
            kinds.add(found.program.kind)
            values = json.loads(json.dumps(found.program.to_json()))
            again = program_from_json({"kind": found.program.kind, **values})
            assert (again.simulate(ids) == found.program.simulate(ids)).all()
    assert kinds == {"token_lookup", "context", "constant"} <= set(PROGRAMS)
    with pytest.raises(ExplainError, match="did you mean constant"):
        program_from_json({"kind": "constnat"})
    tables = {"constant": 0.5, "tables": [], "classes": "AAAA"}
    for damaged in (
        {"kind": "constant"},
        {"kind": "constant", "act": "high"},
        {"kind": "token_lookup", "tokens": [1], "acts": None, "otherwise": None},
        {"kind": "context", **tables},
    ):
        with pytest.raises(ExplainError, match=r"damaged .*overwrite=True"):
            program_from_json(damaged)


def test_programs_predict_nothing_on_padding():
    ids = np.array([[1, 2, -1]])
    one = np.array([1])
    for program in (
        Lookup(one, np.array([2.0]), 0.5),
        Lookup(one[:0], np.zeros(0), 0.5),
        Constant(0.5),
        Context(0.5, ()),
    ):
        predicted = program.simulate(ids)
        assert predicted[0, 2] == 0
        assert predicted[0, 1] == 0.5


def test_shrinkage_is_the_posterior_mean_of_random_effects():
    rng = np.random.default_rng(0)
    effects, n = rng.normal(1.0, 2.0, 400), rng.integers(1, 6, 400)
    group = np.repeat(np.arange(400), n)
    values = effects[group] + rng.normal(0.0, 3.0, len(group))
    sums = np.bincount(group, values)
    found = shrink(n.astype(float), sums, float((values**2).sum()))
    assert found.within == pytest.approx(9.0, rel=0.15)
    assert found.between == pytest.approx(4.0, rel=0.35)
    weight = n / (n + found.within / found.between)
    by_hand = found.mean + weight * (sums / n - found.mean)
    assert found.shrunk == pytest.approx(by_hand)
    plain = np.square(sums / n - effects).mean()
    assert np.square(found.shrunk - effects).mean() < 0.7 * plain, "nearer to the truth"


def test_groups_that_do_not_differ_are_drawn_all_the_way():
    values = np.array([0.0, 2.0, 2.0, 0.0])
    found = shrink(np.array([2.0, 2.0]), np.array([2.0, 2.0]), float((values**2).sum()))
    assert found.between == 0
    assert (found.shrunk == 1.0).all()


def test_what_is_explained_is_left_alone_unless_asked(planted):
    with astore.open(planted.path, mode="a") as store:
        first = lm.explain(store, OTHER, units=[DENSE, 0])
        more = lm.explain(store, OTHER, units=[0, 1, DENSE])
        assert (first.n_found, more.n_found) == (0, 2)
        query = "SELECT created_at FROM explanations WHERE hook = $hook AND unit = 0"
        before = store.sql(query, hook=OTHER).fetchall()
        lm.explain(store, OTHER, units=[0], overwrite=True)
        after = store.sql(query, hook=OTHER).fetchall()
    assert len(after) == len(before)
    assert max(after) > max(before)


def test_settings_and_presets_are_part_of_the_name(planted):
    with astore.open(planted.path, mode="a") as store:
        small = lm.explain(store, HOOK, counts=lm.records.Counts(top=5), units=[ON_CAT])
        paper = lm.explain(store, HOOK, preset="openai", units=[ON_CAT])
        leaky = lm.explain(store, HOOK, preset="openai_crate", units=[ON_CAT])
        rows = store.sql("SELECT explainer, n_records, split FROM explanations").fetchall()
    assert small.explainer == "token_lookup:random=0,top=5"
    assert (small.explainer, 5, "explain") in rows
    assert (paper.explainer, 5, "explain") in rows
    assert (leaky.explainer, 5, "score") in rows, "explains on the documents that score"


def test_other_units_are_others_and_near_in_density_where_asked():
    units = list(range(200))
    densities = {unit: 0.001 * (unit + 1) for unit in units}
    drawn = other_units(units, units, HOOK, 0)
    assert all(a != b for a, b in zip(units, drawn, strict=True))
    assert len(set(drawn)) > 100
    assert drawn == other_units(units, units, HOOK, 0)
    assert drawn != other_units(units, units, HOOK, 1)
    assert drawn[5:9] == other_units([5, 6, 7, 8], units, HOOK, 0), "whoever else is asked for"
    near = other_units(units, units, HOOK, 0, densities)
    assert max(abs(a - b) for a, b in zip(units[20:-20], near[20:-20], strict=True)) < NEAREST
    with pytest.raises(ExplainError, match="1 explained units; .* need two or more"):
        other_units([1], [1], HOOK, 0)


def test_a_random_explanation_is_that_of_another_unit(planted, explained):
    with astore.open(planted.path, mode="a") as store:
        handle = lm.explain(store, HOOK, explainer="random_explanation")
        own, taken = read_explanations(store, HOOK, "token_lookup", 0), handle.of(HOOK)
    for unit, found in taken.items():
        givers = [u for u, other in own.items() if other.text == found.text]
        assert givers and unit not in givers


def test_a_sample_is_drawn_per_hook_by_seed():
    sample = lm.records.sample(8, seed=0)
    assert sample.draw(HOOK, 64) == sorted(set(sample.draw(HOOK, 64)))
    assert sample.draw(HOOK, 64) != sample.draw(OTHER, 64)
    assert sample.draw(HOOK, 64) != lm.records.sample(8, seed=1).draw(HOOK, 64)
    assert sample.draw(HOOK, 5) == [0, 1, 2, 3, 4]


def test_what_cannot_be_explained_says_why(planted):
    with astore.open(planted.path, mode="a") as store:
        for faulty, said in (
            ({"explainer": "token_lokup"}, "did you mean token_lookup"),
            ({"hooks": "blocks.9.*"}, "no hook 'blocks.9.\\*' stored as rows"),
            ({"units": [D_VOCAB]}, "want units 0 to 5"),
            ({"max_rules": 3}, "token_lookup: no setting 'max_rules'; it has none"),
            ({"explainer": "context_rules", "max_rule": 3}, "did you mean max_rules"),
            (
                {"preset": "openai", "counts": lm.records.Counts(top=3)},
                "'openai' says which records",
            ),
        ):
            with pytest.raises(ExplainError, match=said):
                lm.explain(store, **faulty)
        with pytest.raises(ExplainError, match="have seeds 0, not 3|no explanations"):
            read_explanations(store, HOOK, "nobody", 3)
