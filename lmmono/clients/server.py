"""A language model behind an OpenAI-compatible server.

Nothing is sent before the client is asked something. The key is read from the environment when the
first call is made and held by the connection alone: no name, repr, message or cache has it.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from lmmono.clients.client import (
    Answer,
    AnswerFailure,
    Heard,
    Prompt,
    Read,
    Reading,
    Usage,
)
from lmmono.clients.server_bodies import MissingLogprobs, chat_answer, reading, text_answer
from lmmono.clients.server_limits import NO_LIMITS, Account, Limits, Price
from lmmono.errors import ClientError

NO_KEY = "none"
"""Sent in place of a key where no variable is named; servers on one's own machine ignore it."""


T = TypeVar("T", Answer, Reading)


@dataclass(frozen=True, slots=True)
class _Call(Generic[T]):
    """One call that is to be made."""

    path: str
    body: dict[str, Any]
    n_bytes: int
    understand: Callable[[bytes], T]
    failed: Callable[[AnswerFailure, str, Usage], T]


class ServerClient:
    """A model of an OpenAI-compatible server.

    Args:
        model: Name of the model on the server.
        base_url: Where the server is, such as `http://127.0.0.1:8000/v1`.
        key_variable: Environment variable that holds the key; None sends none.
        prices: Price of models by name, for cost in US dollars; see `Price`.
        limits: Most calls, most cost, and calls per minute; see `Limits`.
        n_threads: Calls under way together.
        timeout_seconds: Longest wait for one try of a call.
        n_retries: Further tries of a call, with growing pauses; for what may pass (408, 409, 429,
            5xx, no connection, time out).

    Raises:
        ClientError: A limit on cost without a price.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        key_variable: str | None = None,
        prices: Mapping[str, Price] | None = None,
        limits: Limits = NO_LIMITS,
        n_threads: int = 8,
        timeout_seconds: float = 120.0,
        n_retries: int = 4,
    ) -> None:
        self._model, self._base_url, self._key_variable = model, base_url, key_variable
        self._n_threads, self._timeout, self._n_retries = n_threads, timeout_seconds, n_retries
        self._account = Account(limits, (prices or {}).get(model))
        self._was_reached = False

    def __repr__(self) -> str:
        spent = self.spent
        cost = "" if spent.cost_usd is None else f", {spent.cost_usd:.4f} USD"
        return f"ServerClient({self.name}, {spent.n_calls:,} calls{cost})"

    @property
    def name(self) -> str:
        """Model and host; a server may come back on another port as the same judge."""
        return f"{self._model}@{urlsplit(self._base_url).hostname}"

    @property
    def spent(self) -> Usage:
        """What all calls so far took; `seconds` adds up over threads."""
        return self._account.spent

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
        """Return an answer for each prompt, in order; see `Client.complete`.

        Turns go to `/chat/completions`, bare texts to `/completions`.
        """
        shared: dict[str, Any] = {"max_tokens": max_tokens, "temperature": float(temperature)}
        shared |= {"seed": seed} if temperature else {}
        calls = [_completion(prompt, shared, n_alternatives) for prompt in prompts]
        return self._each(calls, on_answer)

    def read(
        self, texts: Sequence[str], *, n_alternatives: int = 0, on_reading: Read | None = None
    ) -> list[Reading]:
        """Return the tokens of each text with log-probabilities; see `Client.read`.

        Asks `/completions` to echo the text and to add nothing; not every server can.
        """
        body = {"max_tokens": 0, "temperature": 0.0, "echo": True, "logprobs": n_alternatives}
        calls = [
            _Call(
                "/completions",
                {"prompt": text, **body},
                len(text.encode()),
                lambda sent, text=text: reading(sent, text),
                _failed_reading,
            )
            for text in texts
        ]
        return self._each(calls, on_reading)

    def _each(self, calls: Sequence[_Call[T]], heard: Callable[[int, T], None] | None) -> list[T]:
        """Make the calls in threads; each answer is told before its thread makes another call."""
        server, lock = self._server, Lock()

        def made(i: int) -> T:
            outcome = self._made(server, calls[i])
            if heard is not None:
                with lock:
                    heard(i, outcome)
            return outcome

        with ThreadPoolExecutor(self._n_threads) as pool:
            futures = [pool.submit(made, i) for i in range(len(calls))]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _made(self, server: Any, call: _Call[T]) -> T:
        began = time.perf_counter()
        bound = self._account.begin(call.n_bytes, call.body["max_tokens"])
        if bound is None:
            return call.failed("refused", "the client's limit on calls or cost is reached", Usage())
        outcome = call.failed("no_answer", "", Usage(1))
        try:
            outcome = self._sent(server, call)
        finally:
            took = replace(outcome.usage, n_calls=1, seconds=time.perf_counter() - began)
            took = self._account.end(bound, took)
        return replace(outcome, usage=took)

    def _sent(self, server: Any, call: _Call[T]) -> T:
        import openai

        try:
            sent = server.post(call.path, cast_to=bytes, body={"model": self._model, **call.body})
            self._was_reached = True
            return call.understand(sent)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ClientError(
                f"{self.name}: the key is refused (HTTP {error.status_code}); the key is what "
                f"environment variable {self._key_variable} holds (key_variable=)"
            ) from None
        except openai.NotFoundError:
            raise ClientError(
                f"{self.name}: no such model or path (HTTP 404 at {call.path}); check model= and "
                "base_url=, which mostly ends in /v1"
            ) from None
        except openai.APIStatusError as error:
            self._was_reached = True
            detail = f"HTTP {error.status_code}: {self._without_key(error.message)[:200]}"
        except openai.APITimeoutError:
            detail = f"no answer within {self._timeout:g} s"
        except openai.APIConnectionError as error:
            detail = f"no connection: {type(error.__cause__).__name__}"
            if not self._was_reached:
                raise ClientError(
                    f"{self.name}: the server cannot be reached ({detail}); check base_url="
                ) from None
        except MissingLogprobs:
            raise ClientError(
                f"{self.name}: the server gives no log-probabilities of a prompt; use a server "
                "that echoes them on /completions (such as vLLM), or LocalClient"
            ) from None
        return call.failed("no_answer", detail, Usage(1))

    @cached_property
    def _server(self) -> Any:
        try:
            from openai import OpenAI
        except ImportError:
            raise ClientError("servers need one package more: pip install 'lmmono[llm]'") from None
        return OpenAI(
            api_key=self._key(),
            base_url=self._base_url,
            timeout=self._timeout,
            max_retries=self._n_retries,
        )

    def _key(self) -> str:
        if self._key_variable is None:
            return NO_KEY
        key = os.environ.get(self._key_variable)
        if not key:
            raise ClientError(
                f"{self.name}: environment variable {self._key_variable} is not set; it must hold "
                "the server's key"
            )
        return key

    def _without_key(self, message: str) -> str:
        key = self._key()
        return message if key == NO_KEY else message.replace(key, "***")


def _completion(prompt: Prompt, shared: dict[str, Any], n_alternatives: int) -> _Call[Answer]:
    if not prompt.messages:
        body = {"prompt": prompt.text, **shared}
        body |= {"logprobs": n_alternatives} if n_alternatives else {}
        n_bytes = len(prompt.text.encode())
        return _Call("/completions", body, n_bytes, text_answer, _failed_answer)
    turns = [{"role": each.role, "content": each.content} for each in prompt.messages]
    body = {"messages": turns, **shared}
    body |= {"logprobs": True, "top_logprobs": n_alternatives} if n_alternatives else {}
    # servers count a few tokens more per turn: for who speaks and where it ends
    n_bytes = sum(len(each.content.encode()) + 8 for each in prompt.messages) + 8
    return _Call("/chat/completions", body, n_bytes, chat_answer, _failed_answer)


def _failed_answer(failure: AnswerFailure, detail: str, usage: Usage) -> Answer:
    return Answer(None, failure, detail, usage=usage)


def _failed_reading(failure: AnswerFailure, detail: str, usage: Usage) -> Reading:
    return Reading(failure=failure, detail=detail, usage=usage)
