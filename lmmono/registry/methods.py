"""The methods that change a model or put something beside it, with their sources and status.

A record names its home as a string, so that training, suites and recipes reach a method without
importing it. Adding one is adding a record, and, for an objective, its settings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lmmono.errors import TrainError
from lmmono.registry.lookup import find, load

Role = Literal["objective", "adapter", "head", "interpreter", "comparator"]
"""`objective`: a loss term. `adapter`: weights added to a model that is tuned. `head`: what turns
features into logits, or learns codes on frozen ones. `interpreter`: learns to explain a model.
`comparator`: an interpretable model of another kind, to compare with."""

Place = Literal["train", "fine_tuning", "robustness", "python"]
"""Where a method is named: recipe sections `train` and `robustness.fine_tuning`, families and
learners of `robustness`, or from Python alone."""


@dataclass(frozen=True, slots=True)
class Method:
    """One method."""

    name: str
    """Name in recipes and tables; of an objective, its `kind`."""
    role: Role
    """What it is."""
    about: str
    """What it does, in a sentence."""
    paper: str
    """Where it comes from."""
    variant: str
    """What of the paper this is: its equation, released code, or a stated candidate."""
    status: str
    """How sure we are that it is what the paper has."""
    home: str
    """`module:name`; of an objective, takes its settings and a context, returns the objective."""
    places: tuple[Place, ...]
    """Where it can be named."""

    def load(self) -> Callable[..., Any]:
        """Import and return what the record stands for."""
        return load(self.home)


_PENALTIES = "lmmono.methods.penalties"
_TUNED: tuple[Place, ...] = ("train", "fine_tuning")

_METHODS = (
    Method(
        "decorrelation",
        "objective",
        "pairs of units, or of tokens, are pushed towards correlation 0",
        "Yan et al. 2024 (arXiv 2406.17969), DecPO",
        "squared correlations of units, or squared cosines of tokens",
        "the idea; the released loss is un-normalised and signed, which a norm penalty also lowers",
        f"{_PENALTIES}:DecorrelationTerm",
        _TUNED,
    ),
    Method(
        "sparsity",
        "objective",
        "activations are made small (L1) or few (Hoyer)",
        "L1; Hoyer 2004 (J. Mach. Learn. Res. 5)",
        "mean |a|; 1 - Hoyer's sparseness",
        "standard definitions",
        f"{_PENALTIES}:SparsityTerm",
        _TUNED,
    ),
    Method(
        "mono_score",
        "objective",
        "units fire on tokens of near embeddings",
        "MonoLoss (arXiv 2602.12403)",
        "the paper's formula on token embeddings, or on any hook's activations",
        "formula as published; the embedding is our choice, the paper has images",
        f"{_PENALTIES}:MonoScoreTerm",
        _TUNED,
    ),
    Method(
        "reversed_deactivation",
        "objective",
        "the most monosemantic activations are put to their mean, gradient 0 or turned round",
        "MEmeL, KDD 2024 (arXiv 2312.11560)",
        "reversed, naive",
        "candidates: the paper's equations could not be read",
        f"{_PENALTIES}:ReversedDeactivationTerm",
        _TUNED,
    ),
)

METHODS = {method.name: method for method in _METHODS}
"""Methods by name."""


def find_method(name: str) -> Method:
    """Return a method.

    Raises:
        TrainError: There is none of that name.
    """
    return find("method", name, METHODS, TrainError)
