"""Comparing the arms of a study: means over training seeds, and twins."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_cli import TINY, call

import activation_store as astore
import lmmono as lm
from lmmono.errors import ExplainError, RunError
from lmmono.reports.seed_means import over_seeds
from lmmono.reports.study_tables import (
    _score_table,
    are_twins,
    study_tables,
    variance_tables,
)
from lmmono.runs.folder import Run, find_runs, open_run

STUDY = TINY.replace("seed: 0", "seeds: [0, 1]").replace("steps: 12", "steps: 4") + (
    "explain: {explainers: [token_lookup], units: 4, window: 32}\n"
    "score: {scorers: [simulation_random], controls: false}\n"
)
ASKED = {"scorer": "simulation_random", "explainer": "token_lookup:window=32"}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    text = STUDY.replace("capture: {", "capture: {splits: [explain, score], ")
    (folder / "tiny.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call("run", "tiny.yaml") == 0
    return folder / "runs" / "tiny"


def test_arms_are_means_over_seeds_and_twins_differ_in_the_architecture_alone(study):
    runs = [open_run(path) for path in find_runs(study)]
    tables = {table.title: table for table in study_tables([study])}
    arms = {row[0]: row for row in tables["Arms"].rows}
    assert set(arms) == {"crate", "gpt2"}
    mine = [run for run in runs if run.recipe.arm == "gpt2"]
    assert arms["gpt2"][4] == over_seeds(np.array([run.val_loss for run in mine]))

    stores = {
        arm: [astore.open(run.store_path) for run in runs if run.recipe.arm == arm] for arm in arms
    }
    asked = """SELECT value, nan_fraction FROM all_scores WHERE metric = 'simulation_random'
        AND hook = 'blocks.*.mlp.hook_post' AND control IS NULL"""
    values = [store.sql(asked).fetchall()[0] for store in stores["crate"]]
    scores = tables["simulation_random of token_lookup:window=32, neurons"]
    (row,) = [row for row in scores.rows if row[0] == "crate"]
    assert row[1] == f"{np.mean([undefined for _, undefined in values]):.1%}"
    assert row[2] == over_seeds([value for value, _ in values], "simulation_random")
    assert scores.columns == ("arm", "undefined", "score", "defined")

    twins = tables["Twins"].rows
    assert [row[:3] for row in twins] == [("crate - gpt2", "neurons", "simulation_random")]
    found = lm.compare(stores["crate"], stores["gpt2"], seed=[0, 1], **ASKED)
    assert twins[0][4].startswith(f"{found.raw.difference:+.3f} [{found.raw.ci_low:+.3f}")
    with pytest.raises(ExplainError, match="want one seed or one for each of 2 pairs, got 3"):
        lm.compare(stores["crate"], stores["gpt2"], seed=[0, 1, 2], **ASKED)


def test_controls_stand_beside_the_score_they_belong_to():
    key = ("simulation_random", "token_lookup", "neurons")
    one = {"shuffled_pairing": (0.0, 0.5), "defined": (0.4, 0.0), "": (0.2, 0.5)}
    other = {"shuffled_pairing": (0.1, 0.3), "defined": (0.6, 0.0), "": (0.4, 0.3)}
    table = _score_table(key, {"crate": [{key: one}, {key: other}], "gpt2": [{}]})
    assert table.columns == ("arm", "undefined", "score", "defined", "shuffled_pairing")
    (row,) = table.rows
    assert row[:2] == ("crate", "40.0%")
    assert [str(cell).split()[0] for cell in row[2:]] == ["0.3", "0.5", "0.05"]


def test_the_interval_over_seeds_is_students():
    values = np.array([0.1, 0.2, 0.6])
    low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    assert str(over_seeds(values)) == f"0.3 [{low:.3g}, {high:.3g}]"
    assert str(over_seeds(values[:1])) == "0.1"
    assert over_seeds(values[:0]) is None


def test_other_settings_make_no_twins(study):
    runs = {(r.recipe.arm, r.recipe.seed): r for r in map(open_run, find_runs(study))}
    crate, gpt2 = ([runs[arm, seed] for seed in (0, 1)] for arm in ("crate", "gpt2"))
    assert are_twins(crate, gpt2)
    assert not are_twins(crate, crate)
    assert not are_twins(crate, gpt2[:1])
    untrained = crate[0].recipe.train.model_copy(update={"steps": 0})
    recipes = [run.recipe.model_copy(update={"train": untrained}) for run in crate]
    other = [Run(run.dir, recipe, run.manifest) for run, recipe in zip(crate, recipes, strict=True)]
    assert not are_twins(other, gpt2)


def test_the_verb_prints_the_tables_and_names_what_is_not_scored(study, capsys, tmp_path):
    assert call("compare", study, "--wide") == 0
    printed = capsys.readouterr().out
    assert "Arms" in printed and "Twins" in printed and "crate - gpt2" in printed
    runs = [open_run(path) for path in find_runs(study) if "seed1" in path.name]
    runs += [open_run(path) for path in find_runs(study) if "crate-seed0" in path.name]
    for run, n_left_out in zip((runs[0], runs[-1]), (2, 4), strict=True):
        record = run.manifest.stages["score"].model_copy(update={"state": "begun"})
        stages = {**run.manifest.stages, "score": record}
        run.manifest.model_copy(update={"stages": stages}).write(run.dir)
        if n_left_out == 2:  # the other seed is whole
            (table, *_) = study_tables([study])
            assert "2 runs are left out" in table.note
            assert [row[1] for row in table.rows] == ["1", "1"]
    with pytest.raises(RunError, match="not scored yet; run `lmmono score"):
        study_tables([study])
    assert call("compare", study) == 2
    assert call("compare", tmp_path) == 2


def test_the_variance_of_runs_that_are_not_captured_is_refused_with_the_way_out(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(STUDY)
    for recipe in lm.Recipe.load(tmp_path / "tiny.yaml", f"out={tmp_path / 'runs'}").runs():
        Run.create(recipe)
    assert call("variance", tmp_path / "runs") == 2
    assert "not captured yet; run `lmmono score" in capsys.readouterr().err


def test_the_variance_of_a_mean_score_is_told_by_arm_seed_half_and_draw(study):
    explainer = "token_lookup:window=32"
    (table,) = variance_tables(
        [study], scorers=["simulation_random"], explainers=[explainer], n_draws=2, n_units=8
    )
    factors = ["architecture", "training seed", "corpus half", "record draw"]
    assert [row[0] for row in table.rows[:-1]] == factors
    shares = [float(row[2].rstrip("%")) for row in table.rows]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert "explainer, judge" in table.note
