"""Writing a store: activations in, shards and tables out, a commit at a time.

A capture is a set of hooks taken over one stream of sequences. Everything it writes depends only
on the stream and the settings, not on how the sequences come in batches: it looks at fixed places
of the stream whether a block of entries is due to be written and a commit to be made. A commit is
atomic: it lists the shards and stores, in one step, the tables and what the writer must remember. A
capture that is stopped in any way resumes after its last commit, and its store equals that of one
never stopped.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from types import TracebackType

import duckdb
import numpy as np
from jaxtyping import Bool

from activation_store.catalog import catalogue
from activation_store.errors import ContentError, DroppedWarning, StoreError
from activation_store.hooks import LARGEST, NOTHING, Rows, Skip, Vectors
from activation_store.shards.names import (
    StateFile,
    listed,
    listed_states,
    load_state,
    register,
    write_state,
)
from activation_store.write import state
from activation_store.write.accumulator import (
    GROUP_TOKENS,
    Accumulator,
    Tensor,
    VectorLog,
    as_block,
    as_tokens,
    is_block,
    tiles_of,
)
from activation_store.write.exemplars import DRAWS
from activation_store.write.sequences import TokenLog, refuse_shared
from activation_store.write.spool import Spool
from activation_store.write.state import Rank, RankState
from activation_store.write.summary import write_tables

COMMIT_TOKENS = 1_000_000
"""Tokens between commits unless asked otherwise."""


def _settings_of(hook: Rows) -> dict[str, object]:
    """Return a hook's settings as they are compared; thousands of cuts are their digest."""
    settings = asdict(hook)
    if hook.cuts is not None:
        settings["cuts"] = hashlib.sha256(np.array(hook.cuts).tobytes()).hexdigest()[:16]
    return settings


class Writer:
    """Writes one capture into a store; a context manager, made by `Store.writer`.

    Leaving the block commits. Leaving it by an exception does not: what was committed before stays.
    """

    def __init__(
        self,
        where: catalogue.Place,
        *,
        rows: Sequence[Rows] = (),
        vectors: Sequence[Vectors] = (),
        n_ctx: int,
        seed: int = 0,
        commit_tokens: int = COMMIT_TOKENS,
        model_digest: str | None = None,
        rank: int = 0,
        world_size: int = 1,
        skip: Skip | None = None,
    ) -> None:
        """Check the settings; nothing is opened or written before the block is entered.

        Args:
            where: place of the store.
            rows: hooks to keep as sparse rows.
            vectors: hooks to keep whole.
            n_ctx: tokens per sequence.
            seed: seed of the random and quantile exemplars.
            commit_tokens: tokens between commits, rounded up to a fixed grid of the stream.
            model_digest: of the model's weights; a store holds one model.
            rank: which of several processes this is, each with sequences of its own.
            world_size: how many processes capture together.
            skip: tokens to leave out of statistics, exemplars, acts and vectors.

        Raises:
            ContentError: no hook, or one named twice, or a rank that cannot be.
        """
        self._rank = Rank(rank, world_size)
        self._skip = skip or NOTHING
        if not 1 <= n_ctx <= 2**16:
            raise ContentError(f"n_ctx: want 1 to 65536 tokens per sequence, got {n_ctx}.")
        for kind, hooks in (("rows", rows), ("vectors", vectors)):
            names = [hook.hook for hook in hooks]
            if len(set(names)) < len(names):
                raise ContentError(f"{kind}: a hook is named twice: {', '.join(names)}.")
        if not rows and not vectors:
            raise ContentError("want at least one hook, as rows or as vectors; got none.")
        self._where = where
        self._rows, self._vectors = tuple(rows), tuple(vectors)
        self._n_ctx, self._seed = n_ctx, seed
        self._group = max(1, GROUP_TOKENS // n_ctx)
        self._commit_seqs = self._group * -(-commit_tokens // (n_ctx * self._group))
        self._model_digest = model_digest
        self._n_seqs = self._committed = 0
        self._stopped = False
        self._open = ExitStack()

    @property
    def next_seq(self) -> int:
        """Sequences of this rank's stream that are committed: a resumed capture skips so many."""
        return self._committed

    @property
    def settings(self) -> dict[str, object]:
        """What must be the same to resume a capture."""
        return {
            "n_ctx": self._n_ctx,
            "seed": self._seed,
            "draws": DRAWS,
            "world_size": self._rank.world_size,
            "commit_tokens": self._commit_seqs * self._n_ctx,
            "skip": asdict(self._skip),
            **{f"rows {hook.hook}": _settings_of(hook) for hook in self._rows},
            **{f"vectors {hook.hook}": asdict(hook) for hook in self._vectors},
        }

    @property
    def _key(self) -> str:
        names = [f"rows {hook.hook}" for hook in self._rows]
        return "capture " + json.dumps(names + [f"vectors {hook.hook}" for hook in self._vectors])

    def __enter__(self) -> "Writer":
        """Take the store's writer lock and resume after the last commit of the capture.

        Raises:
            LockedError: another process writes this store.
            ContentError: the capture was begun with other settings, or is of another model.
            ShardError: what the capture is to be resumed from is damaged.
        """
        with ExitStack() as opening:
            opening.enter_context(catalogue.locked(self._rank.lock(self._where)))
            n_threads = min(8, os.cpu_count() or 1)
            self._pool = opening.enter_context(ThreadPoolExecutor(n_threads))
            self._accumulators = [
                Accumulator(hook, self._seed, self._pool, n_threads, self._skip)
                for hook in self._rows
            ]
            self._vector_log = VectorLog(self._vectors, self._skip)
            self._tokens = TokenLog()
            wait = catalogue.COMMIT_WAIT_SECONDS
            with (
                # without it another rank's commit removes the state that is being read
                catalogue.locked(self._where.commit_lock, wait),
                catalogue.opened(self._where) as con,
            ):
                with state.understood():
                    self._resume(con)
                self._store_id = catalogue.read_meta(self._where)["store_id"]
                shards = [shard.file for shard in listed(con)]
                self._spool = opening.enter_context(
                    Spool(self._where.folder, self._store_id, self._rank.next_number(shards))
                )
                self._rank.sweep(self._where, con)
            self._open = opening.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Commit what is not committed, unless the block or the writer ended with an error."""
        with self._open:
            if kind is None and not self._stopped and self._n_seqs > self._committed:
                self.commit()
                self._warn_of_dropped()
            else:
                self._spool.abandon()

    def _warn_of_dropped(self) -> None:
        """Say which vectors are missing, and which acts, because they do not fit their type."""
        dropped = [
            f"{hook.rows.hook}: {n:,} activations are beyond {hook.rows.dtype} and were dropped"
            for hook in self._accumulators
            if (n := int(hook.seen.odd[:, 2].sum()))
        ]
        log = self._vector_log
        if n := log.n_tokens - log.n_vectors:
            causes = [
                f"{hook.hook} ({hook.dtype}) has {n_nan:,} NaN, {n_inf:,} infinite, {n_large:,} "
                f"beyond {LARGEST[hook.dtype]:,.0f}"
                for hook, (n_nan, n_inf, n_large) in zip(log.hooks, log.odd.tolist(), strict=True)
                if n_nan + n_inf + n_large
            ]
            dropped.append(f"{n:,} of {log.n_tokens:,} tokens have no vector: {'; '.join(causes)}")
        if dropped:
            warnings.warn(
                f"{self._where.file}: {'; '.join(dropped)}. Where values are large, capture with "
                "dtype float32; table hooks counts all that was left out.",
                DroppedWarning,
                stacklevel=2,
            )

    def _resume(self, con: duckdb.DuckDBPyConnection) -> None:
        """Take up the state of the last commit, if there was one with the same settings."""
        meta = dict(con.execute("SELECT key, value FROM meta").fetchall())
        for name, now in (("model_digest", self._model_digest), ("n_ctx", str(self._n_ctx))):
            if now is not None and meta.get(name, now) != now:
                raise ContentError(
                    f"{self._where.file}: {name}: the store holds {meta[name]}, this capture has "
                    f"{now}; write it to a store of its own."
                )
        self._tokens.restore(
            state.read(con, "tokens" + self._rank.suffix),
            self._rank.others(self._where, con, "tokens"),
        )
        others = self._rank.others(self._where, con, self._key)
        for other in others:
            if other is not None:
                self._refuse_other_settings(other)
        files = listed_states(con)
        self._state = files.get(self._key + self._rank.suffix)
        self._state_number = self._rank.next_number(file.file for file in files.values())
        stored = state.read(con, self._key + self._rank.suffix)
        if stored is None:
            if not any(others):
                self._refuse_known_hooks(con)
            return
        last = state.from_bytes(load_state(stored, self._where.folder))
        self._refuse_other_settings(last)
        self._n_seqs = self._committed = int(last["n_seqs"])
        for hook in self._accumulators:
            hook.restore(last)
        self._vector_log.restore(last)
        self._tokens.restore_given(last["given"])

    def _refuse_other_settings(self, begun: RankState) -> None:
        """Refuse to resume a capture, or to join one, that was begun with other settings."""
        differences = state.settings_difference(str(begun["settings"]), self.settings)
        if differences:
            raise ContentError(
                f"{self._where.file}: this capture was begun with other settings: "
                f"{'; '.join(differences)}. Use the same, or write to another store."
            )

    def _refuse_known_hooks(self, con: duckdb.DuckDBPyConnection) -> None:
        """Refuse to begin a capture of hooks that belong to another one."""
        captured = set(con.execute("SELECT hook, kind FROM hooks").fetchall())
        ours = {(hook.hook, "rows") for hook in self._rows}
        ours |= {(hook.hook, "vectors") for hook in self._vectors}
        if captured & ours:
            names = ", ".join(f"{hook} ({kind})" for hook, kind in sorted(captured & ours))
            raise ContentError(
                f"{self._where.file}: already captured together with other hooks: {names}. Name "
                "the same set of hooks to resume that capture, or leave these out."
            )

    def pending(
        self, seq_ids: Tensor, token_ids: Tensor, doc_ids: Tensor, split: str | None = None
    ) -> Bool[np.ndarray, " batch"]:
        """Tell which sequences this capture does not hold yet: all others can be skipped.

        A second capture of the same hooks adds what is new, and a resumed one what is missing,
        whatever the order of the sequences.

        Args:
            seq_ids: [batch], numbers of the sequences.
            token_ids: [batch, n_ctx].
            doc_ids: [batch, n_ctx], document of each token; below 0 for padding.
            split: part of the corpus that the sequences belong to; None leaves it unchecked.

        Raises:
            ContentError: a shape that does not fit, or a sequence that the store holds with other
                tokens or documents, or in another split.
        """
        n = len(seq_ids)
        seq = as_tokens("seq_ids", seq_ids, (n,))
        tokens = as_tokens("token_ids", token_ids, (n, self._n_ctx))
        docs = as_tokens("doc_ids", doc_ids, (n, self._n_ctx))
        self._tokens.check_same(seq, tokens, docs, split)
        return ~self._tokens.is_given(seq)

    def add(
        self,
        seq_ids: Tensor,
        token_ids: Tensor,
        doc_ids: Tensor,
        split: str,
        activations: Mapping[str, Tensor],
    ) -> None:
        """Take a batch of whole sequences; returns when the arrays are no longer needed.

        Args:
            seq_ids: [batch], numbers of the sequences, each given once.
            token_ids: [batch, n_ctx].
            doc_ids: [batch, n_ctx], document of each token; below 0 for padding at the ends.
            split: part of the corpus that the sequences belong to.
            activations: for each hook, floating point [batch, n_ctx, d], numpy or torch.

        Raises:
            ContentError: a hook or a shape that does not fit, a sequence given twice, or a hook
                that is too dense to be kept as rows.
            WriteError: the disk is full or the folder cannot be written.
        """
        n = len(seq_ids)
        seq = as_tokens("seq_ids", seq_ids, (n,))
        tokens = as_tokens("token_ids", token_ids, (n, self._n_ctx))
        docs = as_tokens("doc_ids", doc_ids, (n, self._n_ctx))
        hooks = (*self._rows, *self._vectors)
        if missing := sorted({hook.hook for hook in hooks} - activations.keys()):
            raise ContentError(
                f"activations of {', '.join(missing)} are missing; got {', '.join(activations)}."
            )
        blocks = {
            hook.hook: as_block(hook.hook, activations[hook.hook], (n, self._n_ctx, hook.d))
            for hook in hooks
        }
        keep = ~self._skip.mask(tokens, docs) if self._skip else None
        real = docs >= 0 if keep is None else (docs >= 0) & keep
        self._tokens.check(seq, tokens, docs, split)
        with self._changing():
            done = 0
            while done < n:
                stop = min(n, done + self._group - self._n_seqs % self._group)
                part = slice(done, stop)
                self._tokens.add(seq[part], tokens[part], docs[part], split)
                kept = None if keep is None else keep[part]
                tiles = tiles_of(seq[part], docs[part], tokens[part], kept)
                for hook in self._accumulators:
                    block = blocks[hook.rows.hook][part]
                    hook.add(block.reshape(docs[part].size, -1), tiles)
                some = {hook.hook: blocks[hook.hook][part] for hook in self._vectors}
                self._vector_log.add(seq[part], real[part], some)
                self._n_seqs += stop - done
                done = stop
                if self._n_seqs % self._group == 0:
                    self._look()

    @contextmanager
    def _changing(self) -> Generator[None]:
        """Mark the writer as unusable if the change does not end well."""
        if self._stopped:
            raise StoreError(
                f"{self._where.file}: this writer stopped at an error before; leave its block and "
                f"enter another one, which resumes from sequence {self._committed} of the stream."
            )
        self._stopped = True
        yield
        self._stopped = False

    def _look(self) -> None:
        """Write a block or commit, if it is time; only at fixed places of the stream."""
        if self._n_seqs - self._committed >= self._commit_seqs:
            self._commit()
        elif is_block(self._accumulators):
            self._write_block()
        if self._vector_log.is_full:
            self._spool.vectors(self._vector_log.take())

    def _write_block(self) -> None:
        for hook in self._accumulators:
            parts = hook.take()
            hook.busy(self._spool.acts(hook.rows, parts) if hook.n_buffered else None)

    def commit(self) -> None:
        """Make everything added so far part of the store, in one step; waits for the disk.

        Raises:
            ContentError: a hook that is too dense to be kept as rows.
            WriteError: the disk is full or the folder cannot be written.
        """
        with self._changing():
            self._commit()

    def _commit(self) -> None:
        self._write_block()
        self._spool.vectors(self._vector_log.take())
        self._spool.tokens(self._tokens.take())
        shards = self._spool.finish()
        writing_state = self._pool.submit(self._write_state)
        with catalogue.commit(self._where) as con:
            others = self._rank.others(self._where, con, self._key)
            refuse_shared(self._tokens.given, others)
            register(con, shards)
            totals = [hook.total(others) for hook in self._accumulators]
            write_tables(con, totals, self._vector_log.totals(others), self._seed)
            # the store is of one model and one length of sequence from now on
            for name, value in (("model_digest", self._model_digest), ("n_ctx", str(self._n_ctx))):
                if value is not None:
                    state.pin(con, name, value)
            state.write(con, "tokens" + self._rank.suffix, self._tokens.dump())
            file = writing_state.result()
            state.write(con, self._key + self._rank.suffix, file.value())
            catalogue.sync(self._where.folder)
        if self._state is not None:
            (self._where.folder / self._state.file).unlink(missing_ok=True)
        self._state, self._state_number = file, self._state_number + 1
        self._committed = self._n_seqs

    def _write_state(self) -> StateFile:
        """Bring to the disk what must be remembered; runs in a thread."""

        def arrays() -> Iterator[tuple[str, np.ndarray]]:
            yield "settings", np.array(json.dumps(self.settings))
            yield "n_seqs", np.array(self._n_seqs)
            yield "given", self._tokens.given
            for hook in self._accumulators:
                yield from hook.dump().items()
            yield from self._vector_log.dump().items()

        return write_state(
            self._where.folder,
            self._store_id,
            self._state_number,
            lambda file: state.write_arrays(file, arrays()),
        )
