"""The audit of scorers: true explanations of planted units against false ones."""

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score, roc_auc_score

from lmmono.errors import ExplainError
from lmmono.pipeline import train
from lmmono.recipe import Recipe
from lmmono.scores import audit, planted_units
from lmmono.scores.audit import audit_scorer
from lmmono.scores.planted_units import (
    CRITERIA,
    FALSE,
    LEVELS,
    broad,
    feature_areas,
    information_shares,
    narrow,
    near_miss,
)


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
        monkeypatch.setattr(planted_units, "CRITERIA", dict.fromkeys(CRITERIA, ("trained", 1.01)))
        audit_scorer("simulation_random", run=run, max_tokens=2048)
    # even an untrained layer has neurons that happen to prefer the words of a feature
    low = {"mutual_information": ("trained", 0.05), "auroc": ("by AUROC", 0.8)}
    monkeypatch.setattr(planted_units, "CRITERIA", low)
    rows = audit_scorer("simulation_random", run=run, max_tokens=4096).rows
    assert {row["level"] for row in rows} == {"trained", "by AUROC"}
    whole = [row for row in rows if row["kind"] == row["false"] == "all"]
    random = [row for row in rows if row["kind"] == "all" and row["false"] == "random"]
    assert all(3 < row["n"] <= 128 for row in whole)
    assert all(row["ranking"] > 0.6 for row in random)


def test_information_and_areas_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    acts = np.where(rng.random((400, 3)) < 0.5, rng.random((400, 3)), 0).astype(np.float32)
    acts[:, 1] = 2.0
    truth = rng.random((400, 2)) < 0.2 + 0.6 * acts[:, :1]
    areas, shares = feature_areas(acts, truth), information_shares(acts, truth)
    for unit in (0, 2):
        fires = acts[:, unit] > 0
        edges = np.quantile(acts[fires, unit], np.linspace(0, 1, 10)[1:-1])
        levels = np.where(fires, 1 + np.searchsorted(edges, acts[:, unit], side="right"), 0)
        for feature in range(2):
            is_true = truth[:, feature]
            assert areas[unit, feature] == pytest.approx(roc_auc_score(is_true, acts[:, unit]))
            entropy = mutual_info_score(is_true, is_true)
            wanted = mutual_info_score(levels, is_true) / entropy
            assert shares[unit, feature] == pytest.approx(wanted)
    assert areas[1] == pytest.approx(0.5) and shares[1] == pytest.approx(0.0)


@pytest.mark.parametrize("name", ["token_selectivity", "llm_simulation", "intruder"])
def test_a_scorer_of_no_explanations_is_refused(name):
    with pytest.raises(ExplainError, match="did you mean|known: simulation_tar"):
        audit_scorer(name)
