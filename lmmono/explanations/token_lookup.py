"""`token_lookup`: what a unit does on each token, whatever stands around it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from lmmono.explanations.explain_task import ExplainTask
from lmmono.explanations.explanation import Explanation, Program

SHOWN_TOKENS = 8
"""Most tokens that a text names."""

SHOWN_FRACTION = 0.3
"""Tokens are named whose activation is at least this fraction of the strongest token's."""


@dataclass(frozen=True, slots=True)
class Lookup(Program):
    """An activation per token; one for all others."""

    kind: ClassVar[str] = "token_lookup"
    reads_one_token: ClassVar[bool] = True
    tokens: Int[ndarray, " tokens"]
    """Token ids, ascending."""
    acts: Float[ndarray, " tokens"]
    """Predicted activation on each, in units of the hook."""
    otherwise: float
    """Predicted activation on any other token."""

    def simulate(
        self, token_ids: Int[ndarray, "records window"]
    ) -> Float[ndarray, "records window"]:
        """Return the activation of each token by itself."""
        table = np.append(self.acts, self.otherwise)
        if not len(self.tokens):
            return np.where(token_ids >= 0, self.otherwise, 0.0)
        at = np.minimum(np.searchsorted(self.tokens, token_ids), len(self.tokens) - 1)
        is_listed = self.tokens[at] == token_ids
        return np.where(token_ids >= 0, table[np.where(is_listed, at, -1)], 0.0)

    def to_json(self) -> dict[str, Any]:
        """Return the two columns and the default."""
        return {
            "tokens": self.tokens.tolist(),
            "acts": self.acts.tolist(),
            "otherwise": self.otherwise,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Lookup":
        """Return the look-up that was described."""
        tokens, acts = np.array(values["tokens"], np.int64), np.array(values["acts"], np.float64)
        return cls(tokens, acts, float(values["otherwise"]))


@dataclass(frozen=True, slots=True)
class Shrinkage:
    """Means per group, drawn towards the mean of all by how much the groups are known to differ.

    A group of n values with mean m gets mean + n / (n + within / between) * (m - mean), the
    posterior mean where values scatter around their group with variance `within` and groups around
    the mean with variance `between`. Both are estimated by the method of moments (one-way analysis
    of variance with random effects, Searle, Casella and McCulloch 1992, 3.6).
    """

    mean: float
    """Mean of all values."""
    within: float
    """Variance of values within groups."""
    between: float
    """Variance of group means beyond what `within` explains; 0 where there is none."""
    shrunk: Float[ndarray, " groups"]
    """The posterior mean of each group."""


def shrink(
    n: Float[ndarray, " groups"], sums: Float[ndarray, " groups"], squares: float
) -> Shrinkage:
    """Return shrunk group means from group sizes, group sums and the sum of all squares.

    Where no group has two values, `within` is not known; then it is taken to equal `between`, so
    that a group of one value goes half way.
    """
    total, groups = n.sum(), len(n)
    mean = sums.sum() / total
    between_squares = float((np.square(sums) / n).sum() - total * mean**2)
    spare = total - groups
    spread = total - float(np.square(n).sum()) / total
    if groups < 2 or spread <= 0:
        return Shrinkage(float(mean), 0.0, 0.0, np.full(groups, mean))
    if spare <= 0:
        between = within = between_squares / (groups - 1) / 2
    else:
        within = max((squares - total * mean**2 - between_squares) / spare, 0.0)
        between = max((between_squares - (groups - 1) * within) / spread, 0.0)
    ratio = within / between if between > 0 else np.inf
    weight = n / (n + ratio)
    return Shrinkage(float(mean), within, between, mean + weight * (sums / n - mean))


def explain_by_tokens(task: ExplainTask) -> list[Explanation]:
    """Explain each unit of a task by the activation it has on each token of its records."""
    all_ids = task.records.all_token_ids()
    return task.explain_each(lambda i: _explained(task, i, all_ids[i]))


def _explained(task: ExplainTask, i: int, token_ids: ndarray) -> Explanation:
    is_token = token_ids >= 0
    tokens, group = np.unique(token_ids[is_token], return_inverse=True)
    acts = task.records.acts[i][is_token].astype(np.float64)
    n = np.bincount(group).astype(np.float64)
    means = shrink(n, np.bincount(group, acts), float(np.square(acts).sum()))
    program = Lookup(tokens, rounded(means.shrunk), float(rounded(np.array([means.mean]))[0]))
    text = lookup_text(program, task.vocabulary)
    return task.explained(i, text, program, complexity=float(len(tokens)))


def rounded(values: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return values with 4 significant digits: what is stored is what simulates."""
    with np.errstate(divide="ignore", invalid="ignore"):
        # decimal places that leave 4 significant digits
        digits = np.where(values != 0, 3 - np.floor(np.log10(np.abs(values))), 0).astype(int)
    # beyond these powers of ten a double overflows
    scale = 10.0 ** np.clip(digits, -300, 300)
    return np.round(values * scale) / scale


def lookup_text(program: Lookup, vocabulary: tuple[str, ...]) -> str:
    """Return the strongest tokens of a look-up as a short phrase."""
    order = np.argsort(-program.acts, kind="stable")[:SHOWN_TOKENS]
    strongest = program.acts[order[0]] if len(order) else 0.0
    if strongest <= max(program.otherwise, 0.0):
        return "no token in particular"
    least = program.otherwise + SHOWN_FRACTION * (strongest - program.otherwise)
    named = program.tokens[order[program.acts[order] >= least]]
    return "tokens " + ", ".join(quoted(int(token_id), vocabulary) for token_id in named)


def quoted(token_id: int, vocabulary: tuple[str, ...]) -> str:
    r"""Return a token as people read it, in quotation marks, line ends and the like escaped.

    >>> quoted(1, (" the", "\n"))
    "'\\n'"
    """
    has_string = 0 <= token_id < len(vocabulary)
    return repr(vocabulary[token_id]) if has_string else f"[{token_id}]"
