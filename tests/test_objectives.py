"""Named loss terms: the seam that every training goes through."""

import json
import signal
from pathlib import Path
from typing import get_args

import lookup_model
import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from small_models import tiny
from test_finetuning import TEST, TRAIN, VAL
from test_training import RECIPE, stop_at
from torch import nn

from lmmono.errors import ModelError, RecipeError, RobustnessError, TrainError, TrainingStopped
from lmmono.pipeline import train
from lmmono.probes.finetuning import FineTuning, finetune, load_classifier, tune
from lmmono.recipe import Recipe
from lmmono.recipe.objective_settings import AnyObjective, Decorrelation, SparsePenalty
from lmmono.recipe.robustness_settings import Tuning
from lmmono.registry.methods import METHODS
from lmmono.registry.suites import MonoVariant
from lmmono.runs.folder import Run
from lmmono.suites.tuned import tuners
from lmmono.training.objectives import Loss, Objective, Step, Term, Terms

TOKENIZER = lookup_model.tokenizer()
OBJECTIVES = (
    "train.objectives=[{kind: decorrelation, weight: 0.5, every_steps: 2}, {kind: "
    "reversed_deactivation, memory: 0.9}, {kind: sparsity, measure: hoyer, start_fraction: 0.5, "
    "warmup_fraction: 0.2, name: few}, {kind: mono_score, weight: 0.1}]"
)


class Probing(Objective):
    """A term with weights and a buffer of its own: a linear map of features to ones."""

    columns = ("n_calls",)

    def __init__(self, d_model: int = 16) -> None:
        super().__init__()
        self.map = nn.Linear(d_model, 1)
        self.register_buffer("n_calls", torch.zeros(()))

    def forward(self, step: Step) -> Loss:
        self.n_calls += 1
        features = step.outputs.features
        noisy = features + 0.01 * torch.randn_like(features)
        return Loss((self.map(noisy) - 1).square().mean(), {"n_calls": self.n_calls.clone()})


def tuned(folder=None, terms=(), progress=None, model=None, **how):
    how = {"epochs": 3, "lr": 1e-2, **how}
    extra = {} if progress is None else {"progress": progress}
    return finetune(
        model or tiny("gpt2"),
        TRAIN,
        VAL,
        n_classes=2,
        seed=0,
        settings=FineTuning(**how),
        tokenizer=TOKENIZER,
        terms=terms,
        folder=folder,
        **extra,
    )


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(out=folder / "runs"))
    return path


@pytest.fixture(scope="module")
def whole(recipe_file: Path) -> Run:
    """A language model trained with four objectives, at one go."""
    return train(Recipe.load(recipe_file, "name=whole", OBJECTIVES))


def model_bits(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.dir / "model" / "model.safetensors")


def test_every_term_has_its_column_and_only_where_it_is_on(whole: Run) -> None:
    rows = whole.metrics.to_pylist()
    steps = {
        name: [row["step"] for row in rows if row["metric"] == f"objective/{name}"]
        for name in ("decorrelation", "few", "mono_score", "reversed_deactivation/scale")
    }
    assert steps["decorrelation"] == steps["mono_score"] == [10, 20, 24]
    assert steps["few"] == [20, 24], "it begins with step 12"
    assert steps["reversed_deactivation/scale"] == [10, 20, 24]
    versions = {row["metric_version"] for row in rows if row["metric"].startswith("objective/")}
    assert versions == {1}
    assert any(row["metric"] == "loss" and row["split"] == "train" for row in rows)


def test_a_stopped_training_with_objectives_goes_on_to_the_same_bits(
    recipe_file: Path, whole: Run
) -> None:
    recipe = Recipe.load(recipe_file, "name=stopped", OBJECTIVES)
    with pytest.raises(TrainingStopped):
        train(recipe, progress=stop_at(10, signal.SIGTERM))
    saved = load_file(recipe.dir / "checkpoint" / "weights.safetensors")
    assert any("mean_0" in name and tensor.abs().sum() > 0 for name, tensor in saved.items())
    resumed = train(recipe)
    assert all(torch.equal(a, model_bits(whole)[name]) for name, a in model_bits(resumed).items())
    columns = ["step", "split", "metric", "layer", "value"]
    assert resumed.metrics.select(columns).equals(whole.metrics.select(columns))


def test_weight_0_measures_and_changes_no_bit(recipe_file: Path) -> None:
    plain = train(Recipe.load(recipe_file, "name=plain"))
    term = "train.objectives=[{kind: sparsity, weight: 0.0}]"
    measured = train(Recipe.load(recipe_file, "name=measured", term))
    assert all(torch.equal(a, model_bits(plain)[name]) for name, a in model_bits(measured).items())
    names = {row["metric"] for row in measured.metrics.to_pylist()}
    assert "objective/sparsity" in names and "objective/sparsity/active_fraction" in names


def test_recipes_without_objectives_keep_their_digests(recipe_file: Path) -> None:
    recipe = Recipe.load(recipe_file)
    assert "objectives" not in recipe.model_dump()["train"]
    assert "objectives" not in recipe.model_dump()["robustness"]["fine_tuning"]
    other = Recipe.load(recipe_file, "train.objectives=[{kind: sparsity}]")
    assert other.digest("train") != recipe.digest("train")
    assert "objectives" not in tuners(Tuning())[0].how.identity


def test_sets_of_objectives_are_tuned_side_by_side() -> None:
    settings = Tuning(modes=("full",), objective_sets={"plain": (), "sparse": (SparsePenalty(),)})
    assert [tuner.label for tuner in tuners(settings)] == ["tuned-full+plain", "tuned-full+sparse"]
    assert tuners(settings)[1].how.identity["objectives"][0]["kind"] == "sparsity"


def test_a_term_grows_to_its_weight_after_its_start():
    term = Term("t", Probing(), 2.0, start_fraction=0.5, warmup_fraction=0.2)
    assert [term.weight_at(i, 10) for i in (5, 6, 9)] == [1.0, 2.0, 2.0]
    assert [term.is_on(i, 10) for i in (4, 5)] == [False, True]


def test_wrong_objectives_are_told_with_the_way_out(recipe_file: Path) -> None:
    def faults(override: str) -> str:
        with pytest.raises(RecipeError) as told:
            Recipe.load(recipe_file, override)
        return str(told.value)

    two = faults("train.objectives=[{kind: sparsity}, {kind: sparsity}]")
    assert "two objectives are called sparsity; give one a name" in two
    assert "want one of continuity, decorrelation, " in faults("train.objectives=[{kind: spars}]")
    assert "has no term to weigh" in faults(
        "train.objectives=[{kind: reversed_deactivation, weight: 2.0}]"
    )
    recipe = Recipe.load(recipe_file, "train.objectives=[{kind: sparsity, hooks: [blocks.7.x]}]")
    with pytest.raises(ModelError, match=r"no hook 'blocks.7.x'"):
        train(recipe)


def test_terms_refuse_what_cannot_stand_together() -> None:
    class Whole(Probing):
        replaces_main = True

    with pytest.raises(TrainError, match="want each name once"):
        Terms([Term("a", Probing()), Term("a", Probing())])
    with pytest.raises(TrainError, match="a and b both compute the main loss"):
        Terms([Term("a", Whole()), Term("b", Whole())])


def test_a_term_that_becomes_no_number_is_named() -> None:
    class Broken(Probing):
        def forward(self, step: Step) -> Loss:
            return Loss(super().forward(step).value * float("nan"))

    with pytest.raises(TrainError, match="objective broken became nan at step 0"):
        tuned(terms=[Term("broken", Broken(), weight=0.0)])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_objectives_of_a_recipe_reach_a_tuned_model(method: str) -> None:
    objectives = (Decorrelation(weight=5.0), SparsePenalty(hooks=("blocks.0.mlp.hook_post",)))
    found = tuned(method=method, objectives=objectives)
    terms = [epoch.terms for epoch in found.history]
    assert terms[-1]["decorrelation"] < terms[0]["decorrelation"]
    assert {"sparsity", "sparsity/active_fraction"} <= terms[0].keys()
    assert found.history != tuned(method=method).history


def test_own_weights_of_a_term_learn_and_are_those_of_the_best_epoch() -> None:
    probing = Probing()
    found = tuned(terms=[Term("probing", probing)])
    values = [epoch.terms["probing"] for epoch in found.history]
    assert values[-1] < 0.5 * values[0]
    n_calls = (found.chosen_epoch + 1) * 4  # 64 texts, 16 a step
    assert probing.n_calls == n_calls and found.terms.by_name["probing"] is probing


def test_own_weights_have_a_rate_and_a_decay_of_their_own() -> None:
    class Slow(Probing):
        lr = 0.0
        weight_decay = 0.5

    slow = Slow()
    before = slow.map.weight.clone()
    tuned(terms=[Term("slow", slow)], epochs=1)
    assert torch.equal(slow.map.weight, before), "its rate is 0"
    groups = Terms([Term("slow", slow)]).groups(0.01, 0.1)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.5), (1, 0.0)]


class Stopped(Exception):
    """Raised by a progress that stands for a kill."""


def test_a_killed_tuning_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def die(what, done, total, **facts):
        if done == 2:
            raise Stopped

    def with_term(**more):
        torch.manual_seed(5)
        probing = Probing()
        term = Term("probing", probing)
        how = {"method": "lora", "objectives": (Decorrelation(),)}
        return probing, lambda: tuned(terms=[term], **how, **more)

    probing, run = with_term()
    whole = run()
    folder = tmp_path / "tuning"
    with pytest.raises(Stopped):
        with_term(folder=folder, progress=die)[1]()
    again, run = with_term(folder=folder)
    resumed = run()
    assert resumed.history == whole.history and resumed.chosen_epoch == whole.chosen_epoch
    assert np.array_equal(resumed.predict(TEST.texts), whole.predict(TEST.texts))
    assert torch.equal(again.map.weight, probing.map.weight) and not folder.exists()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_classifier_is_saved_and_loaded_to_the_same_bits(tmp_path: Path, method: str) -> None:
    found = tuned(method=method, objectives=(SparsePenalty(),), epochs=1)
    found.save(tmp_path / "tuned")
    loaded = load_classifier(tmp_path / "tuned", tiny("gpt2"), TOKENIZER)
    assert np.array_equal(loaded.predict(TEST.texts), found.predict(TEST.texts))
    assert loaded.history == found.history and loaded.settings == found.settings
    with pytest.raises(RobustnessError, match="do not fit this LlamaForCausalLM"):
        load_classifier(tmp_path / "tuned", tiny("llama"), TOKENIZER)
    weights = tmp_path / "tuned" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(RobustnessError, match="other bytes"):
        load_classifier(tmp_path / "tuned", tiny("gpt2"), TOKENIZER)


def test_a_frozen_classifier_keeps_its_bits_while_a_term_learns() -> None:
    found = tuned(epochs=1)
    before = {name: tensor.clone() for name, tensor in found.network.state_dict().items()}
    probing = Probing()
    settings = FineTuning(epochs=3, lr=1e-2)
    with pytest.raises(TrainError, match="nothing to train"):
        tune(found, TRAIN, VAL, seed=0, settings=settings, frozen=True)
    term = Term("probing", probing)
    tune(found, TRAIN, VAL, seed=0, settings=settings, terms=[term], frozen=True, keep="last")
    for name, tensor in found.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert found.chosen_epoch == 2 and all(p.requires_grad for p in found.network.parameters())
    assert found.history[-1].terms["probing"] < found.history[0].terms["probing"]


WANTS: dict[str, dict[str, object]] = {
    "continuity": {"perturbations": ["word_shuffle", "embedding_gaussian"]},
    "flint": {"n_attributes": 4, "d_hidden": 8, "min_documents": 1},
    "r_drop": {"dropout": 0.1},
}
"""What an objective needs to be told."""

ADAPTERS = {
    **{name: {"method": name} for name in ("rslora", "dora", "two_branch", "topk_lora")},
    **{f"monolora {v}": {"method": "monolora", "variant": v} for v in get_args(MonoVariant)},
}

TUNED = {
    **{
        method.name: {
            "objectives": (
                TypeAdapter(AnyObjective).validate_json(
                    json.dumps({"kind": method.name, **WANTS.get(method.name, {})})
                ),
            )
        }
        for method in METHODS.values()
        if method.role in ("objective", "interpreter") and "fine_tuning" in method.places
    },
    **ADAPTERS,
}
"""Settings of every way to tune that `lmmono ls methods` lists."""


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("name", TUNED)
def test_every_method_goes_on_after_a_kill_and_is_loaded_to_the_same_bits(
    tmp_path: Path, name: str
) -> None:
    def die(what, done, total, **facts):
        if done == 1:
            raise Stopped

    how = {"epochs": 2, "batch_texts": 40, **TUNED[name]}
    whole = tuned(**how)
    with pytest.raises(Stopped):
        tuned(tmp_path / "tuning", progress=die, **how)
    resumed = tuned(tmp_path / "tuning", **how)
    said = whole.predict(TEST.texts)
    assert resumed.history == whole.history
    assert np.array_equal(resumed.predict(TEST.texts), said)
    whole.save(tmp_path / "tuned")
    loaded = load_classifier(tmp_path / "tuned", tiny("gpt2"), TOKENIZER)
    assert np.array_equal(loaded.predict(TEST.texts), said)
