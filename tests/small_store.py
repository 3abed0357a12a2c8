"""A small store whose every value is known: written with pyarrow, without the capture."""

import atexit
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import activation_store as astore
from activation_store.catalog import catalogue, tables
from activation_store.shards import names as shards
from activation_store.shards.encoding import Target, encode_vectors

HOOK = "blocks.0.mlp.hook_post"
HOSTILE = """it's "x"; DROP TABLE shards; --"""
WORDS = (" the", " cat", " sat", "s", ".", "\n", " <b>", "'", " éa", "<|endoftext|>")
N_SEQ, N_CTX, D = 12, 16, 6


@dataclass(frozen=True)
class Small:
    """The store's path and the arrays it was made from."""

    path: Path
    token_ids: np.ndarray  # [n_seq, n_ctx]
    doc_ids: np.ndarray  # [n_seq, n_ctx]
    acts: dict[str, np.ndarray]  # hook -> [n_seq, n_ctx, d]; stored where > 0
    vectors: np.ndarray  # [n_seq, n_ctx, 4]


@cache
def template(seed: int) -> Small:
    """Make each store once; every test gets a copy of its own."""
    folder = Path(tempfile.mkdtemp(prefix="small-store-"))
    atexit.register(shutil.rmtree, folder)
    return make(folder / "run", seed)


def small_store(path: Path, seed: int = 0) -> Small:
    copied(template(seed).path, path)
    return replace(template(seed), path=path)


def copied(store: Path, path: Path) -> Path:
    """Copy a store that this process made: no stranger's file, which takes 60 ms to look at."""
    shutil.copytree(store, path, dirs_exist_ok=True)
    catalogue._looked_at.add(catalogue._signature(catalogue.place(path).file))
    return path


def make(path: Path, seed: int) -> Small:
    rng = np.random.default_rng(seed)
    token_ids = rng.integers(0, len(WORDS), (N_SEQ, N_CTX))
    doc_ids = np.arange(N_SEQ * N_CTX).reshape(N_SEQ, N_CTX) // 10
    # multiples of 1/8 are exact in every float type, so sums can be compared to the bit
    acts = {
        hook: np.maximum(rng.integers(-16, 9, (N_SEQ, N_CTX, D)), 0).astype(np.float32) / 8
        for hook in (HOOK, HOSTILE)
    }
    small = Small(path, token_ids, doc_ids, acts, rng.normal(size=(N_SEQ, N_CTX, 4)))
    with astore.open(path, "w") as store:
        fill(store, small)
    return small


def fill(store: astore.Store, small: Small) -> None:
    store_id = catalogue.read_meta(store.place)["store_id"]
    n_docs = int(small.doc_ids.max()) + 1
    store.add_vocabulary(WORDS)
    store.add_documents([{"doc_id": i, "split": split(i), "name": f"d{i}"} for i in range(n_docs)])
    half = N_SEQ // 2
    number = 0
    with catalogue.commit(store.place) as con:
        for seqs in (slice(0, half), slice(half, N_SEQ)):
            number += 1
            shards.register(con, [tokens_shard(store, store_id, number, small, seqs)])
            for hook in small.acts:
                number += 1
                shards.register(con, [acts_shard(store, store_id, number, small, hook, seqs)])
        number += 1
        shards.register(con, [vectors_shard(store, store_id, number, small)])
        tables.replace(con, "hooks", hook_rows(small))
        tables.replace(con, "unit_stats", stat_rows(small))
        tables.replace(con, "exemplars", exemplar_rows(small))


def split(doc_id: int) -> str:
    return "explain" if doc_id % 2 else "score"


def shard_of(
    store: astore.Store, kind: shards.Kind, number: int, hook: str | None, table: pa.Table
) -> shards.Shard:
    name = shards.shard_name(kind, catalogue.read_meta(store.place)["store_id"], number)
    path = store.place.folder / name
    pq.write_table(table, path, row_group_size=64)
    unit = table.column("unit").to_numpy() if kind == "acts" else None
    seq = table.column("seq_id").to_numpy()
    return shards.Shard(
        name,
        kind,
        hook,
        table.num_rows,
        path.stat().st_size,
        shards.checksum(path),
        None if unit is None else int(unit.min()),
        None if unit is None else int(unit.max()),
        int(seq.min()),
        int(seq.max()),
    )


def constant(text: str, n: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([text]))


def tokens_shard(store, store_id, number, small, seqs) -> shards.Shard:
    seq, pos = np.mgrid[seqs, 0:N_CTX].reshape(2, -1)
    docs = small.doc_ids[seqs].reshape(-1)
    columns = [
        pa.array(seq, pa.int32()),
        pa.array(pos, pa.int32()),
        pa.array(docs, pa.int32()),
        pa.array([split(doc) for doc in docs]).dictionary_encode(),
        pa.array(small.token_ids[seqs].reshape(-1), pa.int32()),
    ]
    table = pa.Table.from_arrays(columns, schema=shards.TOKENS)
    return shard_of(store, "tokens", number, None, table)


def acts_shard(store, store_id, number, small, hook, seqs) -> shards.Shard:
    by_unit = small.acts[hook][seqs].transpose(2, 0, 1)
    unit, seq, pos = np.nonzero(by_unit > 0)
    columns = [
        constant(hook, len(unit)),
        pa.array(unit, pa.int32()),
        pa.array(seq + seqs.start, pa.int32()),
        pa.array(pos, pa.int32()),
        pa.array(by_unit[unit, seq, pos]),
    ]
    table = pa.Table.from_arrays(columns, schema=shards.ACTS)
    return shard_of(store, "acts", number, hook, table)


def vectors_shard(store, store_id, number, small) -> shards.Shard:
    seq, pos = np.mgrid[0:N_SEQ, 0:N_CTX].reshape(2, -1)
    x = small.vectors.astype(np.float16).reshape(len(seq), -1)
    name = shards.shard_name("vectors", store_id, number)
    target = Target(store.place.folder, name, "vectors", "resid")
    return encode_vectors(target, seq.astype(np.int32), pos.astype(np.int32), x)


def hook_rows(small: Small) -> list[dict]:
    known = {"n_tokens": N_SEQ * N_CTX, "n_nan": 0, "n_inf": 0, "n_overflow": 0}
    rows = [
        {"hook": h, "kind": "rows", "d": D, "dtype": "float32", "threshold": 0.0}
        | {"n_acts": int((a > 0).sum())}
        | known
        for h, a in small.acts.items()
    ]
    vectors = {"hook": "resid", "kind": "vectors", "d": 4, "dtype": "float16"}
    return [*rows, vectors | {"n_acts": N_SEQ * N_CTX} | known]


def stat_rows(small: Small) -> list[dict]:
    return [
        {
            "hook": hook,
            "unit": unit,
            "n_tokens": N_SEQ * N_CTX,
            "n_active": int((acts[..., unit] > 0).sum()),
            "density": float((acts[..., unit] > 0).mean()),
            "max_act": float(acts[..., unit].max()),
        }
        for hook, acts in small.acts.items()
        for unit in range(D)
    ]


def exemplar_rows(small: Small) -> list[dict]:
    rows: list[dict] = []
    for hook, acts in small.acts.items():
        for unit in range(D):
            order = np.argsort(-acts[..., unit].reshape(-1), kind="stable")[:10]
            for rank, at in enumerate(order, 1):
                seq, pos = divmod(int(at), N_CTX)
                rows.append(
                    {"hook": hook, "unit": unit, "kind": "top", "rank": rank}
                    | {"seq_id": seq, "pos": pos, "doc_id": int(small.doc_ids[seq, pos])}
                    | {"act": float(acts[seq, pos, unit])}
                )
    return rows
