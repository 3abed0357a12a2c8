"""The runs that a server or its client looks at: store, console, and model where there is one."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import activation_store as astore
from activation_store.pages.unit_page import Counting
from lmmono.errors import RunError, nearest
from lmmono.reports.server.console import Console, ConsoleLimits
from lmmono.runs.schema_names import schema_names

if TYPE_CHECKING:
    from lmmono.reports.server.lab import Lab
else:  # for annotations only: a lab needs torch
    Lab = object

MOST_TOKENS = 20_000_000
"""Tokens of a store that are held in memory for its pages: a key and an id, 12 bytes each."""


@dataclass
class ServedRun:
    """One run, opened for reading."""

    name: str
    """Name in addresses and in SQL: letters, digits and _."""
    store: astore.Store
    """Store for the pages' own queries, of which each has its limits."""
    folder: Path | None
    """Run folder, where there is one: it holds the model."""
    limits: ConsoleLimits
    """What a query of others may take."""
    attached: dict[str, Path]
    """Stores that their queries find by name, and so twins."""
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def console(self) -> Console:
        """Queries of others, on connections of their own, made at the first call.

        What they take is not taken from the pages; and to attach other runs takes longer than all
        else that a first page needs.
        """
        with self._turn:
            if "_console" not in self.__dict__:
                store = astore.open(self.store.path, limits=self.limits.of_store())
                for name, file in self.attached.items():
                    store.attach(file, name)
                self.__dict__["_console"] = Console(store, self.limits)
            return self.__dict__["_console"]

    def close(self) -> None:
        """Close the stores."""
        self.store.close()
        if "_console" in self.__dict__:
            self.console.store.close()

    @cached_property
    def hooks(self) -> dict[str, int]:
        """Width of every hook stored as rows, in the order of the layers."""
        rows = self.store.sql("SELECT hook, d FROM hooks WHERE kind = 'rows'").fetchall()
        return dict(sorted(rows, key=lambda row: [_part(p) for p in row[0].split(".")]))

    @cached_property
    def about(self) -> dict[str, Any]:
        """Row of table `runs`; empty where a store has none."""
        found = self.store.sql("FROM runs ORDER BY created_at LIMIT 1").to_arrow_table().to_pylist()
        return found[0] if found else {}

    @cached_property
    def counts(self) -> dict[str, int]:
        """Documents, tokens and acts of the store."""
        info = self.store.info()
        return {"documents": info.n_documents, "tokens": info.n_tokens, "acts": info.n_acts}

    @cached_property
    def counting(self) -> Counting | None:
        """The tokens of the store in memory, where they are not too many: pages come sooner."""
        return Counting(self.store) if self.counts["tokens"] <= MOST_TOKENS else None

    def lab(self) -> Lab:
        """Return the model, loaded at the first call.

        Raises:
            RunError: There is no run folder, or it has no model.
        """
        # these and what they import take longer than the rest of a first page
        from lmmono.reports.server.lab import Lab
        from lmmono.runs.folder import open_run

        if self.folder is None:
            raise RunError(f"{self.name}: a store alone has no model; serve its run folder")
        with self._turn:
            if "_lab" not in self.__dict__:
                run = open_run(self.folder)
                self.__dict__["_lab"] = Lab(run.model, run.tokenizer, run.recipe.data.n_ctx)
            return self.__dict__["_lab"]

    def require(self, hook: str, unit: int) -> None:
        """Check that there is such a unit.

        Raises:
            ContentError: There is none; names the hooks.
        """
        if not 0 <= unit < self.hooks.get(hook, 0):
            listing = ", ".join(f"{n} (units 0 to {d - 1})" for n, d in self.hooks.items())
            raise astore.ContentError(f"{self.name}: no unit {unit} of hook {hook!r}; {listing}.")


def _part(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdigit() else (-1, text)


class Served:
    """Runs by name, in the order given; the first is what is meant where none is named."""

    def __init__(self, places: Sequence[str | Path], limits: ConsoleLimits | None = None) -> None:
        """Open runs for reading.

        Args:
            places: Run folders, stores, or folders of runs.
            limits: What a query of the console may take.

        Raises:
            RunError: A place holds no store, or none is given.
            StoreError: A store cannot be opened.
        """
        if not places:
            raise RunError("want a run")
        limits = limits or ConsoleLimits()
        files = list(dict.fromkeys(file for place in places for file in _store_files(Path(place))))
        names = schema_names([str(file) for file in files])
        attached = dict(zip(names, files, strict=True)) if len(files) > 1 else {}
        self.runs = {
            name: ServedRun(
                name,
                astore.open(file, limits=_OWN),
                file.parent if (file.parent / "manifest.json").is_file() else None,
                limits,
                attached,
            )
            for file, name in zip(files, names, strict=True)
        }

    @property
    def first(self) -> ServedRun:
        """The run that is meant where none is named."""
        return next(iter(self.runs.values()))

    def run(self, name: str | None) -> ServedRun:
        """Return a run by its name.

        Raises:
            RunError: There is none of that name.
        """
        if not name:
            return self.first
        if name not in self.runs:
            raise RunError(f"no run {name!r} is served; {nearest(name, self.runs)}")
        return self.runs[name]

    def close(self) -> None:
        """Close every store."""
        for run in self.runs.values():
            run.close()


_OWN = astore.QueryLimits(seconds=30.0)
"""A page's own query that takes longer is a fault of ours; it must not hold a thread for ever."""


def _store_files(place: Path) -> list[Path]:
    """Return the stores at a place: its own, or those of the runs in it.

    Raises:
        RunError: There is none.
    """
    if place.is_file():
        return [place]
    if (place / "store.duckdb").is_file():
        return [place / "store.duckdb"]
    if found := sorted(place.glob("*/store.duckdb")):
        return found
    from lmmono.runs.folder import open_run

    run = open_run(place)
    raise RunError(f"{run.dir}: holds no store yet; run `lmmono capture {run.dir}` first")
