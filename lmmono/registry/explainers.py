"""The explainers: what each is shown, needs and cites. Adding one is adding a record."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from lmmono.errors import ExplainError
from lmmono.registry.lookup import find, load

ProtocolName = Literal["openai", "openai_crate"]
"""Choices of records as in a paper; see `lmmono.explanations.protocols`."""


@dataclass(frozen=True, slots=True)
class Explainer:
    """One explainer."""

    name: str
    """Name in tables, recipes and on the command line."""
    home: str
    """`module:function`; takes a task of `lmmono.explanations`, returns explanations."""
    citation: str
    """Where the algorithm comes from."""
    about: str
    """What it says of a unit, in a sentence."""
    shown: dict[str, int] = field(default_factory=lambda: {"top": 20, "random": 20})
    """Records of each kind it is shown by default."""
    needs: tuple[Literal["client"], ...] = ()
    """What must be given besides a store."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Its settings by default."""

    def load(self) -> Callable[[Any], Any]:
        """Import and return the function that explains."""
        return load(self.home)


_ASKED: dict[str, Any] = {
    "n_candidates": 1,
    "temperature": 0.0,
    "max_tokens": 60,
    "rank_by": "simulation",
}

_ALL = (
    Explainer(
        "token_lookup",
        "lmmono.explanations.token_lookup:explain_by_tokens",
        citation="Bills et al. 2023, token look-up tables; shrinkage: one-way random effects",
        about="mean activation per token over the records, shrunk towards the mean of all tokens",
    ),
    Explainer(
        "context_rules",
        "lmmono.explanations.contexts:explain_by_rules",
        citation="own; greedy forward selection of rules, sets of keys as in CART (Breiman 1984)",
        about="a few rules over the token, those before it, their character classes and the place",
        settings={"max_rules": 8, "max_terms": 12},
    ),
    Explainer(
        "context_boosted",
        "lmmono.explanations.contexts:explain_by_all_contexts",
        citation="own; boosting with random-effect means per context, an upper bound",
        about="a weight for every context that the records hold",
    ),
    Explainer(
        "random_explanation",
        "lmmono.explanations.explanation_controls:explain_by_others",
        citation="control: Heap et al. 2025 (arXiv 2501.17727) and the floors of Bills et al. 2023",
        about="the explanation of another unit of the hook, drawn by seed; a floor for every score",
        shown={},
        settings={"of": "token_lookup", "matched_density": False},
    ),
    Explainer(
        "constant",
        "lmmono.explanations.explanation_controls:explain_by_a_constant",
        citation="control",
        about="the mean activation over the records, on every token",
    ),
    Explainer(
        "llm_token_act_pair",
        "lmmono.explanations.llm_explainers:explain_by_pairs",
        citation="Bills et al. 2023, token and activation pairs; own prompt and examples",
        about="a phrase by a language model that sees tokens with their activations, line by line",
        shown={"top": 5},
        needs=("client",),
        settings=_ASKED,
    ),
    Explainer(
        "llm_max_act",
        "lmmono.explanations.llm_explainers:explain_by_max_act",
        citation="Paulo et al. 2024, Automatically interpreting millions of features; own prompt",
        about="a phrase by a language model that sees excerpts with the tokens that fire marked",
        shown={"top": 10},
        needs=("client",),
        settings=_ASKED,
    ),
    Explainer(
        "llm_contrastive",
        "lmmono.explanations.llm_explainers:explain_by_contrast",
        citation="delphi's contrastive explainer (Paulo et al. 2024); own prompt",
        about="a phrase by a language model that sees excerpts that fire beside near misses",
        shown={"top": 10, "near_miss": 5, "random": 5},
        needs=("client",),
        settings=_ASKED,
    ),
)

EXPLAINERS: dict[str, Explainer] = {explainer.name: explainer for explainer in _ALL}
"""Explainers by name; adding one is adding a record."""


def find_explainer(name: str) -> Explainer:
    """Return the explainer of a name.

    Raises:
        ExplainError: There is none; says which are near.
    """
    return find("explainer", name, EXPLAINERS, ExplainError)
