"""What calls to a server may take: at most so many, so much money, and not too fast."""

import threading
import time
from dataclasses import dataclass

from lmmono.clients.client import Usage
from lmmono.errors import ClientError


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
        sent, received = (
            self.prompt_usd * n_prompt_tokens,
            self.completion_usd * n_completion_tokens,
        )
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
        self._n_begun, self._held = 0, 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def begin(self, n_prompt_bytes: int, max_tokens: int) -> float | None:
        """Return the cost held back for a call, or None where a limit forbids it; waits its turn.

        No tokenizer makes more tokens than bytes.
        """
        price, limits = self._price, self._limits
        with self._lock:
            bound = 0.0 if price is None else price.of(n_prompt_bytes, max_tokens)
            taken = (self.spent.cost_usd or 0.0) + self._held + bound
            if limits.max_calls is not None and self._n_begun >= limits.max_calls:
                return None
            if limits.max_cost_usd is not None and taken > limits.max_cost_usd:
                return None
            self._n_begun, self._held = self._n_begun + 1, self._held + bound
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + 60.0 / (limits.calls_per_minute or float("inf"))
        time.sleep(max(turn - now, 0.0))
        return bound

    def end(self, bound: float, usage: Usage) -> Usage:
        """Count what a call took in place of what was held back; returns it with its cost."""
        cost = self._price and self._price.of(usage.n_prompt_tokens, usage.n_completion_tokens)
        usage = Usage(
            usage.n_calls, usage.n_prompt_tokens, usage.n_completion_tokens, cost, usage.seconds
        )
        with self._lock:
            self._held -= bound
            self.spent += usage
        return usage
