"""FLINT's losses and measures against numbers worked out by hand, to 1e-4."""

import math

import numpy as np
import pytest
import torch

from lmmono.methods import flint_losses as losses
from lmmono.methods import flint_measures as measures

TWO = torch.tensor([[8.0, 0, 0, 0], [0, 8.0, 0, 0]])


def near(value: float) -> object:
    return pytest.approx(value, abs=1e-4)


def test_conciseness_and_diversity_on_two_one_hot_texts():
    assert float(losses.conciseness(TWO)) == near(0.009049)
    assert float(losses.diversity(TWO, "paper")) == near(0.783242)
    assert float(losses.mean_l1(TWO)) == near(2.0)
    assert float(losses.diversity(TWO, "norm")) == near(math.log(2))


def test_output_fidelity_as_the_code_and_as_the_paper_has_it():
    h, f = torch.tensor([[2.0, 0, -1]]), torch.tensor([[1.0, 1, 0]])
    assert float(losses.output_fidelity(h, f)) == near(1.480571)
    assert float(losses.paper_output_fidelity(h, f)) == near(0.904005)


def test_the_teacher_of_output_fidelity_gets_no_gradient():
    h, f = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    losses.output_fidelity(h, f).backward()
    assert f.grad is None and h.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["paper", "mi", "norm"])
def test_dead_attributes_cost_nothing_and_gain_nothing(kind):
    dead = torch.zeros(8, 24)
    entropies = losses.conciseness(dead) - losses.diversity(dead, kind)
    assert float(entropies) == near(0.0) and float(losses.mean_l1(dead)) == 0


@pytest.mark.parametrize(
    ("n", "at_1", "at_4", "at_8", "at_12"),
    [
        (24, 3.142, 1.537, 0.069, 0.002),
        (64, 4.144, 2.910, 0.186, 0.005),
        (256, 5.541, 5.030, 0.712, 0.020),
        (768, 6.642, 6.445, 1.866, 0.061),
    ],
)
def test_entropy_is_flat_until_attributes_are_large(n, at_1, at_4, at_8, at_12):
    one = torch.zeros(n)
    one[0] = 1.0
    values = [float(losses.entropy(size * one)) for size in (1, 4, 8, 12)]
    np.testing.assert_allclose(values, [at_1, at_4, at_8, at_12], atol=6e-4)
    scaled = losses.conciseness(one[None], scale=math.log(n))
    assert float(scaled) < values[0], "a scale of log J makes it sharp"


def test_the_summed_l1_is_least_with_every_attribute_dead_and_the_mean_is_not():
    sizes = torch.linspace(0.0, 14.0, 1401)
    one = torch.zeros(1401, 24)
    one[:, 0] = sizes
    entropy = losses.entropy(one)
    for eta, best in ((0.5, 9.2), (1.0, 8.4), (3.0, 7.2), (5.0, 6.5)):
        assert float(sizes[(entropy + eta * one.sum(-1)).argmin()]) == 0.0
        assert float(sizes[(entropy + eta * one.mean(-1)).argmin()]) == pytest.approx(best, abs=0.1)


def test_diversity_by_the_number_of_attributes_that_are_used():
    of = {kind: [] for kind in ("paper", "mi", "norm")}
    for k in (1, 2, 4, 8, 12, 24):
        phi = torch.zeros(24, 24)
        phi[torch.arange(24), torch.arange(24) % k] = 8.0
        for kind, values in of.items():
            values.append(float(losses.conciseness(phi) if kind == "mi" else 0.0))
            values[-1] = float(losses.diversity(phi, kind)) - values[-1]
    np.testing.assert_allclose(of["paper"], [0.07, 1.55, 2.71, 3.06, 3.13, 3.18], atol=6e-3)
    np.testing.assert_allclose(of["mi"], [0.0, 0.69, 1.38, 2.07, 2.46, 3.10], atol=0.08)
    np.testing.assert_allclose(of["norm"], np.log([1, 2, 4, 8, 12, 24]), atol=1e-4)


def test_a_small_batch_underestimates_diversity_and_a_running_mean_does_not():
    generator = torch.Generator().manual_seed(0)
    phi = 8.0 * torch.eye(24)[torch.randint(24, (400, 64), generator=generator)]
    for n, wanted in ((4, 2.46), (8, 2.92), (16, 3.07), (64, 3.16)):
        values = [float(losses.diversity(batch[:n], "paper")) for batch in phi]
        assert np.mean(values) == pytest.approx(wanted, abs=0.03)
    running = losses.usage(phi.flatten(0, 1))
    assert float(losses.diversity(phi[0, :4], "paper", mean=running)) == near(math.log(24))


def test_decoder_losses_by_hand():
    log_p = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]]).log()
    counts = torch.tensor([[2.0, 0, 1], [0, 0, 0]])
    wanted = -(2 * math.log(0.5) + math.log(0.25)) / 3
    assert float(losses.word_loss(log_p, counts)) == near(wanted)
    assert float(losses.word_loss(log_p, 0 * counts)) == 0.0
    made, target = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert float(losses.embedding_loss(made, target)) == near(1 - 1 / math.sqrt(2) + 0.5)
    used = torch.tensor([[True, True, False]])
    ids = torch.tensor([[0, 1, 2]])
    assert float(losses.token_loss(log_p[None, [0, 0, 1]], ids, used)) == near(
        -(math.log(0.5) + math.log(0.25)) / 2
    )


def test_relevance_and_conciseness_of_one_text():
    phi = np.array([[2.0, 0.5, 0.0, 3.0]])
    weight = np.array([[1.0, -2.0, 4.0, 0.5], [0.0, 1.0, 1.0, -1.0]]).T
    scores = phi @ weight
    np.testing.assert_allclose(scores, [[2.5, -2.5]])
    alpha = measures.contributions(phi, weight, scores.argmax(axis=1))
    np.testing.assert_allclose(alpha, [[2.0, -1.0, 0.0, 1.5]])
    assert alpha.sum() == near(scores.max())
    r = measures.relevance(alpha)
    np.testing.assert_allclose(r, [[1.0, -0.5, 0.0, 0.75]])
    assert measures.conciseness_at(r, 1.5) == 2.0


def test_conciseness_grows_with_tau_and_may_be_below_one_without_a_positive_head():
    random = np.random.default_rng(0)
    r = measures.relevance(random.normal(size=(50, 8)))
    curve = [measures.conciseness_at(r, tau) for tau in measures.TAUS]
    assert curve == sorted(curve) and curve[0] < 2
    absent = measures.relevance(np.array([[-3.0, 1.0]]))
    assert measures.conciseness_at(absent, 1.5) == 0.0
    assert measures.use(np.ones((1, 2)), absent, absent).absent == 1.0


def test_global_relevance_is_over_texts_on_which_both_models_agree():
    r = np.array([[1.0, 0.0], [0.5, 1.0], [1.0, 0.2]])
    classes, agree = np.array([0, 0, 1]), np.array([True, True, False])
    matrix = measures.global_relevance(r, classes, agree, 3)
    np.testing.assert_allclose(matrix[0], [0.75, 0.5])
    assert np.isnan(matrix[1:]).all()


def test_use_of_attributes_by_hand():
    phi = np.array([[2.0, 2.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    matrix = np.array([[0.9, 0.3, 0.0], [0.1, 0.3, np.nan]])
    found = measures.use(phi, measures.relevance(phi), matrix)
    assert found.dead == near(1 / 3) and found.effective == near(2.0)
    assert found.exclusivity == near((0.9 + 0.5) / 2) and found.redundancy == near(1.0)
    dead = measures.use(np.zeros((3, 2)), np.zeros((3, 2)), np.full((2, 2), np.nan))
    assert dead.dead == 1.0 and math.isnan(dead.effective) and math.isnan(dead.exclusivity)


def test_fidelity_counts_the_texts_asked_for_and_divergence_is_zero_of_the_same():
    ours, theirs = np.eye(3)[[0, 1, 2, 0]], np.eye(3)[[0, 1, 1, 1]]
    assert measures.fidelity(ours, theirs) == (0.5, 4)
    wrong = np.array([False, False, True, False])
    assert measures.fidelity(ours, theirs, wrong) == (0.0, 1)
    assert math.isnan(measures.fidelity(ours, theirs, wrong & False)[0])
    log_p = np.log([[0.5, 0.5], [0.9, 0.1]])
    assert measures.divergence(log_p, log_p) == near(0.0)
    assert measures.divergence(log_p, log_p[::-1].copy()) == near(
        (0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)) / 2
        + (0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)) / 2
    )


def test_two_runs_are_matched_one_to_one_whatever_their_order():
    phi = np.random.default_rng(0).random((60, 5))
    assert measures.matched_correlation(phi, phi[:, [3, 1, 4, 0, 2]]) == near(1.0)
    assert measures.matched_correlation(phi, phi[::-1].copy()) < 0.6
    assert measures.matched_correlation(phi, np.zeros((60, 5))) == 0.0


def test_what_an_edit_does_to_attributes_by_hand():
    before, after = np.array([[2.0, 0.0], [1.0, 1.0]]), np.array([[0.0, 2.0], [1.0, 1.0]])
    np.testing.assert_allclose(measures.attribute_distance(before, after), [1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(measures.relevance_distance(before, after), [1.0, 0.0], atol=1e-6)
    assert measures.flips(before, after) == 0.5
    r, changed = measures.relevance(before), measures.relevance(after)
    assert measures.overlap(r, changed, 1.5) == near((0.0 + 1.0) / 2)
