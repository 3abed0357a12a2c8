"""The learners that turn problems into linear probes: one registry, one record each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lmmono.errors import RobustnessError, nearest
from lmmono.robust.problems import Probes, Problems
from lmmono.robust.tuning import tuned_logistic


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
