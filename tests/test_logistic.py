"""Logistic regression of many problems is scikit-learn's, each problem at each penalty."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from lmmono.errors import RobustnessError
from lmmono.probes.logistic import L2_PATH, basis, fit_path, tuned_logistic
from lmmono.probes.problems import Problems, choose

PATH = (100.0, 1.0, 0.03)


def drawn(n=120, d=12, n_classes=3, p=5, *, seed=0, dtype=torch.float64):
    """Return rows with unlike scales, and labels of p draws of noise."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + 3
    truth = torch.randn(d, n_classes, generator=generator, dtype=torch.float64)
    clean = ((x - 3) @ truth).argmax(dim=1)
    wrong = torch.rand(p, n, generator=generator) < torch.linspace(0, 0.4, p)[:, None]
    other = torch.randint(1, n_classes, (p, n), generator=generator)
    return x.to(dtype), torch.where(wrong, (clean + other) % n_classes, clean), clean


def standardised(x):
    return ((x - x.mean(dim=0)) / x.std(dim=0, correction=0)).numpy()


def peer(x, y, l2, weights=None):
    fit = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=100_000)
    return fit.fit(x, y.numpy(), sample_weight=weights)


@pytest.mark.parametrize(("n", "d", "n_classes"), [(120, 12, 2), (120, 12, 4), (30, 50, 3)])
def test_weights_are_scikit_learns(n, d, n_classes):
    x, y, _ = drawn(n, d, n_classes, 2)
    path = fit_path(x, y, n_classes=n_classes, l2=PATH, tolerance=1e-9)
    weight, bias = path.weights()
    mean, spread = x.mean(dim=0), x.std(dim=0, correction=0)
    scaled, shifted = weight * spread, bias + weight @ mean
    for i in range(2):
        for j, l2 in enumerate(PATH):
            wanted = peer(standardised(x), y[i], l2)
            coefficients, intercept = wanted.coef_, wanted.intercept_
            if n_classes == 2:  # its binary fit has one vector: the difference
                coefficients = np.concatenate([-coefficients, coefficients]) / 2
                intercept = np.concatenate([-intercept, intercept]) / 2
            np.testing.assert_allclose(scaled[i, j], coefficients, atol=2e-5)
            np.testing.assert_allclose(shifted[i, j], intercept - intercept.mean(), atol=2e-5)


def test_log_probabilities_are_those_of_the_weights():
    x, y, _ = drawn()
    path = fit_path(x, y[:2], n_classes=3, l2=PATH)
    weight, bias = path.weights()
    wanted = torch.einsum("nd,plcd->plnc", x, weight) + bias[:, :, None]
    torch.testing.assert_close(path.log_probabilities(x), wanted.log_softmax(dim=-1))


def test_weights_of_rows_are_scikit_learns_sample_weights():
    x, y, _ = drawn(p=2)
    weights = torch.rand(2, 120, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[0] = (weights[0] < 0.6).double()
    path = fit_path(x, y, n_classes=3, l2=PATH, weights=weights, tolerance=1e-9)
    found = path.log_probabilities(x).exp()
    for i in range(2):
        for j, l2 in enumerate(PATH):
            wanted = peer(standardised(x), y[i], l2, weights[i].numpy()).predict_proba(
                standardised(x)
            )
            np.testing.assert_allclose(found[i, j], wanted, atol=2e-5)


def test_float32_at_the_default_tolerance_agrees_on_test_rows():
    x, y, clean = drawn(1200, 40, 4, 4, dtype=torch.float32)
    path = fit_path(x[:400], y[:, :400], n_classes=4)
    found = path.log_probabilities(x[400:]).argmax(dim=-1)
    mean, spread = x[:400].mean(dim=0), x[:400].std(dim=0, correction=0)
    train, test = ((part - mean) / spread for part in (x[:400], x[400:]))
    for j in (2, 3, 4):
        right: list[float] = []
        for i in range(4):
            fit = LogisticRegression(C=1 / L2_PATH[j], tol=1e-6, max_iter=10_000)
            wanted = fit.fit(train.numpy(), y[i, :400].numpy()).predict(test.numpy())
            right.append(float((wanted == clean[400:].numpy()).mean()))
            assert (found[i, j].numpy() == wanted).mean() >= 0.99
        accuracy = (found[:, j] == clean[400:]).double().mean()
        assert accuracy == pytest.approx(np.mean(right), abs=0.002)


def test_each_problem_is_solved_as_if_alone_and_equal_calls_give_equal_bits():
    x, y, _ = drawn(p=7)
    how = {"n_classes": 3, "l2": PATH, "tolerance": 1e-9}
    together = fit_path(x, y, **how).log_probabilities(x)
    assert torch.equal(together, fit_path(x, y, **how).log_probabilities(x))
    alone = fit_path(x, y[3:4], **how).log_probabilities(x)
    torch.testing.assert_close(together[3:4].exp(), alone.exp(), atol=1e-5, rtol=0)


def test_a_dimension_that_never_changes_has_no_weight_and_scales_do_not_matter():
    x, y, _ = drawn()
    still = torch.cat([x * 1000, torch.full((120, 1), 7.3, dtype=torch.float64)], dim=1)
    path = fit_path(still, y, n_classes=3, l2=PATH)
    assert (path.weights()[0][..., -1] == 0).all()
    wanted = fit_path(x, y, n_classes=3, l2=PATH).log_probabilities(x)
    torch.testing.assert_close(path.log_probabilities(still), wanted)


def test_the_basis_turns_and_turns_back():
    for n, d in ((50, 8), (8, 50)):
        x = drawn(n, d)[0]
        on = basis(x)
        assert on.rows.shape == (n, min(n - 1, d) + 1)
        torch.testing.assert_close(on.coordinates(x), on.rows)
        gram = on.rows.T @ on.rows
        torch.testing.assert_close(gram, on.squares.diag(), atol=1e-8, rtol=1e-9)
        weight, bias = on.on_features(torch.ones(len(on.squares), dtype=torch.float64))
        torch.testing.assert_close(x @ weight + bias, on.rows.sum(dim=1))


def test_features_that_never_change_leave_the_bias():
    y = torch.tensor([[0, 0, 0, 1]])
    path = fit_path(torch.ones(4, 3), y, n_classes=2, l2=(1.0,), tolerance=1e-7)
    found = path.log_probabilities(torch.ones(1, 3)).exp().flatten()
    torch.testing.assert_close(found, torch.tensor([0.75, 0.25]), atol=1e-4, rtol=0)


def problems(n=100, m=60, p=4, **more):
    x, y, clean = drawn(n + m, p=p, dtype=torch.float32)
    return Problems(
        x[:n], y[:, :n], x[n:], y[:, n:], 3, tuple(range(p)), **{"clean_val": clean[n:], **more}
    )


def test_the_penalty_is_the_best_on_the_given_validation_labels():
    given = problems()
    path = fit_path(given.x, given.y, n_classes=3)
    said = path.log_probabilities(given.x_val)
    right = (said.argmax(dim=-1) == given.y_val[:, None]).double().mean(dim=-1)
    probes = tuned_logistic(given)
    for i in range(4):
        at = L2_PATH.index(min(L2_PATH, key=lambda l2: abs(l2 - float(probes.chosen_l2[i]))))
        assert right[i, at] == right[i].max()
    torch.testing.assert_close(
        probes.predict(given.x_val)[0],
        said[0, L2_PATH.index(min(L2_PATH, key=lambda v: abs(v - float(probes.chosen_l2[0]))))],
        atol=1e-4,
        rtol=1e-4,
    )


def test_among_equals_the_least_loss_and_then_the_strongest_penalty_is_chosen():
    sure, unsure, wrong = [0.9, 0.1], [0.6, 0.4], [0.2, 0.8]
    p = torch.tensor([[[unsure], [sure], [sure], [wrong]]])
    labels, rows = torch.tensor([[0]]), torch.ones(1, 1, dtype=torch.bool)
    assert choose(p.log(), labels, rows).tolist() == [1]
    assert choose(p.log(), labels, rows & False).tolist() == [0], "without a row all are equal"


def test_rows_outside_a_problem_change_nothing():
    some = torch.zeros(4, 100, dtype=torch.bool)
    some[:2, :40], some[2:, 30:90] = True, True
    half = torch.zeros(4, 60, dtype=torch.bool)
    half[:, :30] = True
    given = problems(w=some, w_val=half)
    found = tuned_logistic(given)
    for i in range(4):
        rows, x_val = some[i], given.x_val[:30]
        only = Problems(
            given.x[rows], given.y[i : i + 1, rows], x_val, given.y_val[i : i + 1, :30], 3, (i,)
        )
        wanted = tuned_logistic(only)
        assert found.chosen_l2[i] == wanted.chosen_l2[0]
        torch.testing.assert_close(found.weight[i], wanted.weight[0], atol=5e-3, rtol=1e-2)


def test_what_cannot_be_learned_is_a_failure_among_others_and_alone():
    given = problems()
    y, w = given.y.clone(), torch.ones(4, 100, dtype=torch.bool)
    y[0], w[1, 2:] = 1, False
    y[2][y[2] == 2] = 0
    mixed = Problems(given.x, y, given.x_val, given.y_val, 3, given.seeds, w=w)
    probes = tuned_logistic(mixed)
    assert probes.failures == (
        "all 100 training labels are class 1",
        "2 training examples for 3 classes",
        "no training label is of class 2",
        None,
    )
    accuracy = probes.accuracy(given.x_val, given.y_val[3])
    assert accuracy[:3].isnan().all() and accuracy[3] > 0.5
    assert probes.weight[:3].isnan().all() and probes.chosen_l2[:3].isnan().all()
    alone = tuned_logistic(mixed.subset([0]))
    assert alone.failures == probes.failures[:1] and alone.weight.isnan().all()


def test_features_and_labels_that_do_not_fit_are_errors_that_say_where():
    given = problems()
    x = given.x.clone()
    x[7, 2] = torch.nan
    with pytest.raises(RobustnessError, match="x has 1 rows that are not finite.*row 7"):
        Problems(x, given.y, given.x_val, given.y_val, 3, given.seeds)
    with pytest.raises(RobustnessError, match="y has labels 0 to 2, want 0 to 1"):
        Problems(given.x, given.y, given.x_val, given.y_val, 2, given.seeds)
    with pytest.raises(RobustnessError, match=r"seeds has shape \(1,\), want \(4,\)"):
        Problems(given.x, given.y, given.x_val, given.y_val, 3, (0,))
    with pytest.raises(RobustnessError, match="1 classes, want at least 2"):
        Problems(given.x, given.y * 0, given.x_val, given.y_val * 0, 1, given.seeds)
