"""Kept steps of a training: models, stores and scores of each, and the lives of units."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_cli import call

import activation_store as astore
import lmmono as lm
from activation_store.write.recorder import digest
from lmmono.errors import ExplainError, RecipeError, TrainError
from lmmono.pipeline.whole_run import check_run
from lmmono.runs.folder import Run
from lmmono.runs.kept import kept_runs
from lmmono.training.loop import require_new_weights

RECIPE = """
name: kept
seed: 3
out: {out}
data: {{corpus: {{kind: planted, n_documents: 200}}, n_ctx: 32}}
model: {{arch: crate, n_layers: 1, d_model: 16, n_heads: 2}}
train: {{steps: 2, batch_tokens: 256, warmup_steps: 1, eval_every_steps: 10, eval_tokens: 512,
  precision: fp32, keep: {{at: [1, 2], log: true}}}}
capture: {{max_tokens: 1024, top_k: 4, random_k: 2, quantile_k: 1}}
explain: {{explainers: [token_lookup], window: 32}}
score: {{scorers: [simulation_random]}}
"""
KEPT = [0, 1]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    (folder / "kept.yaml").write_text(RECIPE.format(out=folder / "runs"))
    return folder / "kept.yaml"


@pytest.fixture(scope="module")
def run(recipe_file: Path) -> Run:
    from lmmono.pipeline import open_for, run_stages

    return run_stages(open_for(lm.Recipe.load(recipe_file)))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.dir / "model" / "model.safetensors")


def test_steps_are_kept_with_their_loss_and_no_two_have_the_same_weights(run: Run) -> None:
    kept = kept_runs(run)
    assert list(kept) == KEPT
    assert [one.model_facts["step"] for one in kept.values()] == KEPT
    digests = [one.model_facts["model_digest"] for one in (*kept.values(), run)]
    assert len(set(digests)) == len(digests)
    assert digests == [digest(one.model) for one in (*kept.values(), run)]
    assert run.model_facts["kept"] == dict(zip(map(str, KEPT), digests, strict=False))
    losses = [one.val_loss for one in (*kept.values(), run)]
    assert losses[-1] < losses[0]
    assert check_run(run.dir).n_inner == len(KEPT) + 1  # the untrained control


def test_the_recipe_of_a_kept_step_trains_its_model_again(run: Run, tmp_path: Path) -> None:
    kept = kept_runs(run)[1]
    again = lm.train(lm.Recipe.load(kept.dir / "recipe.yaml", f"out={tmp_path}"))
    assert again.recipe.train.until == 1
    assert all(torch.equal(a, weights(again)[name]) for name, a in weights(kept).items())


def test_weights_of_an_earlier_step_are_refused() -> None:
    require_new_weights("b", 2, {0: "a"})
    with pytest.raises(TrainError, match="steps 1 and 4 have the same weights"):
        require_new_weights("b", 4, {0: "a", 1: "b"})


def test_steps_are_captured_on_the_same_tokens_and_scored(run: Run) -> None:
    tokens = "SELECT seq_id, pos, doc_id, split, token_id FROM token_ids ORDER BY ALL"
    scored = """SELECT value FROM all_scores WHERE metric = 'simulation_random'
        AND hook = 'blocks.*.mlp.hook_post' AND control IS NULL"""
    with astore.open(run.store_path) as store:
        own = store.sql(tokens).fetchall()
        assert store.sql("SELECT run, step FROM runs").fetchall() == [("kept", 2)]
        controls = store.sql("SELECT DISTINCT control FROM all_scores").fetchall()
        assert ("untrained_model",) in controls
    for step, kept in kept_runs(run).items():
        with astore.open(kept.store_path) as store:
            assert store.sql(tokens).fetchall() == own
            assert store.sql("SELECT step FROM runs").fetchall() == [(step,)]
            assert len(store.sql(scored).fetchall()) == 1
        assert not (kept.dir / "untrained").exists()


def test_steps_beyond_the_training_are_faults_of_the_recipe(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.keep\.at=.*want steps up to train\.steps \(2\)"):
        lm.Recipe.load(recipe_file, "train.keep.at=[1, 3]")
    with pytest.raises(RecipeError, match="ascending"):
        lm.Recipe.load(recipe_file, "train.keep.at=[1, 0]")


def test_dropped_activations_leave_scores_and_are_captured_again_for_others(
    run: Run, recipe_file: Path
) -> None:
    from lmmono.pipeline import open_for, run_stages

    kept = kept_runs(run)[1]
    scores = "SELECT metric, value FROM all_scores WHERE control IS NULL ORDER BY ALL"
    with astore.open(kept.store_path) as store:
        before = store.sql(scores).fetchall()
    changes = ("score.step_rows=false",)
    dropped = run_stages(open_for(lm.Recipe.load(recipe_file, *changes)))
    with astore.open(kept.store_path) as store:
        assert store.info().n_acts == 0
        assert store.verify().ok
        assert store.sql("SELECT count(*) FROM exemplars").fetchall() != [(0,)]
        assert store.sql(scores).fetchall() == before
        with pytest.raises(ExplainError, match="were dropped once they were scored"):
            lm.explain(store, explainer="token_lookup", overwrite=True)
    with astore.open(dropped.dir / "untrained" / "store.duckdb") as store:
        assert store.info().n_acts == 0
    assert check_run(dropped.dir).faults == []
    again = (*changes, "score.scorers=[simulation_tar]")
    run_stages(open_for(lm.Recipe.load(recipe_file, *again)))
    with astore.open(kept.store_path) as store:
        metrics = {name for (name,) in store.sql("SELECT DISTINCT metric FROM scores").fetchall()}
        assert "simulation_tar" in metrics
        assert store.info().n_acts == 0


def test_lives_of_units_are_tables_of_the_store_and_of_the_command_line(run: Run, capsys) -> None:
    with astore.open(run.store_path) as store:
        n_steps, n_units = len(KEPT) + 1, 64
        history = store.sql("FROM unit_history ORDER BY hook, unit, step").df()
        assert len(history) == n_steps * n_units
        last = history[history.step == 2]
        alive = last.density > 0
        assert np.allclose(last.correlation[alive], 1.0)
        densities = store.sql("SELECT density FROM unit_stats ORDER BY unit").df().density
        assert np.allclose(last.density, densities)  # the tokens are those of the capture
        assert store.sql("FROM birth('blocks.0.mlp.hook_post', 3)").fetchall()
        assert store.sql("FROM death('blocks.0.mlp.hook_post', 3)").fetchall()
    query = "SELECT count(*) AS n FROM step1.unit_stats JOIN unit_stats USING (hook, unit)"
    assert call("sql", run.dir, query, "--csv") == 0
    assert capsys.readouterr().out.splitlines()[1] == str(n_units)
    assert call("history", run.dir) == 0
    shown = capsys.readouterr().out
    assert "units at each kept step" in shown and "births" in shown
    assert "scores at each kept step" in shown
    assert call("history", run.dir, "blocks.0.mlp:3") == 0
    assert "birth: " in capsys.readouterr().out
