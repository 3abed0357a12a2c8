"""Progress of long work, on stderr, so that stdout holds results only.

    with lm.shown_progress() as progress:
        run = lm.train(recipe, progress=progress)

On a terminal it is a bar with rate and time left; elsewhere it is plain lines, one every few
seconds at most.
"""

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from activation_store.printable import number, printable
from lmmono.types import Progress

LINE_EVERY_SECONDS = 5.0


@contextmanager
def shown_progress(
    console: Console | None = None, every_seconds: float | int = LINE_EVERY_SECONDS
) -> Generator[Progress]:
    """Yield a `Progress` that shows itself on stderr until the block ends, in notebooks too.

    Every long function of `lmmono` takes one: `lm.train`, `lm.capture`, `lm.explain`, `lm.score`.

    Args:
        console: Where to show it; stderr by default.
        every_seconds: Least time between two plain lines, where it is no terminal.
    """
    console = console or Console(stderr=True)
    if console.is_terminal or console.is_jupyter:
        with _bars(console) as bars:
            yield _BarProgress(bars)
    else:
        yield LineProgress(console, every_seconds)


class LineProgress:
    """Progress as plain lines: `train: 200 of 1000 (20 %), 41/s, 20 s left, loss 3.21`."""

    def __init__(self, console: Console, every_seconds: float | int) -> None:
        self._console = console
        self._every = every_seconds
        self._last = time.monotonic()
        self._first: dict[str, tuple[float, int]] = {}
        self._done: dict[str, int] = {}

    def __call__(self, what: str, done: int, total: int, **facts: float | int) -> None:
        """Write a line, if the last one is old enough or the work is done."""
        now = time.monotonic()
        if done <= self._done.get(what, 0):  # the same work once more: of another run, or again
            self._first.pop(what, None)
        self._done[what] = done
        began, before = self._first.setdefault(what, (now, done))
        if now - self._last < self._every and done < total:
            return
        self._last = now
        rate = (done - before) / (now - began) if now > began else 0.0
        share = f"{done / total:.0%}" if total else "-"
        parts = [f"{what}: {done} of {total} ({share})"]
        if rate and done < total:
            parts += [f"{number(rate, 4)}/s", f"{(total - done) / rate:.0f} s left"]
        parts += _facts(facts)
        line = printable(", ".join(parts))  # it may name a hook of somebody else's store
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class _BarProgress:
    """Progress as bars, one per kind of work."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._tasks = {}

    def __call__(self, what: str, done: int, total: int, **facts: float | int) -> None:
        task = self._tasks.get(what)
        if task is None or done < self._bars.tasks[self._bars.task_ids.index(task)].completed:
            # work of one name begins anew with the next run: a bar of its own
            # words of a store or a path are no markup of rich's, which fails on `[/x]`
            label = escape(printable(what))
            self._tasks[what] = self._bars.add_task(label, total=total, completed=done, facts="")
        self._bars.update(
            self._tasks[what], completed=done, total=total, facts=", ".join(_facts(facts))
        )


class _RateColumn(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{number(speed, 4)}/s" if speed else "")


def _bars(console: Console) -> RichProgress:
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
        console=console,
        refresh_per_second=4,
    )


def _facts(facts: Mapping[str, float | int]) -> list[str]:
    return [f"{name.replace('_', ' ')} {number(value, 4)}" for name, value in facts.items()]
