"""Documents of a Hugging Face dataset, by name or folder; imports `datasets` only when asked."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lmmono.data.document import Document
from lmmono.data.text_files import SourceFile, missing_column
from lmmono.errors import DataError
from lmmono.recipe.sections import HubCorpus


def hub_documents(corpus: HubCorpus) -> Iterator[Document]:
    """Yield the documents of a dataset in its own order.

    Raises:
        DataError: If the dataset, its configuration, split or text column is not there, or a
            value is no text.
    """
    import datasets

    name = _short_name(corpus)
    with _told_as_data_errors(corpus), _without_progress_bars():
        rows = datasets.load_dataset(
            corpus.name, corpus.config, split=corpus.split, streaming=corpus.streaming
        )
        for i, row in enumerate(_with_column(corpus, iter(rows))):
            yield Document(_text(row[corpus.text_column], f"{name}:{i}"), f"{name}:{i}")


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


def _with_column(corpus: HubCorpus, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    first = next(rows, None)
    if first is None:
        return iter(())
    if corpus.text_column not in first:
        raise missing_column(f"dataset {corpus.name}", corpus.text_column, list(first))
    return chain([first], rows)


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
