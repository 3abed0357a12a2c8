"""Recipe `adapters` in small: every adapter and head is reached by its name."""

from pathlib import Path

import lookup_model
import pytest
from small_models import tiny
from test_tuned_models import task

from lmmono.errors import RecipeError
from lmmono.recipe import Recipe
from lmmono.suites.study import Study
from lmmono.types import silent

RECIPE = Path(__file__).parents[1] / "recipes" / "adapters.yaml"
SMALL = (
    "robustness.fine_tuning.modes=[full, lora, rslora, dora, monolora, two_branch, topk_lora]",
    "robustness.fine_tuning.variants=[relu_out, relu_both, relu_code, topk_code]",
    "robustness.families=[raw, {name: cl, steps: 2}, {name: ncl, steps: 2, spread: true}, "
    "{name: csr, k: 8, steps: 2}]",
    "robustness.seeds=1",
    "robustness.n_train=40",
    "robustness.n_val=20",
    "robustness.n_test=40",
    "robustness.rates=[0.2]",
    "robustness.fine_tuning.rates=[0.2]",
    "robustness.fine_tuning.steps=1",
    "robustness.fine_tuning.lora_lr=[0.01]",
)


def test_the_recipe_reaches_every_adapter_and_head():
    whole = Recipe.load(RECIPE).robustness
    assert whole.rates == (0.0, 0.1, 0.2, 0.3, 0.4)
    assert set(whole.fine_tuning.rates) < set(whole.rates), "tuned models have their probes beside"
    labels = [family.label for family in whole.families]
    assert labels == ["raw", "neurons", "cl", "ncl", "csr-8"]
    settings = Recipe.load(RECIPE, *SMALL).robustness
    families = {family.label: family for family in settings.families}
    words = lookup_model.tokenizer()
    made = Study(tiny("crate"), [task()], families, settings, None, words, silent).run()
    assert {row["failure"] for row in made.rows} == {None}
    modes = ("lora", "rslora", "dora", "two_branch", "topk_lora")
    variants = (f"monolora-{v}" for v in ("relu_out", "relu_both", "relu_code", "topk_code"))
    tuned = {row["feature"] for row in made.rows if row["feature"].startswith("tuned")}
    assert tuned == {"tuned-full", *(f"tuned-{name}-8" for name in (*modes, *variants))}
    probed = {(r["feature"], r["probe"]) for r in made.rows if r["suite"] == "noisy_labels"}
    names = ("raw", "cl-2steps", "ncl-2steps-spread", "csr-8-2steps")
    assert probed == {(name, learner) for name in names for learner in ("logistic", "nonneg_ce")}


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
