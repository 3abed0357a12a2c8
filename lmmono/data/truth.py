"""The planted features of tokens, whatever tokenizer cut the words."""

from functools import cache

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer

from lmmono.data.framing import frame_of
from lmmono.data.planted import Language, PlantedDocument
from lmmono.data.tokenizing import exact_backend
from lmmono.data.tokens import TokenCorpus, TokenRows
from lmmono.errors import DataError
from lmmono.recipe.sections import PlantedCorpus


def token_truth(
    document: PlantedDocument, offsets: Int[np.ndarray, "n_tokens 2"]
) -> Bool[np.ndarray, "n_tokens n_features"]:
    """Return which features each token has: those of every word it shares a character with.

    Args:
        document: The document that was tokenized.
        offsets: First character of each token and the one after its last.
    """
    lengths = np.array([len(word) for word in document.words])
    ends = np.cumsum(lengths + 1) - 1  # words are joined by single blanks
    starts = ends - lengths
    first = np.searchsorted(ends, offsets[:, 0], side="right")
    after_last = np.searchsorted(starts, offsets[:, 1], side="left")
    seen = np.concatenate([np.zeros_like(document.truth[:1], int), document.truth.cumsum(axis=0)])
    return seen[np.maximum(first, after_last)] > seen[first]


def row_truth(corpus: TokenCorpus, rows: TokenRows) -> Bool[np.ndarray, "n_rows n_ctx n_features"]:
    """Return the features of every token of some rows of a planted corpus.

    BOS, end-of-text and padding have none. The features are those of `planted_language(corpus)`, in
    order.

    Raises:
        DataError: If the corpus is not a planted one, or its rows start with a BOS of their own.
    """
    language = planted_language(corpus)
    frame = frame_of(corpus.tokenizer, corpus.section)
    if frame.row_start is not None:
        raise DataError(f"{corpus.dir}: known features want data.bos: auto, always or never")
    around = (int(frame.before is not None), int(frame.after is not None))
    backend = exact_backend(corpus.tokenizer)
    truth = np.zeros((rows.ids.size, len(language.features)), bool)
    first_tokens, doc_ids = _first_tokens(corpus, rows), rows.doc_ids.ravel()
    places = rows.seq_ids - corpus.tokens(rows.split).first_seq_id
    # where each token stands in the split, documents end to end
    place = (places[:, None] * rows.n_ctx + np.arange(rows.n_ctx)).ravel()
    by_document = np.argsort(doc_ids, kind="stable")
    documents, starts = np.unique(doc_ids[by_document], return_index=True)
    for doc_id, here in zip(documents.tolist(), np.split(by_document, starts[1:]), strict=True):
        if doc_id >= 0:  # padding has no features
            own = _document_truth(language, backend, doc_id, around)
            truth[here] = own[place[here] - first_tokens[doc_id]]
    return truth.reshape(*rows.ids.shape, -1)


def planted_language(corpus: TokenCorpus) -> Language:
    """Return the language of a planted corpus.

    Raises:
        DataError: If the corpus is not a planted one.
    """
    source = corpus.section.corpus
    if not isinstance(source, PlantedCorpus):
        raise DataError(
            f"{corpus.dir}: only a planted corpus has known features, this one is of kind "
            f"{source.kind!r}"
        )
    return _language(source.language_seed)


@cache
def _language(seed: int) -> Language:
    return Language(seed)


def _document_truth(
    language: Language, backend: Tokenizer, doc_id: int, around: tuple[int, int]
) -> Bool[np.ndarray, "n_tokens n_features"]:
    # no planted document is empty, so document i of the corpus is document i of the language
    document = language.document(doc_id)
    encoding = backend.encode(document.text, add_special_tokens=False)
    truth = token_truth(document, np.array(encoding.offsets, np.int64))
    return np.pad(truth, (around, (0, 0)))  # the tokens before and after it


def _first_tokens(corpus: TokenCorpus, rows: TokenRows) -> dict[int, int]:
    """Return for each document of the rows' split the place of its first token in the split."""
    table = corpus.documents.select(["doc_id", "split", "n_tokens"]).to_pydict()
    places: dict[int, int] = {}
    place = 0
    for doc_id, split, n_tokens in zip(*table.values(), strict=True):
        if split == rows.split:
            places[doc_id] = place
            place += n_tokens
            if corpus.section.rows == "documents":  # the next one starts in a row of its own
                place += -place % corpus.n_ctx
    return places
