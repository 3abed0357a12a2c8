"""One change of a lake: it comes about whole or not at all."""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import duckdb

from activation_store.errors import LockedError, WriteError
from activation_store.lake.lake_place import LAKE, LakePlace, said

Answer = TypeVar("Answer")

ATTEMPTS = 8
"""How often a commit is tried where another program wrote at the same moment."""

_PASSING = ("database is locked", "conflict", "could not serialize", "deadlock detected")


def run(
    con: duckdb.DuckDBPyConnection,
    place: LakePlace,
    work: Callable[[duckdb.DuckDBPyConnection], Answer],
) -> Answer:
    """Run `work` in a transaction of the lake, again where another program came between.

    Ours take turns, so only programs that write to the DuckLake without us can.

    Raises:
        LockedError: they came between `ATTEMPTS` times.
        WriteError: the machine or the server refused.
        StoreError: what `work` raises; nothing is changed.
    """
    con.execute(f"USE {LAKE}")
    for attempt in range(ATTEMPTS):
        con.execute("BEGIN")
        try:
            answer = work(con)
            con.execute("COMMIT")
        except duckdb.Error as fault:
            _roll_back(con)
            text = said(place, fault)
            if not any(sign in text.lower() for sign in _PASSING):
                raise WriteError(
                    f"{place.name}: cannot write: {text}. What was committed before is intact."
                ) from fault
            if attempt == ATTEMPTS - 1:
                raise LockedError(
                    f"{place.name}: other programs changed the lake in each of {ATTEMPTS} "
                    f"attempts: {text}. Nothing was written; run again later."
                ) from fault
            time.sleep(min(5.0, 0.05 * 2**attempt) * random.uniform(0.5, 1.0))
        except BaseException:
            _roll_back(con)
            raise
        else:
            return answer
    raise AssertionError("the last attempt returns or raises")


def _roll_back(con: duckdb.DuckDBPyConnection) -> None:
    # a commit that failed has ended its transaction already
    with suppress(duckdb.TransactionException):
        con.execute("ROLLBACK")
