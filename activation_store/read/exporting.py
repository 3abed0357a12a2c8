"""A store or a lake in the layouts of others: plain Parquet, delphi latents, OpenAI neuron records.

An export is atomic: it is written next to its final place and renamed when it is whole, so a folder
of that name is complete. Nothing is ever added to a folder that has something in it.
"""

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from activation_store.errors import ContentError, ShardError, StoreError, writing
from activation_store.read.excerpts import records
from activation_store.store import Store

_TABLES = (
    "all_scores",
    "dictionaries",
    "documents",
    "exemplars",
    "explanations",
    "hooks",
    "meta",
    "neighbours",
    "promotes",
    "robustness",
    "runs",
    "unit_lives",
    "unit_stats",
    "unit_steps",
    "vocabulary",
)
Tensors: TypeAlias = dict[str, np.ndarray]

_DELPHI_SMALLEST = 1e-5  # activations that delphi takes for zero: |a| at or below this


@contextmanager
def whole_folder(out: str | os.PathLike[str]) -> Generator[Path]:
    """Give a fresh folder that becomes `out` when the block succeeds, and is removed when not.

    Raises:
        StoreError: `out` is there already and is not an empty folder.
        WriteError: the machine refused a write.
    """
    place = Path(out).absolute()
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise StoreError(f"{place}: is there already; name a folder that is not, or is empty.")
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_name(f".{place.name}.{secrets.token_hex(4)}.part")
        draft.mkdir()
        try:
            yield draft
            os.replace(draft, place)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def export_parquet(store: Store, out: str | os.PathLike[str]) -> Path:
    """Write everything in a store as Parquet that any reader takes, and return the folder.

        tables/<table>.parquet
        tokens/<number>.parquet             seq_id, pos, doc_id, split, token_id
        acts/hook=<hook>/<number>.parquet     unit, seq_id, pos, act
        vectors/hook=<hook>/<number>.parquet  seq_id, pos, vector (a list of fixed size)

    Hooks are percent-encoded in names of folders, as Hive partitions are. Types stay as stored.
    Needs the memory of one row group.

    Raises:
        StoreError: `out` holds something already.
        ShardError: a shard cannot be read.
        WriteError: the machine refused; nothing is left behind.
    """
    shards = store.sql(
        "SELECT kind, hook, file FROM shards ORDER BY kind, hook, length(file), file"
    ).fetchall()
    check_shards(store)
    with whole_folder(out) as folder:
        (folder / "tables").mkdir()
        for table in _TABLES:
            rows = store.sql(f"FROM {table}").to_arrow_table()
            pq.write_table(rows, folder / "tables" / f"{table}.parquet")
        numbers: dict[Path, int] = {}
        for kind, hook, file in shards:
            at = folder / kind if hook is None else folder / kind / f"hook={quote(hook, safe='')}"
            at.mkdir(parents=True, exist_ok=True)
            number = numbers[at] = numbers.get(at, -1) + 1
            _copy_rows(
                store.backend.files.fs, store.backend.files.path(file), at / f"{number:05d}.parquet"
            )
    return Path(out)


def check_shards(store: Store, hooks: Sequence[str] | None = None) -> None:
    """Compare the shards of tokens and of some hooks, or of all, with their sha256.

    An export gives bytes a new form and a new checksum; damaged ones must not become sound.

    Raises:
        ShardError: a shard is missing or was changed; names it and the way out.
    """
    chosen = None if hooks is None else set(hooks)
    for shard in store.shards():
        if chosen is None or shard.hook is None or shard.hook in chosen:
            store.backend.files.checked(shard).close()


def _copy_rows(files: fs.FileSystem, shard: str, to: Path) -> None:
    """Write the rows of a shard without its column hook, one row group after the other."""
    try:
        source = pq.ParquetFile(files.open_input_file(shard))
    except (FileNotFoundError, pa.ArrowInvalid) as fault:
        raise ShardError(
            f"{shard}: cannot be read: {fault}. Run `lmmono store verify --repair` on the store, "
            "which drops only what is lost and says what."
        ) from fault
    with source:
        names = [name for name in source.schema_arrow.names if name != "hook"]
        schema = pa.schema([source.schema_arrow.field(name) for name in names])
        with pq.ParquetWriter(to, schema, compression="zstd") as file:
            for number in range(source.num_row_groups):
                file.write_table(source.read_row_group(number, columns=names))


def export_delphi(
    store: Store,
    out: str | os.PathLike[str],
    hooks: str | Sequence[str] | None = None,
    *,
    n_splits: int = 5,
    model_name: str = "",
    pad_token_id: int = 0,
) -> Path:
    """Write acts as delphi caches latents, and return the folder, delphi's `raw_dir`.

        <hook>/<start>_<end>.safetensors   units start to end, both included: `locations` (row of
                                           the tokens, pos, unit - start), `activations` float16,
                                           `tokens` [rows, n_ctx]
        <hook>/config.json

    Row i of the tokens is the i-th sequence by seq_id. Only |act| > 1e-5 are written, as delphi
    does. Needs the memory of the acts of one split, 40 bytes each, and of all tokens.

    Args:
        store: an open store or lake.
        out: folder to write.
        hooks: hooks captured as rows; all of them by default.
        n_splits: files per hook.
        model_name: what delphi loads the tokenizer from, unless it is given one.
        pad_token_id: where a sequence has no token stored.

    Raises:
        ContentError: a hook without rows, no tokens, or acts beyond the range of float16.
        StoreError: `out` holds something already.
        WriteError: the machine refused; nothing is left behind.
    """
    if n_splits < 1:
        raise ContentError(f"n_splits: want an integer >= 1, got {n_splits}.")
    widths = _widths(store, hooks)
    check_shards(store, list(widths))
    seqs, tokens = _token_matrix(store, pad_token_id)
    with whole_folder(out) as folder:
        for hook, d in widths.items():
            at = folder / _folder_name(hook)
            at.mkdir()
            cuts = np.linspace(0, d, min(n_splits, d) + 1).astype(int).tolist()
            for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
                tensors = {**_latents(store, hook, start, stop, seqs), "tokens": tokens}
                write_tensors(at / f"{start}_{stop - 1}.safetensors", tensors)
            config = _delphi_config(store, tokens, model_name, n_splits)
            (at / "config.json").write_text(json.dumps(config, indent=4))
    return Path(out)


def _widths(store: Store, hooks: str | Sequence[str] | None) -> dict[str, int]:
    """Return the hooks asked for with their widths."""
    rows = store.sql("SELECT hook, d FROM hooks WHERE kind = 'rows' ORDER BY hook").fetchall()
    widths: dict[str, int] = dict(rows)
    wanted = [hooks] if isinstance(hooks, str) else widths if hooks is None else hooks
    if missing := [hook for hook in wanted if hook not in widths]:
        raise ContentError(
            f"{store.path}: no rows of hook {missing[0]!r}; hooks captured as rows: "
            f"{', '.join(widths) or 'none'}."
        )
    if not wanted:
        raise ContentError(f"{store.path}: no hook was captured as rows; nothing to export.")
    return {hook: widths[hook] for hook in wanted}


def _folder_name(hook: str) -> str:
    """Return a hook as the name of a folder; what a name cannot hold is percent-encoded.

    >>> _folder_name("blocks.0.mlp.hook_post"), _folder_name("a/b"), _folder_name("..")
    ('blocks.0.mlp.hook_post', 'a%2Fb', '%2E%2E')
    """
    name = quote(hook, safe=" ")
    return name if name.strip(".") else name.replace(".", "%2E")


def _token_matrix(store: Store, pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sequences, ascending, and their tokens as int64 [n, n_ctx]."""
    columns = store.sql("SELECT seq_id, pos, token_id FROM token_ids").fetchnumpy()
    seq, pos, token = (np.asarray(columns[name]) for name in ("seq_id", "pos", "token_id"))
    if not len(seq):
        raise ContentError(f"{store.path}: holds no tokens; nothing to export.")
    seqs, row = np.unique(seq, return_inverse=True)
    tokens = np.full((len(seqs), int(pos.max()) + 1), pad_token_id, np.int64)
    tokens[row, pos] = token
    return seqs, tokens


def _latents(store: Store, hook: str, start: int, stop: int, seqs: np.ndarray) -> Tensors:
    """Return the acts of units start to stop as delphi has them, token by token."""
    columns = store.sql(
        "SELECT seq_id, pos, unit, act FROM acts WHERE hook = $hook AND unit >= $first"
        " AND unit < $stop AND abs(act) > $smallest ORDER BY seq_id, pos, unit",
        hook=hook,
        first=start,
        stop=stop,
        smallest=_DELPHI_SMALLEST,
    ).fetchnumpy()
    row = np.searchsorted(seqs, np.asarray(columns["seq_id"]))
    units = np.asarray(columns["unit"]) - start
    act = np.asarray(columns["act"])
    if too_large := int((np.abs(act) > np.finfo(np.float16).max).sum()):
        raise ContentError(
            f"{hook}: {too_large} activations are beyond the range of float16, in which delphi "
            "keeps them; export as Parquet instead."
        )
    locations = np.stack([row, np.asarray(columns["pos"]), units], axis=1)
    narrow = locations.max(initial=0) < 2**16
    return {
        "locations": locations.astype(np.uint16 if narrow else np.uint32),
        "activations": act.astype(np.float16),
    }


def _delphi_config(
    store: Store, tokens: np.ndarray, model_name: str, n_splits: int
) -> dict[str, Any]:
    """Return delphi's CacheConfig; what stands for a data set it would load is empty."""
    return {
        "dataset_repo": "",
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "",
        "batch_size": 1,
        "cache_ctx_len": tokens.shape[1],
        "ctx_len": tokens.shape[1],
        "n_tokens": tokens.size,
        "n_splits": n_splits,
        "model_name": model_name,
        "exported_from": store.info().store_id,
    }


def export_openai(
    store: Store,
    out: str | os.PathLike[str],
    hook: str,
    *,
    layer: int | None = None,
    before: int = 32,
    after: int = 31,
) -> Path:
    """Write the units of a hook as OpenAI's `NeuronRecord`s, and return the folder.

        <layer>/<unit>.json   statistics, top exemplars, random ones, and some of each tenth

    Records are excerpts of the exemplar's document around it; a token whose act is not stored has
    0. `kurtosis` is m4 / m2^2. `quantile_boundaries` lie half-way between the acts of one tenth's
    exemplars and the next's; null where a tenth has none. The random sample is of all tokens.

    Args:
        store: an open store or lake.
        out: folder to write.
        hook: a hook captured as rows.
        layer: number of the layer; by default the N in `blocks.N.`.
        before: most tokens before an exemplar's own.
        after: most tokens after it.

    Raises:
        ContentError: a hook without rows, or without a layer in its name and none given.
        StoreError: `out` holds something already.
        WriteError: the machine refused; nothing is left behind.
    """
    _widths(store, hook)
    number = layer if layer is not None else layer_of(hook)
    check_shards(store, [hook])
    with whole_folder(out) as folder:
        at = folder / str(number)
        at.mkdir()
        for stats, exemplars in records(store, hook, before, after):
            record = _neuron_record(number, stats, exemplars)
            (at / f"{stats['unit']}.json").write_text(json.dumps(record, allow_nan=False))
    return Path(out)


def layer_of(hook: str) -> int:
    """Return the layer in the name of a hook.

    Raises:
        ContentError: the name has none.

    >>> layer_of("blocks.3.mlp.hook_post")
    3
    """
    number = re.search(r"(?:^|\.)(\d+)\.", hook)
    if number is None:
        raise ContentError(f"layer: {hook!r} names none; say which, as layer=0.")
    return int(number.group(1))


def _neuron_record(
    layer: int, stats: dict[str, Any], exemplars: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Return one record in the form that OpenAI's `loads` turns into a NeuronRecord."""
    bins = sorted({row["bin"] for row in exemplars["quantile"]})
    by_bin = [[row for row in exemplars["quantile"] if row["bin"] == one] for one in range(10)]
    moments = ("mean", "variance", "skewness", "kurtosis")
    return {
        "dataclass_name": "NeuronRecord",
        "neuron_id": {
            "dataclass_name": "NeuronId",
            "layer_index": layer,
            "neuron_index": stats["unit"],
        },
        "random_sample": [_activation_record(row) for row in exemplars["random"]],
        "random_sample_by_quantile": (
            [[_activation_record(row) for row in rows] for rows in by_bin] if bins else None
        ),
        "quantile_boundaries": _boundaries(by_bin),
        **{name: _finite(stats[name]) for name in moments},
        "most_positive_activation_records": [_activation_record(row) for row in exemplars["top"]],
    }


def _activation_record(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "dataclass_name": "ActivationRecord",
        "tokens": row["tokens"],
        "activations": row["acts"],
    }


def _boundaries(by_bin: Sequence[Sequence[dict[str, Any]]]) -> list[float] | None:
    if not all(by_bin):
        return None
    ends = [(min(row["act"] for row in rows), max(row["act"] for row in rows)) for rows in by_bin]
    return [(high + low) / 2 for (_, high), (low, _) in zip(ends[:-1], ends[1:], strict=True)]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


Exporter = Callable[..., Path]

FORMATS: dict[str, Exporter] = {
    "delphi": export_delphi,
    "openai": export_openai,
    "parquet": export_parquet,
}
"""Layouts by the name that the command line has for them."""


def export(store: Store, to: str, out: str | os.PathLike[str], hooks: Sequence[str] = ()) -> Path:
    """Write a store in the layout `to`, one of `FORMATS`, and return the folder.

    Raises:
        ContentError: another layout, or hooks that it does not take.
        StoreError: as the export of that layout does.
    """
    if to not in FORMATS:
        raise ContentError(f"export: want one of {', '.join(FORMATS)}, got {to!r}.")
    if to == "parquet":
        if hooks:
            raise ContentError("export: parquet takes everything; leave the hooks out.")
        return export_parquet(store, out)
    if to == "delphi":
        return export_delphi(store, out, tuple(hooks) or None)
    if len(hooks) != 1:
        raise ContentError(f"export: openai takes one hook, got {len(hooks)}.")
    return export_openai(store, out, hooks[0])


_SAFETENSORS_TYPES = {
    "float16": "F16",
    "float32": "F32",
    "int32": "I32",
    "int64": "I64",
    "uint16": "U16",
    "uint32": "U32",
}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write arrays of any shape in the safetensors format: header size, JSON header, their bytes.

    By hand, as the store depends on three packages only. Source:
    https://github.com/huggingface/safetensors#format
    """
    header: dict[str, object] = {}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        kind = _SAFETENSORS_TYPES[array.dtype.name]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers may want the arrays at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).data)
