"""Where documents come from: the planted language, local files, or a Hugging Face dataset."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lmmono.data import planted
from lmmono.errors import DataError
from lmmono.recipe.sections import Corpus, PlantedCorpus


@dataclass(frozen=True, slots=True)
class Document:
    """One text, never cut: the unit of splitting."""

    text: str
    """The text as it was read."""
    name: str = ""
    """Where it came from, for people: `file:row`, `planted:17`."""


def documents(corpus: Corpus) -> Iterator[Document]:
    """Yield the documents of a corpus in its own order, as they are read.

    Raises:
        DataError: If a source is missing, cannot be read, or has no such text column.
    """
    match corpus:
        case PlantedCorpus():
            language = planted.Language(corpus.language_seed)
            for i in range(corpus.n_documents):
                yield Document(language.text(i), f"planted:{i}")
        case _:
            raise DataError(f"corpus kind {corpus.kind!r} is not read yet")


def fingerprint(corpus: Corpus) -> dict[str, Any]:
    """Return what the text depends on, as JSON: settings and the sha256 of every byte read."""
    match corpus:
        case PlantedCorpus():
            return {**corpus.model_dump(mode="json"), "version": planted.VERSION}
        case _:
            raise DataError(f"corpus kind {corpus.kind!r} is not read yet")
