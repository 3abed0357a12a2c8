"""Learners: what they minimise, what they choose on, and what they make of planted noise."""

import math
from dataclasses import replace

import pytest
import torch

from lmmono.errors import RobustnessError
from lmmono.probes.cleaning import noise_matrices, noise_rates
from lmmono.probes.gradient import (
    PLANS,
    ProbeBatch,
    co_teaching,
    descend,
    early_learning,
    mixup,
    plain,
)
from lmmono.probes.logistic import basis, fit_path
from lmmono.probes.losses import cross_entropy, symmetric_cross_entropy
from lmmono.probes.problems import Problems
from lmmono.registry.suites import LEARNERS, find_learner

N, M, D = 90, 60, 6
TRUE_RATE = 0.3


def drawn(kind="pair", p=2, rate=TRUE_RATE, n=N, m=M):
    """Return p problems of three classes with label noise in training and validation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n + m + 400, D, generator=generator)
    clean = (3 * x[:, :3] + 0.2 * x[:, 3:]).argmax(dim=1)
    wrong = torch.rand(p, n + m, generator=generator) < rate
    shift = 1 if kind == "pair" else torch.randint(1, 3, (p, n + m), generator=generator)
    y = torch.where(wrong, (clean[: n + m] + shift) % 3, clean[: n + m])
    problems = Problems(
        x[:n], y[:, :n], x[n : n + m], y[:, n:], 3, tuple(range(p)), clean_val=clean[n : n + m]
    )
    return problems, (x[n + m :], clean[n + m :])


def same(a, b):
    pairs = ((a.weight, b.weight), (a.bias, b.bias), (a.chosen_l2, b.chosen_l2))
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in pairs)


@pytest.fixture(scope="module")
def fitted():
    """Probes of every learner on two sound problems and one of a single class."""
    problems, test = drawn(p=3)
    y = problems.y.clone()
    y[2] = 1
    problems = Problems(
        problems.x, y, problems.x_val, problems.y_val, 3, (0, 1, 2), clean_val=problems.clean_val
    )
    return problems, test, {name: learner.load()(problems) for name, learner in LEARNERS.items()}


def test_every_learner_beats_chance_and_gives_a_reason_where_it_has_no_probe(fitted):
    _, (x, clean), found = fitted
    assert len(found) == len(LEARNERS) == 13
    for name, probes in found.items():
        accuracy = probes.accuracy(x, clean)
        # on 90 rows ten neighbours outvote right labels too, and small losses say little
        floor = 0.4 if name in ("knn_relabel", "co_teaching") else 0.6
        assert (accuracy[:2] > floor).all(), (name, accuracy)
        assert accuracy[2].isnan(), name
        assert probes.failures == (None, None, "all 90 training labels are class 1"), name
        assert len(probes.notes) == 3, name
        assert probes.predict(x)[:2].exp().sum(dim=-1).allclose(torch.ones(1)), name


@pytest.mark.parametrize("name", LEARNERS)
def test_problems_that_nobody_can_learn_are_failures_and_no_error(name):
    problems, _ = drawn()
    hopeless = replace(problems, y=torch.ones_like(problems.y))
    probes = LEARNERS[name].load()(hopeless)
    assert probes.failures == 2 * ("all 90 training labels are class 1",)
    assert probes.weight.isnan().all()


@pytest.mark.parametrize("name", ["logistic", "mixup", "co_teaching", "cleanlab"])
def test_equal_seeds_give_equal_bits(fitted, name):
    problems, _, found = fitted
    assert same(LEARNERS[name].load()(problems), found[name])


def test_other_seeds_draw_otherwise_where_something_is_drawn(fitted):
    problems, _, found = fitted
    other = Problems(
        problems.x, problems.y, problems.x_val, problems.y_val, 3, (7, 8, 9), clean_val=None
    )
    for name, draws in (("gce", False), ("mixup", True), ("co_teaching", True)):
        assert same(LEARNERS[name].load()(other), found[name]) != draws, name


def test_settings_are_chosen_on_noisy_labels(fitted):
    problems, _, found = fitted
    blind = Problems(problems.x, problems.y, problems.x_val, problems.y_val, 3, problems.seeds)
    for name in ("logistic", "gce"):
        assert same(LEARNERS[name].load()(blind), found[name]), f"{name} saw clean labels"
    with pytest.raises(RobustnessError, match="oracle_logistic: want Problems.clean_val"):
        LEARNERS["oracle_logistic"].load()(blind)
    assert problems.clean_val is not None
    clean_val = problems.clean_val
    accuracy = found["oracle_logistic"].accuracy(problems.x_val, clean_val)
    assert (accuracy[:2] >= found["logistic"].accuracy(problems.x_val, clean_val)[:2]).all()


def test_preconditioned_descent_ends_where_the_logistic_solver_does():
    problems, _ = drawn()
    on, l2 = basis(problems.x.double()), torch.tensor([10.0, 0.5], dtype=torch.float64)
    batch = ProbeBatch(problems.y, 3, (0, 1))
    start = torch.zeros(2, 3, D + 1, dtype=torch.float64)
    (weight,) = descend(
        on, plain(cross_entropy)(batch), start, l2=l2, bound=0.5, preconditioned=True, keep=(300,)
    ).unbind(dim=1)
    path = fit_path(on, problems.y, n_classes=3, l2=(10.0, 0.5), tolerance=1e-8)
    wanted = path.weights()[0][torch.arange(2), torch.arange(2)]
    found = on.on_features(weight - weight.mean(dim=1, keepdim=True))[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


def test_bounds_hold_so_that_no_step_goes_too_far():
    # largest eigenvalue of the loss' Hessian in the logits, over random logits and labels
    generator = torch.Generator().manual_seed(0)
    losses = {"label_smoothing": None, "gce": None, "sce": symmetric_cross_entropy}
    for name in losses:
        plan, worst = PLANS[name], 0.0
        for _ in range(60):
            logits = 3 * torch.randn(3, 1, generator=generator, dtype=torch.float64)
            batch = ProbeBatch(torch.randint(3, (1, 1), generator=generator), 3, (0,))
            objective = plan.objective(batch)

            def loss(z, objective=objective):
                return objective(z.view(1, 3, 1), 0).sum()

            hessian = torch.autograd.functional.hessian(loss, logits.flatten())
            worst = max(worst, float(torch.linalg.eigvalsh(hessian).max()))
        assert 0 < worst <= plan.bound, (name, worst)


def test_early_stopping_keeps_what_plain_descent_has_after_few_steps(fitted):
    plan = PLANS["early_stopping"]
    assert plan.keep[:4] == (1, 2, 3, 4) and plan.keep[-1] == 300
    assert list(plan.keep) == sorted(set(plan.keep))
    problems, _, _ = fitted
    on = basis(problems.x)
    batch = ProbeBatch(problems.y[:1], 3, (0,))
    weights = descend(
        on,
        plain(cross_entropy)(batch),
        torch.zeros(1, 3, D + 1),
        l2=torch.zeros(1),
        bound=0.5,
        preconditioned=False,
        keep=(1, 300),
    )[0]
    # the first step goes along the gradient at zero: from 1/3 each to the labels
    target = torch.nn.functional.one_hot(problems.y[0], 3).float().T
    slope = (target - 1 / 3) @ on.rows
    torch.testing.assert_close(weights[0], slope / (0.5 * on.squares.max()), atol=1e-5, rtol=1e-4)
    assert weights[1].norm() > 1.5 * weights[0].norm()


def test_elr_remembers_within_a_fit_and_not_beyond():
    problems, _ = drawn()
    objective = early_learning(ProbeBatch(problems.y, 3, (0, 1)))
    logits = torch.randn(2, 3, N, generator=torch.Generator().manual_seed(0))
    first, second = objective(logits, 0), objective(logits, 1)
    assert (second < first).all(), "agreement with itself is rewarded more each step"
    assert torch.equal(objective(logits, 0), first)


def test_mixup_draws_the_same_partners_for_every_penalty_and_others_for_other_seeds():
    logits = torch.randn(3, 3, N, generator=torch.Generator().manual_seed(0))
    logits[1:] = logits[0]
    y = torch.randint(3, (1, N), generator=torch.Generator().manual_seed(1)).expand(3, N)
    first, again, other = mixup(ProbeBatch(y, 3, (4, 4, 5)))(logits, 0)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_co_teaching_leaves_out_the_share_that_is_reckoned_wrong():
    y = torch.randint(3, (2, N), generator=torch.Generator().manual_seed(1))
    logits = torch.randn(2, 3, N, generator=torch.Generator().manual_seed(0), requires_grad=True)
    objective = co_teaching(ProbeBatch(y, 3, (0, 1), rates=(0.4, 0.4)))
    for step, share in ((0, 1.0), (50, 0.8), (100, 0.6), (250, 0.6)):
        used = (objective(logits, step) > 0).sum(dim=1) / N
        assert ((used - 0.5 * share).abs() < 0.12).all(), "half of the rows are seen per step"


def test_co_teaching_learns_from_the_rows_that_the_peer_finds_easy():
    # probe 0 finds rows 0..9 easy, probe 1 rows 10..19; each must learn from the other's
    logits = torch.zeros(2, 2, 20, dtype=torch.float64)
    logits[0, 0, :10], logits[1, 0, 10:] = 5.0, 5.0
    objective = co_teaching(
        ProbeBatch(torch.zeros(2, 20, dtype=torch.long), 2, (0, 1), rates=(0.5,) * 2)
    )
    taught = [torch.zeros(20, dtype=torch.bool) for _ in range(2)]
    for _ in range(40):
        losses = objective(logits, 1000)
        for probe in range(2):
            taught[probe] |= losses[probe] > 0
    # of some ten rows seen about half are the peer's easy ones, and half are kept
    assert taught[0][10:].all() and taught[1][:10].all()
    assert taught[0][:10].sum() < 10 or taught[1][10:].sum() < 10


def test_forward_correction_undoes_flips_that_tuned_logistic_follows():
    # 55 % of class 0 is given as class 1: the given labels' own best guess is wrong there
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 2, generator=generator)
    clean = (x[:, 0] > 0).long()
    flips = (torch.rand(900, generator=generator) < 0.55) & (clean == 0)
    given = torch.where(flips, 1, clean)[None]
    noise = torch.tensor([[[0.45, 0.55], [0.0, 1.0]]])
    problems = Problems(
        x[:300], given[:, :300], x[300:500], given[:, 300:500], 2, (0,), noise=noise
    )
    corrected = LEARNERS["forward"].load()(problems).accuracy(x[500:], clean[500:])
    plainly = LEARNERS["logistic"].load()(problems).accuracy(x[500:], clean[500:])
    assert corrected > 0.9 and plainly < 0.75
    nothing = Problems(
        x[:300], given[:, :300], x[300:500], given[:, 300:500], 2, (0,),
        noise=torch.full((1, 2, 2), 0.5),
    )  # fmt: skip
    (failure,) = LEARNERS["forward"].load()(nothing).failures
    assert "noise matrix cannot be inverted" in failure


def test_noise_is_estimated_from_noisy_labels_alone():
    problems, _ = drawn("any", n=600, m=400)
    wanted = torch.eye(3) * (1 - 1.5 * TRUE_RATE) + TRUE_RATE / 2
    for found in noise_matrices(problems):
        assert found.sum(dim=1).allclose(torch.ones(3))
        assert (found - wanted).abs().max() < 0.2
    for rate in noise_rates(problems):
        assert TRUE_RATE - 0.1 < rate < TRUE_RATE + 0.15


def test_an_unknown_learner_is_told_with_the_nearest():
    with pytest.raises(RobustnessError, match="learner 'logistics' .*did you mean logistic"):
        find_learner("logistics")
    assert find_learner("sce").name == "sce"
    assert math.isclose(PLANS["sce"].bound, 0.5 * (6 + 0.1 * 4 * math.log(10)))
