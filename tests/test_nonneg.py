"""Non-negative maps, head and cross entropy: against explicit logits, SciPy and scikit-learn."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from test_learners import drawn, same
from torch.nn.functional import cross_entropy

from lmmono.methods.nonneg import L2_GRID, MAPS, NonNegativeHead, nonneg_logistic, rep_relu
from lmmono.probes.probe_jobs import JudgedPart, fit_probes, which_right


def test_the_head_is_the_cross_entropy_of_its_explicit_logits():
    torch.manual_seed(0)
    head = NonNegativeHead(5, 3)
    with torch.no_grad():
        head.weight[0, :2] = -1.0
    e, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 1])
    want, w = torch.zeros(4, 3), head.weight.detach()
    for i in range(4):
        for c in range(3):
            want[i, c] = sum(max(float(e[i, j]), 0) * max(float(w[c, j]), 0) for j in range(5))
    torch.testing.assert_close(head(e), want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(cross_entropy(head(e), y), cross_entropy(want, y))
    cross_entropy(head(e), y).backward()
    assert (head.weight.grad[0, :2] == 0).all() and (head.weight.grad[0, 2:] != 0).any()
    assert [name for name, _ in head.named_parameters()] == ["weight"], "no bias"
    assert (NonNegativeHead(5, 3).weight >= 0).all()


def test_rep_relu_is_relu_forward_and_gelu_backward():
    z = torch.tensor([-2.0, -0.5, 0.0, 1.5], requires_grad=True)
    assert torch.equal(rep_relu(z), torch.relu(z))
    (got,) = torch.autograd.grad(rep_relu(z).sum(), z)
    (want,) = torch.autograd.grad(torch.nn.functional.gelu(z).sum(), z)
    assert torch.equal(got, want) and got[2] == 0.5
    for name, function in MAPS.items():
        lowest = float(function(torch.linspace(-9, 9, 99)).min())
        assert lowest >= 0 or name in ("gelu", "leakyrelu"), name


def test_the_learner_finds_the_minimum_of_its_problem():
    problems, _ = drawn(p=1)
    (penalty,) = (1.0,)
    probes = nonneg_logistic(problems, l2=(penalty,))
    x, y = problems.x.clamp_min(0).double(), problems.y[0]
    size = x.square().mean(0).sqrt()

    def loss(flat):
        w = torch.tensor(flat, dtype=torch.float64).reshape(3, -1).requires_grad_()
        value = cross_entropy(x / size @ w.clamp_min(0).T, y, reduction="sum")
        value = value + penalty / 2 * w.clamp_min(0).square().sum()
        value.backward()
        return value.item(), w.grad.numpy().ravel()

    found = minimize(loss, np.full(3 * 6, 0.5), jac=True, bounds=[(0, None)] * 18, tol=1e-14)
    got = probes.weight[0].double() * size
    assert (probes.weight >= 0).all() and (probes.weight == 0).any() and (probes.bias == 0).all()
    torch.testing.assert_close(got, torch.tensor(found.x).reshape(3, -1), atol=2e-3, rtol=1e-2)
    assert loss(got.numpy().ravel())[0] == pytest.approx(found.fun, rel=1e-6)


def test_it_learns_the_same_bits_again_and_reads_what_is_above_zero():
    problems, (x, clean) = drawn(rate=0.1)
    one, again = nonneg_logistic(problems), nonneg_logistic(copy.deepcopy(problems))
    assert same(one, again) and all(
        float(value) in torch.tensor(L2_GRID) for value in one.chosen_l2
    )
    assert torch.equal(one.predict(x), one.predict(x.clamp_min(0)))
    right = [int(each.sum()) for each in which_right(one, JudgedPart(x.numpy(), clean.numpy()))]
    assert right == [round(float(a) * len(x)) for a in one.accuracy(x, clean)]
    few = fit_probes(problems, "nonneg_ce", budget=3)
    assert few.reads == "positive" and ((few.weight != 0).any(dim=1).sum(dim=1) <= 3).all()
    assert fit_probes(problems, "logistic").reads == "features"
    hopeless = replace(problems, x=-problems.x.abs(), x_val=-problems.x_val.abs())
    assert (nonneg_logistic(hopeless).weight == 0).all(), "nothing is above zero"
