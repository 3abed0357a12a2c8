"""Suite `flint` from a recipe: rows, files, pictures, and going on where it stopped."""

import json
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML
from test_cli import call

import activation_store as astore
from lmmono.methods.flint_measures import matched_on_halves
from lmmono.methods.flint_planted import word_attributes
from lmmono.registry.metrics import METRICS
from lmmono.reports.robustness_tables import suite_tables
from lmmono.runs.folder import open_run

RECIPE = Path(__file__).parents[1] / "recipes" / "flint.yaml"
SMALL = {
    "data": {"corpus": {"kind": "planted", "n_documents": 200}, "n_ctx": 32},
    "model": {"arch": "gpt2", "n_layers": 2, "d_model": 16, "n_heads": 2},
    "train": {"steps": 4, "batch_tokens": 256, "warmup_steps": 2, "eval_tokens": 512},
    "capture": {"hooks": ["blocks.0.mlp.hook_post"], "max_tokens": 512, "max_density": 1.0},
}
FEW = {
    "tasks": ["planted_polarity"],
    "hook": "blocks.0.hook_resid_post",
    "seeds": 2,
    "n_train": 64,
    "n_val": 20,
    "n_test": 40,
}
FLINT = {
    "interpreter": {"n_attributes": 6, "d_hidden": 16, "min_documents": 1, "lr": 1e-2},
    "ablations": ["l1_only"],
    "floors": ["shuffled_labels", "untrained_model"],
    "baselines": ["topics", "lime"],
    "epochs": 1,
    "steps": None,
    "batch_texts": 16,
    "lr": 1e-2,
    "n_explained": 3,
    "n_lime": 2,
    "maximise": 1,
}
IN_ACTS = ("unit_stats", "explanations", "scores")
ROWS = "SELECT * EXCLUDE (created_at, seconds) FROM robustness ORDER BY ALL"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the shipped recipe, made small."""
    folder, yaml = tmp_path_factory.mktemp("flint"), YAML()
    recipe = yaml.load(RECIPE)
    recipe.update(SMALL)
    recipe["robustness"].update(FEW)
    recipe["robustness"]["flint"] = FLINT
    (folder / "recipes").mkdir()
    yaml.dump(recipe, folder / "recipes" / RECIPE.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for verb in ("train", "capture", "robustness"):
            assert call(verb, f"recipes/{RECIPE.name}") == 0
        return open_run(folder / "runs/flint")


def test_every_entrant_has_its_rows_at_every_seed(run):
    with astore.open(run.store_path) as store:
        rows = store.sql(ROWS).df()
    assert set(rows.suite) == {"flint"} and set(rows.metric) <= set(METRICS)
    assert set(rows.feature) == {
        *("black_box", "flint_by_design", "flint_post_hoc", "l1_only", "topics", "lime"),
        *("flint_shuffled_labels", "flint_untrained_model"),
    }
    accuracy = rows[rows.metric == "accuracy"].groupby(["feature", "probe"]).size()
    assert set(accuracy) == {2}
    assert ("flint_by_design", "classifier") in accuracy and ("black_box", "classifier") in accuracy
    assert ("flint_post_hoc", "classifier") not in accuracy, "it is the black box"
    for metric in ("fidelity", "conciseness_3", "mcc", "mcc_untrained", "attribute_flips"):
        assert len(rows[(rows.metric == metric) & (rows.feature == "flint_post_hoc")]) == 2, metric
    stability = rows[rows.metric == "attribute_stability"]
    assert {"flint_by_design", "flint_post_hoc", "l1_only"} <= set(stability.feature)
    shares = rows[rows.metric == "fidelity"].dropna(subset="value")
    assert ((shares.ci_low <= shares.value) & (shares.value <= shares.ci_high)).all()


def test_the_report_has_a_table_of_each_task(run):
    (table,) = (t for t in suite_tables(run) if t.title.startswith("Interpreters"))
    assert "planted_polarity" in table.title
    by_name = {row[:2]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert table.rows[0][0] == "black_box" and len(by_name) == 12
    ours = by_name["flint_by_design", "classifier"]["accuracy - black box"]
    values = [
        by_name[name, "classifier"]["accuracy"].value for name in ("flint_by_design", "black_box")
    ]
    assert ours.value == pytest.approx(values[0] - values[1])


def test_the_first_seed_leaves_pictures_acts_and_the_matrix(run):
    (picture,) = run.dir.glob("flint/planted_polarity/flint_by_design/0-*/pictures.json")
    told = json.loads(picture.read_text())
    assert told["classes"] == ["blame", "praise"] and len(told["attributes"]) == 6
    with astore.open(picture.with_name("store.duckdb")) as acts:
        n = [acts.sql(f"SELECT count(*) FROM {name}").fetchone()[0] for name in IN_ACTS]
    assert n == [6, 6, 12]
    with astore.open(run.store_path) as store:
        query = "SELECT preset, count(*) FROM all_scores WHERE metric = 'attribute_relevance'"
        found = dict(store.sql(f"{query} AND dictionary = 'flint_by_design' GROUP BY 1").fetchall())
    assert found == {"blame": 6, "praise": 6}


def test_what_is_done_is_not_done_again_when_a_baseline_is_added(run, monkeypatch):
    with astore.open(run.store_path) as store:
        before = store.sql(ROWS).fetchall()
    monkeypatch.chdir(run.dir.parents[1])
    more = "robustness.flint.baselines=[topics,lime,linear_probe]"
    assert call("robustness", "recipes/flint.yaml", more) == 0
    with astore.open(run.store_path) as store:
        kept = [row for row in store.sql(ROWS).fetchall() if row[2] != "linear_probe"]
    assert kept == before, "the same bits: nothing was computed again"


def test_planted_attributes_are_those_that_words_decide():
    names, of_word = word_attributes("planted_topic")
    assert len(names) == len(set(names)) > 3 and not any(of_word["the"])
    assert {sum(has) for has in of_word.values()} == {0, 1}
    assert word_attributes("planted_polarity")[0] == ("positive", "negative", "negator")


def test_a_match_is_chosen_on_one_half_and_measured_on_the_other():
    random = np.random.default_rng(0)
    truth = random.random((80, 3))
    ours = np.concatenate([-truth[:, [2, 0, 1]], random.random((80, 20))], axis=1)
    assert matched_on_halves(ours, truth) == pytest.approx(1.0)
    assert abs(matched_on_halves(random.random((80, 23)), truth)) < 0.5
    assert matched_on_halves(np.zeros((80, 2)), truth) == 0.0
