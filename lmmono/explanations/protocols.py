"""Protocols: which excerpts explain a unit and which score it, as the papers chose them.

The default keeps documents of the two sides apart, cuts no excerpt across documents and shows no
excerpt twice. The papers' protocols are here to be compared with, by name.
"""

from dataclasses import dataclass, field

from lmmono.errors import ExplainError
from lmmono.records.sampler import Ranks
from lmmono.registry.lookup import find
from lmmono.types import Split


@dataclass(frozen=True, slots=True)
class Protocol:
    """What is shown to explainers and what scores them."""

    name: str
    """Name of the preset."""
    score: Ranks
    """Records that score: ranks in the lists of the score split."""
    explain: Ranks = field(default_factory=dict)
    """Records that explain; empty leaves it to the explainer."""
    window: int = 64
    """Tokens per excerpt, the most."""
    explain_split: Split = "explain"
    """Documents that explain."""
    score_split: Split = "score"
    """Documents that score."""
    token_centred: bool = False
    """Windows around single tokens, which may overlap and cross documents, in place of excerpts."""
    about: str = ""
    """Source, and where this differs from it."""


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "openai",
            explain={"top": (0, 4, 8, 12, 16)},
            score={"top": (2, 6, 10, 14, 18), "random": (1, 4, 7, 10, 13)},
            about="Bills et al. 2023, neuron_explainer: 64 tokens; of 20 top records every fourth "
            "explains (train) and scores (valid), of 15 random ones every third scores. There both "
            "sides come from one list of records; here their documents differ, one top record per "
            "document, no duplicates.",
        ),
        Protocol(
            "openai_crate",
            explain={"top": (0, 2, 4, 6, 8)},
            score={"top": (1, 3, 5, 7, 9), "random": (0, 2, 4, 6, 8)},
            explain_split="score",
            token_centred=True,
            about="Bai and Ma 2024 (crate-lm): the 50 strongest token positions and 50 random "
            "ones, each with 32 tokens before and 31 after it, cut from the flat text: windows may "
            "overlap, cross documents and be in both sides, which raises the score. The paper's "
            "mean leaves out units without a defined score: that is the metric's `_defined` row. "
            "Their explainer and simulator were 4-bit 7B language models; the program used here is "
            "another instrument.",
        ),
    )
}
"""The protocols of papers; a scorer's own settings are its default."""


def find_protocol(name: str) -> Protocol:
    """Return the protocol of a name.

    Raises:
        ExplainError: There is none; says which there are.
    """
    return find("preset", name, PROTOCOLS, ExplainError)


def escaped(value: object) -> str:
    """Return a value as `variant` writes it, so that no value looks like a further setting."""
    return str(value).replace(",", "%2C")


def variant(name: str | None, preset: str | None, changes: dict[str, object]) -> str | None:
    """Return what tells settings apart in stored rows: the preset and what was changed.

    >>> variant("token_lookup", "openai", {})
    'token_lookup:openai'
    >>> variant(None, None, {"window": 32, "top": 5})
    'top=5,window=32'
    >>> variant(None, None, {"model": "judge,window=32"})  # a server may call a model anything
    'model=judge%2Cwindow=32'
    """
    changed = ",".join(f"{key}={escaped(value)}" for key, value in sorted(changes.items()))
    return ":".join(part for part in (name, preset, changed) if part) or None
