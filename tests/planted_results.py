"""Results of robustness suites whose truth is planted: who is better, where, and by how much."""

import numpy as np

from lmmono.suites.results import Result


def result(feature="raw", value=0.5, **changes) -> Result:
    known = {"suite": "noisy_labels", "task": "topic", "corruption": "symmetric", "level": 0.1}
    known |= {"probe": "logistic", "n_shots": None, "metric": "accuracy", "split": "test"}
    known |= {"seed": 0, "n": 1000, "settings": {"n_classes": 2}}
    return Result(feature=feature, value=value, **(known | changes))


def noisy_labels(
    gains: dict[str, float],
    *,
    seeds=10,
    tasks=("topic",),
    levels=(0.0, 0.05, 0.1, 0.4, 0.45),
    noise=0.005,
    corruption="symmetric",
) -> list[Result]:
    """Accuracies of each family: what all share at a seed, a gain under noise, and chance."""
    rng = np.random.default_rng(7)
    found: list[Result] = []
    for task in tasks:
        for seed in range(seeds):
            for level in levels:
                shared = 0.9 - 0.5 * level + 0.05 * rng.standard_normal()
                for feature, gain in gains.items():
                    value = shared + (gain if level else 0.0) + noise * rng.standard_normal()
                    about = {"task": task, "seed": seed, "level": level}
                    kind = corruption if level else None
                    found.append(result(feature, float(value), corruption=kind, **about))
    return found


def other_domain(
    above: dict[str, float], *, seeds=8, shots=(4, 16, 64), slope=0.7, spread=0.02, draw=1
) -> list[Result]:
    """Accuracies at home and elsewhere: on a line in logits, and so far above it."""
    rng = np.random.default_rng(draw)
    found: list[Result] = []
    for seed in range(seeds):
        for shot in shots:
            for feature, distance in above.items():
                x = 0.5 * np.log2(shot) - 0.5 + 0.1 * rng.standard_normal()
                y = -0.3 + slope * x + distance + spread * rng.standard_normal()
                about = {"suite": "ood", "corruption": None, "level": 0.0, "n_shots": shot}
                for split, z in (("test", x), ("ood:shifted", y)):
                    value = float(1 / (1 + np.exp(-z)))
                    found.append(result(feature, value, split=split, seed=seed, n=10**7, **about))
    return found
