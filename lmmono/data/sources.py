"""Text as a caller has it, as rows of tokens: a text, several, files, or a dataset's rows."""

import glob
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from lmmono.data.chat import Chat
from lmmono.data.corpora import Document, checked_text, documents, reading_notes
from lmmono.data.hub_documents import row_documents
from lmmono.data.text_files import has_readable_suffix
from lmmono.data.tokens import TokenCorpus, write_rows
from lmmono.errors import DataError
from lmmono.files.json_files import settings_faults
from lmmono.recipe.sections import Data, FilesCorpus, HubCorpus
from lmmono.types import Progress, silent

N_CTX = Data.model_fields["n_ctx"].default
HALVES = {"val_fraction": 0.0, "explain_fraction": 0.5, "score_fraction": 0.5}
"""Shares where nothing is trained: whatever explains units is half of the documents."""


def tokenize(
    model: Any,
    texts: Any,
    *,
    n_ctx: int | None = None,
    rows: Literal["packed", "documents"] | None = None,
    bos: Literal["auto", "always", "rows", "never"] = "auto",
    eos: Literal["auto", "always", "never"] = "auto",
    chat: str | None = None,
    text_column: str | None = None,
    split: Literal["auto", "file", "line", "blank_line"] = "auto",
    splits: Mapping[str, float] | None = None,
    max_documents: int | None = None,
    tokenizer: Any = None,
    progress: Progress = silent,
) -> TokenCorpus:
    """Return texts as rows of tokens, as a recipe's section `data` makes them of a corpus.

    No token is dropped: the last row of a split is padded. The rows lie in a temporary folder,
    which goes when nothing refers to the corpus any more.

    Args:
        model: A model with its tokenizer as `model.tokenizer`, or a tokenizer.
        texts: A text; a path, folder or glob of files that recipes read; several of either; a
            dataset of `datasets`, or mappings. A string is a path if it exists or ends as such
            files do; a list of one text is always a text.
        n_ctx: Tokens per row; None takes 128, or the model's context where that is smaller.
        rows: `documents` starts each document in a row of its own, `packed` puts them end to end;
            None takes the first for texts and the second for files and datasets.
        bos: As `data.bos` in recipes.
        eos: As `data.eos`.
        chat: Column of messages, as `data.chat`.
        text_column: Column of the text, as `data.corpus.text_column`.
        split: What of a `.txt` file is a document, as `data.corpus.split`.
        splits: Shares of splits, as `data.splits`; None takes half for `explain` and half for
            `score`, by a hash of each text.
        max_documents: Documents to read; None reads all.
        tokenizer: Where the model has none.
        progress: Called with the documents done.

    Raises:
        DataError: There is no tokenizer, a text is empty or no text, a file or column is missing,
            or a setting is out of range.
    """
    tokenizer = _tokenizer(model, tokenizer)
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    context = getattr(config, "max_position_embeddings", None)
    paths = _paths(texts)
    if rows is None:
        rows = "documents" if paths is None and _is_texts(texts) else "packed"
    settings: dict[str, Any] = {
        "corpus": {"kind": "files", "paths": paths or ("(given in Python)",)},
        "tokenizer": {"kind": "folder", "path": str(tokenizer.name_or_path or "(the model's)")},
        "splits": dict(splits or HALVES),
        "n_ctx": min(N_CTX, context or N_CTX) if n_ctx is None else n_ctx,
        "rows": rows,
        "bos": bos,
        "eos": eos,
        "chat": chat,
    }
    settings["corpus"] |= {
        "text_column": text_column,
        "split": split,
        "max_documents": max_documents,
    }
    try:
        section = Data.model_validate(settings)
    except ValidationError as error:
        raise DataError(settings_faults("tokenize", error)) from None
    assert isinstance(section.corpus, FilesCorpus)
    messages = None if chat is None else Chat(chat, tokenizer)
    if paths is not None:
        pieces, notes = documents(section.corpus, messages), reading_notes(section.corpus, messages)
    else:
        pieces, notes = islice(_given(texts, section.corpus, messages), max_documents), []
    folder = Path(tempfile.mkdtemp(prefix="lmmono-tokens-"))
    try:
        write_rows(pieces, tokenizer, section, folder, progress, notes=notes, keep_rest=True)
        corpus = TokenCorpus(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(corpus, shutil.rmtree, folder, ignore_errors=True)
    return corpus


def _tokenizer(model: Any, tokenizer: Any) -> PreTrainedTokenizerFast:
    own = model if isinstance(model, PreTrainedTokenizerFast) else getattr(model, "tokenizer", None)
    chosen = tokenizer or own
    if not isinstance(chosen, PreTrainedTokenizerFast):
        raise DataError(
            "text needs the model's tokenizer: open the model with lm.open_model, or pass "
            "tokenizer=, a fast one of transformers"
        )
    return chosen


def _paths(texts: Any) -> tuple[str, ...] | None:
    """Return what is to be read as files, None where nothing is."""
    if isinstance(texts, str | Path):
        return (str(texts),) if isinstance(texts, Path) or _is_path(texts) else None
    if isinstance(texts, list | tuple) and texts:
        several: list[Any] = list(texts)  # pyright: ignore[reportUnknownArgumentType]
        if all(isinstance(t, Path) or (isinstance(t, str) and _ends_as_file(t)) for t in several):
            return tuple(map(str, several))
    return None


def _is_path(text: str) -> bool:
    if "\n" in text or len(text) > 4096:  # no path is longer
        return False
    return _ends_as_file(text) or (bool(text.strip()) and os.path.exists(text))


def _ends_as_file(text: str) -> bool:
    """Return whether a string ends as a file that can be read, and is no sentence that does."""
    if "\n" in text or not has_readable_suffix(text):
        return False
    return " " not in text or glob.has_magic(text) or os.path.exists(text)


def _is_texts(texts: Any) -> bool:
    return isinstance(texts, str) or (
        isinstance(texts, list | tuple) and not any(isinstance(t, Mapping) for t in texts)  # pyright: ignore[reportUnknownVariableType]
    )


def _given(texts: Any, corpus: FilesCorpus, chat: Chat | None) -> Iterator[Document]:
    """Yield the documents of texts or rows in memory.

    Raises:
        DataError: There is none, one is empty or no text, or a dataset has several splits.
    """
    if isinstance(texts, str):
        texts = [texts]
    if isinstance(texts, Mapping):
        names = ", ".join(map(repr, list(texts)[:5]))  # pyright: ignore[reportUnknownArgumentType]
        raise DataError(f"texts: want rows, got a mapping of {names}; choose one split of it")
    if not isinstance(texts, Iterable):
        raise DataError(
            f"texts: want a text, a list of texts, a path or glob, a datasets.Dataset or rows of "
            f"tokens, got {type(texts).__name__}"
        )
    if not _is_texts(texts):
        wanted = HubCorpus(kind="hub", name="given", text_column=corpus.text_column)
        yield from row_documents(texts, "row", "texts", wanted, chat)  # pyright: ignore[reportUnknownArgumentType]
        return
    several: list[Any] = list(texts)  # pyright: ignore[reportUnknownArgumentType]
    if not several:
        raise DataError("texts: want at least one text, got an empty list")
    for i, text in enumerate(several):
        where = f"texts[{i}]" if len(several) > 1 else "texts"
        if not isinstance(text, str):
            raise DataError(f"{where}: want text, got {type(text).__name__} ({text!r:.40})")
        if not text.strip():
            raise DataError(f"{where}: the text is empty; leave it out")
        yield Document(checked_text(text, "texts", where), f"text:{i}")
