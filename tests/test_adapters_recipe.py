"""Recipe `adapters` in small: every adapter and head is reached by its name, and goes on."""

from pathlib import Path

import pytest

import activation_store as astore
import lmmono as lm
from lmmono.errors import RecipeError
from lmmono.pipeline import open_for
from lmmono.recipe import Recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "adapters.yaml"
SMALL = (
    "arm=crate",
    "data.corpus.n_documents=300",
    "data.n_ctx=32",
    "model.d_model=16",
    "model.n_heads=2",
    "model.sparsity=1.0",
    "train.steps=10",
    "train.batch_tokens=512",
    "train.warmup_steps=2",
    "train.eval_tokens=1024",
    "capture.max_tokens=2048",
    "robustness.tasks=[planted_polarity]",
    "robustness.families=[raw, neurons, {name: cl, steps: 4}, {name: ncl, steps: 4}, "
    "{name: ncl, positives: spans, spread: true, steps: 4}, {name: csr, k: 8, steps: 4}]",
    "robustness.seeds=1",
    "robustness.n_train=40",
    "robustness.n_val=20",
    "robustness.n_test=40",
    "robustness.rates=[0.2]",
    "robustness.fine_tuning.rates=[0.2]",
    "robustness.fine_tuning.steps=2",
    "robustness.fine_tuning.lora_lr=[0.01]",
)


def test_the_recipe_reaches_every_adapter_and_head(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = Recipe.load(RECIPE)
    assert set(whole.robustness.fine_tuning.rates) == {0.0, 0.1, 0.2, 0.3, 0.4}
    assert whole.robustness.seeds == 5
    recipe = Recipe.load(RECIPE, *SMALL)
    (one,) = recipe.runs()
    run = lm.run_stages(open_for(one), "train", "capture", "robustness")
    with astore.open(run.store_path) as store:
        rows = store.sql("SELECT suite, feature, probe, failure FROM robustness").fetchall()
    assert {failure for *_, failure in rows} == {None}
    tuned = {feature for suite, feature, *_ in rows if suite == "fine_tuning"} - {"raw"}
    modes = ("lora", "rslora", "dora", "two_branch", "topk_lora")
    variants = (f"monolora-{v}" for v in ("relu_out", "relu_both", "relu_code", "topk_code"))
    assert {name for name in tuned if name.startswith("tuned")} == {
        "tuned-full",
        *(f"tuned-{name}-8" for name in (*modes, *variants)),
    }
    probed = {(feature, probe) for suite, feature, probe, _ in rows if suite == "noisy_labels"}
    names = ("raw", "neurons", "cl", "ncl", "ncl-spans-spread", "csr-8")
    assert probed == {(name, learner) for name in names for learner in ("logistic", "nonneg_ce")}
    before = len(rows)
    lm.run_stages(open_for(one), "robustness")
    with astore.open(run.store_path) as store:
        assert store.sql("SELECT count(*) FROM robustness").fetchone() == (before,)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("robustness.fine_tuning.modes=[monolore]", "did you mean"),
        ("robustness.fine_tuning.variants=[relu_in]", "relu_out"),
        ("robustness.families=[{name: cl, map: relu}]", "cl has no such setting"),
    ],
)
def test_what_there_is_not_is_told(change, fault):
    with pytest.raises(RecipeError, match=fault):
        Recipe.load(RECIPE, change)
