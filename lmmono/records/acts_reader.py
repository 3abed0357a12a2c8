"""The one door to what explains and scores: reads a store once per hook, whoever asks how often."""

from collections.abc import Sequence
from functools import cache

import activation_store as astore
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.protocols import Ranks, counts_for
from lmmono.explanations.stored_explanations import read_explanations
from lmmono.records.exemplar_records import Excerpts, read_excerpts
from lmmono.records.record import KINDS, Counts, Records, read_records
from lmmono.records.token_windows import read_token_windows
from lmmono.types import Split


class RecordReader:
    """Reads the records of units; keeps the excerpts, and the records of the hook asked for last.

    Args:
        store: An open store.
        seed: Seed of what is drawn.
    """

    def __init__(self, store: astore.Store, *, seed: int = 0) -> None:
        self.store, self.seed = store, seed
        self._excerpts = cache(self._read_excerpts)
        self._hook = ""
        self._records: dict[tuple[object, ...], Records] = {}
        self._explanations: dict[str, dict[int, Explanation]] = {}

    def excerpts(self, split: Split, window: int = 64) -> Excerpts:
        """Return the excerpts of a split.

        Raises:
            ExplainError: The split has none.
        """
        return self._excerpts(split, window)

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
        asked = (split, counts, window, None if units is None else tuple(units), token_centred)
        self._turn_to(hook)
        if asked not in self._records:
            excerpts = self.excerpts(split, window)
            if token_centred:
                grid = excerpts.grid
                found = read_token_windows(
                    self.store, hook, grid, counts, window=window, units=units, seed=self.seed
                )
            else:
                found = read_records(
                    self.store, hook, excerpts, counts, units=units, seed=self.seed
                )
            self._records[asked] = found
        return self._records[asked]

    def ranked(self, hook: str, split: Split, ranks: Ranks, **settings: object) -> Records:
        """Return the records at some ranks of each kind; settings as for `records`."""
        counts = counts_for(ranks)
        records = self.records(hook, split, counts, **settings)  # pyright: ignore[reportArgumentType]
        wanted: list[int] = []
        for kind in KINDS:
            if kind in ranks:
                columns = records.columns(kind)
                wanted += [int(columns[rank]) for rank in ranks[kind]]
        return records if wanted == list(range(counts.total())) else records.take(wanted)

    def explanations(self, hook: str, explainer: str) -> dict[int, Explanation]:
        """Return the best explanation of each unit; see `stored.read_explanations`.

        Raises:
            ExplainError: There are none.
        """
        self._turn_to(hook)
        if explainer not in self._explanations:
            found = read_explanations(self.store, hook, explainer, self.seed)
            self._explanations[explainer] = found
        return self._explanations[explainer]

    def _turn_to(self, hook: str) -> None:
        if hook != self._hook:
            self._hook, self._records, self._explanations = hook, {}, {}

    def _read_excerpts(self, split: Split, window: int) -> Excerpts:
        return read_excerpts(self.store, split, window=window)
