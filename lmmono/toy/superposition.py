"""The toy study of superposition: does a code that keeps features apart learn better under noise?

40 sparse features in 20 dimensions, and a linear probe that tells which feature is the largest. A
monosemantic code gives half of the features an axis each and drops the others; a polysemantic one,
learned on sparse features, keeps all in superposition. Encoders have equal energy, and every code
meets the same samples, flips and noise at a seed. What counts is the error; a moment score stands
beside it, since theory speaks of moments (see `separability`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

import activation_store as astore
from lmmono.data.corruption.label_noise import corrupt_labels
from lmmono.errors import DataError, nearest
from lmmono.probes.logistic import PenaltyPath, fit_path
from lmmono.probes.problems import choose
from lmmono.suites.results import Result, stored_rows
from lmmono.toy.codes import ToyData, axes, dimensionality, random_code, trained
from lmmono.toy.separability import mean_ratio
from lmmono.types import Progress, silent

Targets = Literal["all", "coded"]
Codes = list[Float[ndarray, "d features"]]
"""One encoder per seed."""

SUITE = "toy_superposition"
D_CODE = 20
"""Dimensions of every code: half of the features."""

SPARSE = 0.05
"""Share of features there when the polysemantic code is learned."""

IMPORTANCE = 0.9
"""Feature i weighs this to the i where features are dense: without it no axis is better."""

L2 = (100.0, 10.0, 1.0, 0.1, 0.01)
"""Penalties to choose from, on noisy validation labels."""

ALONE, NOWHERE = 0.9, 0.01
"""A feature has a dimension for itself above the first share of it, and is dropped below the other.
"""


@dataclass(frozen=True, slots=True)
class ToySettings:
    """What the study runs over."""

    p: float = 0.05
    """Probability that a feature is there in the task."""
    targets: Targets = "all"
    """`all`: which of the 40 features is the largest. `coded`: which of the 20 that the
    monosemantic code keeps; the others are there, and do not matter."""
    n_train: tuple[int, ...] = (200, 2_000)
    """Training samples; a fourth as many, at least 100, choose the penalty."""
    label_noise: tuple[float, ...] = (0.0, 0.1, 0.25, 0.4, 0.6, 0.8)
    """Shares of training and validation labels flipped to another class."""
    input_noise: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    """Standard deviations of Gaussian noise on test features, in those of a feature; the probe
    has learned without."""
    seeds: int = 5
    """Repetitions: codes, samples and noise anew."""
    steps: int = 2_000
    """Steps in which codes are learned."""
    n_test: int = 4_000
    """Test samples."""

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise DataError(f"toy: p: want a share above 0 and at most 1, got {self.p}")
        if max(self.label_noise) > 1:
            raise DataError(f"toy: label_noise: want shares, got {max(self.label_noise)}")
        if self.label_noise[0] != 0 or min(self.n_train) < 2 or self.seeds < 1:
            raise DataError("toy: want label noise from 0 on, 2 samples and 1 seed at least")
        if len({n // self.n_classes for n in self.n_train}) < len(self.n_train):
            raise DataError(f"toy: n_train {self.n_train}: want numbers further apart")

    @property
    def n_classes(self) -> int:
        """Features that may be the largest."""
        return ToyData().n_features if self.targets == "all" else D_CODE

    @property
    def task(self) -> str:
        """Name in table `robustness`."""
        return f"superposition_{self.targets}_p{self.p:g}"


def toy_settings(
    p: float, targets: str, n_train: Sequence[int] | None, seeds: int, steps: int
) -> ToySettings:
    """Return settings from what a command line holds.

    Raises:
        DataError: One of them makes no sense.
    """
    if targets not in get_args(Targets):
        raise DataError(f"toy: targets {targets!r}: {nearest(targets, get_args(Targets))}")
    settings = ToySettings(p, "all" if targets == "all" else "coded", seeds=seeds, steps=steps)
    return replace(settings, n_train=tuple(n_train)) if n_train else settings


@dataclass(frozen=True, slots=True)
class ToyArm:
    """One kind of code."""

    name: str
    """Name in tables."""
    about: str
    """How it comes about."""
    make: Callable[[Sequence[int], int], Codes]
    """Seeds and steps to encoders of equal energy."""


ARMS: tuple[ToyArm, ...] = (
    ToyArm(
        "mono",
        "20 features on an axis each, by hand; 20 nowhere",
        lambda seeds, _: [axes(D_CODE, ToyData().n_features) for _ in seeds],
    ),
    ToyArm(
        "mono_learned",
        "learned on features that are always there, feature i with weight 0.9^i",
        lambda seeds, steps: trained(
            ToyData(1.0), D_CODE, seeds, steps=steps, importance=IMPORTANCE
        ),
    ),
    ToyArm(
        "poly",
        "learned on features that are there 5 % of the time",
        lambda seeds, steps: trained(ToyData(SPARSE), D_CODE, seeds, steps=steps),
    ),
    ToyArm(
        "random",
        "every feature in a random direction, learned from nothing",
        lambda seeds, _: [random_code(D_CODE, ToyData().n_features, seed) for seed in seeds],
    ),
)
"""The codes, monosemantic first."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """How an arm spends its dimensions, means over seeds."""

    arm: str
    """Name."""
    about: str
    """How it comes about."""
    alone: float
    """Features with a dimension for themselves, D_i above 0.9."""
    shared: float
    """Features that share dimensions."""
    dropped: float
    """Features that are nowhere, D_i below 0.01."""


@dataclass(frozen=True, slots=True)
class Superposition:
    """What came out of a toy study."""

    settings: ToySettings
    """What it ran over."""
    capacities: tuple[Capacity, ...]
    """How each arm spends its dimensions."""
    results: tuple[Result, ...]
    """Accuracy on clean labels, and `fisher_ratio` of codes, one per seed and condition."""


def superposition(
    settings: ToySettings | None = None,
    *,
    into: str | Path | None = None,
    progress: Progress = silent,
) -> Superposition:
    """Run the toy study.

    Args:
        settings: What to run over.
        into: Store whose table `robustness` gets the rows; made if it is not there.
        progress: Told how many seeds are done.

    Raises:
        StoreError: The store cannot be opened.
    """
    settings = settings or ToySettings()
    seeds = range(settings.seeds)
    codes = {arm.name: arm.make(seeds, settings.steps) for arm in ARMS}
    results: list[Result] = []
    for seed in seeds:
        samples = _Samples.draw(settings, seed)
        for arm in ARMS:
            results += _results(settings, samples, codes[arm.name][seed], arm.name)
        progress("toy", seed + 1, settings.seeds)
    if into is not None:
        with astore.open(into, "a" if Path(into).exists() else "w") as store:
            store.append("robustness", stored_rows(results))
    return Superposition(
        settings, tuple(_capacity(arm, codes[arm.name]) for arm in ARMS), tuple(results)
    )


def _capacity(arm: ToyArm, codes: Codes) -> Capacity:
    shares = np.array([dimensionality(weight) for weight in codes])
    alone, dropped = (shares > ALONE).sum(axis=1).mean(), (shares < NOWHERE).sum(axis=1).mean()
    shared = shares.shape[1] - alone - dropped
    return Capacity(arm.name, arm.about, float(alone), float(shared), float(dropped))


@dataclass(frozen=True, slots=True, eq=False)
class _Samples:
    """Samples of one seed, the same for every arm."""

    seed: int
    train: Float[ndarray, "n features"]
    val: Float[ndarray, "m features"]
    test: Float[ndarray, "t features"]
    noise: Float[ndarray, "t features"]
    """Standard normal; scaled by the level."""

    @classmethod
    def draw(cls, settings: ToySettings, seed: int) -> "_Samples":
        rng, data = np.random.default_rng((seed, 4)), ToyData(settings.p)
        n = max(settings.n_train)
        sizes = (n, _n_val(n), settings.n_test)
        train, val, test = (_with_target(data, settings, size, rng) for size in sizes)
        return cls(seed, train, val, test, rng.standard_normal(test.shape))


def _n_val(n_train: int) -> int:
    return max(100, n_train // 4)


def _with_target(
    data: ToyData, settings: ToySettings, n: int, rng: np.random.Generator
) -> Float[ndarray, "n features"]:
    """Return samples in which some feature that may be the largest is there."""
    x = data.draw(n, rng)
    while (empty := ~x[:, : settings.n_classes].any(axis=1)).any():
        x[empty] = data.draw(int(empty.sum()), rng)
    return x


def _labels(x: Float[ndarray, "n features"], n_classes: int) -> Int64[ndarray, " n"]:
    return x[:, :n_classes].argmax(axis=1).astype(np.int64)


def _noisy(
    labels: Int64[ndarray, " n"], settings: ToySettings, seed: int
) -> Int64[ndarray, "rates n"]:
    """Return the labels at every rate; a higher rate flips what a lower one does, and more."""
    noisy = [
        corrupt_labels(labels, "symmetric", rate, n_classes=settings.n_classes, seed=seed).labels
        for rate in settings.label_noise
    ]
    return np.stack(noisy)


def _results(
    settings: ToySettings, samples: _Samples, weight: Float[ndarray, "d features"], arm: str
) -> list[Result]:
    """Return the rows of one code at one seed."""
    n_classes, noise = settings.n_classes, samples.noise * ToyData(settings.p).spread
    test_labels = _labels(samples.test, n_classes)
    about = Result(
        *(SUITE, settings.task, arm, None, 0.0, None, None, "fisher_ratio", "test", samples.seed),
        *(0.0, settings.n_test),
        settings={"n_classes": n_classes, "d": D_CODE, "p": settings.p},
    )
    clean = samples.test @ weight.T
    shifted = {s: (samples.test + s * noise) @ weight.T for s in settings.input_noise}
    rows = _ratios(settings, about, clean, shifted, test_labels)
    for n in settings.n_train:
        here = replace(
            about,
            probe="logistic",
            n_shots=max(1, n // n_classes),
            metric="accuracy",
            settings={**about.settings, "n_train": n},
        )
        path, best = _probes(settings, samples, weight, n)
        right = _accuracies(path, best, clean, test_labels)
        rows += [
            _row(here, "symmetric", rate, value)
            for rate, value in zip(settings.label_noise, right, strict=True)
        ]
        for level, code in shifted.items():
            value = _accuracies(path, best, code, test_labels)[0]
            rows.append(_row(here, "input_gaussian", level, value))
    return rows


def _row(about: Result, corruption: str, level: float, value: float) -> Result:
    return replace(about, corruption=corruption if level else None, level=level, value=value)


def _ratios(
    settings: ToySettings,
    about: Result,
    clean: Float[ndarray, "t d"],
    shifted: dict[float, Float[ndarray, "t d"]],
    labels: Int64[ndarray, " t"],
) -> list[Result]:
    """Return the moment score of a code under every noise, on test samples."""
    n_classes, noisy = settings.n_classes, _noisy(labels, settings, about.seed)
    rows = [
        _row(about, "symmetric", rate, mean_ratio(clean, part, n_classes))
        for rate, part in zip(settings.label_noise, noisy, strict=True)
    ]
    return rows + [
        _row(about, "input_gaussian", level, mean_ratio(code, labels, n_classes))
        for level, code in shifted.items()
    ]


def _probes(
    settings: ToySettings, samples: _Samples, weight: Float[ndarray, "d features"], n: int
) -> tuple[PenaltyPath, Int64[Tensor, " rates"]]:
    """Return the probes of all rates and penalties, and the penalty chosen at each rate."""
    x, x_val = samples.train[:n], samples.val[: _n_val(n)]
    y, y_val = (
        torch.from_numpy(_noisy(_labels(part, settings.n_classes), settings, samples.seed + shift))
        for part, shift in ((x, 0), (x_val, 1_000_000))  # validation labels flip by themselves
    )
    code, code_val = (torch.from_numpy(part @ weight.T).float() for part in (x, x_val))
    path = fit_path(code, y, n_classes=settings.n_classes, l2=L2, standardise=False)
    best = choose(path.log_probabilities(code_val), y_val, torch.ones_like(y_val, dtype=torch.bool))
    return path, best


def _accuracies(
    path: PenaltyPath,
    best: Int64[Tensor, " rates"],
    code: Float[ndarray, "t d"],
    labels: Int64[ndarray, " t"],
) -> list[float]:
    """Return the share of right answers of the chosen probe of each rate."""
    classes = path.log_probabilities(torch.from_numpy(code).float()).argmax(dim=-1)
    chosen = classes[torch.arange(len(best)), best]
    return (chosen == torch.from_numpy(labels)).double().mean(dim=1).tolist()
