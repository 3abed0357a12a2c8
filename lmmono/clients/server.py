"""A language model behind an OpenAI-compatible server: what it may cost, what it sends, asking it.

Nothing is sent before the client is asked something. The key is read from the environment when a
call is made and held by the connection alone: no name, repr, message, answer or file has it.

A server is not trusted: a call ends at its deadline however slowly bytes come, the prompt goes to
no other address, and what is sent back is checked. `openai` makes the connection, the retries and
the errors. Its typed responses are not used: it builds them without a check, and with one they
refuse the many servers that leave out an id or a date.
"""

import asyncio
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Annotated, Any, Generic, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from lmmono.clients.client import (
    Answer,
    AnswerFailure,
    Heard,
    Prompt,
    Read,
    Reading,
    Usage,
)
from lmmono.errors import ClientError

NO_KEY = "none"
"""Sent in place of a key where no variable is named; servers on one's own machine ignore it."""

MAX_TOKENS_COUNTED = 2**53
"""A usage beyond this is a lie, and overflows the floats that costs are counted in."""

MAX_BODY_BYTES = 64_000_000
"""Most bytes of one answer, unpacked: 15 alternatives at each of 100,000 tokens. Without a bound a
server fills the memory before the deadline ends the call."""

MAX_ROUNDING = 1e-3
"""A log-probability may be this much above 0: servers round in half precision."""

T = TypeVar("T", Answer, Reading)


# ---- what calls may take ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Price:
    """What a model costs, in US dollars per million tokens."""

    prompt_usd: float
    """Of tokens sent."""
    completion_usd: float
    """Of tokens received."""

    def of(self, n_prompt_tokens: int, n_completion_tokens: int) -> float:
        """Return the cost of a call in US dollars.

        >>> Price(prompt_usd=0.5, completion_usd=2.0).of(1_000_000, 500_000)
        1.5
        """
        sent = self.prompt_usd * n_prompt_tokens
        received = self.completion_usd * n_completion_tokens
        return (sent + received) / 1e6


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what one client may take; None is no bound."""

    max_calls: int | None = None
    """Calls in all; retries of a call are the same call."""
    max_cost_usd: float | None = None
    """US dollars in all."""
    calls_per_minute: float | None = None
    """Calls begin at least 60 / this many seconds apart."""


NO_LIMITS = Limits()


class Account:
    """Keeps a client within its limits; safe to use from several threads.

    Before a call its cost is held back at a bound that it cannot pass, so that calls under way
    together do not pass the limit either.
    """

    def __init__(self, limits: Limits, price: Price | None) -> None:
        if limits.max_cost_usd is not None and price is None:
            raise ClientError("a limit on cost needs the model's price; pass prices={model: Price}")
        self.spent = Usage(cost_usd=None if price is None else 0.0)
        self._limits, self._price = limits, price
        self._n_begun, self._held_back_usd = 0, 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def begin(self, n_prompt_bytes: int, max_tokens: int) -> tuple[float, float] | None:
        """Return the cost held back for a call and the seconds to wait; None where a limit forbids.

        No tokenizer makes more tokens than bytes.
        """
        price, limits = self._price, self._limits
        with self._lock:
            bound = 0.0 if price is None else price.of(n_prompt_bytes, max_tokens)
            taken = (self.spent.cost_usd or 0.0) + self._held_back_usd + bound
            if limits.max_calls is not None and self._n_begun >= limits.max_calls:
                return None
            if limits.max_cost_usd is not None and taken > limits.max_cost_usd:
                return None
            self._n_begun, self._held_back_usd = self._n_begun + 1, self._held_back_usd + bound
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + 60.0 / (limits.calls_per_minute or float("inf"))
        return bound, max(turn - now, 0.0)

    def end(self, bound: float, usage: Usage) -> Usage:
        """Count what a call took in place of what was held back; returns it with its cost."""
        cost = self._price and self._price.of(usage.n_prompt_tokens, usage.n_completion_tokens)
        usage = replace(usage, cost_usd=cost)
        with self._lock:
            self._held_back_usd -= bound
            self.spent += usage
        return usage


# ---- what a server sends ----------------------------------------------------------------------


class BodyTooLong(Exception):
    """The server sends more than `MAX_BODY_BYTES`."""


class MissingLogprobs(Exception):
    """The server sends no log-probabilities of the prompt."""


def _at_most_zero(logprob: float) -> float:
    if not logprob <= MAX_ROUNDING:
        raise ValueError("want a log-probability of at most 0")
    return min(logprob, 0.0)


def _possible(alternatives: Any) -> Any:
    """Leave out alternatives that cannot be: some servers list them with null or -Infinity."""
    if not isinstance(alternatives, dict):
        return alternatives
    return {k: v for k, v in alternatives.items() if v is not None and v != -float("inf")}


Logprob = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_at_most_zero)]
Alternatives = Annotated[dict[str, Logprob], BeforeValidator(_possible)]
Count = Annotated[int, Field(ge=0, le=MAX_TOKENS_COUNTED)]


class _SentUsage(BaseModel):
    prompt_tokens: Count = 0
    completion_tokens: Count | None = 0


class _SentAlternative(BaseModel):
    token: str
    logprob: Logprob


class _SentToken(_SentAlternative):
    top_logprobs: list[_SentAlternative] | None = None


class _ChatLogprobs(BaseModel):
    content: list[_SentToken] | None = None


class _SentMessage(BaseModel):
    content: str | None = None


class _ChatChoice(BaseModel):
    message: _SentMessage
    logprobs: _ChatLogprobs | None = None
    finish_reason: str | None = None


class _SentChat(BaseModel):
    choices: list[_ChatChoice]
    usage: _SentUsage | None = None


class _TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[Logprob | None]
    top_logprobs: list[Alternatives | None] | None = None
    text_offset: list[int] | None = None


class _TextChoice(BaseModel):
    text: str | None = None
    logprobs: _TextLogprobs | None = None
    finish_reason: str | None = None


class _SentText(BaseModel):
    choices: list[_TextChoice]
    usage: _SentUsage | None = None


def chat_answer(body: bytes) -> Answer:
    """Return the answer in a body of `/v1/chat/completions`."""
    try:
        sent = _SentChat.model_validate_json(body)
    except ValidationError as error:
        return Answer(None, "unparsed", _described(error))
    usage = _usage(sent.usage)
    if not sent.choices or not sent.choices[0].message.content:
        return _empty(sent.choices, usage)
    choice = sent.choices[0]
    content = (choice.logprobs and choice.logprobs.content) or []
    return Answer(
        choice.message.content,
        tokens=tuple(token.token for token in content),
        alternatives=tuple(
            {other.token: other.logprob for other in token.top_logprobs or []} for token in content
        ),
        usage=usage,
    )


def text_answer(body: bytes) -> Answer:
    """Return the answer in a body of `/v1/completions`."""
    try:
        sent = _SentText.model_validate_json(body)
    except ValidationError as error:
        return Answer(None, "unparsed", _described(error))
    usage = _usage(sent.usage)
    if not sent.choices or not sent.choices[0].text:
        return _empty(sent.choices, usage)
    choice = sent.choices[0]
    if choice.logprobs is None:
        return Answer(choice.text, usage=usage)
    alternatives = tuple(some or {} for some in choice.logprobs.top_logprobs or [])
    return Answer(
        choice.text, tokens=tuple(choice.logprobs.tokens), alternatives=alternatives, usage=usage
    )


def _empty(choices: Sequence[_ChatChoice] | Sequence[_TextChoice], usage: Usage) -> Answer:
    detail = "the answer is empty"
    if choices and choices[0].finish_reason == "length":
        detail += ": all its tokens went into thinking; give it more (max_tokens=)"
    return Answer(None, "unparsed", detail, usage=usage)


def reading(body: bytes, text: str) -> Reading:
    """Return what a body of `/v1/completions` with `echo` says of a text.

    Tokens that a server adds before the text are left out; those after it, too.

    Raises:
        MissingLogprobs: There are no log-probabilities in it.
    """
    try:
        sent = _SentText.model_validate_json(body)
    except ValidationError as error:
        return Reading(failure="unparsed", detail=_described(error))
    usage = _usage(sent.usage)
    if not sent.choices:
        return Reading(failure="unparsed", detail="the answer is empty", usage=usage)
    logprobs = sent.choices[0].logprobs
    if logprobs is None:
        raise MissingLogprobs
    alternatives = logprobs.top_logprobs or [None] * len(logprobs.tokens)
    lengths = {len(logprobs.tokens), len(logprobs.token_logprobs), len(alternatives)}
    place = None if len(lengths) > 1 else _place(logprobs, text)
    if place is None:
        detail = "tokens, log-probabilities and text do not line up"
        return Reading(failure="unparsed", detail=detail, usage=usage)
    first, bounds = place
    of_text = slice(first, first + len(bounds) - 1)
    return Reading(
        tuple(text[a:b] for a, b in pairwise(bounds)),
        tuple(logprobs.token_logprobs[of_text]),
        tuple(some or {} for some in alternatives[of_text]),
        usage=usage,
    )


def _place(logprobs: _TextLogprobs, text: str) -> tuple[int, list[int]] | None:
    """Return the first token of the text, and where its tokens begin and the last one ends.

    Joined tokens are not the text where a character is of several tokens; then offsets are needed.
    """
    ends = list(accumulate((len(token) for token in logprobs.tokens), initial=0))
    at = "".join(logprobs.tokens).find(text)
    if at in ends and at + len(text) in ends:
        first, last = ends.index(at), ends.index(at + len(text))
        return first, [end - at for end in ends[first : last + 1]]
    offsets = logprobs.text_offset or []
    inside = [offset for offset in offsets if offset < len(text)]
    ascending = all(a <= b for a, b in pairwise(offsets)) and inside[:1] == [0]
    if len(offsets) != len(logprobs.tokens) or not ascending:
        return None
    return 0, [*inside, len(text)]


def _usage(sent: _SentUsage | None) -> Usage:
    sent = sent or _SentUsage()
    return Usage(1, sent.prompt_tokens, sent.completion_tokens or 0)


def _described(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"])) or "body"
    return f"the server sent something else than an answer: {where}: {first['msg']}"


# ---- asking -----------------------------------------------------------------------------------


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
        n_at_once: Calls under way together.
        timeout_seconds: Longest time for one try of a call, from the connection to the last byte.
        n_retries: Further tries of a call, with growing pauses; for what may pass (408, 409, 429,
            5xx, no connection, time out).
        extra_body: What else is sent with every call, such as `{"reasoning_effort": "low"}`; None
            as a value leaves a parameter out that this client would send, such as
            `{"temperature": None}` for models that refuse it.

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
        n_at_once: int = 8,
        timeout_seconds: float = 120.0,
        n_retries: int = 4,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            parts = urlsplit(base_url)
            is_address = parts.scheme in ("http", "https") and bool(
                parts.hostname and parts.port != 0
            )
        except ValueError:  # of a host or port that cannot be
            is_address = False
        if not is_address:
            raise ClientError(
                f"base_url: want an address like http://localhost:8000/v1, got {base_url!r}"
            )
        self._model, self._base_url, self._key_variable = model, base_url, key_variable
        self._n_at_once, self._timeout, self._n_retries = n_at_once, timeout_seconds, n_retries
        self._extra_body = dict(extra_body or {})
        self._account = Account(limits, (prices or {}).get(model))
        self._was_reached = False
        self._length_name = "max_tokens"

    def __repr__(self) -> str:
        spent = self.spent
        cost = "" if spent.cost_usd is None else f", {spent.cost_usd:.4f} USD"
        return f"ServerClient({self.name}, {spent.n_calls:,} calls{cost})"

    @property
    def name(self) -> str:
        """Model, host and path, without `/v1`, and a hash of `extra_body` where there is one.

        The port is left out: a server may come back on another one as the same judge. A path is
        not: gateways have a model of one name behind several.
        """
        parts = urlsplit(self._base_url)
        path = parts.path.rstrip("/").removesuffix("/v1")
        name = f"{self._model}@{parts.hostname}{path}"
        if not self._extra_body:
            return name
        sent = json.dumps(self._extra_body, sort_keys=True)
        return f"{name}+{hashlib.sha256(sent.encode()).hexdigest()[:8]}"

    @property
    def spent(self) -> Usage:
        """What all calls so far took; `seconds` adds up over calls made together."""
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
        return self._all([_completion(p, shared, n_alternatives) for p in prompts], on_answer)

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
                lambda failure, detail, usage: Reading(failure=failure, detail=detail, usage=usage),
            )
            for text in texts
        ]
        return self._all(calls, on_reading)

    def _all(self, calls: Sequence[_Call[T]], heard: Callable[[int, T], None] | None) -> list[T]:
        """Make the calls, some at once; an answer is told before the next call takes its place."""
        outcomes: dict[int, T] = {}
        places = iter(range(len(calls)))

        async def work(server: Any) -> None:
            for i in places:
                outcomes[i] = await self._made(server, calls[i])
                if heard is not None:
                    heard(i, outcomes[i])

        async def work_together() -> None:
            try:
                async with self._connection() as server, asyncio.TaskGroup() as group:
                    for _ in range(min(self._n_at_once, len(calls))):
                        group.create_task(work(server))
            except BaseExceptionGroup as faults:
                raise faults.exceptions[0] from None

        if calls:
            _run_apart(work_together())
        return [outcomes[i] for i in range(len(calls))]

    async def _made(self, server: Any, call: _Call[T]) -> T:
        began = time.perf_counter()
        admitted = self._account.begin(call.n_bytes, call.body["max_tokens"])
        if admitted is None:
            return call.failed("refused", "the client's limit on calls or cost is reached", Usage())
        bound, wait_seconds = admitted
        outcome = call.failed("no_answer", "", Usage(1))
        try:
            await asyncio.sleep(wait_seconds)
            outcome = self._without_key(await self._sent(server, call))
        finally:
            took = replace(outcome.usage, n_calls=1, seconds=time.perf_counter() - began)
            took = self._account.end(bound, took)
        return replace(outcome, usage=took)

    async def _sent(self, server: Any, call: _Call[T]) -> T:
        import openai

        length_name, body = self._length_name, self._body(call)
        try:
            # `timeout` of the connection is per read: a byte now and then would hold it for ever
            async with asyncio.timeout(self._deadline_seconds):
                sent = await server.post(call.path, cast_to=bytes, body=body)
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
            if error.status_code < 400:
                raise ClientError(
                    f"{self.name}: the server sends calls on to another address (HTTP "
                    f"{error.status_code}), where the prompt would go too; base_url= must be the "
                    "address that answers"
                ) from None
            if length_name == "max_tokens" and _wants_other_length(error):
                # known from now on; calls under way together may each find it out
                self._length_name = "max_completion_tokens"
                return await self._sent(server, call)
            detail = f"HTTP {error.status_code}: {self._masked(error.message)[:200]}"
        except BodyTooLong as error:
            return call.failed("unparsed", str(error), Usage(1))
        except (openai.APITimeoutError, TimeoutError):
            detail = f"no answer within {self._timeout:g} s"
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, BodyTooLong):  # as older versions of openai tell it
                return call.failed("unparsed", str(error.__cause__), Usage(1))
            if type(error.__cause__).__name__ == "DecodingError":  # of httpx: the body is no gzip
                return call.failed("unparsed", f"cannot be unpacked: {error.__cause__}", Usage(1))
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

    @property
    def _deadline_seconds(self) -> float:
        # all tries, and the pauses between them: openai waits 0.5, 1, 2, 4 and then 8 seconds
        pauses = sum(min(0.5 * 2**n, 8.0) for n in range(self._n_retries))
        return (self._n_retries + 1) * self._timeout + pauses

    def _body(self, call: _Call[T]) -> dict[str, Any]:
        body = {"model": self._model, **call.body}
        body[self._length_name] = body.pop("max_tokens")
        body |= self._extra_body
        return {name: value for name, value in body.items() if value is not None}

    def _connection(self) -> Any:
        try:
            from openai import AsyncOpenAI
        except ImportError:
            raise ClientError("servers need one package more: pip install 'lmmono[llm]'") from None
        return AsyncOpenAI(
            api_key=self._key(),
            base_url=self._base_url,
            timeout=self._timeout,
            max_retries=self._n_retries,
            # a redirect would send the prompt to an address that nobody named
            http_client=_bounded_http()(follow_redirects=False, timeout=self._timeout),
        )

    def _key(self) -> str:
        if self._key_variable is None:
            return NO_KEY
        key = os.environ.get(self._key_variable)
        where = f"{self.name}: environment variable {self._key_variable}"
        if not key:
            raise ClientError(f"{where} is not set; it must hold the server's key")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ClientError(
                f"{where} holds a blank, a line break or another character that no key has; set "
                "it to the key alone"
            )
        return key

    def _masked(self, text: str) -> str:
        key = self._key()
        return text if key == NO_KEY else text.replace(key, "***")

    def _without_key(self, outcome: T) -> T:
        """Return an answer without the key, where a server repeats what it was sent."""
        key = self._key()
        if key == NO_KEY or key not in f"{outcome}{''.join(outcome.tokens)}":
            return outcome
        if isinstance(outcome, Reading):
            return Reading(failure="unparsed", detail="the server sent the key back")
        text = None if outcome.text is None else self._masked(outcome.text)
        return replace(
            outcome, text=text, detail=self._masked(outcome.detail), tokens=(), alternatives=()
        )


@cache
def _bounded_http() -> Any:
    """Return the class of connections that read an answer up to `MAX_BODY_BYTES`."""
    import httpx
    from openai import DefaultAsyncHttpxClient

    class BoundedHttpClient(DefaultAsyncHttpxClient):
        async def send(self, request: Any, **options: Any) -> Any:
            options["stream"] = True
            response = await super().send(request, **options)
            body = bytearray()
            try:
                async for part in response.aiter_bytes():  # unpacked, where it was packed
                    body += part
                    if len(body) > MAX_BODY_BYTES:
                        raise BodyTooLong(
                            f"the server sent more than {MAX_BODY_BYTES:,} bytes; read no further"
                        )
            finally:
                await response.aclose()
            headers = [
                (name, value)
                for name, value in response.headers.multi_items()
                if name not in ("content-encoding", "content-length", "transfer-encoding")
            ]
            return httpx.Response(
                response.status_code, headers=headers, content=bytes(body), request=request
            )

    return BoundedHttpClient


def _completion(prompt: Prompt, shared: dict[str, Any], n_alternatives: int) -> _Call[Answer]:
    def failed(failure: AnswerFailure, detail: str, usage: Usage) -> Answer:
        return Answer(None, failure, detail, usage=usage)

    if not prompt.messages:
        body = {"prompt": prompt.text, **shared}
        body |= {"logprobs": n_alternatives} if n_alternatives else {}
        n_bytes = len(prompt.text.encode())
        return _Call("/completions", body, n_bytes, text_answer, failed)
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
    body = {"messages": turns, **shared}
    body |= {"logprobs": True, "top_logprobs": n_alternatives} if n_alternatives else {}
    # servers count a few tokens more per turn: for who speaks and where it ends
    n_bytes = sum(len(turn.content.encode()) + 8 for turn in prompt.messages) + 8
    return _Call("/chat/completions", body, n_bytes, chat_answer, failed)


def _wants_other_length(error: Any) -> bool:
    """Return whether a call was refused for the name of its length.

    OpenAI's reasoning models take `max_completion_tokens` and refuse `max_tokens`.
    """
    is_refused = error.status_code in (400, 422)
    return is_refused and "max_completion_tokens" in f"{error.message} {error.body}"


def _run_apart(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end in a thread: the caller may have an event loop, as notebooks do.

    Where the caller is interrupted, calls under way are broken off.
    """
    begun: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[None] | None]] = []

    async def noted() -> None:
        begun.append((asyncio.get_running_loop(), asyncio.current_task()))
        await work

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, noted())
        try:
            future.result()
        except BaseException:
            if begun and not future.done():
                loop, task = begun[0]
                assert task is not None
                loop.call_soon_threadsafe(task.cancel)
            raise
