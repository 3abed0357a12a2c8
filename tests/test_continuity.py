"""Semantic continuity and what it is compared with: oracles, gradients, refusals, resume."""

import signal
from pathlib import Path

import lookup_model
import numpy as np
import pytest
import torch
from small_models import tiny
from test_finetuning import TRAIN, VAL
from test_training import RECIPE, stop_at
from torch import nn

from lmmono.errors import RecipeError, TrainError, TrainingStopped
from lmmono.methods.distances import (
    LOGIT_DISTANCES,
    attribute_distance,
    gradient_distance,
    kl,
    normed_cosine,
)
from lmmono.methods.perturbations import gaussian, replaced_tokens
from lmmono.methods.smoothness import JacobianTerm, VatTerm, has_dropout
from lmmono.pipeline import train
from lmmono.probes.finetuning import FineTuning, finetune
from lmmono.recipe import Recipe
from lmmono.recipe.objective_settings import (
    AttributeDistance,
    Continuity,
    FreeLargeBatch,
    GradientDistance,
    HiddenDistance,
    JacobianPenalty,
    Perturbation,
    RDrop,
    SmoothAdversarial,
    SmoothedLabels,
    VirtualAdversarial,
)
from lmmono.training.objectives import (
    Loss,
    Objective,
    ObjectiveContext,
    Outputs,
    Step,
    Term,
    Trainee,
    TrainingBatch,
)

NOISE = (Perturbation(kind="embedding_gaussian"),)
TYPOS = (Perturbation(kind="word_shuffle", severity=5), Perturbation(kind="token_replace"))


def tuned(objectives=(), family="gpt2", terms=(), model=None, **how):
    how = {"epochs": 2, "lr": 1e-2, **how}
    return finetune(
        model or tiny(family),
        TRAIN,
        VAL,
        n_classes=2,
        seed=0,
        settings=FineTuning(objectives=objectives, **how),
        tokenizer=lookup_model.tokenizer(),
        terms=terms,
    )


@pytest.mark.parametrize(
    ("measure", "wanted"),
    [
        ("symmetric_kl", 0.386704),
        ("half_symmetric_kl", 0.193352),
        ("kl", 0.171808),
        ("js", 0.046625),
        ("squared_logits", 0.416667),
        ("cosine", 0.105573),
    ],
)
def test_distances_of_logits_are_those_calculated_by_hand(measure, wanted):
    p, q = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.5, -1.0]])
    assert LOGIT_DISTANCES[measure](p, q).item() == pytest.approx(wanted, abs=1e-4)
    assert LOGIT_DISTANCES[measure](p, p).item() == pytest.approx(0, abs=1e-6)
    if measure == "kl":
        assert kl(q, p).item() == pytest.approx(0.214896, abs=1e-4)


def test_distances_of_probabilities_streams_attributes_and_gradients():
    p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[np.log(3.0), 0.0]])
    squared = LOGIT_DISTANCES["squared_probabilities"](p, q)
    assert squared.item() == pytest.approx(2 * 0.25**2)  # .5 .5 and .75 .25
    h = torch.tensor([[1.0, 2.0, 3.0]])
    assert normed_cosine(h, 5 * h + 7).item() == pytest.approx(0, abs=1e-6), "a layer norm drops it"
    assert normed_cosine(h, -h).item() == pytest.approx(2, abs=1e-6)
    phi, psi = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert attribute_distance(phi, psi).item() == pytest.approx(2 / 4)
    g = torch.randn(1, 4, 3)
    shifted = torch.cat([torch.ones(1, 1, 3), g[:, :3]], dim=1)  # a token put before
    places = [([0, 1, 2], [1, 2, 3])]
    assert gradient_distance(g, shifted, places).item() == pytest.approx(0, abs=1e-6)


def test_perturbations_have_the_strength_that_they_say():
    torch.manual_seed(0)
    embeds = 3 * torch.randn(8, 64, 32)
    is_token = torch.ones(8, 64, dtype=torch.bool)
    moved = gaussian(embeds, is_token, 0.2) - embeds
    rms = embeds.square().mean().sqrt()
    assert moved[:, 1:].std().item() == pytest.approx(0.2 * rms.item(), rel=0.03)
    assert not moved[:, 0].any()
    ids = torch.arange(8 * 64).view(8, 64)
    batch = TrainingBatch(ids, is_token, ids)
    changed = (replaced_tokens(batch, 0.25) != ids).float()
    assert changed[:, 1:].mean().item() == pytest.approx(0.25, abs=0.06) and not changed[:, 0].any()


class Linear(Trainee):
    """Logits that are linear in token embeddings: their Jacobian is known."""

    is_classifier = True

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.body = nn.Module()
        self.body.table = nn.Embedding(7, 4)
        self.body.get_input_embeddings = lambda: self.body.table
        self.weight = torch.randn(4, 3)

    @property
    def model(self):
        return self.body

    def parameters(self):
        return self.body.parameters()

    def run(self, batch, *, is_main=False):
        logits = self.body.table(batch.ids).sum(dim=1) @ self.weight
        return Outputs(logits, self.loss_of(logits, batch.labels))

    def loss_of(self, logits, labels):
        return nn.functional.cross_entropy(logits, labels)


def linear_step():
    trainee = Linear()
    ids = torch.tensor([[0, 1, 2], [0, 5, 6]])
    batch = TrainingBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([0, 2]))
    context = ObjectiveContext(trainee.model, True, 10, 0, 4, 3)
    return Step(trainee, batch, trainee.run(batch), 0, 10, {}), context, trainee.weight


def test_the_jacobian_penalty_is_the_squared_norm_of_a_linear_models_weights():
    step, context, weight = linear_step()
    term = JacobianTerm(JacobianPenalty(projections=4000), context)
    torch.manual_seed(0)
    # each of three tokens has the whole weight as its Jacobian
    assert term(step).value.item() == pytest.approx(3 * weight.square().sum().item(), rel=0.05)


def test_vat_finds_a_worse_change_than_random_ones_of_its_length():
    step, context, _ = linear_step()
    torch.manual_seed(0)
    value = VatTerm(VirtualAdversarial(radius=0.2, ascent_steps=5), context)(step).value.item()
    embeds = step.embed(step.batch.ids).detach()
    others = []
    for _ in range(50):
        change = torch.randn_like(embeds)
        change[:, 0] = 0
        size = embeds[:, 1:].flatten(1).norm(dim=1) / change.flatten(1).norm(dim=1)
        other = step.again(embeds=embeds + 0.2 * change * size[:, None, None]).logits
        others.append(kl(step.outputs.logits, other).mean().item())
    assert value > max(others)


ALL = [
    Continuity(perturbations=NOISE, augmentation=0.5, warmup_fraction=0.0),
    Continuity(perturbations=TYPOS, distances=(HiddenDistance(),), hold_clean=True),
    Continuity(perturbations=NOISE, distances=(GradientDistance(),), every_steps=2),
    RDrop(),
    RDrop(dropout=0.2),
    VirtualAdversarial(),
    SmoothAdversarial(),
    FreeLargeBatch(),
    SmoothedLabels(),
    JacobianPenalty(weight=0.01),
]


@pytest.mark.parametrize("objective", ALL, ids=lambda o: str(o.model_dump(exclude_defaults=True)))
def test_each_objective_trains_a_classifier_and_reports_the_guard(objective):
    method = "lora" if objective.kind in ("vat", "freelb", "jacobian") else "full"
    found = tuned((objective,), method=method, epochs=1)
    terms = found.history[0].terms
    assert 0.5 <= terms[f"{objective.kind}/confidence"] <= 1
    assert terms[f"{objective.kind}/feature_variance"] > 0
    assert terms[objective.kind] > 0
    plain = tuned(epochs=1, method=method)
    weights = list(zip(found.network.trained(), plain.network.trained(), strict=True))
    assert any(not torch.equal(mine, its) for mine, its in weights), "it has a gradient"


def test_the_constraint_lowers_the_distance_and_augmentation_alone_need_not():
    noise = (Perturbation(kind="embedding_gaussian", size=1.0),)

    def distance(weight):
        objective = Continuity(
            perturbations=noise, augmentation=0.5, weight=weight, warmup_fraction=0.0
        )
        terms = tuned((objective,), epochs=4).history[-1].terms
        return terms["continuity"], terms["continuity/d_embedding_gaussian_1"]

    free, held = distance(0.0), distance(20.0)
    assert held[0] < 0.5 * free[0] and held[0] == pytest.approx(held[1])


class Attributes(Objective):
    """The least that an interpreter has: two attributes, one weight."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hooks = (hook,)
        self.scale = nn.Parameter(torch.ones(()))

    def attributes(self, acts, is_token):
        return (self.scale * acts[self.hooks[0]][..., :2]).relu().mean(dim=1)

    def relevance(self, attributes, logits):
        return attributes * logits.amax(dim=-1, keepdim=True)

    def forward(self, step: Step) -> Loss:
        return Loss((self.scale - 1).square())


@pytest.mark.parametrize("of", ["attributes", "relevance"])
def test_attributes_of_an_interpreter_can_be_held_together(of):
    objective = Continuity(perturbations=NOISE, distances=(AttributeDistance(of=of),))
    with pytest.raises(TrainError, match="no objective of this training has attributes; add"):
        tuned((objective,), epochs=1)
    term = Term("interpreter", Attributes("blocks.1.hook_resid_post"))
    terms = tuned((objective,), terms=[term], epochs=1).history[0].terms
    assert 0 < terms["continuity/attributes"] <= 1


def test_what_does_not_fit_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="want at least one perturbation, such as typos"):
        Continuity()
    with pytest.raises(ValueError, match="typos is a noise of texts; want a severity"):
        Perturbation(kind="typos", size=0.1)
    with pytest.raises(TrainError, match=r"CrateBaseModel has no dropout.*set dropout: 0.1"):
        tuned((RDrop(),), family="crate")
    assert has_dropout(tiny("gpt2")) and not has_dropout(tiny("crate"))

    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    context = ObjectiveContext(Blind(), True, 10, 0, 4, 3)
    with pytest.raises(TrainError, match="vat moves token embeddings, and Blind has none"):
        VatTerm(VirtualAdversarial(), context)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("continuity")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(out=folder / "runs"))
    return path


def test_a_recipe_without_perturbations_is_told_at_its_place(recipe_file):
    with pytest.raises(RecipeError, match=r"objectives.*want at least one perturbation"):
        Recipe.load(recipe_file, "train.objectives=[{kind: continuity}]")
    typos = "train.objectives=[{kind: continuity, perturbations: [typos]}]"
    with pytest.raises(TrainError, match="changes texts, and language models are trained on rows"):
        train(Recipe.load(recipe_file, "name=typos", typos))


def test_a_stopped_language_model_under_constraints_goes_on_to_the_same_bits(recipe_file):
    objectives = (
        "train.objectives=[{kind: continuity, perturbations: [token_replace, embedding_gaussian], "
        "distances: [{on: logits, measure: js}, {on: hidden}]}, {kind: vat, every_steps: 2}, "
        "{kind: label_smoothing}, {kind: jacobian, weight: 0.0, every_steps: 6}]"
    )
    whole = train(Recipe.load(recipe_file, "name=whole", objectives, "train.steps=12"))
    recipe = Recipe.load(recipe_file, "name=stopped", objectives, "train.steps=12")
    with pytest.raises(TrainingStopped):
        train(recipe, progress=stop_at(10, signal.SIGTERM))
    resumed = train(recipe)
    columns = ["step", "split", "metric", "layer", "value"]
    assert resumed.metrics.select(columns).equals(whole.metrics.select(columns))
    names = {row["metric"] for row in whole.metrics.to_pylist()}
    assert {"objective/continuity/hidden", "objective/vat", "objective/jacobian"} <= names
