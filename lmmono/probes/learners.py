"""The learners that turn problems into linear probes: one registry, one record each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from lmmono.errors import RobustnessError, nearest
from lmmono.probes.cleaning import pruned, relabelled
from lmmono.probes.gradient import descended
from lmmono.probes.objectives import PLANS
from lmmono.probes.problems import Probes, Problems
from lmmono.probes.tuning import tuned_logistic


@dataclass(frozen=True, slots=True)
class Learner:
    """One way to learn a probe from labels that may be wrong."""

    name: str
    about: str
    """What it does and where it comes from."""
    fit: Callable[[Problems], Probes]
    """The same problems and seeds give the same bits."""
    chosen_on: Literal["noisy", "clean"] = "noisy"
    """Whose validation labels its settings are chosen on; clean is an oracle, reported apart."""


def _oracle(problems: Problems) -> Probes:
    if problems.clean_val is None:
        raise RobustnessError(
            "learner oracle_logistic: want Problems.clean_val, the true validation labels; without "
            "them take learner logistic"
        )
    return tuned_logistic(problems, labels=problems.clean_val.expand_as(problems.y_val))


_ABOUT = (
    ("label_smoothing", "labels smoothed by 0.1 (Szegedy et al. 2016)"),
    ("gce", "generalised cross entropy, q 0.7 (Zhang and Sabuncu 2018)"),
    ("sce", "symmetric cross entropy, 6 and 0.1 (Wang et al. 2019)"),
    ("forward", "loss corrected by the noise matrix, estimated if not given (Patrini et al. 2017)"),
    ("elr", "early-learning regularisation, 3 and 0.7 (Liu et al. 2020)"),
    ("mixup", "rows and labels mixed with others', uniform shares (Zhang et al. 2018)"),
    ("early_stopping", "plain descent without L2, stopped by noisy validation labels"),
    ("co_teaching", "two probes that choose easy rows for each other (Han et al. 2018)"),
)

LEARNERS: dict[str, Learner] = {
    learner.name: learner
    for learner in (
        Learner("logistic", "cross entropy, L2 chosen on noisy validation labels", tuned_logistic),
        Learner(
            "oracle_logistic",
            "cross entropy, L2 chosen on clean validation labels, which no one has",
            _oracle,
            "clean",
        ),
        Learner(
            "cleanlab", "labels at odds with a probe's dropped (Northcutt et al. 2021)", pruned
        ),
        Learner("knn_relabel", "labels outvoted by those of ten neighbours replaced", relabelled),
        *(Learner(name, about, partial(descended, plan=PLANS[name])) for name, about in _ABOUT),
    )
}
"""Learners by name."""


def find_learner(name: str) -> Learner:
    """Return a learner.

    Raises:
        RobustnessError: There is none of that name.
    """
    if name not in LEARNERS:
        raise RobustnessError(f"no learner {name!r}; {nearest(name, LEARNERS)}")
    return LEARNERS[name]
