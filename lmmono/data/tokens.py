"""A corpus as token rows on disk: made once per content, read as memory maps ever after.

A prepared folder holds `tokenizer/`, `{split}.ids.npy` and `{split}.doc_ids.npy` per split,
`documents.parquet`, and `corpus.json`. It refuses to be half of anything: the folder gets its
name only when it is complete.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32, Int64, UInt
from pydantic import BaseModel, Field
from transformers import PreTrainedTokenizerFast

from lmmono.data.corpora import document_count, documents, fingerprint
from lmmono.data.document import Document
from lmmono.data.packing import pack
from lmmono.data.tokenizers import (
    build_tokenizer,
    end_of_text_id,
    read_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
)
from lmmono.data.vocabulary import shown_tokens
from lmmono.errors import DataError, RunError
from lmmono.files.atomic import atomic_folder
from lmmono.files.digests import damaged_files, folder_digests
from lmmono.files.json_files import read_json
from lmmono.files.locks import wait_for_lock
from lmmono.recipe.sections import Data
from lmmono.types import SPLITS, Progress, Split, silent

FORMAT = 2
"""Part of every digest: raised whenever equal settings and text would give other files."""


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of one split in corpus order: all of them, or a sample.

    Documents are packed end to end with an end-of-text token after each, and cut into rows.
    """

    ids: UInt[np.ndarray, "n_rows n_ctx"]
    """Token ids, uint16 or uint32, usually a memory map."""
    doc_ids: Int32[np.ndarray, "n_rows n_ctx"]
    """Document of each token; an end-of-text token belongs to the document it ends."""
    first_seq_id: int
    """`seq_id` of the split's first row; its row r has `first_seq_id + r`, unique in a corpus."""
    split: Split
    """The split all rows come from."""
    places: Int64[np.ndarray, "n_rows"] | None = field(default=None, repr=False)
    """Number r of each row in the split, ascending; None where these are 0, 1, 2, ..."""
    corpus: "TokenCorpus | None" = field(default=None, repr=False, compare=False)
    """The corpus they belong to: its documents and vocabulary go where the rows go."""

    @property
    def n_ctx(self) -> int:
        """Tokens per row."""
        return self.ids.shape[1]

    @property
    def seq_ids(self) -> Int64[np.ndarray, "n_rows"]:
        """The `seq_id` of every row."""
        places = np.arange(len(self), dtype=np.int64) if self.places is None else self.places
        return self.first_seq_id + places

    @property
    def n_documents(self) -> int:
        """Documents that the rows hold tokens of; padding (below 0) is none."""
        return int((np.unique(self.doc_ids) >= 0).sum())

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: slice) -> "TokenRows":
        """Return some rows, such as the share of one process."""
        places = self.seq_ids[rows] - self.first_seq_id
        return replace(self, ids=self.ids[rows], doc_ids=self.doc_ids[rows], places=places)

    def limit(self, max_tokens: int | None, *, seed: int = 0) -> "TokenRows":
        """Return a sample of whole rows that hold at most `max_tokens` tokens; None keeps all.

        The first rows of a split are few documents, so rows are drawn from all of it: the first
        ones of a permutation by seed, in corpus order. A larger limit keeps what a smaller one
        has.

        Raises:
            DataError: If not even one row fits.
        """
        if max_tokens is None:
            return self
        n_rows = max_tokens // self.n_ctx
        if n_rows == 0:
            raise DataError(
                f"a limit of {max_tokens} tokens holds no row of {self.n_ctx}: "
                f"allow at least {self.n_ctx} tokens"
            )
        if n_rows >= len(self):
            return self
        # the split is part of the seed: splits of equal size do not get the same places
        rng = np.random.default_rng((seed, SPLITS.index(self.split)))
        drawn = np.sort(rng.permutation(len(self))[:n_rows])
        places = self.seq_ids[drawn] - self.first_seq_id
        return replace(self, ids=self.ids[drawn], doc_ids=self.doc_ids[drawn], places=places)


class TokenCorpus:
    """A prepared folder, opened: reads `corpus.json` at once and everything else when asked.

    Raises:
        DataError: If the folder is no prepared corpus, or one of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.dir = folder
        self._facts = _read_facts(folder)
        self.digest, self.n_ctx = self._facts.digest, self._facts.n_ctx

    def __repr__(self) -> str:
        n_rows = sum(facts["n_rows"] for facts in self.facts.values())
        return f"TokenCorpus({self.dir}, {n_rows} rows of {self.n_ctx} tokens)"

    @property
    def facts(self) -> dict[str, dict[str, int]]:
        """Per split: `n_rows`, `n_documents`, `n_tokens` and `n_tokens_dropped` by packing."""
        return self._facts.splits

    def verify(self) -> list[str]:
        """Return one fault for each file whose bytes are not those that were written."""
        return damaged_files(self.dir, self._facts.sha256)

    @property
    def section(self) -> Data:
        """The settings that made the folder."""
        return self._facts.settings

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that made the rows."""
        return read_tokenizer(self.dir / "tokenizer")

    @cached_property
    def documents(self) -> pa.Table:
        """One row per document: doc_id, split, name, text_sha256, n_tokens."""
        return pq.read_table(self.dir / "documents.parquet")

    def tokens(self, split: Split) -> TokenRows:
        """Return the rows of a split as memory maps.

        Raises:
            DataError: If the split has no whole row.
        """
        facts = self.facts[split]
        if facts["n_rows"] == 0:
            raise DataError(_no_rows(split, facts, self.n_ctx))
        earlier = SPLITS[: SPLITS.index(split)]
        return TokenRows(
            ids=np.load(self.dir / f"{split}.ids.npy", mmap_mode="r"),
            doc_ids=np.load(self.dir / f"{split}.doc_ids.npy", mmap_mode="r"),
            first_seq_id=sum(self.facts[other]["n_rows"] for other in earlier),
            split=split,
            corpus=self,
        )

    def vocabulary(self) -> list[str]:
        """Return each token as people read it; joined, the tokens of a row read as its text.

        So a word carries the blank before it. Bytes that are no text alone show as `<0xE2>`.
        """
        return shown_tokens(self.tokenizer)


def prepare(section: Data, cache_dir: Path, progress: Progress = silent) -> TokenCorpus:
    """Return the corpus of the settings, made now if no folder of this content exists yet.

    The content is the settings and every byte of the files (not where they lie), or the version
    of the planted language. Safe to call from several processes at once: one works, the others
    wait. A killed or failed call leaves nothing that looks finished; the next one starts over.

    Args:
        section: What to read, how to split, tokenize and cut it.
        cache_dir: Folder of prepared corpora; made if absent.
        progress: Called with the documents done; the total is what is known of it so far.

    Raises:
        DataError: If the text or the tokenizer cannot be read, nothing is left to train on, or
            the disk refuses.
    """
    digest = _digest(section)
    folder = cache_dir / digest[:16]
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with wait_for_lock(cache_dir / f"{digest[:16]}.lock"):
            is_new = not folder.exists()
            if is_new:
                with atomic_folder(folder) as partial:
                    _write(section, digest, partial, progress)
    except (OSError, RunError) as error:
        raise DataError(
            f"cannot write the prepared corpus to {cache_dir}: {error}; "
            "free space there or choose another folder"
        ) from error
    corpus = TokenCorpus(folder)
    if not is_new and (faults := corpus.verify()):
        raise DataError(f"{faults[0]}; delete {folder} and prepare the corpus again")
    return corpus


def _write(section: Data, digest: str, folder: Path, progress: Progress) -> None:
    corpus = section.corpus
    tokenizer = build_tokenizer(section.tokenizer, corpus, section.splits, progress)
    save_tokenizer(tokenizer, folder / "tokenizer")
    texts, total = _Counted(documents(corpus)), document_count(corpus)

    def report(n_packed: int) -> None:
        done = n_packed + texts.n_empty
        progress("documents", done, total or done)

    table, splits = pack(texts, tokenizer, section, folder, report)
    if table.num_rows == 0:
        raise DataError(f"the corpus is empty: {texts.n_empty} documents read, none holds any text")
    if splits["train"]["n_rows"] == 0:
        raise DataError(_no_rows("train", splits["train"], section.n_ctx))
    pq.write_table(table, folder / "documents.parquet", compression="zstd")
    facts = {
        "format": FORMAT,
        "digest": digest,
        "n_ctx": section.n_ctx,
        "d_vocab": len(tokenizer),
        "end_of_text_id": end_of_text_id(tokenizer),
        "empty_documents": texts.n_empty,
        "splits": splits,
        "settings": section.model_dump(mode="json"),
        "sha256": folder_digests(folder),
    }
    (folder / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")


class _Counted:
    """Documents without the empty ones, which are counted."""

    def __init__(self, texts: Iterator[Document]) -> None:
        self.n_empty = 0
        self._texts = texts

    def __iter__(self) -> Iterator[Document]:
        for document in self._texts:
            if document.text.strip():
                yield document
            else:
                self.n_empty += 1


def _digest(section: Data) -> str:
    settings = section.model_dump(mode="json")
    settings["corpus"] = fingerprint(section.corpus)
    settings["tokenizer"] = tokenizer_fingerprint(section.tokenizer)
    settings["format"] = FORMAT
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class CorpusFile(BaseModel):
    """What `corpus.json` holds."""

    digest: str
    n_ctx: int = Field(ge=1)
    splits: dict[str, dict[str, int]]
    settings: Data
    sha256: dict[str, str]


def _read_facts(folder: Path) -> CorpusFile:
    path = folder / "corpus.json"
    if not path.is_file():
        raise DataError(f"{folder} is no prepared corpus: it has no corpus.json; prepare it again")
    way_out = f"delete {folder} and prepare again"
    found = read_json(path, dict, DataError, way_out=way_out).get("format")
    if found != FORMAT:
        raise DataError(f"{path}: want a corpus of format {FORMAT}, got {found}; prepare it again")
    return read_json(path, CorpusFile, DataError, way_out=way_out)


def _no_rows(split: Split, facts: dict[str, int], n_ctx: int) -> str:
    return (
        f"split {split!r} fills no row of {n_ctx} tokens: it has {facts['n_documents']} documents "
        f"with {facts['n_tokens']} tokens in all; use more documents, a larger "
        f"{'corpus' if split == 'train' else f'data.splits.{split}_fraction'} or a smaller "
        "data.n_ctx"
    )
