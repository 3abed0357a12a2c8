"""Documents of a Hugging Face dataset, by name or folder; imports `datasets` only when asked."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lmmono.data.chat import Chat
from lmmono.data.document import Document
from lmmono.data.text_files import (
    GUESS_ROWS,
    SourceFile,
    guessed_column,
    missing_column,
    saved_files,
)
from lmmono.errors import DataError, nearest
from lmmono.recipe.sections import HubCorpus


def hub_documents(corpus: HubCorpus, chat: Chat | None = None) -> Iterator[Document]:
    """Yield the documents of a dataset in its own order.

    Raises:
        DataError: If the dataset, its configuration, split or text column is not there, or a
            value is no text.
    """
    name = _short_name(corpus)
    with _told_as_data_errors(corpus), _without_progress_bars():
        yield from row_documents(_rows(corpus), name, f"dataset {corpus.name}", corpus, chat)


def row_documents(
    rows: Iterable[Any], name: str, where: str, corpus: HubCorpus | None, chat: Chat | None
) -> Iterator[Document]:
    """Yield the documents of a dataset's rows, named by `name` and row.

    Args:
        rows: The rows, mappings.
        name: What document names begin with.
        where: The dataset as errors name it.
        corpus: Names the text column, if it is named.
        chat: Column of messages to read in its place.

    Raises:
        DataError: There is no such column, or a value is no text.
    """
    rest = iter(rows)
    first: list[Any] = list(islice(rest, GUESS_ROWS))
    if not first:
        return
    wanted = chat.column if chat is not None else corpus and corpus.text_column
    column = wanted or guessed_column(first, where, "text_column")
    if column not in first[0]:
        raise missing_column(where, column, list(first[0]))
    for i, row in enumerate(chain(first, rest)):
        place = f"{name}:{i}"
        text = chat.text(row[column], place) if chat else _text(row[column], place)
        yield Document(text, place)


def _rows(corpus: HubCorpus) -> Iterable[Any]:
    """Return the rows of a dataset, which `save_to_disk` may have written to a folder."""
    import datasets

    if not saved_files(corpus.name):
        return datasets.load_dataset(
            corpus.name, corpus.config, split=corpus.split, streaming=corpus.streaming
        )
    saved = datasets.load_from_disk(corpus.name)
    if isinstance(saved, datasets.Dataset):
        return saved
    if corpus.split not in saved:
        way_out = nearest(corpus.split, map(str, saved))
        raise DataError(f"dataset {corpus.name}: no split {corpus.split!r}; {way_out}")
    return saved[corpus.split]


def labelled_rows(
    name: str, config: str | None, split: str, max_rows: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the first rows of a dataset's split as they are, streamed; None yields all.

    Raises:
        DataError: If the dataset, its configuration or split is not there.
    """
    import datasets

    corpus = HubCorpus(kind="hub", name=name, config=config, split=split)
    with _told_as_data_errors(corpus), _without_progress_bars():
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        yield from islice(iter(rows), max_rows)


def hub_fingerprint(corpus: HubCorpus) -> dict[str, Any]:
    """Return what identifies the dataset's content: digests of local files, or the revision."""
    import datasets

    if saved := saved_files(corpus.name):
        return {"name": _short_name(corpus), "content": [[f.name, f.sha256()] for f in saved]}
    with _told_as_data_errors(corpus), _without_progress_bars():
        builder = datasets.load_dataset_builder(corpus.name, corpus.config)
    data_files: dict[str, list[str]] = dict(builder.config.data_files or {})
    paths = [Path(path) for split in sorted(data_files) for path in data_files[split]]
    if paths and all(path.is_file() for path in paths):
        content: Any = [[p.name, SourceFile(p, p.name, "", None).sha256()] for p in paths]
    else:
        content = builder.hash  # made of the commit and the etags of its files
    return {"name": _short_name(corpus), "content": content}


def _short_name(corpus: HubCorpus) -> str:
    path = Path(corpus.name)
    return path.name if path.is_dir() else corpus.name


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: want text, got {type(value).__name__}")
    return value


@contextmanager
def _told_as_data_errors(corpus: HubCorpus) -> Generator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError, ValueError) as error:
        config = f" ({corpus.config})" if corpus.config else ""
        raise DataError(
            f"dataset {corpus.name}{config}, split {corpus.split}: {error}; check its "
            "name, config and split, and the network if it is no local folder"
        ) from error


@contextmanager
def _without_progress_bars() -> Generator[None]:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
