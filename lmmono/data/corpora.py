"""Where documents come from: the planted language, local files, or a Hugging Face dataset."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from lmmono.data.chat import Chat
from lmmono.data.document import Document
from lmmono.data.hub_documents import hub_documents, hub_fingerprint
from lmmono.data.planted import VERSION, Language
from lmmono.data.text_files import (
    read_rows,
    read_texts,
    row_count,
    source_files,
    text_column,
    text_split,
)
from lmmono.errors import DataError
from lmmono.recipe.sections import Corpus, FilesCorpus, HubCorpus, PlantedCorpus

__all__ = [
    "Document",
    "checked_text",
    "document_count",
    "documents",
    "fingerprint",
    "reading_notes",
]


def documents(corpus: Corpus, chat: Chat | None = None) -> Iterator[Document]:
    """Yield the documents of a corpus in its own order, empty ones included, as they are read.

    Args:
        corpus: Where they come from.
        chat: Column of messages to read in place of a text column.

    Raises:
        DataError: If a source is missing, cannot be read, or has no such text column.
    """
    match corpus:
        case PlantedCorpus():
            return _planted(corpus)
        case FilesCorpus():
            return islice(_from_files(corpus, chat), corpus.max_documents)
        case HubCorpus():
            return islice(hub_documents(corpus, chat), corpus.max_documents)


def reading_notes(corpus: Corpus, chat: Chat | None = None) -> list[str]:
    """Return what was chosen where the settings leave it open, a sentence each.

    Raises:
        DataError: As `documents`.
    """
    if not isinstance(corpus, FilesCorpus):
        return []
    files = source_files(corpus.paths)
    notes = [text_split(files, corpus.split)[1]]
    if corpus.text_column is None and chat is None:
        with_rows = next((file for file in files if file.format != ".txt"), None)
        if with_rows is not None and (column := text_column(with_rows, _COLUMN)) != "text":
            notes.append(f"text is read from column {column!r}")
    return [note for note in notes if note]


def document_count(corpus: Corpus) -> int | None:
    """Return how many documents there will be, where that is known without reading them."""
    if isinstance(corpus, PlantedCorpus):
        return corpus.n_documents
    if isinstance(corpus, HubCorpus):
        return None
    counts = [row_count(file) for file in source_files(corpus.paths)]
    if any(count is None for count in counts):
        return None
    total = sum(count or 0 for count in counts)
    return total if corpus.max_documents is None else min(total, corpus.max_documents)


def fingerprint(corpus: Corpus) -> dict[str, Any]:
    """Return what the documents depend on, as JSON; where the files lie is no part of it."""
    match corpus:
        case PlantedCorpus():
            return {**corpus.model_dump(mode="json"), "version": VERSION}
        case FilesCorpus():
            settings = corpus.model_dump(mode="json", exclude={"paths"})
            files = [[file.name, file.sha256()] for file in source_files(corpus.paths)]
            return {**settings, "files": files}
        case HubCorpus():
            settings = corpus.model_dump(mode="json", exclude={"name", "streaming"})
            return {**settings, **hub_fingerprint(corpus)}


def _planted(corpus: PlantedCorpus) -> Iterator[Document]:
    language = Language(corpus.language_seed)
    for i in range(corpus.n_documents):
        yield Document(language.text(i), f"planted:{i}")


def _from_files(corpus: FilesCorpus, chat: Chat | None) -> Iterator[Document]:
    files = source_files(corpus.paths)
    split, column = text_split(files, corpus.split)[0], corpus.text_column
    for file in files:
        if file.format == ".txt":
            if chat is not None:
                raise DataError(f"{file.path}: data.chat wants rows with messages, not .txt")
            for name, text in read_texts(file, split):
                yield Document(text, name)
            continue
        if chat is not None:
            for name, row in read_rows(file, [chat.column]):
                yield Document(chat.text(row[chat.column], name), name)
            continue
        column = column or text_column(file, _COLUMN)  # the first file's stands for all
        for name, row in read_rows(file, [column]):
            yield Document(checked_text(row[column], column, name), name)


_COLUMN = "data.corpus.text_column"


def checked_text(value: Any, column: str, where: str) -> str:
    """Return the text of a row's column; None is an empty text.

    Raises:
        DataError: It is no text, or no whole characters.
    """
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: want text in {column!r}, got {type(value).__name__}")
    return _utf8(value or "", where)


def _utf8(text: str, name: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # a JSON escape can spell half a character
        raise DataError(
            f"{name}: character {error.start} (U+{ord(text[error.start]):04X}) is half of a "
            "surrogate pair and no text; repair or drop the document"
        ) from error
    return text
