"""Asking a language model: one protocol for local models, servers and the replay cache.

Holds the words of the protocol only; `client_local.py`, `client_server.py` and `client_replay.py`
hold the clients. A call that fails is a value, so that one bad answer costs one item.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from lmmono.explaining.explanation import Failure, Usage


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


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one prompt."""

    text: str | None
    """The completion; None where it failed."""
    failure: Failure | None = None
    """Why there is none."""
    alternatives: tuple[dict[str, float], ...] = ()
    """Per token of the completion: the likeliest tokens and their log-probabilities."""
    usage: Usage = field(default_factory=Usage)
    """What it took."""


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """The tokens of a bare text and what the model expected instead of each."""

    tokens: tuple[str, ...]
    """Strings that join to the text."""
    logprobs: tuple[float | None, ...]
    """Log-probability of each token after those before it; None for the first."""
    alternatives: tuple[dict[str, float], ...]
    """Per position: the likeliest tokens there and their log-probabilities."""
    usage: Usage = field(default_factory=Usage)
    """What it took."""


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
    ) -> list[Answer]:
        """Return an answer for each prompt, in order.

        Raises:
            ClientError: The model cannot be reached at all, or the settings are refused.
        """
        ...

    def read(
        self, texts: Sequence[str], *, n_alternatives: int = 0
    ) -> list[PromptTokens | Failure]:
        """Return, for each bare text, its tokens with log-probabilities; nothing is generated.

        Raises:
            ClientError: The model does not give log-probabilities of its prompt.
        """
        ...
