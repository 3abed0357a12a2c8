"""The audit of scorers: true explanations of planted units against false ones."""

import numpy as np
import pytest

from lmmono.errors import ExplainError
from lmmono.pipeline import train
from lmmono.recipe import Recipe
from lmmono.scores import audit, planted_units
from lmmono.scores.audit import audit_scorer
from lmmono.scores.planted_units import FALSE, LEVELS, broad, narrow, near_miss


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

    def guessed(store, name, metric, units, progress):
        return np.random.default_rng(0).random((len(units), 1 + len(FALSE)))

    monkeypatch.setattr(audit, "_scores", guessed)
    rows = audit_scorer("simulation_random", n_documents=40).rows
    means = [row["ranking"] for row in rows if row["kind"] == row["false"] == "all"]
    assert abs(np.mean(means) - 0.5) < 0.08
    near = [row["calibration"] for row in rows if row["kind"] == row["false"] == "all"]
    assert abs(np.mean(near)) < 0.1


def test_false_explanations_are_as_false_as_they_say():
    rng = np.random.default_rng(0)
    share, counts = np.repeat([1.0, 0.0], 50), np.ones(100)
    for make, said, right in (
        (near_miss, 51, 25),
        (broad, 100, 50),
        (narrow, 12, 12),
    ):
        made = make(share, counts, rng)
        assert abs((made > 0).sum() - said) <= 1 and (made[:50] > 0).sum() == right


RECIPE = """\
name: known
seed: 0
data: {corpus: {kind: planted, n_documents: 300}, tokenizer: {kind: words}, n_ctx: 32}
model: {arch: gpt2, n_layers: 1, d_model: 32, n_heads: 2}
train: {steps: 0, batch_tokens: 1024}
"""


def test_neurons_of_a_run_that_follow_a_feature_are_audited_too(tmp_path, monkeypatch):
    (tmp_path / "known.yaml").write_text(RECIPE)
    run = train(Recipe.load(tmp_path / "known.yaml", f"out={tmp_path / 'runs'}"))
    with pytest.raises(ExplainError, match="no neuron follows a feature; train it longer"):
        monkeypatch.setattr(planted_units, "MATCHED", 0.99)
        audit_scorer("simulation_random", run=run, max_tokens=2048)
    # even an untrained layer has neurons that happen to prefer the words of a feature
    monkeypatch.setattr(planted_units, "MATCHED", 0.25)
    rows = audit_scorer("simulation_random", run=run, max_tokens=4096).rows
    assert {row["level"] for row in rows} == {"trained"}
    (whole,) = [row for row in rows if row["kind"] == row["false"] == "all"]
    (random,) = [row for row in rows if row["kind"] == "all" and row["false"] == "random"]
    assert 5 < whole["n"] <= 128
    assert random["ranking"] > 0.75


def test_correlations_are_those_of_numpy():
    rng = np.random.default_rng(0)
    acts, truth = rng.random((50, 3)).astype(np.float32), rng.random((50, 2)) < 0.3
    acts[:, 1] = 2.0
    found = planted_units._correlations(acts, truth)
    for unit in (0, 2):
        for feature in range(2):
            wanted = np.corrcoef(acts[:, unit], truth[:, feature])[0, 1]
            assert found[unit, feature] == pytest.approx(wanted, abs=1e-5)
    assert found[1] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("name", ["token_selectivity", "llm_simulation", "intruder"])
def test_a_scorer_of_no_explanations_is_refused(name):
    with pytest.raises(ExplainError, match="did you mean|known: simulation_tar"):
        audit_scorer(name)
