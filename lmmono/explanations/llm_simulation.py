"""Activations that a language model expects of an explanation: all tokens in one reading.

The model reads a text with examples, the explanation, and one excerpt with a token per line, each
followed by a tab and the word `unknown`. Nothing is generated. At each place where `unknown` begins
(a slot, found by its character) the log-probabilities of the strings "0" to "10" are kept, made to
sum to one, and averaged: E = sum(v p_v) / sum(p_v). Bills et al. 2023, all at once.

Where "10" is two tokens, p("1") covers both 1 and 10. Then
    p_10 = p("1") p("0" after "1"),  p_1 = p("1") (1 - p("0" after "1")),
and p("0" after "1") is read from a second text that ends with 10 in the slot's place. That is one
more reading per slot, so it is made only where "1" holds at least `TEN_SHARE` of the digits'
probability; elsewhere the expected value is at most 9 x TEN_SHARE = 0.18 too low.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate, islice

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from lmmono.clients.client import Client, Failed, Reading, Usage
from lmmono.errors import ExplainError
from lmmono.explanations.llm_prompts import INVENTED_UNITS, LEVELS, characters_of, visible

N_ALTERNATIVES = 15
"""Tokens looked at per slot, as in Bills et al. 2023."""

TEN_SHARE = 0.02
"""Share of the digits' probability from which "1" is looked into, where "10" is two tokens."""

TEXTS_AT_ONCE = 64
"""Texts read together; their alternatives are in memory, about 2 MB per text."""

_ABOUT = (
    "Units of a language model read a text token by token and give each token an activation from 0 "
    f"(silent) to {LEVELS} (strongest). Each unit below is explained by a phrase; then come the "
    "tokens of a text, each with a tab and the unit's activation. Where that is unknown, most "
    "tokens have 0."
)
_UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a language model expects a unit to do, by its explanation alone."""

    acts: Float[ndarray, "records window"]
    """Expected activations between 0 and 10; 0 on padding and where there is a fallback."""
    n_slots: int = 0
    """Tokens, or characters of several tokens, that were asked."""
    n_fallback: int = 0
    """Slots without any number among the alternatives; their value is 0."""
    failed: Failed | None = None
    """Why a text could not be read; then all activations are 0 and stand for nothing."""
    usage: Usage = field(default_factory=Usage)
    """What it took."""
    prompt_hash: str | None = None
    """sha256 of the texts that were read, one after the other; None where nothing was."""

    @property
    def fallback_fraction(self) -> float:
        """Share of slots without any number among the alternatives."""
        return self.n_fallback / max(self.n_slots, 1)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> ndarray:
        return np.array(self.acts, dtype=dtype, copy=copy)  # pyright: ignore[reportArgumentType, reportCallIssue]


@dataclass(slots=True)
class _Slot:
    """One token that is asked."""

    end: int
    """Character of the text at which the number would stand."""
    shares: Float[ndarray, " levels"]
    """Probability of 0 to 10; all 0 where there is a fallback."""

    @property
    def value(self) -> float:
        total = self.shares.sum()
        return float(self.shares @ np.arange(LEVELS + 1) / total) if total > 0 else 0.0


@cache
def _start() -> str:
    blocks = [_ABOUT]
    for i, unit in enumerate(INVENTED_UNITS, start=1):
        pairs = [*unit.silent[0], *unit.firing[0]]
        n_hidden = len(unit.silent[0]) - 2  # the first tokens are unknown, as all will be
        lines = [
            f"{visible(token)}\t{_UNKNOWN if n < n_hidden else act}"
            for n, (token, act) in enumerate(pairs)
        ]
        blocks.append(_head(i, unit.explanation) + "\n".join(lines) + "\nEnd")
    return "\n\n".join(blocks) + "\n\n"


def _head(i: int, explanation: str) -> str:
    return f"Unit {i}\nThis unit fires on: {explanation}\nActivations:\n"


def simulation_text(explanation: str, tokens: Sequence[str]) -> tuple[str, list[int]]:
    """Return the text to read, and the character at which each token's slot begins."""
    text = _start() + _head(len(INVENTED_UNITS) + 1, " ".join(explanation.split()))
    lines = [f"{visible(token)}\t{_UNKNOWN}\n" for token in tokens]
    ends = accumulate((len(line) for line in lines), initial=len(text))
    slots = [end - len(_UNKNOWN) - 1 for end in list(ends)[1:]]
    return text + "".join(lines), slots


def simulate(
    client: Client,
    explanations: Sequence[str],
    token_ids: Sequence[Int[ndarray, "records window"]],
    vocabulary: tuple[str, ...],
) -> list[Simulation]:
    """Return what a model expects of each explanation on the tokens of its records.

    Args:
        client: A model that gives log-probabilities of its prompt.
        explanations: Texts.
        token_ids: Records of each; negative ids are padding.
        vocabulary: String of each token id.

    Raises:
        ExplainError: The store that the tokens come from has no strings for them.
        ClientError: The model gives no log-probabilities of its prompt.
    """
    if not vocabulary:
        raise ExplainError("the store has no vocabulary, so no text can be shown; capture it anew")
    simulations = [Simulation(np.zeros(ids.shape)) for ids in token_ids]
    digests = [hashlib.sha256() for _ in simulations]
    for texts in _batches(_texts(explanations, token_ids, vocabulary)):
        for text, reading, slots in _read(client, texts):
            i, simulation = text.explanation, simulations[text.explanation]
            is_token = token_ids[i][text.record] >= 0
            # a character of several tokens has one slot: all of them get its value
            simulation.acts[text.record, is_token] = [slots[of].value for of in text.owners]
            digests[i].update(text.text.encode())
            simulations[i] = replace(
                simulation,
                n_slots=simulation.n_slots + len(slots),
                n_fallback=simulation.n_fallback + sum(not slot.shares.any() for slot in slots),
                failed=simulation.failed or reading.failed,
                usage=simulation.usage + reading.usage,
                prompt_hash=digests[i].hexdigest(),
            )
    return [
        replace(one, acts=np.zeros(one.acts.shape)) if one.failed else one for one in simulations
    ]


@dataclass(frozen=True, slots=True)
class _Text:
    """The text of one record of one explanation."""

    explanation: int
    record: int
    text: str
    slots: list[int]
    owners: list[int]
    """Slot of each token."""


def _texts(
    explanations: Sequence[str],
    token_ids: Sequence[Int[ndarray, "records window"]],
    vocabulary: tuple[str, ...],
) -> Iterator[_Text]:
    for i, (explanation, records) in enumerate(zip(explanations, token_ids, strict=True)):
        for record, ids in enumerate(records):
            pieces, owners = characters_of([vocabulary[token_id] for token_id in ids[ids >= 0]])
            if pieces:
                yield _Text(i, record, *simulation_text(explanation, pieces), owners)


def _batches(texts: Iterator[_Text]) -> Iterator[list[_Text]]:
    while batch := list(islice(texts, TEXTS_AT_ONCE)):
        yield batch


def _read(client: Client, texts: list[_Text]) -> Iterator[tuple[_Text, Reading, list[_Slot]]]:
    readings = client.read([text.text for text in texts], n_alternatives=N_ALTERNATIVES)
    slots = [
        [] if reading.failure else _slots(reading, text.slots)
        for text, reading in zip(texts, readings, strict=True)
    ]
    for i, slot, after_one in _read_on(client, texts, readings, slots):
        usage = readings[i].usage + after_one.usage
        first = after_one if readings[i].failure is None else readings[i]
        readings[i] = replace(readings[i], usage=usage, failure=first.failure, detail=first.detail)
        if not after_one.failure:
            _split_one(slot, after_one)
    for text, reading, own in zip(texts, readings, slots, strict=True):
        nothing = [_Slot(end, np.zeros(LEVELS + 1)) for end in text.slots]
        yield text, reading, (nothing if reading.failure else own)


def _slots(reading: Reading, ends: list[int]) -> list[_Slot]:
    by_start, slots = _by_start(reading), list[_Slot]()
    for end in ends:
        token = by_start.get(end)
        alternatives = {} if token is None else reading.alternatives[token]
        logprobs = [alternatives.get(str(level), -np.inf) for level in range(LEVELS + 1)]
        slots.append(_Slot(end, np.exp(logprobs)))
    return slots


def _by_start(reading: Reading) -> dict[int, int]:
    """Return the token that begins at each character; tokens without one of their own are out."""
    starts = accumulate((len(token) for token in reading.tokens), initial=0)
    pairs = zip(starts, reading.tokens, strict=False)
    return {start: i for i, (start, token) in enumerate(pairs) if token}


def _read_on(
    client: Client, texts: list[_Text], readings: list[Reading], slots: list[list[_Slot]]
) -> Iterator[tuple[int, _Slot, Reading]]:
    """Read on after "1" in the slots where it matters; yield text, slot and reading."""
    # a 10 is two tokens to this model where the examples' first one is
    first_ten = _start().index("\t10\n") + 2
    wanted = [
        (i, slot)
        for i, reading in enumerate(readings)
        if not reading.failure and first_ten in _by_start(reading)
        for slot in slots[i]
        if slot.shares[1] >= TEN_SHARE * slot.shares.sum() > 0
    ]
    if wanted:
        further = client.read([texts[i].text[: slot.end] + "10" for i, slot in wanted])
        for (i, slot), after_one in zip(wanted, further, strict=True):
            yield i, slot, after_one


def _split_one(slot: _Slot, after_one: Reading) -> None:
    """Give 10 its part of the probability of "1"."""
    zero = _by_start(after_one).get(slot.end + 1)
    logprob = None if zero is None else after_one.logprobs[zero]
    ten = slot.shares[1] * (0.0 if logprob is None else np.exp(logprob))
    slot.shares[1] -= ten
    slot.shares[10] += ten
