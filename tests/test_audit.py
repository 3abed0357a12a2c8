"""The audit of scorers: true explanations of planted units against false ones."""

import numpy as np
import pytest

from lmmono.errors import ExplainError
from lmmono.scoring import audit
from lmmono.scoring.audit import FALSE, LEVELS, audit_scorer


@pytest.fixture(scope="module")
def simulated():
    return audit_scorer("simulation_random", n_documents=120)


def test_simulation_ranks_true_explanations_above_false_ones(simulated):
    whole = [row for row in simulated.rows if row["kind"] == row["false"] == "all"]
    assert [row["level"] for row in whole] == list(LEVELS)
    assert simulated.metric == "simulation_random"
    for row in whole:
        assert 0.5 < row["ci_low"] <= row["ranking"] <= row["ci_high"]
        assert row["calibration"] > 0.5


def test_every_level_and_kind_of_feature_has_a_row_per_false_explanation(simulated):
    kinds = {row["kind"] for row in simulated.rows}
    assert {"all", "word_class", "number"} <= kinds
    keys = {(row["level"], row["kind"], row["false"]) for row in simulated.rows}
    assert len(keys) == len(simulated.rows) == len(LEVELS) * len(kinds) * (1 + len(FALSE))


def test_a_scorer_that_guesses_ranks_by_chance(monkeypatch):
    """Scores drawn at random win half of the time, whatever they are of."""

    def guessed(store, name, metric, d, progress):
        return np.random.default_rng(0).random((len(LEVELS), d, 1 + len(FALSE)))

    monkeypatch.setattr(audit, "_scores", guessed)
    rows = audit_scorer("simulation_random", n_documents=120).rows
    means = [row["ranking"] for row in rows if row["kind"] == row["false"] == "all"]
    assert abs(np.mean(means) - 0.5) < 0.08
    near = [row["calibration"] for row in rows if row["kind"] == row["false"] == "all"]
    assert abs(np.mean(near)) < 0.1


def test_false_explanations_are_as_false_as_they_say():
    rng = np.random.default_rng(0)
    share, counts = np.repeat([1.0, 0.0], 50), np.ones(100)
    for make, said, right in (
        (audit._near_miss, 51, 25),
        (audit._broad, 100, 50),
        (audit._narrow, 12, 12),
    ):
        made = make(share, counts, rng)
        assert abs((made > 0).sum() - said) <= 1 and (made[:50] > 0).sum() == right


@pytest.mark.parametrize("name", ["token_selectivity", "llm_simulation", "intruder"])
def test_a_scorer_of_no_explanations_is_refused(name):
    with pytest.raises(ExplainError, match="did you mean|known: simulation_tar"):
        audit_scorer(name)
