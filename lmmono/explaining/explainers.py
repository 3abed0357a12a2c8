"""The explainers that there are; adding one is adding an entry."""

from lmmono.explaining.registry import EXPLAINERS, Explainer

for explainer in (
    Explainer(
        "token_lookup",
        "lookup:explain_by_tokens",
        citation="Bills et al. 2023, token look-up tables; shrinkage: one-way random effects",
        about="mean activation per token over the records, shrunk towards the mean of all tokens",
    ),
    Explainer(
        "random_explanation",
        "controls:explain_by_others",
        citation="control: Heap et al. 2025 (arXiv 2501.17727) and the floors of Bills et al. 2023",
        about="the explanation of another unit of the hook, drawn by seed; a floor for every score",
        shown={},
        settings={"of": "token_lookup", "matched_density": False},
    ),
    Explainer(
        "constant",
        "controls:explain_by_a_constant",
        citation="control",
        about="the mean activation over the records, on every token",
    ),
):
    EXPLAINERS[explainer.name] = explainer
