"""Shards on their way to the disk: encoded and written by threads while the next batch is computed.

Shards get their numbers in the order in which they are begun, by the thread that captures, so names
and bytes do not depend on how fast the disk is.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from activation_store.hooks import Rows
from activation_store.shards.encoding import (
    ActsFile,
    Part,
    Target,
    encode_tokens,
    encode_vectors,
)
from activation_store.shards.names import Kind, Shard, shard_name
from activation_store.write.vectors import VectorBlock

SHARD_ROWS = 16_000_000
"""Rows after which a shard of acts ends, at the next block."""
THREADS = 2


class _Growing:
    """A shard of acts that blocks are still appended to, one job after the other."""

    def __init__(self, target: Target, rows: Rows) -> None:
        self.target = target
        self.rows = rows
        self.n_rows = 0
        self.last: Future[None] | None = None
        self.file: ActsFile | None = None

    def append(self, parts: Sequence[Part], before: "Future[None] | None") -> None:
        """Write one block after the one before; runs in a thread."""
        if before is not None:
            before.result()
        if self.file is None:
            self.file = ActsFile(self.target, self.rows.dtype)
        self.file.append(parts)

    def close(self, before: "Future[None] | None") -> Shard:
        """Finish the shard after its last block; runs in a thread."""
        if before is not None:
            before.result()
        assert self.file is not None
        return self.file.close()


class Spool:
    """Writes shards in the background; `finish` waits for them and returns their rows."""

    def __init__(self, folder: Path, store_id: str, first_number: int) -> None:
        self._folder, self._store_id = folder, store_id
        self._number = first_number
        self._threads = ThreadPoolExecutor(THREADS)
        self._growing: dict[str, _Growing] = {}
        self._closing: list[Future[Shard]] = []
        self._waiting_vectors: list[Future[Shard]] = []

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _target(self, kind: Kind, hook: str | None) -> Target:
        name = shard_name(kind, self._store_id, self._number)
        self._number += 1
        return Target(self._folder, name, kind, hook)

    def acts(self, rows: Rows, parts: Sequence[Part]) -> "Future[None]":
        """Append a block to the hook's shard; the parts must not change until the job is done."""
        shard = self._growing.get(rows.hook)
        if shard is None:
            shard = _Growing(self._target("acts", rows.hook), rows)
            self._growing[rows.hook] = shard
        shard.last = self._threads.submit(shard.append, parts, shard.last)
        shard.n_rows += sum(int(part.entries.used[0]) for part in parts)
        if shard.n_rows >= SHARD_ROWS:
            self._close(self._growing.pop(rows.hook))
        return shard.last

    def _close(self, shard: _Growing) -> None:
        self._closing.append(self._threads.submit(shard.close, shard.last))

    def vectors(self, block: VectorBlock | None) -> None:
        """Write one shard per hook; waits while as many are on their way already."""
        if block is None:
            return
        for job in self._waiting_vectors:
            job.result()
        self._waiting_vectors = [
            self._submit(encode_vectors, self._target("vectors", hook), block.seq, block.pos, x)
            for hook, x in block.vectors.items()
        ]

    def tokens(self, columns: tuple[dict[str, np.ndarray], Sequence[str]] | None) -> None:
        """Write one shard of tokens."""
        if columns is not None:
            self._submit(encode_tokens, self._target("tokens", None), *columns)

    def _submit(self, job: Callable[..., Shard], *args: object) -> "Future[Shard]":
        future = self._threads.submit(job, *args)
        self._closing.append(future)
        return future

    def finish(self) -> list[Shard]:
        """End every shard, wait until all are on the disk, and return their rows.

        Raises:
            WriteError: the disk is full or the folder cannot be written.
        """
        for shard in self._growing.values():
            self._close(shard)
        self._growing = {}
        shards = [job.result() for job in self._closing]
        self._closing, self._waiting_vectors = [], []
        return shards

    def abandon(self) -> None:
        """Forget what is on its way; files without a row in the catalogue do not count."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for shard in self._growing.values():
            if shard.file is not None:
                shard.file.abandon()
        self._growing = {}
