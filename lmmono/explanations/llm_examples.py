"""Examples that language models are shown first: invented units, written for lmmono.

An excerpt is written `token|token:8|token`: tokens between bars, each with its activation of 1 to
10 where it is not 0.
"""

from dataclasses import dataclass

Shown = tuple[tuple[str, int], ...]
"""Tokens of an excerpt, each with its activation of 0 to 10."""


def shown(written: str) -> Shown:
    """Return the tokens and activations of a written excerpt.

    >>> shown("We| sail:7| at| dawn")
    (('We', 0), (' sail', 7), (' at', 0), (' dawn', 0))
    """
    parts = [part.rpartition(":") for part in written.split("|")]
    return tuple((token, int(act)) if token else (act, 0) for token, _, act in parts)


@dataclass(frozen=True, slots=True)
class Example:
    """An invented unit."""

    explanation: str
    """What it means."""
    firing: tuple[Shown, ...]
    """Excerpts in which it fires."""
    silent: tuple[Shown, ...]
    """Excerpts in which it does not."""


EXAMPLES: tuple[Example, ...] = (
    Example(
        "words for boats and ships",
        (
            shown("The| old| ferry:9| left| the| quay| an| hour| late|."),
            shown(" We| watched| a| canoe:10| drift| past| two| barges:8|."),
            shown(" he| painted| the| boat:10| blue| before| winter"),
        ),
        (
            shown(" The| harbour| office| opens| at| nine|."),
            shown(" a| lorry| full| of| fish| stood| by| the| water"),
        ),
    ),
    Example(
        "the number of a year after the word in or since",
        (
            shown(" the| mill| closed| in| 1962:10| and| never| opened| again"),
            shown(" She| has| lived| here| since| 2004:8|.| In| 2011:9| she| wed|."),
            shown(" prices| fell| in| 1931:10|,| then| rose"),
        ),
        (
            shown(" The| hall| seats| 1200| people|."),
            shown(" in| room| 214| we| found| 3| chairs"),
        ),
    ),
    Example(
        "the second part of a contraction with not",
        (
            shown(" I| do|n't:10| think| it| will| rain"),
            shown(" They| could|n't:9| find| the| key|,| so| they| wait|ed"),
            shown(" it| is|n't:10| far| and| we| were|n't:8| tired"),
        ),
        (
            shown(" I| do| not| know| him|."),
            shown(" She|'s| late| because| the| bus| was| full"),
        ),
    ),
)
"""The invented units, in the order in which they are shown."""
