"""What language models are asked about a unit, and how their answers are read.

Models are shown invented units first, written for lmmono. An excerpt of one is written
`token|token:8|token`: tokens between bars, each with its activation of 1 to 10 where it is not 0.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from activation_store.read.characters import whole_characters
from lmmono.clients.client import Message, Prompt, final_answer

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
class InventedUnit:
    """An invented unit."""

    explanation: str
    """What it means."""
    firing: tuple[Shown, ...]
    """Excerpts in which it fires."""
    silent: tuple[Shown, ...]
    """Excerpts in which it does not."""


INVENTED_UNITS: tuple[InventedUnit, ...] = (
    InventedUnit(
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
    InventedUnit(
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
    InventedUnit(
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

LEVELS = 10
"""Activations are shown as 0 to this."""

ANSWER = "Explanation:"
"""How an answer begins."""

MAX_CHARACTERS = 400
"""A longer explanation is none."""

SPARSE = 0.2
"""Where fewer tokens fire, those that fire are listed once more by themselves."""

_ABOUT = (
    "You study single units of a language model. A unit reads a text token by token and gives each "
    f"token an activation from 0 (silent) to {LEVELS} (strongest). "
)
_ASK = (
    f"Say in one short phrase what makes the unit fire. Answer with one line that begins with "
    f'"{ANSWER}". Name the general pattern; do not list the tokens, and do not mention '
    "activations or excerpts."
)


def levels(
    acts: Float[ndarray, "records window"], scale: float | None = None
) -> Int[ndarray, "records window"]:
    """Return activations as whole numbers of 0 to 10: min(10, floor(10 max(0, x) / scale)).

    Args:
        acts: Activations, in units of the hook.
        scale: What 10 stands for; None takes the largest of `acts` (Bills et al. 2023).
    """
    positive = np.maximum(np.asarray(acts, np.float64), 0.0)
    top = float(positive.max(initial=0.0)) if scale is None else scale
    if top <= 0:
        return np.zeros(positive.shape, np.int64)
    return np.minimum(np.floor(LEVELS * positive / top), LEVELS).astype(np.int64)


def visible(token: str) -> str:
    r"""Return a token on one line: line ends, tabs and the like as people write them.

    >>> visible("a\n\t")
    'a\\n\\t'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)


def characters_of(tokens: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the tokens of a text as people read them, and which of these each token belongs to.

    Most letters of most scripts are several tokens, which say nothing alone: they become one piece.

    >>> characters_of([" a", "<0xE5><0xAE>", "<0xB6>", "b"])
    ([' a', '家', 'b'], [0, 1, 1, 2])
    """
    pieces, owners = list[str](), list[int]()
    for text in whole_characters(tokens):
        if text or not pieces:  # a token without text of its own belongs to the character before it
            pieces.append(text)
        owners.append(len(pieces) - 1)
    return pieces, owners


def pairs_prompt(records: Sequence[Shown]) -> Prompt:
    """Ask with each token and its activation on a line of its own."""
    about = _ABOUT + "You see excerpts, one token per line: the token, a tab, its activation. "
    return _prompt(about + _ASK, [_pairs(unit.firing) for unit in INVENTED_UNITS], _pairs(records))


def max_act_prompt(records: Sequence[Shown]) -> Prompt:
    """Ask with excerpts as text, the tokens that fire in double brackets, and the strongest."""
    about = _ABOUT + (
        "You see excerpts of text in which it fires. Tokens that fire stand in [[double "
        "brackets]]; under each excerpt are its strongest tokens with their activations. "
    )
    return _prompt(
        about + _ASK, [_marked(unit.firing) for unit in INVENTED_UNITS], _marked(records)
    )


def contrastive_prompt(firing: Sequence[Shown], silent: Sequence[Shown]) -> Prompt:
    """Ask with excerpts in which it fires and others in which it does not."""
    about = _ABOUT + (
        "You see excerpts of text in which it fires, with the tokens that fire in [[double "
        "brackets]], and then excerpts in which it is silent throughout. The explanation must hold "
        "for the first and not for the others. "
    )
    examples = [_contrast(unit.firing, unit.silent) for unit in INVENTED_UNITS]
    return _prompt(about + _ASK, examples, _contrast(firing, silent))


def parse_explanation(answer: str) -> str | None:
    """Return the explanation in an answer; None where it has not the form asked for.

    The form is one line that begins with `Explanation:`, emphasis aside, of at most 400 characters,
    or that word and the next line, with nothing before it and no second explanation after it.
    Thinking aloud before it and a fence around it are left out; see `final_answer`.

    >>> parse_explanation("Explanation: names of rivers.")
    'names of rivers'
    >>> parse_explanation("I am sorry, I cannot help with that.") is None
    True
    """
    lines = [line.strip().strip("*").strip() for line in final_answer(answer).splitlines()]
    lines = [line for line in lines if line]
    heads = [line for line in lines if line.lower().startswith(ANSWER.lower())]
    if len(heads) != 1 or lines[0] != heads[0]:
        return None
    text = heads[0][len(ANSWER) :].strip(" *\"'")
    if not text and len(lines) > 1:
        text = lines[1].strip(" *\"'")
    text = text.removesuffix(".").strip()
    has_words = any(character.isalnum() for character in text)
    return text if has_words and len(text) <= MAX_CHARACTERS else None


def _prompt(about: str, examples: Iterable[str], asked: str) -> Prompt:
    turns = [Message("system", about)]
    for unit, excerpts in zip(INVENTED_UNITS, examples, strict=True):
        answer = f"{ANSWER} {unit.explanation}"
        turns += [Message("user", excerpts), Message("assistant", answer)]
    return Prompt((*turns, Message("user", asked)))


def _pairs(records: Sequence[Shown]) -> str:
    lines: list[str] = []
    for i, record in enumerate(records, start=1):
        lines += [f"Excerpt {i}", *_lines(record), ""]
    pairs = [pair for record in records for pair in record]
    firing = [(token, act) for token, act in pairs if act]
    if len(firing) < SPARSE * len(pairs):
        lines += ["The tokens that fire, once more", *_lines(firing), ""]
    return "\n".join(lines).rstrip("\n")


def _lines(pairs: Iterable[tuple[str, int]]) -> list[str]:
    return [f"{visible(token)}\t{act}" for token, act in pairs]


def _marked(records: Sequence[Shown]) -> str:
    blocks: list[str] = []
    for i, record in enumerate(records, start=1):
        strongest = sorted((pair for pair in record if pair[1]), key=lambda pair: -pair[1])[:5]
        named = ", ".join(f'"{visible(token)}" {act}' for token, act in strongest)
        blocks.append(f"Excerpt {i}: {_text(record)}\nStrongest: {named or 'none'}")
    return "\n\n".join(blocks)


def _contrast(firing: Sequence[Shown], silent: Sequence[Shown]) -> str:
    fires = [f"Fires {i}: {_text(record)}" for i, record in enumerate(firing, start=1)]
    rests = [f"Silent {i}: {_text(record)}" for i, record in enumerate(silent, start=1)]
    return "\n".join([*fires, "", *rests])


def _text(record: Shown) -> str:
    marked = [f"[[{visible(token)}]]" if act else visible(token) for token, act in record]
    return "".join(marked).strip()
