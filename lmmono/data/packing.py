"""Packing: documents end to end, an end-of-text token after each, cut into rows on disk."""

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
from lmmono.data.splits import split_of
from lmmono.data.tokenizers import end_of_text_id
from lmmono.data.tokenizing import BLOCK_CHARACTERS, plain_encoder
from lmmono.recipe.sections import Data
from lmmono.types import SPLITS, Split

BLOCK_DOCUMENTS = 2048

DOCUMENTS = pa.schema(
    [
        pa.field("doc_id", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("text_sha256", pa.string(), nullable=False),
        pa.field("n_tokens", pa.int32(), nullable=False),
    ]
)
"""Columns of `documents.parquet`; `n_tokens` counts the document's end-of-text token."""


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

    def __init__(self, folder: Path, split: Split, n_ctx: int, dtype: np.dtype[Any]) -> None:
        self.n_documents = 0
        self.n_tokens = 0
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
        """Add documents, each with its end-of-text token already at its end."""
        lengths = [len(ids) for ids in tokens]
        if not lengths:
            return
        self._ids.append(np.concatenate(tokens))
        self._doc_ids.append(np.repeat(np.asarray(doc_ids, np.int32), lengths))
        self.n_documents += len(doc_ids)
        self.n_tokens += sum(lengths)

    def facts(self) -> dict[str, int]:
        """Return what went in and what the row length left out."""
        return {
            "n_rows": self._ids.n_rows,
            "n_documents": self.n_documents,
            "n_tokens": self.n_tokens,
            "n_tokens_dropped": self._ids.n_left,
        }


def pack(
    texts: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    section: Data,
    folder: Path,
    report: Callable[[int], None],
) -> tuple[pa.Table, dict[str, dict[str, int]]]:
    """Write the row files of every split and return the documents' table and facts per split.

    The tokenizer reads a literal `<|endoftext|>` in a document as ordinary characters, so only
    the packing itself puts an end-of-text token anywhere.
    """
    encode = plain_encoder(tokenizer)
    end = np.uint32(end_of_text_id(tokenizer))
    dtype = id_dtype(len(tokenizer))
    blocks: list[pa.RecordBatch] = []
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(SplitWriter(folder, split, section.n_ctx, dtype))
            for split in SPLITS
        }
        n_documents = 0
        for block in _blocks(texts):
            splits: list[Split] = [split_of(document.text, section.splits) for document in block]
            tokens = [np.append(ids, end) for ids in encode([document.text for document in block])]
            for split in SPLITS:
                of_split = [i for i, other in enumerate(splits) if other == split]
                writers[split].append(
                    [n_documents + i for i in of_split], [tokens[i] for i in of_split]
                )
            blocks.append(_document_rows(n_documents, block, splits, tokens))
            n_documents += len(block)
            report(n_documents)
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
