"""Asking a language model: one protocol for local models, servers and the replay cache.

Holds the protocol; `local`, `server` and `replayed` hold the clients. A call that fails is a value,
so that one bad answer costs one prompt.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

AnswerFailure = Literal["unparsed", "refused", "no_answer"]
"""Why there is no answer.

no_answer: nothing came back, such as from a server that is down. refused: the client's limit on
calls or cost is reached, or a replay file has no such answer. unparsed: what came back is empty, or
has not the form that it must have.
"""

UNANSWERED: tuple[AnswerFailure, ...] = ("no_answer", "refused")
"""Failures of the connection: asking again may help, so that what failed so is not done. Failures
of the answer (`unparsed`) are results: asking again would be paid for and give the same."""


class Failed(NamedTuple):
    """Why there is nothing: what stands in columns `failure` and `reason` of a row."""

    failure: str
    """Type of the failure."""
    reason: str | None = None
    """What went wrong, in words; None where the type says all."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What asking a language model took."""

    n_calls: int = 0
    """Calls made; an answer from the replay cache is none."""
    n_prompt_tokens: int = 0
    """Tokens sent."""
    n_completion_tokens: int = 0
    """Tokens received."""
    cost_usd: float | None = None
    """US dollars; None where no price is known."""
    seconds: float = 0.0
    """Wall time."""

    def __add__(self, other: "Usage") -> "Usage":
        costs = [cost for cost in (self.cost_usd, other.cost_usd) if cost is not None]
        return Usage(
            self.n_calls + other.n_calls,
            self.n_prompt_tokens + other.n_prompt_tokens,
            self.n_completion_tokens + other.n_completion_tokens,
            sum(costs) if costs else None,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str
    """What is said."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked: turns, or a bare text to go on from."""

    messages: tuple[Message, ...] = ()
    """Turns of a chat; empty for a bare text."""
    text: str = ""
    """Bare text, for base models."""

    @property
    def sha256(self) -> str:
        """Hash of all that is said."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one prompt."""

    text: str | None
    """The completion; None where it failed."""
    failure: AnswerFailure | None = None
    """Why there is none."""
    detail: str = ""
    """What went wrong, for people; never holds a key."""
    tokens: tuple[str, ...] = ()
    """Tokens of the completion, where alternatives were asked for."""
    alternatives: tuple[dict[str, float], ...] = ()
    """Per token of the completion: the likeliest tokens and their log-probabilities, in nats."""
    usage: Usage = field(default_factory=Usage)
    """What it took."""

    @property
    def failed(self) -> Failed | None:
        """Failure and detail; None where it worked."""
        return self.failure and Failed(self.failure, self.detail or None)


@dataclass(frozen=True, slots=True)
class Reading:
    """The tokens of a bare text and what the model expected instead of each."""

    tokens: tuple[str, ...] = ()
    """Strings that join to the text; a character of several tokens is in the last of them."""
    logprobs: tuple[float | None, ...] = ()
    """Log-probability of each token after those before it, in nats; None for the first."""
    alternatives: tuple[dict[str, float], ...] = ()
    """Per position: the likeliest tokens there and their log-probabilities; empty for the first."""
    failure: AnswerFailure | None = None
    """Why there is nothing; as for an answer."""
    detail: str = ""
    """What went wrong, for people; never holds a key."""
    usage: Usage = field(default_factory=Usage)
    """What it took."""

    @property
    def failed(self) -> Failed | None:
        """Failure and detail; None where it worked."""
        return self.failure and Failed(self.failure, self.detail or None)


def final_answer(text: str) -> str:
    r"""Return what a model answers in the end, without thinking before it and a fence around it.

    A model that thinks aloud ends that with `</think>`; where it never does, its budget of tokens
    ran out and nothing is answered. Some chat templates write the opening `<think>` themselves, so
    that only the closing one is in the answer.

    >>> final_answer("<think>\nIs it [1]?\n</think>\n\n```json\n[0,1]\n```")
    '[0,1]'
    >>> final_answer("<think>\nI am not done")
    ''
    """
    answer = text.rpartition("</think>")[2].strip()
    if answer.startswith("<think>"):
        return ""
    fenced = re.fullmatch(r"```[^\n`]*\n(.*?)\n?```", answer, re.DOTALL)
    return fenced[1].strip() if fenced else answer


Heard = Callable[[int, Answer], None]
"""Called with the place of a prompt and its answer as soon as it is there, from any thread, one
call at a time."""

Read = Callable[[int, Reading], None]
"""As `Heard`, for texts that are read."""


@runtime_checkable
class Client(Protocol):
    """A language model that can be asked."""

    @property
    def name(self) -> str:
        """Model and version, as stored with every score."""
        ...

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        n_alternatives: int = 0,
        on_answer: Heard | None = None,
    ) -> list[Answer]:
        """Return an answer for each prompt, in order.

        Args:
            prompts: What is asked.
            max_tokens: Most tokens of an answer.
            temperature: 0 takes the likeliest token; above 0 samples.
            seed: Seed of the sampling; the same prompt and seed give the same answer, whatever
                else is asked with it, as far as the model's host keeps to it.
            n_alternatives: Alternatives wanted at each token.
            on_answer: Told each answer when it comes.

        Raises:
            ClientError: The model cannot be reached at all, or the settings are refused.
        """
        ...

    def read(
        self, texts: Sequence[str], *, n_alternatives: int = 0, on_reading: Read | None = None
    ) -> list[Reading]:
        """Return, for each bare text, its tokens with log-probabilities; nothing is generated.

        Raises:
            ClientError: The model cannot be reached, or gives no log-probabilities of its prompt.
        """
        ...
