"""Monosemanticity up and down: each formula against a hand calculation, each gradient."""

import itertools

import lookup_model
import numpy as np
import pytest
import torch
from small_models import tiny
from test_finetuning import TRAIN, VAL

from lmmono.methods.penalties import (
    ReversedDeactivationTerm,
    deactivated,
    hoyer_density,
    mono_scores,
    squared_correlation,
    squared_cosine,
)
from lmmono.probes.finetuning import FineTuning, finetune
from lmmono.recipe.objective_settings import (
    Decorrelation,
    MonoScore,
    ReversedDeactivation,
    SparsePenalty,
)
from lmmono.training.objectives import ObjectiveContext


def drawn(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(30, 5), (5, 30)])
def test_squared_correlation_is_numpys_off_the_diagonal(shape):
    acts = drawn(*shape)
    corr = np.corrcoef(acts.numpy().astype(float), rowvar=False)
    d = shape[1]
    wanted = ((corr - np.eye(d)) ** 2).sum() / d**2
    assert squared_correlation(acts).item() == pytest.approx(wanted, abs=1e-4)
    dead = torch.cat([acts, torch.zeros(shape[0], 1)], dim=1)
    again = squared_correlation(dead).item() * (d + 1) ** 2 / d**2
    assert again == pytest.approx(wanted, abs=1e-4), "a dead unit correlates with nothing"


def test_squared_cosine_is_the_mean_over_pairs_of_tokens():
    acts = drawn(7, 4).abs()
    pairs = list(itertools.permutations(range(7), 2))
    cosines = np.array(
        [torch.nn.functional.cosine_similarity(acts[i], acts[j], dim=0).item() for i, j in pairs]
    )
    value, decorrelation = squared_cosine(acts)
    assert value.item() == pytest.approx((cosines**2).mean(), abs=1e-5)
    assert decorrelation.item() == pytest.approx(1 - cosines.mean(), abs=1e-5)


def test_hoyer_by_hand():
    # (3, 4, 0, 0): L1 7, L2 5, so (7/5 - 1) / (2 - 1) = 0.4; one active 0; all alike 1; none: out
    acts = torch.tensor([[3.0, 4, 0, 0], [0, 0, -9, 0], [2, 2, 2, 2], [0, 0, 0, 0]])
    assert hoyer_density(acts[:1]).item() == pytest.approx(0.4)
    assert hoyer_density(acts).item() == pytest.approx((0.4 + 0 + 1) / 3)


def test_mono_score_is_the_weighted_mean_cosine_of_pairs():
    acts, e = drawn(9, 3, seed=2).relu(), drawn(9, 5, seed=1)
    acts[:, 2] = 0.0
    acts[4, 2] = 1.0  # fires on one token: it has no pair
    scores, cosine = mono_scores(acts, e)
    unit = torch.nn.functional.normalize(e, dim=1)
    a = (acts - acts.amin(0)) / (acts.amax(0) - acts.amin(0))
    for unit_index in (0, 1):
        up = down = 0.0
        for i, j in itertools.permutations(range(9), 2):
            weight = float(a[i, unit_index] * a[j, unit_index])
            up, down = up + weight * float(unit[i] @ unit[j]), down + weight
        assert scores[unit_index].item() == pytest.approx(up / down, abs=1e-4)
    pairs = [float(unit[i] @ unit[j]) for i, j in itertools.permutations(range(9), 2)]
    assert cosine.item() == pytest.approx(np.mean(pairs), abs=1e-5) and len(scores) == 2


@pytest.mark.parametrize(("variant", "slope"), [("naive", 0.0), ("reversed", -1.0)])
def test_deactivation_puts_the_mean_and_turns_the_gradient(variant, slope):
    z = torch.tensor([[1.0, 5.0, 2.0]], requires_grad=True)
    mean = torch.tensor([0.5, 0.25, 0.125])
    chosen = torch.tensor([[False, True, False]])
    changed = deactivated(z, mean, chosen, variant)
    assert changed.tolist() == [[1.0, 0.25, 2.0]]
    changed.sum().backward()
    assert z.grad is not None and z.grad.tolist() == [[1.0, slope, 1.0]]


def test_running_statistics_are_a_moving_average_of_batches():
    model = tiny("gpt2")
    settings = ReversedDeactivation(hooks=("blocks.0.mlp.hook_post",), memory=0.75, share=0.25)
    context = ObjectiveContext(model, False, 10, 0, 16)
    term = ReversedDeactivationTerm(settings, context)
    (watch,) = term.edits().values()
    width = len(term.mean_0)
    first, second = (drawn(12, width, seed).view(3, 4, width) for seed in (3, 4))
    watch(first)
    changed = watch(second)
    means = [batch.flatten(0, 1).mean(0) for batch in (first, second)]
    variances = [batch.flatten(0, 1).var(0, correction=0) for batch in (first, second)]
    torch.testing.assert_close(term.mean_0, 0.75 * means[0] + 0.25 * means[1])
    torch.testing.assert_close(term.variance_0, 0.75 * variances[0] + 0.25 * variances[1])
    # the second batch was judged by the first one's statistics alone
    scale = (second - means[0]).square() / variances[0]
    best = scale.topk(round(0.25 * width), dim=-1).indices
    chosen = torch.zeros_like(second, dtype=torch.bool).scatter_(-1, best, True)
    torch.testing.assert_close(changed, torch.where(chosen, means[0].expand_as(second), second))


SETTINGS = [
    Decorrelation(weight=30.0),
    Decorrelation(form="samples", weight=30.0),
    SparsePenalty(weight=30.0),
    SparsePenalty(measure="hoyer", weight=30.0),
    MonoScore(weight=30.0),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.kind}-{s.model_dump()}"[:40])
@pytest.mark.parametrize("family", ["gpt2", "crate"])
def test_each_objective_moves_what_it_claims_to(settings, family):
    """Against the same term measured at weight 0, and turned round."""

    def last(weight):
        how = FineTuning(
            epochs=3, lr=1e-2, objectives=(settings.model_copy(update={"weight": weight}),)
        )
        found = finetune(
            tiny(family),
            TRAIN,
            VAL,
            n_classes=2,
            seed=0,
            settings=how,
            tokenizer=lookup_model.tokenizer(),
        )
        return found.history[-1].terms[settings.kind]

    assert last(settings.weight) < last(0.0)


def test_deactivation_acts_in_training_and_not_in_evaluation():
    how = FineTuning(epochs=1, objectives=(ReversedDeactivation(share=0.2),))
    tuned = finetune(
        tiny("gpt2"),
        TRAIN,
        VAL,
        n_classes=2,
        seed=0,
        settings=how,
        tokenizer=lookup_model.tokenizer(),
    )
    terms = tuned.history[0].terms
    assert terms["reversed_deactivation/changed_fraction"] == pytest.approx(0.2, abs=0.03)
    first, again = tuned.predict(VAL.texts), tuned.predict(VAL.texts)
    assert np.array_equal(first, again)
