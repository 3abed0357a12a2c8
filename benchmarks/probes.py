"""Logistic probes of many label draws over the full L2 path: lmmono, its floor, scikit-learn.

    OMP_NUM_THREADS=1 python benchmarks/probes.py [--problems 1000] [--peers 5]

1,000 problems share 2,000 rows of 768 dimensions (a spectrum that falls like those of language
models) and four classes; their labels are draws of symmetric noise at five rates. Each is fitted at
the ten penalties of LogisticRegressionCV, and one penalty is chosen on noisy validation labels.

Seconds are processor time of one thread, which other work on the machine lengthens less than it
does wall time. scikit-learn fits `--peers` problems in a loop, each rate in turn, and is scaled to
all. The floor is 4 n d C operations per problem and gradient, for the gradients that lmmono took,
at the rate of the two matrix products that a gradient needs, measured before and after.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lmmono.probes.logistic import AT_ONCE, L2_PATH, PenaltyPath, basis, fit_path
from lmmono.probes.problems import choose

T = TypeVar("T")

N, M, D, C = 2000, 500, 768, 4
RATES = (0.0, 0.1, 0.2, 0.3, 0.45)


def planted(n_problems: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows, their classes, and noisy ones for training and validation."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, D + 1) ** -0.5
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    codes = torch.randn(N + M + 10_000, D, generator=generator) * spectrum
    signal = codes @ torch.randn(D, C, generator=generator)
    signal = 4 * signal / signal.std() + torch.randn(len(codes), C, generator=generator)
    clean = signal.argmax(dim=1)
    rates = torch.tensor(RATES)[torch.arange(n_problems) % len(RATES)]
    wrong = torch.rand(n_problems, N + M, generator=generator) < rates[:, None]
    other = torch.randint(1, C, wrong.shape, generator=generator)
    noisy = torch.where(wrong, (clean[: N + M] + other) % C, clean[: N + M])
    return codes @ turn, clean, noisy[:, :N], noisy[:, N:]


def timed(function: Callable[[], T]) -> tuple[float, T]:
    began = time.process_time()
    result = function()
    return time.process_time() - began, result


def product_rate(n: int) -> float:
    """Return operations per second of the products of a gradient, n problems together."""
    rows, weight = torch.randn(N, D + 1), torch.randn(n * (C - 1), D + 1)
    seconds = [timed(lambda: (weight @ rows.T) @ rows)[0] for _ in range(6)][1:]
    return 4 * N * (D + 1) * n * (C - 1) / float(np.median(seconds))


def tuned_accuracy(said: Tensor, noisy_val: Tensor, said_test: Tensor, clean: Tensor) -> Tensor:
    """Return test accuracy of the penalty chosen on noisy validation labels."""
    at = choose(said, noisy_val, torch.ones_like(noisy_val, dtype=torch.bool))
    right = (said_test.argmax(dim=-1) == clean).double().mean(dim=-1)
    return right[torch.arange(len(at)), at]


def chosen(path: PenaltyPath, val: Tensor, labels: Tensor) -> None:
    """Choose the penalty of every problem, as `tuned_logistic` does."""
    for turned, given in zip(path.turned.split(AT_ONCE), labels.split(AT_ONCE), strict=True):
        said = PenaltyPath(path.basis, path.l2, turned, path.n_iterations).log_probabilities(val)
        choose(said, given, torch.ones_like(given, dtype=torch.bool))


@dataclass(frozen=True)
class Peer:
    """scikit-learn's path of one problem."""

    seconds: float
    n_iterations: int
    said: tuple[Tensor, Tensor]
    """Log-probabilities [1, penalties, rows, classes] of validation and test rows."""


def peer_path(rows: Sequence[Tensor], y: Tensor) -> Peer:
    """Fit scikit-learn's LogisticRegression at every penalty; only fitting is timed."""
    seconds, n_iterations, said = 0.0, 0, ([], [])
    for l2 in L2_PATH:
        learner = LogisticRegression(C=1 / l2, max_iter=1000)
        spent, fit = timed(lambda learner=learner: learner.fit(rows[0].numpy(), y.numpy()))
        seconds += spent
        n_iterations += int(fit.n_iter_.max())
        for each, part in zip(said, rows[1:], strict=True):
            logits = torch.from_numpy(fit.decision_function(part.numpy())).float()
            each.append(logits.log_softmax(dim=-1))
    return Peer(seconds, n_iterations, tuple(torch.stack(each)[None] for each in said))


def compare(
    peer: Peer, path: PenaltyPath, rows: Sequence[Tensor], noisy_val: Tensor, clean: Tensor
):
    """Return accuracies of lmmono and the peer: at every penalty, and at the chosen one."""
    said = [(path.log_probabilities(rows[1]), path.log_probabilities(rows[2])), peer.said]
    right = [(test.argmax(dim=-1) == clean).double().mean(dim=-1)[0] for _, test in said]
    tuned = [float(tuned_accuracy(val, noisy_val, test, clean)[0]) for val, test in said]
    return torch.stack(right), tuned


def peers(
    rows: Sequence[Tensor],
    path: PenaltyPath,
    noisy: tuple[Tensor, Tensor],
    clean: Tensor,
    n_peers: int,
) -> float:
    """Print how scikit-learn does on the first problems; return its seconds per problem."""
    mean, spread = rows[0].mean(dim=0), rows[0].std(dim=0, correction=0)
    scaled = [(part - mean) / spread for part in rows]
    seconds, gaps, differences = 0.0, [], []
    for i in range(n_peers):
        peer = peer_path(scaled, noisy[0][i])
        mine = PenaltyPath(
            path.basis, path.l2, path.turned[i : i + 1], path.n_iterations[i : i + 1]
        )
        right, tuned = compare(peer, mine, rows, noisy[1][i : i + 1], clean)
        seconds += peer.seconds
        gaps.append(right[0] - right[1])
        differences.append(tuned[0] - tuned[1])
        print(
            f"  rate {RATES[i % len(RATES)]:.2f}: tuned accuracy {tuned[0]:.4f}, scikit-learn "
            f"{tuned[1]:.4f}; iterations {int(mine.n_iterations.sum())} and {peer.n_iterations}"
        )
    gap = 100 * torch.stack(gaps)
    print("  points of accuracy, lmmono less scikit-learn, mean over problems by penalty:")
    print("  " + " ".join(f"{value:+.2f}" for value in gap.mean(dim=0).tolist()))
    print(
        f"  largest of one problem {gap.abs().max():.2f}; tuned {100 * np.mean(differences):+.2f}"
    )
    return seconds / n_peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--peers", type=int, default=len(RATES))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    x, clean, noisy, noisy_val = planted(asked.problems)
    rows, test_clean = (x[:N], x[N : N + M], x[N + M :]), clean[N + M :]
    rates = [product_rate(min(AT_ONCE, asked.problems))]
    shared, on = timed(lambda: basis(rows[0]))
    own, path = timed(lambda: fit_path(on, noisy, n_classes=C))
    choosing, _ = timed(lambda: chosen(path, rows[1], noisy_val))
    rates.append(product_rate(min(AT_ONCE, asked.problems)))
    gradients = int(path.n_iterations.sum())
    floor = 4 * N * D * C * gradients / float(np.mean(rates))
    total = shared + own + choosing
    print(f"{asked.problems} problems x {len(L2_PATH)} penalties, n {N}, d {D}, {C} classes")
    print(f"lmmono: {total:.1f} s (basis {shared:.2f}, paths {own:.1f}, choice {choosing:.2f}), "
          f"{gradients / asked.problems:.1f} gradients per problem")  # fmt: skip
    print(f"floor: {floor:.1f} s at {rates[0] / 1e9:.0f} and {rates[1] / 1e9:.0f} GFLOP/s; "
          f"lmmono is at {total / floor:.2f}x")  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        peer = peers(rows, path, (noisy, noisy_val), test_clean, asked.peers)
    print(f"scikit-learn: {peer:.2f} s per problem, {peer * asked.problems:.0f} s for all (scaled)")
    print(f"lmmono has {peer * asked.problems / total:.1f}x its rate")


if __name__ == "__main__":
    main()
