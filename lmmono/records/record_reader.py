"""The one door to what explains and scores: reads a store once per hook, whoever asks how often."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import numpy as np

import activation_store as astore
from lmmono.records.corpus_excerpts import Excerpts, read_excerpts
from lmmono.records.sampler import (
    KINDS,
    Contrasts,
    Counts,
    Ranks,
    Records,
    counts_for,
    read_contrasts,
    read_records,
    read_token_windows,
)
from lmmono.types import Split

T = TypeVar("T")


class RecordReader:
    """Reads the records of units; keeps the excerpts, and what it read of the hook asked for last.

    Args:
        store: An open store.
        seed: Seed of what is drawn.
        part: Read the i-th of n parts of the documents of split `score`, as (i, n); None reads all.
    """

    def __init__(
        self, store: astore.Store, *, seed: int = 0, part: tuple[int, int] | None = None
    ) -> None:
        self.store, self.seed, self._part = store, seed, part
        self._excerpts = cache(self._read_excerpts)
        self._hook = ""
        self._of_hook: dict[tuple[object, ...], Any] = {}

    def excerpts(self, split: Split, window: int = 64) -> Excerpts:
        """Return the excerpts of a split.

        Raises:
            ExplainError: The split has none.
        """
        return self._excerpts(split, window)

    def _read_excerpts(self, split: Split, window: int) -> Excerpts:
        excerpts = read_excerpts(self.store, split, window=window)
        if self._part is None or split != "score":
            return excerpts
        i, n = self._part
        names, number = np.unique(excerpts.doc_ids, return_inverse=True)
        # documents are dealt out at random: their order in the corpus may mean something
        dealt = np.random.default_rng(0).permutation(len(names)) % n == i
        kept = dealt[number]
        first, ids = excerpts.first_cells[kept], excerpts.token_ids[kept]
        return replace(excerpts, first_cells=first, token_ids=ids)

    def once(self, hook: str, key: tuple[object, ...], read: Callable[[], T]) -> T:
        """Return what `read` returns, read once per hook and key; another hook forgets the last."""
        if hook != self._hook:
            self._hook, self._of_hook = hook, {}
        if key not in self._of_hook:
            self._of_hook[key] = read()
        return self._of_hook[key]

    def records(
        self,
        hook: str,
        split: Split,
        counts: Counts,
        *,
        window: int = 64,
        units: Sequence[int] | None = None,
        token_centred: bool = False,
    ) -> Records:
        """Return the records of units; see `read_records` and `read_token_windows`.

        Raises:
            ExplainError: The split has no excerpts, or the hook no such units.
        """

        def read() -> Records:
            excerpts, seed = self.excerpts(split, window), self.seed
            if not token_centred:
                return read_records(self.store, hook, excerpts, counts, units=units, seed=seed)
            grid = excerpts.grid
            return read_token_windows(
                self.store, hook, grid, counts, window=window, units=units, seed=seed
            )

        key = ("records", split, counts, window, None if units is None else tuple(units))
        return self.once(hook, (*key, token_centred), read)

    def ranked(
        self,
        hook: str,
        split: Split,
        ranks: Ranks,
        *,
        window: int = 64,
        units: Sequence[int] | None = None,
        token_centred: bool = False,
    ) -> Records:
        """Return the records at some ranks of each kind; see `records`."""
        counts = counts_for(ranks)
        records = self.records(
            hook, split, counts, window=window, units=units, token_centred=token_centred
        )
        columns: list[int] = []
        for kind in KINDS:
            if kind in ranks:
                of_kind = records.columns(kind)
                columns += [int(of_kind[rank]) for rank in ranks[kind]]
        return records if columns == list(range(counts.total())) else records.take(columns)

    def contrasts(
        self,
        hook: str,
        split: Split,
        n: int,
        *,
        window: int = 64,
        units: Sequence[int] | None = None,
        ranked: bool = False,
    ) -> Contrasts:
        """Return up to n records of each class; see `read_contrasts`.

        Raises:
            ExplainError: The split has no excerpts, or the hook no such units.
        """

        def read() -> Contrasts:
            excerpts = self.excerpts(split, window)
            return read_contrasts(
                self.store, hook, excerpts, n, units=units, seed=self.seed, ranked=ranked
            )

        key = ("contrasts", split, n, window, None if units is None else tuple(units), ranked)
        return self.once(hook, key, read)
