"""Two kinds of model compared along their training: at equal tokens, and at equal loss.

A model that is further trained has other codes, so a difference at equal tokens may be one of
training alone. At equal loss the model with the higher final loss is taken at its end, and the
other where its loss was the same, between two kept steps:

    loss  |a                      d = score of a at its end - score of b where it met that loss,
          | b a                       between the kept steps before and after
          |  - - b - a  <- level
          |        b       b      floors (the same models untrained) are subtracted from both
          +------------------ tokens
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from lmmono.stats.significance import MeanTest, holm, mean_test
from lmmono.studies.differences import MIN_DEFINED, HookUnits, UnitPair

WAYS = ("raw", "defined", "density_matched")
"""How a mean is taken: undefined scores as guessing, left out, and at equal densities."""


@dataclass(frozen=True, slots=True)
class KeptModel:
    """One model at one kept step, with the scores of its units."""

    step: int
    """Optimizer steps."""
    n_tokens: int
    """Training tokens so far."""
    val_loss: float
    """Nats per token on held-out documents."""
    hooks: tuple[HookUnits, ...]
    """Units of each block, the first block first."""


@dataclass(frozen=True, slots=True)
class KeptTraining:
    """One training: its kept steps, and the same model untrained."""

    models: tuple[KeptModel, ...]
    """Ascending by step; the last is the end of training."""
    untrained: tuple[HookUnits, ...] = ()
    """Units of the untrained model; empty subtracts nothing."""
    has_chance: bool = True
    """A unit without a defined score counts as guessing."""


@dataclass(frozen=True, slots=True)
class AtEqualLoss:
    """One pair of trainings where their losses meet."""

    level: float
    """The loss, nats per token: the higher one of both ends."""
    n_tokens: tuple[float, float]
    """Training tokens of both there; NaN where the better one had it before any kept step."""
    differences: Float[ndarray, "3"]
    """a - b in each of `WAYS`."""


def difference(
    a: Sequence[HookUnits], b: Sequence[HookUnits], has_chance: bool = True
) -> Float[ndarray, "3"]:
    """Return mean of a - mean of b in each of `WAYS`; NaN where one cannot be trusted.

    That is where there are fewer than `MIN_DEFINED` defined units, or densities that overlap by
    less than `MIN_OVERLAP`.
    """
    pair = UnitPair(list(a), list(b), has_chance)
    means = pair.means(None)
    differences = means[:, 0] - means[:, 1]
    n_defined = min(sum(int(hook.defined.sum()) for hook in side) for side in (a, b))
    if n_defined < MIN_DEFINED:
        differences[1] = np.nan
    return differences


def at_equal_tokens(
    a: KeptTraining, b: KeptTraining, *, last_block: bool = True
) -> dict[int, ndarray]:
    """Return the differences at every token count that both kept, the floors subtracted.

    Args:
        a: One training.
        b: The other.
        last_block: Count the last block's units too.
    """
    floor, of_b = _floor(a, b, last_block), {model.n_tokens: model for model in b.models}
    return {
        model.n_tokens: _between(a, model, of_b[model.n_tokens], last_block) - floor
        for model in a.models
        if model.n_tokens in of_b
    }


def at_equal_loss(a: KeptTraining, b: KeptTraining, *, last_block: bool = True) -> AtEqualLoss:
    """Return the differences where both have the higher one of their final losses."""
    swap = a.models[-1].val_loss < b.models[-1].val_loss
    worse, better = (b, a) if swap else (a, b)
    end = worse.models[-1]
    losses = [model.val_loss for model in better.models]
    after = next(i for i, loss in enumerate(losses) if loss <= end.val_loss)
    if after == 0 and losses[0] < end.val_loss:  # nothing is extrapolated
        return AtEqualLoss(
            end.val_loss, _in_order(float(end.n_tokens), math.nan, swap), np.full(3, np.nan)
        )
    before = max(after - 1, 0)
    gap = losses[before] - losses[after]
    share = (losses[before] - end.val_loss) / gap if gap else 1.0
    changes, n_tokens = np.zeros(3), 0.0
    for i, weight in ((before, 1 - share), (after, share)):
        if weight:  # 0 x NaN is NaN
            changes += weight * _between(worse, end, better.models[i], last_block)
            n_tokens += weight * math.log(max(better.models[i].n_tokens, 1))
    changes = (-changes if swap else changes) - _floor(a, b, last_block)
    return AtEqualLoss(
        end.val_loss, _in_order(float(end.n_tokens), math.exp(n_tokens), swap), changes
    )


def _in_order(worse: float, better: float, swap: bool) -> tuple[float, float]:
    return (better, worse) if swap else (worse, better)


def _between(
    of: KeptTraining, one: KeptModel, other: KeptModel, last_block: bool
) -> Float[ndarray, "3"]:
    return _of_blocks(one.hooks, other.hooks, last_block, of.has_chance)


def _floor(a: KeptTraining, b: KeptTraining, last_block: bool) -> Float[ndarray, "3"]:
    if not (a.untrained and b.untrained):
        return np.zeros(3)
    return _of_blocks(a.untrained, b.untrained, last_block, a.has_chance)


def _of_blocks(
    a: Sequence[HookUnits], b: Sequence[HookUnits], last_block: bool, has_chance: bool
) -> Float[ndarray, "3"]:
    """Return the differences over all blocks or all but the last; a model of one has no others."""
    if not last_block:
        a, b = a[:-1], b[:-1]
    return difference(a, b, has_chance) if a and b else np.full(3, np.nan)


@dataclass(frozen=True, slots=True)
class RegisteredVerdict:
    """What a registered test came to."""

    test: MeanTest
    """Mean over seeds, interval, both p."""
    p_holm: float
    """p of no difference after Holm's correction over the family."""
    p_equivalent_holm: float
    """p of a difference of the bound or more, after the same correction."""
    word: str
    """supported, opposite, equivalent, inconclusive, or not tested."""


def verdicts(
    by_test: Sequence[tuple[Float[ndarray, " seeds"], int]],
    *,
    bound: float,
    alpha: float = 0.05,
) -> list[RegisteredVerdict]:
    """Return the verdicts of a family of registered tests.

    supported, opposite: p after Holm's correction is below `alpha`, and the mean has the expected
    sign, or the other. equivalent: both one-sided tests against the bound are, after the same
    correction. inconclusive: neither. not tested: fewer than two seeds have a difference.

    Args:
        by_test: Differences over seeds, and the expected sign (1 or -1) of each test.
        bound: Differences smaller than this matter to nobody.
        alpha: Level of the whole family.
    """
    tests = [mean_test(values, bound) for values, _ in by_test]
    # a test that is not there yet counts, so that a verdict does not turn as seeds come
    p, p_equivalent = (
        holm([1.0 if math.isnan(getattr(t, name)) else getattr(t, name) for t in tests])
        for name in ("p", "p_equivalent")
    )
    judged: list[RegisteredVerdict] = []
    for test, (_, sign), one, other in zip(tests, by_test, p, p_equivalent, strict=True):
        if math.isnan(test.p):
            one = other = math.nan
            word = "not tested"
        elif one < alpha:
            word = "supported" if test.mean * sign > 0 else "opposite"
        else:
            word = "equivalent" if other < alpha else "inconclusive"
        judged.append(RegisteredVerdict(test, one, other, word))
    return judged
