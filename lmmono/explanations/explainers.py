"""The explainers that there are; adding one is adding an entry."""

from typing import Any

from lmmono.explanations.explainer_registry import EXPLAINERS, Explainer

_ASKED: dict[str, Any] = {
    "n_candidates": 1,
    "temperature": 0.0,
    "max_tokens": 60,
    "rank_by": "simulation",
}

for explainer in (
    Explainer(
        "token_lookup",
        "lmmono.explanations.lookup:explain_by_tokens",
        citation="Bills et al. 2023, token look-up tables; shrinkage: one-way random effects",
        about="mean activation per token over the records, shrunk towards the mean of all tokens",
    ),
    Explainer(
        "context_rules",
        "lmmono.explanations.rules:explain_by_rules",
        citation="own; greedy forward selection of rules, sets of keys as in CART (Breiman 1984)",
        about="a few rules over the token, those before it, their character classes and the place",
        settings={"max_rules": 8, "max_terms": 12},
    ),
    Explainer(
        "context_boosted",
        "lmmono.explanations.boosted:explain_by_all_contexts",
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
):
    EXPLAINERS[explainer.name] = explainer
