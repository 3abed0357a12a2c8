"""Whether an attack measured robustness, or only failed: the checks against masked gradients.

An attack without limits must bring accuracy near zero, texts made against another classifier must
do less harm than those made against this one, and a larger budget must never help the classifier.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from lmmono.data.corruption.synonyms import Synonyms
from lmmono.data.corruption.texts import pieces_of
from lmmono.suites.attacks import Candidates, Limits, Predict, attack, attack_with

BUDGETS = (25, 100, 400)
NEAR_ZERO = 0.05
ANY_WORD = 30
"""Words of the texts that the attack without limits tries at each place."""


@dataclass(frozen=True, slots=True)
class AttackChecks:
    """What the checks found."""

    clean_accuracy: float
    """Accuracy on the texts as they are."""
    unbounded_accuracy: float
    """Accuracy where every word may become any word of the texts."""
    accuracy_by_budget: dict[int, float]
    """Accuracy under the attack by the number of queries it may make."""
    direct_accuracy: float
    """Accuracy on texts made against this classifier, under the largest budget."""
    transfer_accuracy: float | None
    """Accuracy on texts made against another one; None where none was given."""
    faults: tuple[str, ...]
    """What says that the attack's figures cannot be trusted; none if nothing does."""


def check_attack(
    predict: Predict,
    texts: Sequence[str],
    labels: Int64[np.ndarray, "n"],
    *,
    method: str,
    seed: int = 0,
    synonyms: Synonyms | None = None,
    other: Predict | None = None,
    max_changed: float = 0.3,
) -> AttackChecks:
    """Run the checks of an attack on a classifier.

    Args:
        predict: The classifier.
        texts: Texts to attack, of more than one class; a few dozen will do.
        labels: Their true classes.
        method: The attack, see `lmmono.suites.attacks.attack`.
        seed: Seed of the attack and of the words tried without limits.
        synonyms: For a word attack.
        other: Another classifier of the same classes to make texts against.
        max_changed: Share of words that may be changed, but for the attack without limits.

    Raises:
        DataError: As `attack`.
    """
    how: dict[str, Any] = {"method": method, "seed": seed, "synonyms": synonyms}
    reports = {
        budget: attack(predict, texts, labels, limits=Limits(max_changed, budget), **how)
        for budget in BUDGETS
    }
    direct = reports[BUDGETS[-1]]
    without = Limits(max_changed=1.0, max_queries=10**9)
    free = attack_with(predict, texts, labels, any_word(texts, seed), name="any", limits=without)
    transfer = None
    if other is not None:
        made = attack(other, texts, labels, limits=direct.limits, **how)
        answers = np.asarray(predict([r.adversarial for r in made.results])).argmax(axis=1)
        transfer = float((answers == labels).mean())
    by_budget = {budget: report.accuracy_under_attack for budget, report in reports.items()}
    found = AttackChecks(
        direct.clean_accuracy,
        free.accuracy_under_attack,
        by_budget,
        direct.accuracy_under_attack,
        transfer,
        (),
    )
    return _with_faults(found)


def any_word(texts: Sequence[str], seed: int) -> Candidates:
    """Return the candidates of an attack without limits: words drawn from all of the texts."""
    known = sorted({word for text in texts for word in pieces_of(text)[::2] if word})
    rng = np.random.default_rng(seed)
    return lambda _: [known[i] for i in rng.integers(len(known), size=ANY_WORD).tolist()]


def _with_faults(found: AttackChecks) -> AttackChecks:
    faults: list[str] = []
    if found.unbounded_accuracy > NEAR_ZERO:
        faults.append(
            f"the attack without limits leaves an accuracy of {found.unbounded_accuracy:.3f}, want "
            f"at most {NEAR_ZERO}: the search fails, or the classifier hardly reads the text"
        )
    accuracies = list(found.accuracy_by_budget.values())
    if any(later > earlier for earlier, later in zip(accuracies, accuracies[1:], strict=False)):
        faults.append("a larger budget raises the accuracy: the classifier's answers are not fixed")
    transfer = found.transfer_accuracy
    if transfer is not None and transfer < found.direct_accuracy:
        faults.append(
            f"texts made against another classifier leave {transfer:.3f}, those made against this "
            f"one {found.direct_accuracy:.3f}: the attack on this one is the weaker"
        )
    return AttackChecks(
        found.clean_accuracy,
        found.unbounded_accuracy,
        found.accuracy_by_budget,
        found.direct_accuracy,
        transfer,
        tuple(faults),
    )
