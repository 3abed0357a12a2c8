"""Answers kept in a file, so that no question is paid twice.

The file is SQLite with one table, `answers`, a row per model, prompt and parameters. A row is
written when its answer comes, not when the work is done: after a kill only calls that were under
way are asked again. Failures are not kept. Several processes may share a file.
"""

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from lmmono.clients.client import Answer, Client, Heard, Prompt, Read, Reading, Usage
from lmmono.errors import ClientError

FORMAT = 1
"""Version of keys and answers; part of each key."""

WAIT_SECONDS = 60.0
"""Longest wait for another process that writes: a write takes milliseconds, many may queue."""

KEYS_AT_ONCE = 500
"""Keys looked up in one query; SQLite takes at most 999 parameters where it is old."""

_SCHEMA = """CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY,  -- sha256 of model, kind, parameters and prompt
    model TEXT NOT NULL,
    kind TEXT NOT NULL,  -- complete or read
    parameters TEXT NOT NULL,  -- JSON
    prompt BLOB NOT NULL,  -- JSON of the prompt, or the text read; zlib
    answer BLOB NOT NULL,  -- JSON; zlib
    created_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
)"""

T = TypeVar("T", Answer, Reading)

_READERS: dict[type, Any] = {outcome: TypeAdapter(outcome) for outcome in (Answer, Reading)}
"""What reads JSON as an answer, and refuses anything else."""

_DETAIL = "replay has no such answer"
_NOT_STORED: dict[type, Any] = {
    Answer: Answer(None, "refused", _DETAIL),
    Reading: Reading(failure="refused", detail=_DETAIL),
}
"""The answer where nothing may be asked."""


@dataclass(frozen=True, slots=True)
class _Questions(Generic[T]):
    """What is asked in one call."""

    kind: Literal["complete", "read"]
    prompts: Sequence[str]
    """Prompts as JSON, or texts."""
    parameters: dict[str, Any]
    outcome: type[T]
    """What an answer is: also what the file must hold."""
    ask: Callable[[Client, list[int], Callable[[int, T], None]], Sequence[T]]
    """Asks some of them, by place."""


class ReplayClient:
    """A client that remembers.

    What is in the file is answered from it and counts as no call and no tokens.

    Args:
        client: Client to ask what is not in the file, or the name of one: then nothing is asked,
            and what is not there is the failure `refused`.
        path: The file; made where there is none.

    Raises:
        ClientError: The file is something else, or cannot be written.
    """

    def __init__(self, client: Client | str, path: Path | str) -> None:
        self._client, self._path = client, Path(path)
        self.n_found = 0
        """Answers that came from the file."""
        with self._open() as file:
            file.execute(_SCHEMA)

    def __repr__(self) -> str:
        asked = "nothing is asked" if isinstance(self._client, str) else repr(self._client)
        return f"ReplayClient({self._path}, {len(self):,} answers of {self.name}; {asked})"

    def __len__(self) -> int:
        with self._open() as file:
            query = "SELECT count(*) FROM answers WHERE model = ?"
            return int(file.execute(query, (self.name,)).fetchone()[0])

    @property
    def name(self) -> str:
        """Name of the client that is asked."""
        return self._client if isinstance(self._client, str) else self._client.name

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

        At temperature 0 the seed makes no difference.

        Raises:
            ClientError: The file is damaged; says which row, and how to remove it.
        """
        settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": float(temperature)}
        settings |= {"seed": seed if temperature else 0, "n_alternatives": n_alternatives}

        def ask(client: Client, places: list[int], heard: Heard) -> list[Answer]:
            return client.complete([prompts[i] for i in places], **settings, on_answer=heard)

        as_json = [json.dumps(asdict(prompt), ensure_ascii=False) for prompt in prompts]
        return self._answered(_Questions("complete", as_json, settings, Answer, ask), on_answer)

    def read(
        self, texts: Sequence[str], *, n_alternatives: int = 0, on_reading: Read | None = None
    ) -> list[Reading]:
        """Return the tokens of each text with log-probabilities; see `Client.read`.

        Raises:
            ClientError: The file is damaged; says which row, and how to remove it.
        """
        settings = {"n_alternatives": n_alternatives}

        def ask(client: Client, places: list[int], heard: Read) -> list[Reading]:
            return client.read([texts[i] for i in places], **settings, on_reading=heard)

        return self._answered(_Questions("read", texts, settings, Reading, ask), on_reading)

    def _answered(
        self, questions: _Questions[T], heard: Callable[[int, T], None] | None
    ) -> list[T]:
        """Answer from the file, and ask the rest; what is asked twice is asked once."""
        parameters = json.dumps(questions.parameters, sort_keys=True)
        origin = (self.name, questions.kind, parameters)
        keys = [
            hashlib.sha256(json.dumps([FORMAT, *origin, text]).encode()).hexdigest()
            for text in questions.prompts
        ]
        answers: list[T | None] = [None] * len(keys)
        places: dict[str, list[int]] = {}
        for i, key in enumerate(keys):
            places.setdefault(key, []).append(i)

        def put(key: str, answer: T) -> None:
            for i in places[key]:
                # to all but the first prompt that asks it an answer is free
                answers[i] = own = answer if i == places[key][0] else _free(answer)
                if heard is not None:
                    heard(i, own)

        def keep(n: int, answer: T) -> None:
            key = new[n]
            if answer.failure is None:
                self._write((key, *origin), questions.prompts[places[key][0]], answer)
            put(key, answer)

        stored = self._stored(list(places), questions.outcome)
        for key, answer in stored.items():
            put(key, _free(answer))
            self.n_found += len(places[key])
        new = [key for key in places if key not in stored]
        if isinstance(self._client, str):
            for key in new:
                put(key, _NOT_STORED[questions.outcome])
        elif new:
            fresh = questions.ask(self._client, [places[key][0] for key in new], keep)
            for n, answer in enumerate(fresh):
                if answers[places[new[n]][0]] is None:  # a client may leave the telling to us
                    keep(n, answer)
        return [answer for answer in answers if answer is not None]

    def _stored(self, keys: list[str], outcome: type[T]) -> dict[str, T]:
        answers: dict[str, T] = {}
        with self._open() as file:
            for first in range(0, len(keys), KEYS_AT_ONCE):
                some = keys[first : first + KEYS_AT_ONCE]
                holes = ",".join("?" * len(some))
                query = f"SELECT key, answer FROM answers WHERE key IN ({holes})"
                for key, answer in file.execute(query, some):
                    answers[key] = self._understood(key, answer, outcome)
        return answers

    def _understood(self, key: str, packed: Any, outcome: type[T]) -> T:
        try:
            return _READERS[outcome].validate_json(zlib.decompress(packed))
        except (zlib.error, TypeError, ValidationError) as fault:
            raise ClientError(
                f"{self._path}: the answer with key {key[:12]}... is damaged "
                f"({type(fault).__name__}); take the file from where it was whole, or remove the "
                f"row, and it is asked again: DELETE FROM answers WHERE key = '{key}'"
            ) from fault

    def _write(self, origin: tuple[str, ...], prompt: str, answer: Answer | Reading) -> None:
        row = [zlib.compress(text.encode()) for text in (prompt, json.dumps(asdict(answer)))]
        with self._open() as file:
            # of two processes that ask the same at once the first is kept
            file.execute(
                """INSERT OR IGNORE INTO answers (key, model, kind, parameters, prompt, answer)
                VALUES (?, ?, ?, ?, ?, ?)""",
                (*origin, *row),
            )

    @contextmanager
    def _open(self) -> Generator[sqlite3.Connection, None, None]:
        try:
            file = sqlite3.connect(self._path, timeout=WAIT_SECONDS)
            try:
                with file:
                    yield file
            finally:
                file.close()
        except sqlite3.Error as fault:
            raise ClientError(
                f"{self._path}: cannot be used ({fault}); want a file that ReplayClient made, or a "
                "new one in a folder that can be written"
            ) from fault


def _free(answer: T) -> T:
    cost = None if answer.usage.cost_usd is None else 0.0
    return replace(answer, usage=Usage(cost_usd=cost))
