"""Names shared by every part: document splits and the progress callback. Imports nothing heavy."""

from typing import Literal, Protocol, get_args, runtime_checkable

Split = Literal["train", "val", "explain", "score"]
"""Part of a corpus; each document belongs to exactly one (see `lmmono.data.splits`)."""

SPLITS: tuple[Split, ...] = get_args(Split)


@runtime_checkable
class Progress(Protocol):
    """How long work reports: called with what is done so far; must be cheap and never raise."""

    def __call__(self, what: str, done: int, total: int, **facts: float) -> None:
        """Report that `done` of `total` units of `what` are finished, with facts such as loss."""
        ...


def silent(what: str, done: int, total: int, **facts: float) -> None:  # noqa: ARG001
    """Report nothing: the default of every function that takes a `Progress`."""
