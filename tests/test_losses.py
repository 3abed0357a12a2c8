"""Losses for wrong labels, against values by hand and against each other where they meet."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy as torch_cross_entropy

from lmmono.probes import losses

# two rows, three classes: p = (1/2, 1/4, 1/4) with label 0, and (1/8, 1/8, 3/4) with label 1
P = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]], dtype=torch.float64).T
LOGITS, LABELS = P.log(), torch.tensor([0, 1])


def by_hand(*values):
    return pytest.approx(torch.tensor(values, dtype=torch.float64), rel=1e-12)


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 3, 20, generator=generator, dtype=torch.float64)
    return logits, torch.randint(3, (4, 20), generator=generator)


def test_cross_entropy_is_torchs():
    logits, labels = drawn()
    assert losses.cross_entropy(LOGITS, LABELS) == by_hand(math.log(2), math.log(8))
    wanted = torch_cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses.cross_entropy(logits, labels), wanted)


def test_label_smoothing_is_torchs_and_by_hand():
    logits, labels = drawn()
    first = 0.9 * math.log(2) + 0.1 / 3 * (math.log(2) + 2 * math.log(4))
    second = 0.9 * math.log(8) + 0.1 / 3 * (2 * math.log(8) - math.log(0.75))
    assert losses.label_smoothing(LOGITS, LABELS) == by_hand(first, second)
    wanted = torch_cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(losses.label_smoothing(logits, labels), wanted)


def test_generalised_cross_entropy_by_hand_and_at_its_ends():
    wanted = [(1 - 0.5**0.7) / 0.7, (1 - 0.125**0.7) / 0.7]
    assert losses.generalised_cross_entropy(LOGITS, LABELS) == by_hand(*wanted)
    assert losses.generalised_cross_entropy(LOGITS, LABELS, q=1.0) == by_hand(0.5, 0.875)
    almost = losses.generalised_cross_entropy(LOGITS, LABELS, q=1e-6)
    torch.testing.assert_close(almost, losses.cross_entropy(LOGITS, LABELS), rtol=1e-5, atol=0)


def test_symmetric_cross_entropy_by_hand():
    # RCE = -sum over wrong classes of p log 1e-4
    first = 6 * math.log(2) + 0.1 * 0.5 * 4 * math.log(10)
    second = 6 * math.log(8) + 0.1 * 0.875 * 4 * math.log(10)
    assert losses.symmetric_cross_entropy(LOGITS, LABELS) == by_hand(first, second)


def test_forward_correction_by_hand_and_without_noise():
    noise = torch.tensor([[0.8, 0.2, 0.0], [0.0, 0.9, 0.1], [0.3, 0.0, 0.7]], dtype=torch.float64)
    first = -math.log(0.5 * 0.8 + 0.25 * 0.3)  # given label 0: from class 0, or from class 2
    second = -math.log(0.125 * 0.2 + 0.125 * 0.9)
    assert losses.forward_corrected(LOGITS, LABELS, noise) == by_hand(first, second)
    logits, labels = drawn()
    none = torch.eye(3, dtype=torch.float64).expand(4, 3, 3)
    wanted = losses.cross_entropy(logits, labels)
    torch.testing.assert_close(losses.forward_corrected(logits, labels, none), wanted)


def test_elr_by_hand():
    targets = losses.early_targets(torch.zeros_like(LOGITS), LOGITS)
    assert targets.T.flatten() == by_hand(*(0.3 * P).T.flatten().tolist())
    agreement = [0.3 * (0.25 + 2 * 0.0625), 0.3 * (2 / 64 + 0.5625)]
    wanted = [
        ce + 3 * math.log(1 - a)
        for ce, a in zip((math.log(2), math.log(8)), agreement, strict=True)
    ]
    assert losses.early_regularised(LOGITS, LABELS, targets) == by_hand(*wanted)


def test_elr_pulls_harder_towards_what_was_said_before():
    said, targets = LOGITS.clone().requires_grad_(), P.clone()
    plain, elr = LOGITS.clone().requires_grad_(), LABELS
    losses.cross_entropy(plain, elr).sum().backward()
    losses.early_regularised(said, elr, targets).sum().backward()
    assert plain.grad is not None and said.grad is not None
    # row 1 is labelled 1 but the model said 2: ELR wants 2 more than cross entropy does
    assert said.grad[2, 1] < plain.grad[2, 1]


def test_mixup_is_the_cross_entropy_of_mixed_rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (20,), generator=generator)
    partners = torch.randperm(20, generator=generator)
    shares = torch.rand(20, generator=generator, dtype=torch.float64)
    mixed = shares[:, None] * x + (1 - shares[:, None]) * x[partners]
    one_hot = torch.nn.functional.one_hot(labels, 3).double()
    target = shares[:, None] * one_hot + (1 - shares[:, None]) * one_hot[partners]
    wanted = -(target * (mixed @ weight.T).log_softmax(dim=1)).sum(dim=1)
    found = losses.mixed_cross_entropy(weight @ x.T, labels, partners, shares)
    torch.testing.assert_close(found, wanted)


def test_rows_of_small_loss_are_as_many_as_asked():
    given = torch.tensor([[3.0, 1.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    found = losses.small_loss_rows(given, torch.tensor([2, 3]))
    assert found.tolist() == [[0, 1, 0, 1], [1, 1, 1, 0]]


def test_a_wrong_label_pulls_less_with_the_robust_losses():
    # the more certain the model is of another class, the larger the pull of cross entropy only
    pulls = {}
    for loss in (losses.cross_entropy, losses.generalised_cross_entropy):
        sizes = []
        for certainty in (2.0, 8.0):
            logits = torch.tensor([[0.0], [certainty]], dtype=torch.float64, requires_grad=True)
            loss(logits, torch.tensor([0])).sum().backward()
            assert logits.grad is not None
            sizes.append(float(logits.grad.abs().sum()))
        pulls[loss.__name__] = sizes
    assert pulls["cross_entropy"][1] > pulls["cross_entropy"][0]
    assert pulls["generalised_cross_entropy"][1] < 0.1 * pulls["generalised_cross_entropy"][0]
