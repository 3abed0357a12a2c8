"""Labels cleaned before learning: found by cleanlab, outvoted by neighbours."""

import builtins
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from lmmono.errors import RobustnessError
from lmmono.probes.cleaning import outvoted, pruned, relabelled
from lmmono.probes.logistic import tuned_logistic
from lmmono.probes.problems import Problems


def drawn(rate=0.2, n=150, m=100):
    """Return one problem of three separate clouds, which labels are wrong, and test rows."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.arange(n + m + 300) % 3
    x = torch.randn(len(clean), 4, generator=generator)
    x[torch.arange(len(clean)), clean] += 4
    wrong = torch.rand(n + m, generator=generator) < rate
    given = torch.where(wrong, (clean[: n + m] + 1) % 3, clean[: n + m])
    y, y_val = given[None, :n], given[None, n:]
    return Problems(x[:n], y, x[n : n + m], y_val, 3, (0,)), wrong[:n], (x[n + m :], clean[n + m :])


def test_cleanlab_drops_the_wrong_labels_and_the_refit_is_better():
    problems, wrong, (x, clean) = drawn()
    probes = pruned(problems)
    assert probes.notes[0] is not None
    n_dropped = int(probes.notes[0].split()[0])
    assert 0.7 * int(wrong.sum()) <= n_dropped <= 1.3 * int(wrong.sum())
    assert probes.notes[0].endswith("of 150 labels dropped")
    assert probes.accuracy(x, clean) >= tuned_logistic(problems).accuracy(x, clean)
    assert probes.accuracy(x, clean) > 0.95


def test_a_dropped_row_is_as_if_it_were_not_there():
    problems, wrong, _ = drawn()
    kept = tuned_logistic(problems, kept=~wrong[None])
    other = problems.y.clone()
    other[0, wrong] = (other[0, wrong] + 1) % 3
    again = tuned_logistic(
        Problems(problems.x, other, problems.x_val, problems.y_val, 3, (0,)), kept=~wrong[None]
    )
    assert torch.equal(kept.weight, again.weight)


def test_neighbours_outvote_wrong_labels():
    problems, wrong, (x, clean) = drawn()
    probes = relabelled(problems)
    assert probes.notes[0] is not None
    n_changed = int(probes.notes[0].split()[0])
    assert abs(n_changed - int(wrong.sum())) <= 0.3 * int(wrong.sum())
    assert probes.accuracy(x, clean) > 0.95


def test_votes_by_hand_and_as_scikit_learns_classifier():
    labels = torch.tensor([0, 1, 1, 0])
    near = torch.tensor([[1, 2], [0, 2], [0, 3], [1, 2]])
    assert outvoted(labels, near, 2).tolist() == [1, 1, 0, 1], "row 1 has one vote each: it stays"
    problems, _, _ = drawn()
    x, y = problems.x.numpy(), problems.y[0].numpy()
    scaled = (x - x.mean(axis=0)) / x.std(axis=0)
    for i in (0, 5, 17, 100):
        rest = np.delete(np.arange(len(x)), i)
        peer = KNeighborsClassifier(n_neighbors=10).fit(scaled[rest], y[rest])
        votes = np.round(10 * peer.predict_proba(scaled[i : i + 1])[0]).astype(int)
        near = np.argsort(((scaled - scaled[i]) ** 2).sum(1), kind="stable")[1:11]
        assert np.bincount(y[near], minlength=3).tolist() == votes.tolist()
        voted = outvoted(problems.y[0], torch.from_numpy(np.tile(near, (len(x), 1))), 3)[i]
        assert votes[voted] == votes.max() or int(voted) == y[i]


def test_a_class_that_the_vote_takes_away_is_a_failure_that_says_so():
    problems, _, _ = drawn()
    y = torch.where(problems.y == 2, 1, problems.y)
    y[0, 2] = 2  # one text of class 2 among hundred others
    two = {"y": y.expand(2, -1).clone(), "y_val": problems.y_val.expand(2, -1), "seeds": (0, 1)}
    lone = replace(problems, **two)
    lone.y[1] = problems.y[0]
    probes = relabelled(lone)
    assert probes.failures == ("after cleaning: no training label is of class 2", None)
    assert probes.weight[0].isnan().all() and probes.weight[1].isfinite().all()


def test_few_rows_have_fewer_neighbours():
    x, y = torch.tensor([[0.0], [1.0], [5.0], [6.0]]), torch.tensor([[0, 0, 1, 1]])
    probes = relabelled(Problems(x, y, x, y, 2, (0,)))
    assert probes.failures[0] is not None or probes.notes[0] == "4 of 4 labels changed"


def test_without_cleanlab_the_error_says_what_to_install(monkeypatch):
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("cleanlab"):
            raise ImportError(name)
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RobustnessError, match=r"cleanlab needs.*lmmono\[noise\]"):
        pruned(drawn()[0])
