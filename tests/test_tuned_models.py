"""Suite `fine_tuning`: the model tuned on the draws that probes meet, row by row beside them."""

import math

import lookup_model
import numpy as np
import pytest
from small_models import tiny

import activation_store as astore
import lmmono as lm
from lmmono.data.tasks.task import Labelled, Task
from lmmono.errors import RobustnessError
from lmmono.recipe.robustness_settings import Robustness, Tuning
from lmmono.registry.suites import SUITES
from lmmono.studies.comparisons import compare_families
from lmmono.suites.results import read_results
from lmmono.suites.tuned import tuners

HOW = {"ranks": [2], "epochs": 2, "full_lr": [0.01], "lora_lr": [0.03], "margins": [1.0, 0.6]}
LEAST = {"n_train": None, "n_val": None, "n_test": None, "seeds": 2, "rates": (), "margins": (0.6,)}


def task() -> Task:
    """Texts of words 1 to 19 or of words 20 to 38, which are the classes."""
    parts = {}
    for seed, (part, n) in enumerate({"train": 40, "val": 20, "test": 60}.items()):
        labels = np.arange(n) % 2
        words = np.random.default_rng(seed).integers(1, 20, (n, 5)) + 19 * labels[:, None]
        texts = tuple(" ".join(f"w{i}" for i in row) for row in words)
        parts[part] = Labelled(texts, labels)
    return Task("halves", "which half of the words", "none", "here", ("low", "high"), parts)


def study(into=None, suite="fine_tuning", **changed) -> lm.studies.Outcomes:
    return lm.robustness(
        tiny("crate"),
        task(),
        suite=suite,
        features={"raw": None},
        hook="blocks.1.hook_resid_post",
        tokenizer=lookup_model.tokenizer(),
        into=into,
        budgets=(3,),
        fine_tuning=HOW | changed,
        **LEAST,
    )


def test_a_tuned_model_has_a_row_beside_each_of_a_probe_and_is_not_tuned_twice(tmp_path):
    astore.open(tmp_path / "a", "w").close()
    with astore.open(tmp_path / "a", "a") as store:
        made = study(store)
        again = study(store)
        assert (made.n_computed, again.n_computed, again.n_found) == (12, 0, 12)
        more = study(store, lora_lr=[0.03, 1e-6])
        assert (more.n_computed, len(more.rows)) == (4, 12), "LoRA's rows alone"
        found = read_results(store)
    assert made.features == ("raw", "tuned-full", "tuned-lora-2")
    by_key = {(r["feature"], r["level"], r["seed"]): r for r in more.rows}
    assert len(by_key) == 12 and {key[1] for key in by_key} == {0.0, 0.2}
    for (feature, level, seed), row in by_key.items():
        said = row["settings"]
        assert row["n"] == 60 and row["failure"] is None and row["ci_low"] <= row["value"]
        assert said["n_flipped"] == round(level * 40) and said["budget"] == "full"
        assert row["probe"] == ("logistic" if feature == "raw" else "ce")
        if feature == "tuned-lora-2":
            before = {(r["feature"], r["level"], r["seed"]): r for r in made.rows}
            assert said["lr"] == 0.03 and row["value"] == before[feature, level, seed]["value"]
    assert said["n_trained"] < by_key["tuned-full", 0.0, 0]["settings"]["n_trained"]
    assert np.mean([r["value"] for r in more.rows if r["feature"] != "raw"]) > 0.6
    compared = compare_families(found, "raw")
    assert {(each.feature, each.effect.n_seeds) for each in compared} == {
        ("tuned-full", 2),
        ("tuned-lora-2", 2),
    }
    assert "fine_tuning halves symmetric 0.2: raw" in repr(more)


def test_the_draws_are_those_of_noisy_labels_to_the_last_flip():
    how = {"margins": (1.0, 0.6), "rates": ()}
    settings = Robustness(n_train=30, fine_tuning=Tuning(**how, seeds=2), seeds=3, **how)
    tuned, probed = (list(SUITES[name].load()(task(), settings)) for name in SUITES_PAIRED)
    assert (len(tuned), len(probed)) == (4, 6)
    for mine, theirs in zip(tuned, probed, strict=False):
        assert (mine.seed, mine.level) == (theirs.seed, theirs.level)
        for part in ("train", "labels", "val", "val_labels"):
            assert np.array_equal(getattr(mine, part), getattr(theirs, part))


SUITES_PAIRED = ("fine_tuning", "noisy_labels")


def test_what_cannot_be_tuned_is_a_row_that_says_so():
    made = study(margins=[0.0], modes=["full"])
    assert {row["failure"] for row in made.rows} == {"unlearnable: symmetric noise of 0.5"}
    wild = study(margins=[1.0], modes=["full"], full_lr=[1e30])
    told = {row["failure"] for row in wild.rows if row["feature"] == "tuned-full"}
    assert told == {"tuning diverged in epoch 1: want an lr below 1e+30"}
    assert all(math.isfinite(row["value"]) for row in wild.rows if row["feature"] == "raw")
    with pytest.raises(RobustnessError, match="fine_tuning.modes"):
        study(modes=["half"])


def test_every_rank_is_a_model_of_its_own_and_nothing_to_a_whole_one():
    names = [each.label for each in tuners(Tuning(ranks=(4, 8)))]
    assert names == ["tuned-full", "tuned-lora-4", "tuned-lora-8"]
    one, other = (tuners(Tuning(ranks=(rank,)))[0].identity for rank in (4, 8))
    assert one == other, "a rank is nothing to a whole model"


def test_adapters_are_tuned_by_name_and_their_sparsity_is_told():
    made = study(
        modes=["monolora", "two_branch"], variants=["relu_out", "topk_code"], k=2, margins=[1.0]
    )
    assert made.features[1:] == (
        "tuned-monolora-relu_out-2",
        "tuned-monolora-topk_code-2",
        "tuned-two_branch-2",
    )
    said = {r["feature"]: r["settings"] for r in made.rows if r["feature"] != "raw"}
    assert {(each["mode"], each.get("variant")) for each in said.values()} == {
        ("monolora", "relu_out"),
        ("monolora", "topk_code"),
        ("two_branch", None),
    }
    assert len({each["n_trained"] for each in said.values()}) == 1, "matched"
    assert said["tuned-monolora-relu_out-2"]["update_zeros"] > 0.2
    assert (
        said["tuned-monolora-relu_out-2"]["code_zeros"]
        == 0
        < said["tuned-monolora-topk_code-2"]["code_zeros"]
    )
    assert {row["failure"] for row in study(modes=["topk_lora"], k=3, margins=[1.0]).rows} == {
        None,
        "topk_lora: k: want 1 to the rank, 2, got 3",
    }


def test_settings_of_one_adapter_change_no_digest_of_another():
    for mode, same in (("lora", True), ("topk_lora", False)):
        few, many = (tuners(Tuning(modes=(mode,), k=k))[0].identity for k in (2, 4))
        assert (few == many) == same
    old = Tuning().model_dump()
    assert "variants" not in old and "k" not in old, "recipes from before keep their digest"
