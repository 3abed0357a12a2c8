"""The studies of the results pages, run small: sweeps, kept steps, tables and verdicts."""

from pathlib import Path

import pytest
from test_cli import call

import lmmono as lm
from lmmono.pipeline.sweep import settled_runs, sweep, trial_recipe
from lmmono.reports.study_tables import study_tables
from lmmono.runs.folder import find_runs, open_run

RECIPES = Path(__file__).parents[1] / "recipes"
SMALL = (
    "data={corpus: {kind: planted, n_documents: 200}, tokenizer: {kind: words}, n_ctx: 32}",
    "model.d_model=8",
    "model.n_heads=2",
    "train.steps=4",
    "train.batch_tokens=256",
    "train.micro_batch_tokens=null",
    "train.warmup_steps=1",
    "train.eval_tokens=512",
    "train.keep.at=[2]",
    "sweep.lr=[1e-4, 1e-2]",
    "sweep.steps=3",
    "capture.max_tokens=1024",
    "capture.random_k=2",
    "seeds=[0]",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


def test_each_arm_takes_the_rate_of_the_least_loss_and_its_runs_begin_with_it(folder) -> None:
    one_layer = ("model.n_layers=1", f"out={folder / 'runs'}")
    registered = f"registered={RECIPES / 'registered/study_depth.yaml'}"
    study = lm.Recipe.load(RECIPES / "study_depth.yaml", *SMALL, *one_layer, registered)
    trials = sweep(study)
    assert [(t.arm, t.lr) for t in trials] == [
        (arm, lr) for arm in ("crate-1l", "gpt2-1l") for lr in (1e-4, 1e-2)
    ]
    for arm in ("crate-1l", "gpt2-1l"):
        of_arm = [trial for trial in trials if trial.arm == arm]
        best = min(of_arm, key=lambda trial: trial.val_loss)
        assert [t.is_chosen for t in of_arm] == [t is best for t in of_arm]
        assert best.is_edge  # of two rates both are at the edge
    first = study.runs()[0]
    run = open_run(trial_recipe(first, 1e-2).dir)
    assert run.val_loss == trials[1].val_loss and run.recipe.train.steps == 3
    assert not run.recipe.train.kept_steps and not run.is_done("capture")
    (density,) = trials[1].densities
    assert 0 < density < 1
    chosen = {trial.arm: trial.lr for trial in trials if trial.is_chosen}
    for recipe in settled_runs(study):
        assert recipe.train.lr == chosen[recipe.arm] and recipe.train.steps == 4


@pytest.mark.slow
def test_the_depth_study_runs_whole_and_says_what_its_registered_tests_came_to(
    folder, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(RECIPES.parent)
    few = ("score.scorers=[simulation_tar, simulation_random]", "explain.presets=[]")
    more = ("model.n_layers=1", f"out={folder / 'runs'}", *few)
    assert call("run", RECIPES / "study_depth.yaml", *SMALL, *more) == 0
    capsys.readouterr()
    runs = [open_run(path) for path in find_runs(folder / "runs" / "study_depth")]
    assert [run.recipe.arm for run in runs] == ["crate-1l", "gpt2-1l"]
    assert all(run.is_done("score") and run.is_done("step_scores") for run in runs)
    assert all(run.manifest.registered is not None for run in runs)
    tables = {table.title: table for table in study_tables([folder / "runs" / "study_depth"])}
    assert [row[2] for row in tables["Along training"].rows[:2]] == ["512", "1,024"]
    tokens = tables["At equal tokens"].rows
    assert {row[0] for row in tokens} == {"crate-1l - gpt2-1l"}
    assert len(tokens) == 2 * 4  # steps; two scorers of two explainers
    assert len(tables["At equal loss"].rows) == 4
    verdicts = tables["Registered tests"].rows
    assert len(verdicts) == 3 * 6
    assert {row[-1] for row in verdicts} == {"not tested"}  # one seed
    assert "stood in the manifest of 2 of 2 runs" in tables["Registered tests"].note
    assert call("history", runs[0].dir) == 0
