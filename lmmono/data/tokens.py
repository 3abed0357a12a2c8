"""A corpus as token rows on disk: made once per content, read as memory maps ever after.

A prepared folder holds `tokenizer/`, `{split}.ids.npy` and `{split}.doc_ids.npy` per split,
`documents.parquet`, and `corpus.json`. It refuses to be half of anything: the folder gets its
name only when it is complete.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32, Int64, UInt
from pydantic import BaseModel, Field
from transformers import PreTrainedTokenizerFast

from lmmono.data.chat import Chat
from lmmono.data.corpora import document_count, documents, fingerprint, reading_notes
from lmmono.data.document import Document
from lmmono.data.packing import pack
from lmmono.data.tokenizers import (
    build_tokenizer,
    read_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
)
from lmmono.data.vocabulary import shown_tokens
from lmmono.errors import DataError, RunError, nearest
from lmmono.files.atomic import atomic_folder
from lmmono.files.digests import damaged_files, folder_digests
from lmmono.files.docstrings import with_fields
from lmmono.files.json_files import read_json
from lmmono.files.locks import wait_for_lock
from lmmono.recipe.sections import Data
from lmmono.types import SPLITS, Progress, Split, silent

FORMAT = 3
"""Part of every digest: raised whenever equal settings and text would give other files."""


@with_fields
@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of one split in corpus order: all of them, or a sample.

    Documents are packed end to end and cut into rows, or start in a row of their own each; what
    stands around them is told in `lmmono.data.framing`.
    """

    ids: UInt[np.ndarray, "n_rows n_ctx"]
    """Token ids, uint16 or uint32, usually a memory map."""
    doc_ids: Int32[np.ndarray, "n_rows n_ctx"]
    """Document of each token, BOS and end-of-text included; below 0 is padding."""
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
        """Per split: `n_rows`, `n_documents`, `n_tokens`, `n_tokens_dropped` and `n_padding`."""
        return self._facts.splits

    @property
    def notes(self) -> list[str]:
        """What was chosen or left out where the settings leave it open, a sentence each."""
        return self._facts.notes

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
            DataError: If there is no such split, or it has no whole row.
        """
        if split not in self.facts:
            raise DataError(f"no split {split!r}; {nearest(split, self.facts)}")
        facts = self.facts[split]
        if facts["n_rows"] == 0:
            raise DataError(_no_rows(split, facts, self.n_ctx, self.notes))
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
    chat = None if section.chat is None else Chat(section.chat, tokenizer)
    texts, total = documents(corpus, chat), document_count(corpus)
    notes = reading_notes(corpus, chat)
    write_rows(texts, tokenizer, section, folder, progress, digest=digest, total=total, notes=notes)


def write_rows(
    texts: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    section: Data,
    folder: Path,
    progress: Progress,
    *,
    digest: str = "",
    total: int | None = None,
    notes: Sequence[str] = (),
    keep_rest: bool = False,
) -> None:
    """Write everything that a prepared folder holds.

    Args:
        texts: The documents; empty ones are left out and counted.
        tokenizer: Makes token ids of them.
        section: Row length, splits, and what stands around documents.
        folder: An empty folder.
        progress: Called with the documents done.
        digest: Of the content, where the folder is to be found again; else of what is written.
        total: How many documents there are, if that is known.
        notes: What was chosen in reading them.
        keep_rest: Pad the last row of a split instead of dropping its tokens.

    Raises:
        DataError: No document holds any text, or no split fills a row.
    """
    save_tokenizer(tokenizer, folder / "tokenizer")
    counted = _Counted(texts)

    def report(n_packed: int) -> None:
        done = n_packed + counted.n_empty
        progress("documents", done, total or done)

    table, splits = pack(counted, tokenizer, section, folder, report, keep_rest=keep_rest)
    if table.num_rows == 0:
        raise DataError(
            f"the corpus is empty: {counted.n_empty} documents read, none holds any text"
        )
    if counted.n_empty:
        notes = [*notes, f"{counted.n_empty:,} documents without text are left out"]
    if not any(facts["n_rows"] for facts in splits.values()):
        fullest = max(SPLITS, key=lambda split: splits[split]["n_tokens"])
        raise DataError(_no_rows(fullest, splits[fullest], section.n_ctx, notes))
    pq.write_table(table, folder / "documents.parquet", compression="zstd")
    written = folder_digests(folder)
    facts = {
        "format": FORMAT,
        "digest": digest or hashlib.sha256(json.dumps(written).encode()).hexdigest(),
        "n_ctx": section.n_ctx,
        "d_vocab": len(tokenizer),
        "end_of_text_id": tokenizer.eos_token_id,
        "empty_documents": counted.n_empty,
        "notes": list(notes),
        "splits": splits,
        "settings": section.model_dump(mode="json"),
        "sha256": written,
    }
    (folder / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")


class _Counted:
    """Documents without the empty ones, which are counted."""

    def __init__(self, texts: Iterable[Document]) -> None:
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
    notes: list[str] = []


def _read_facts(folder: Path) -> CorpusFile:
    path = folder / "corpus.json"
    if not path.is_file():
        raise DataError(f"{folder} is no prepared corpus: it has no corpus.json; prepare it again")
    way_out = f"delete {folder} and prepare again"
    version = read_json(path, dict, DataError, way_out=way_out).get("format")
    if version != FORMAT:
        raise DataError(
            f"{path}: want a corpus of format {FORMAT}, got {version}; prepare it again"
        )
    return read_json(path, CorpusFile, DataError, way_out=way_out)


def _no_rows(split: Split, facts: dict[str, int], n_ctx: int, notes: Sequence[str]) -> str:
    remarks = "".join(f" ({note})" for note in notes)
    return (
        f"split {split!r} fills no row of {n_ctx} tokens: it has {facts['n_documents']} documents "
        f"with {facts['n_tokens']} tokens in all{remarks}; use more documents, a larger "
        f"{'corpus' if split == 'train' else f'data.splits.{split}_fraction'}, a smaller "
        "data.n_ctx, or data.rows: documents"
    )
