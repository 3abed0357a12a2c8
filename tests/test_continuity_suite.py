"""The recipes of interventions and of continuity, run small: every row is there, none twice."""

from pathlib import Path

import pytest

import activation_store as astore
from lmmono.pipeline.stage_loop import run_stages
from lmmono.recipe import Recipe
from lmmono.reports.continuity_tables import continuity_tables
from lmmono.runs.folder import Run

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[1] / "recipes"
SMALL = (
    *("data.corpus.n_documents=300", "data.n_ctx=32", "model.n_layers=2", "model.d_model=16"),
    *("model.n_heads=2", "train.steps=6", "train.batch_tokens=256", "train.warmup_steps=2"),
    *("train.eval_tokens=512", "capture.max_tokens=1024", "robustness.seeds=1"),
    *("robustness.n_train=24", "robustness.n_val=12", "robustness.n_attacked=1"),
    "robustness.fine_tuning.epochs=1",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The recipe `continuity` in seconds: one task, three ways to tune."""
    sets = (
        "robustness.fine_tuning.objective_sets={plain: [], continuity: [{kind: continuity, "
        "perturbations: [word_drop]}], vat: [{kind: vat}]}"
    )
    own = (
        *("arm=trained", "robustness.tasks=[planted_polarity]"),
        "robustness.continuity.n_texts=8",
        "robustness.continuity.noises=[word_drop, word_shuffle]",
    )
    out = f"out={tmp_path_factory.mktemp('continuity_suite')}"
    recipe = Recipe.load(RECIPES / "continuity.yaml", *SMALL, sets, *own, out)
    return run_stages(Run.create(recipe))


def rows_of(run):
    with astore.open(run.store_path) as store:
        return (
            store.sql("SELECT * FROM robustness WHERE suite = 'continuity' ORDER BY ALL")
            .to_arrow_table()
            .to_pylist()
        )


def test_every_way_to_tune_has_every_row_of_the_battery_once(run):
    rows = rows_of(run)
    assert not [row["failure"] for row in rows if row["failure"]]
    keys = [
        tuple(row[name] for name in ("feature", "metric", "corruption", "level", "split"))
        for row in rows
    ]
    assert len(set(keys)) == len(keys)
    by_feature = {
        name: {key[1:] for key in keys if key[0] == f"tuned-full+{name}"}
        for name in ("plain", "continuity", "vat")
    }
    assert by_feature["continuity"] == by_feature["vat"]
    # what was found against the first model is tried on the others alone
    more = by_feature["vat"] - by_feature["plain"]
    assert {metric for metric, *_ in more} == {"transfer_accuracy"}
    metrics = {metric for metric, *_ in by_feature["plain"]}
    assert metrics == {
        *("accuracy", "attacked_accuracy", "confidence", "consistency", "continuity_distance"),
        *("flip_rate", "gradient_change", "gradient_norm", "meaning_ratio"),
        *("saliency_overlap", "saliency_spearman"),
    }
    splits = {key[3] for key in by_feature["plain"]}
    assert {"test", "ood:shifted", "ood:cue_random", "ood:cue_reversed"} == splits


def test_noise_that_tuning_met_is_told_from_noise_held_out(run):
    with astore.open(run.store_path) as store:
        seen = store.sql(
            """SELECT DISTINCT corruption, settings->>'seen' FROM robustness
               WHERE feature = 'tuned-full+continuity' AND metric = 'flip_rate'
                 AND corruption LIKE 'word%'"""
        ).fetchall()
        (table,) = continuity_tables(store)
    assert dict(seen) == {"word_drop": "true", "word_shuffle": "false"}
    assert table.columns == (
        "measure",
        *(f"tuned-full+{n}" for n in ("continuity", "plain", "vat")),
    )


def test_an_arm_of_the_intervention_runs_small(tmp_path):
    own = (
        *("arm=decorrelated", "seed=0", f"out={tmp_path}", "robustness.n_test=20"),
        *("robustness.n_noised=12", "robustness.shots=[4]", "robustness.margins=[1.0]"),
        *("robustness.severities=[2]", "robustness.fine_tuning.margins=[1.0]"),
        *("robustness.input_noise=[word_drop]", "robustness.resamples=1"),
    )
    run = run_stages(Run.create(Recipe.load(RECIPES / "intervention.yaml", *SMALL, *own)))
    names = {row["metric"] for row in run.metrics.to_pylist()}
    assert {"objective/decorrelation", "objective/decorrelation/feature_decorrelation"} <= names
    with astore.open(run.store_path) as store:
        tuned = store.sql(
            "SELECT DISTINCT feature FROM robustness WHERE suite = 'fine_tuning' "
            "AND feature LIKE 'tuned%' AND failure IS NULL ORDER BY feature"
        ).fetchall()
    assert [name for (name,) in tuned] == [f"tuned-full+{n}" for n in ("down", "plain", "up")]
