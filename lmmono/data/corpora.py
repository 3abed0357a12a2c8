"""Where documents come from: the planted language, local files, or a Hugging Face dataset."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from lmmono.data.document import Document
from lmmono.data.hub_documents import hub_documents, hub_fingerprint
from lmmono.data.planted import VERSION, Language
from lmmono.data.text_files import SourceFile, read_paragraphs, read_rows, row_count, source_files
from lmmono.errors import DataError
from lmmono.recipe.sections import Corpus, FilesCorpus, HubCorpus, PlantedCorpus

__all__ = ["Document", "document_count", "documents", "fingerprint"]


def documents(corpus: Corpus) -> Iterator[Document]:
    """Yield the documents of a corpus in its own order, empty ones included, as they are read.

    Raises:
        DataError: If a source is missing, cannot be read, or has no such text column.
    """
    match corpus:
        case PlantedCorpus():
            return _planted(corpus)
        case FilesCorpus():
            return islice(_from_files(corpus), corpus.max_documents)
        case HubCorpus():
            return islice(hub_documents(corpus), corpus.max_documents)


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


def _from_files(corpus: FilesCorpus) -> Iterator[Document]:
    for file in source_files(corpus.paths):
        if file.format == ".txt":
            for name, text in read_paragraphs(file):
                yield Document(text, name)
        else:
            yield from _from_rows(file, corpus.text_column)


def _from_rows(file: SourceFile, column: str) -> Iterator[Document]:
    for name, row in read_rows(file, [column]):
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise DataError(f"{name}: want text in {column!r}, got {type(text).__name__}")
        yield Document(_utf8(text or "", name), name)


def _utf8(text: str, name: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # a JSON escape can spell half a character
        raise DataError(
            f"{name}: character {error.start} (U+{ord(text[error.start]):04X}) is half of a "
            "surrogate pair and no text; repair or drop the document"
        ) from error
    return text
