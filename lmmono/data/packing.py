"""Rows on disk: documents end to end, cut at the row's length, or each in rows of its own."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from lmmono.data.document import Document
from lmmono.data.framing import Frame, frame_of
from lmmono.data.splits import split_of
from lmmono.data.tokenizing import BLOCK_CHARACTERS, plain_encoder
from lmmono.recipe.sections import Data
from lmmono.types import SPLITS, Split

BLOCK_DOCUMENTS = 2048
NO_DOCUMENT = -1
"""Stands where other tokens have their document: padding, which no store or statistic counts."""

DOCUMENTS = pa.schema(
    [
        pa.field("doc_id", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("text_sha256", pa.string(), nullable=False),
        pa.field("n_tokens", pa.int32(), nullable=False),
    ]
)
"""Columns of `documents.parquet`; `n_tokens` counts the tokens around the document too."""


def id_dtype(d_vocab: int) -> np.dtype[Any]:
    """Return the smallest of uint16 and uint32 that holds every token id."""
    return np.dtype(np.uint16 if d_vocab <= 2**16 else np.uint32)


class RowFile:
    """A `.npy` of rows that grows: tokens go in, whole rows come out, the header is set last."""

    def __init__(self, path: Path, n_ctx: int, dtype: np.dtype[Any]) -> None:
        self.n_rows = 0
        self._n_ctx, self._dtype = n_ctx, dtype
        self._rest = np.empty(0, dtype)
        self._file: BinaryIO = path.open("wb")
        self._write_header()

    @property
    def n_left(self) -> int:
        """Tokens that fill no row yet."""
        return len(self._rest)

    def append(self, tokens: np.ndarray) -> None:
        """Add tokens and write every row they complete."""
        joined = np.concatenate([self._rest, tokens.astype(self._dtype)])
        n_rows = len(joined) // self._n_ctx
        self._file.write(joined[: n_rows * self._n_ctx].tobytes())
        self._rest = joined[n_rows * self._n_ctx :]
        self.n_rows += n_rows

    def finish(self) -> None:
        """Write the final shape into the header; tokens of the last incomplete row are dropped."""
        self._file.seek(0)
        self._write_header()

    def close(self) -> None:
        """Close the file; unless it was finished, its header says that it has no rows."""
        self._file.close()

    def _write_header(self) -> None:
        # numpy pads the header so that its first axis can grow in place (numpy.lib.format)
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.n_rows, self._n_ctx),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


class SplitWriter:
    """The two row files of one split: token ids, and the document of every token."""

    def __init__(
        self, folder: Path, split: Split, section: Data, frame: Frame, dtype: np.dtype[Any]
    ) -> None:
        self.n_documents = 0
        self.n_tokens = 0
        self.n_padding = 0
        n_ctx = self._n_ctx = section.n_ctx
        self._frame, self._apart = frame, section.rows == "documents"
        self._place = 0  # of the next token in its row
        self._ids = RowFile(folder / f"{split}.ids.npy", n_ctx, dtype)
        self._doc_ids = RowFile(folder / f"{split}.doc_ids.npy", n_ctx, np.dtype(np.int32))

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (self._ids, self._doc_ids):
            with closing(file):
                if kind is None:
                    file.finish()

    def append(self, doc_ids: Sequence[int], tokens: Sequence[np.ndarray]) -> None:
        """Add documents, each with the tokens around it."""
        if not tokens:
            return
        laid = [self._laid(doc_id, ids) for doc_id, ids in zip(doc_ids, tokens, strict=True)]
        self._ids.append(np.concatenate([ids for ids, _ in laid]))
        self._doc_ids.append(np.concatenate([docs for _, docs in laid]))
        self.n_documents += len(doc_ids)
        self.n_tokens += sum(map(len, tokens))

    def _laid(self, doc_id: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a document's tokens as they go into rows, and the document of each."""
        start = self._frame.row_start
        if start is not None:
            # where rows begin inside the document: each takes one token less of it
            first = self._n_ctx - self._place if self._place else self._n_ctx
            ids = np.insert(ids, np.arange(first, len(ids), self._n_ctx - 1), start)
        docs = np.full(len(ids), doc_id, np.int32)
        if self._apart:
            n_padding = -len(ids) % self._n_ctx
            ids = np.pad(ids, (0, n_padding), constant_values=self._frame.padding)
            docs = np.pad(docs, (0, n_padding), constant_values=NO_DOCUMENT)
            self.n_padding += n_padding
        self._place = (self._place + len(ids)) % self._n_ctx
        return ids, docs

    def pad(self) -> None:
        """Fill the last row up, so that no token is dropped."""
        if self._ids.n_left:
            self.n_padding += (n_padding := self._n_ctx - self._ids.n_left)
            self._ids.append(np.full(n_padding, self._frame.padding))
            self._doc_ids.append(np.full(n_padding, NO_DOCUMENT))

    def facts(self) -> dict[str, int]:
        """Return what went in and what the row length left out."""
        return {
            "n_rows": self._ids.n_rows,
            "n_documents": self.n_documents,
            "n_tokens": self.n_tokens,
            "n_tokens_dropped": self._ids.n_left,
            "n_padding": self.n_padding,
        }


def pack(
    texts: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    section: Data,
    folder: Path,
    report: Callable[[int], None],
    *,
    keep_rest: bool = False,
) -> tuple[pa.Table, dict[str, dict[str, int]]]:
    """Write the row files of every split and return the documents' table and facts per split.

    The tokenizer reads a literal `<|endoftext|>` in a document as ordinary characters, so only
    the packing itself puts an end-of-text token anywhere; in chats it is the template's to spell.

    Args:
        texts: Documents, none of them empty.
        tokenizer: Makes token ids of them.
        section: Row length, splits, and what stands around documents.
        folder: Where the files go.
        report: Called with the documents done.
        keep_rest: Pad the last row of a split instead of dropping its tokens.
    """
    encode = plain_encoder(tokenizer, special_tokens=section.chat is not None)
    frame = frame_of(tokenizer, section)
    dtype = id_dtype(len(tokenizer))
    blocks: list[pa.RecordBatch] = []
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(SplitWriter(folder, split, section, frame, dtype))
            for split in SPLITS
        }
        n_documents = 0
        for block in _blocks(texts):
            splits: list[Split] = [split_of(document.text, section.splits) for document in block]
            tokens = [frame.around(ids) for ids in encode([document.text for document in block])]
            for split in SPLITS:
                of_split = [i for i, other in enumerate(splits) if other == split]
                writers[split].append(
                    [n_documents + i for i in of_split], [tokens[i] for i in of_split]
                )
            blocks.append(_document_rows(n_documents, block, splits, tokens))
            n_documents += len(block)
            report(n_documents)
        for writer in writers.values() if keep_rest else ():
            writer.pad()
    facts = {split: writer.facts() for split, writer in writers.items()}
    return pa.Table.from_batches(blocks, schema=DOCUMENTS), facts


def _blocks(texts: Iterable[Document]) -> Iterator[list[Document]]:
    block: list[Document] = []
    size = 0
    for document in texts:
        block.append(document)
        size += len(document.text)
        if len(block) == BLOCK_DOCUMENTS or size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _document_rows(
    first: int, block: list[Document], splits: list[Split], tokens: list[np.ndarray]
) -> pa.RecordBatch:
    columns = [
        range(first, first + len(block)),
        splits,
        [document.name for document in block],
        [sha256(document.text.encode("utf-8")).hexdigest() for document in block],
        [len(ids) for ids in tokens],
    ]
    arrays = [
        pa.array(column, field.type) for column, field in zip(columns, DOCUMENTS, strict=True)
    ]
    return pa.record_batch(arrays, schema=DOCUMENTS)
