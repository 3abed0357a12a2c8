"""Label noise: exact counts, never the own class, the same mask at a seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from lmmono.data.corruption.label_noise import (
    LABEL_NOISE,
    NoisyLabels,
    corrupt_labels,
    opinions,
    rate_at_margin,
    signal_margin,
    weak_opinions,
)
from lmmono.data.tasks.planted_tasks import planted_task
from lmmono.errors import DataError

N, C = 600, 4
LABELS = np.random.default_rng(0).integers(0, C, N)
MARGINS = np.random.default_rng(1).normal(size=N)
SECOND = (LABELS + np.random.default_rng(2).integers(1, C, N)) % C
REAL = np.where(np.random.default_rng(3).random(N) < 0.45, SECOND, LABELS)
MATRIX = np.array([[0.7, 0.1, 0.1, 0.1], [0.2, 0.8, 0, 0], [0, 0.3, 0.4, 0.3], [0, 0, 0.5, 0.5]])
INPUTS = {"matrix": MATRIX, "margins": MARGINS, "second": SECOND, "noisy": REAL}
RATES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4)


def noise(kind: str, rate: float | None, seed: int = 0) -> NoisyLabels:
    return corrupt_labels(LABELS, kind, rate, n_classes=C, seed=seed, **INPUTS)


@pytest.mark.parametrize("kind", LABEL_NOISE)
@pytest.mark.parametrize("rate", RATES)
def test_exactly_as_many_labels_flip_as_asked_and_none_to_its_own_class(kind, rate) -> None:
    made = noise(kind, rate)
    differ = made.labels != LABELS
    if kind == "matrix":
        sizes = np.bincount(LABELS, minlength=C)
        leaving = 1 - np.diag(MATRIX)
        scale = rate / (leaving @ sizes / N)
        wanted = [round(scale * share * size) for share, size in zip(leaving, sizes, strict=True)]
        assert np.bincount(LABELS[differ], minlength=C).tolist() == wanted
    else:
        assert differ.sum() == round(rate * N)
    assert np.array_equal(differ, made.flipped)
    assert np.array_equal(made.confusion, confusion_matrix(LABELS, made.labels))
    assert made.labels.min() >= 0 and made.labels.max() < C


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=60),
    st.floats(0, 1),
    st.sampled_from(["symmetric", "pair_flip"]),
    st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_counts_are_exact_for_any_labels_and_a_rate_that_flips_none_is_refused(
    labels: list[int], rate: float, kind: str, seed: int
) -> None:
    clean = np.array(labels)
    if rate > 0 and round(rate * len(labels)) == 0:
        with pytest.raises(DataError, match="flips none"):
            corrupt_labels(clean, kind, rate, n_classes=3, seed=seed)
        return
    made = corrupt_labels(clean, kind, rate, n_classes=3, seed=seed)
    assert (made.labels != clean).sum() == round(rate * len(labels))


@pytest.mark.parametrize("kind", LABEL_NOISE)
def test_rate_zero_is_the_clean_labels_to_the_bit_and_the_input_is_never_touched(kind) -> None:
    before = LABELS.copy()
    made = noise(kind, 0.0)
    assert made.labels.tobytes() == before.tobytes() and made.labels.dtype == before.dtype
    assert not made.flipped.any() and made.learnable
    noise(kind, 0.4).labels[:] = 0
    assert np.array_equal(before, LABELS)


@pytest.mark.parametrize("kind", LABEL_NOISE)
def test_the_noise_is_the_same_at_a_seed_and_grows_with_the_rate(kind) -> None:
    np.random.seed(1)  # the global state must not matter
    weaker = noise(kind, 0.1, seed=7)
    again = noise(kind, 0.1, seed=7)
    assert np.array_equal(weaker.labels, again.labels)
    stronger = noise(kind, 0.3, seed=7)
    assert stronger.flipped[weaker.flipped].all()
    assert np.array_equal(stronger.labels[weaker.flipped], weaker.labels[weaker.flipped])
    assert not np.array_equal(noise(kind, 0.1, seed=8).flipped, weaker.flipped)


def test_one_seed_gives_one_mask_whatever_the_kind_that_draws_evenly() -> None:
    masks = [noise(kind, 0.2, seed=3).flipped for kind in ("symmetric", "pair_flip", "annotator")]
    assert all(np.array_equal(mask, masks[0]) for mask in masks)


def test_symmetric_noise_spreads_over_the_other_classes_evenly() -> None:
    labels = np.zeros(30_000, np.int64)
    made = corrupt_labels(labels, "symmetric", 0.6, n_classes=4, seed=0)
    counts = np.bincount(made.labels, minlength=4)
    assert counts[0] == 12_000
    assert np.abs(counts[1:] - 6_000).max() < 5 * (18_000 * 2 / 9) ** 0.5


def test_pair_flips_go_to_the_next_class_and_annotators_to_the_second_choice() -> None:
    pair = noise("pair_flip", 0.3)
    assert (pair.labels[pair.flipped] == (LABELS[pair.flipped] + 1) % C).all()
    annotator = noise("annotator", 0.3)
    assert (annotator.labels[annotator.flipped] == SECOND[annotator.flipped]).all()


def test_instance_noise_flips_rather_where_the_margin_is_small() -> None:
    made = corrupt_labels(LABELS, "instance", 0.2, n_classes=C, seed=0, margins=MARGINS)
    assert MARGINS[made.flipped].mean() < MARGINS[~made.flipped].mean() - 0.5
    flat = corrupt_labels(LABELS, "instance", 0.2, n_classes=C, seed=0, margins=np.zeros(N))
    assert abs(MARGINS[flat.flipped].mean() - MARGINS.mean()) < 5 * (1 / 120) ** 0.5


def test_the_matrix_without_a_rate_flips_each_class_by_its_own_share() -> None:
    labels = np.repeat(np.arange(4), 10_000)
    made = corrupt_labels(labels, "matrix", None, n_classes=4, seed=0, matrix=MATRIX)
    shares = made.confusion / 10_000
    assert np.array_equal(np.diag(shares), np.diag(MATRIX))
    assert np.abs(shares - MATRIX).max() < 5 * (0.25 / 10_000) ** 0.5
    assert made.rate == pytest.approx((1 - np.diag(MATRIX)).mean())
    assert not made.learnable  # half of the last class says the third


def test_real_noise_is_what_was_given_or_an_exact_part_of_it() -> None:
    whole = noise("real", None)
    assert np.array_equal(whole.labels, REAL)
    part = noise("real", 0.1)
    assert part.flipped.sum() == 60
    assert np.array_equal(part.labels[part.flipped], REAL[part.flipped])
    with pytest.raises(DataError, match=r"the set's own is 0\.\d+"):
        noise("real", 0.6)


def test_the_margin_says_what_noise_leaves_and_learnable_when_nothing_is_left() -> None:
    assert signal_margin(0.45, 2) == pytest.approx(0.1)
    assert rate_at_margin(0.2, 100) == pytest.approx(0.792)
    assert rate_at_margin(0.1, 4) == pytest.approx(0.675)
    assert noise("symmetric", 0.4).learnable
    assert not noise("symmetric", 0.9).learnable
    assert not noise("pair_flip", 0.6).learnable


def test_a_weak_model_knows_its_doubts_and_its_second_choice() -> None:
    probabilities = np.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    view = opinions(probabilities, np.array([0, 0]))
    assert view.margins == pytest.approx([0.2, -0.3])
    assert view.second.tolist() == [1, 2]
    task = planted_task("planted_polarity", n_train=60, n_val=2, n_test=2)
    train = task.parts["train"]
    view = weak_opinions(train.texts, train.labels, n_classes=2)
    assert (view.second == 1 - train.labels).all()
    assert (view.margins > 0).mean() > 0.55  # negation is what words alone do not tell
    made = corrupt_labels(
        train.labels, "instance", 0.2, n_classes=2, seed=0, margins=view.margins, second=view.second
    )
    assert made.flipped.sum() == 12
    with pytest.raises(DataError, match="two texts of each class"):
        weak_opinions(train.texts[:3], np.array([0, 0, 1]), n_classes=2)


BAD_CALLS = [
    ({"kind": "symetric"}, "did you mean symmetric"),
    ({"rate": 1.5}, r"want a rate in \[0, 1\], got 1.5"),
    ({"rate": None}, "needs a rate"),
    ({"n_classes": 1}, "no other to flip to"),
    ({"n_classes": 3}, "label 3 is no class"),
    ({"labels": np.array([], np.int64)}, "no labels"),
    ({"labels": np.array([0, -1]), "rate": 0.5}, "label -1 is no class"),
    ({"kind": "matrix"}, "needs `matrix`"),
    ({"kind": "matrix", "matrix": np.eye(3)}, "want 4 x 4, got 3 x 3"),
    ({"kind": "matrix", "matrix": np.eye(4)}, "flips no label"),
    ({"kind": "matrix", "matrix": np.eye(4) * 2}, "rows sum to 1"),
    ({"kind": "matrix", "matrix": MATRIX, "rate": 0.9}, "want a rate of at most"),
    ({"kind": "instance"}, "needs `margins`"),
    ({"kind": "instance", "margins": np.zeros(3)}, "600 labels but 3 margins"),
    ({"kind": "instance", "margins": np.full(N, np.nan)}, "not finite"),
    ({"kind": "annotator"}, "needs `second`"),
    ({"kind": "annotator", "second": LABELS}, "own class of 600 labels"),
    ({"kind": "annotator", "second": LABELS + 1}, "holds what is no class"),
    ({"kind": "real"}, "needs `noisy`"),
    ({"kind": "real", "noisy": LABELS}, "no noise in them"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS, ids=[m for _, m in BAD_CALLS])
def test_what_cannot_be_done_is_said(changes: dict, message: str) -> None:
    call = {"labels": LABELS, "kind": "symmetric", "rate": 0.1, "n_classes": C, "seed": 0}
    with pytest.raises(DataError, match=message):
        corrupt_labels(**{**call, **changes})
