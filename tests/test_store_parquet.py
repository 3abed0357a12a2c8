"""The Parquet files of activations, read back by pyarrow, DuckDB and polars."""

from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store.shards.parquet import ActsWriter, RowGroup, delta_pack, room, run_lengths


def row_group(rng: np.random.Generator, n_units: int, n_seqs: int, density: float) -> RowGroup:
    fires = rng.random((n_units, n_seqs, 64)) < density
    unit, seq, pos = np.nonzero(fires)
    units, runs = np.unique(unit, return_counts=True)
    act = rng.standard_normal(len(unit)).astype(np.float32)
    return RowGroup(
        (units * 3).astype(np.int32), runs, seq.astype(np.int32), pos.astype(np.int32), act
    )


def written(path: Path, groups: list[RowGroup], dtype: str = "float32") -> Path:
    with path.open("wb") as file:
        writer = ActsWriter("blocks.0.mlp.hook_post", dtype, file.write)  # type: ignore[arg-type]
        for group in groups:
            writer.append(group)
        writer.close()
    return path


def columns(groups: list[RowGroup]) -> dict[str, np.ndarray]:
    return {
        "unit": np.concatenate([np.repeat(group.units, group.runs) for group in groups]),
        "seq_id": np.concatenate([group.seq_id for group in groups]),
        "pos": np.concatenate([group.pos for group in groups]),
        "act": np.concatenate([group.act for group in groups]),
    }


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("density", [0.002, 0.2, 1.0])
def test_three_readers_agree_on_what_was_written(
    tmp_path: Path, dtype: str, density: float
) -> None:
    rng = np.random.default_rng(0)
    groups = [row_group(rng, n, 9, density) for n in (300, 1, 40)]
    path = written(tmp_path / "acts.parquet", groups, dtype)
    expected = columns(groups)
    expected["act"] = expected["act"].astype(dtype).astype(np.float32)
    arrow = pq.read_table(path)
    assert pq.ParquetFile(path).metadata.num_row_groups == 3
    assert not any(field.nullable for field in arrow.schema)
    assert set(arrow["hook"].to_pylist()) == {"blocks.0.mlp.hook_post"}
    duck = duckdb.sql(f"SELECT unit, seq_id, pos, act::FLOAT act FROM '{path}'").fetchnumpy()
    polars = pl.read_parquet(path)
    assert polars["hook"].unique().to_list() == ["blocks.0.mlp.hook_post"]
    for name, values in expected.items():
        np.testing.assert_array_equal(arrow[name].to_numpy(), values)
        np.testing.assert_array_equal(duck[name], values)
        np.testing.assert_array_equal(polars[name].to_numpy(), values)


def test_every_page_has_a_checksum_that_arrow_checks(tmp_path: Path) -> None:
    path = written(tmp_path / "acts.parquet", [row_group(np.random.default_rng(0), 30, 9, 0.2)])
    whole = pq.read_table(path, page_checksum_verification=True)
    data = path.read_bytes()
    metadata = pq.ParquetFile(path).metadata.row_group(0)
    for column in range(5):
        chunk = metadata.column(column)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        damaged = bytearray(data)
        damaged[start + chunk.total_compressed_size - 1] ^= 1  # the last byte of the last page
        path.write_bytes(damaged)
        with pytest.raises(OSError, match="CRC checksum verification failed"):
            pq.read_table(path, page_checksum_verification=True, use_threads=False)
    path.write_bytes(data)
    assert pq.read_table(path) == whole


def test_statistics_let_readers_pass_over_row_groups(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    groups = [row_group(rng, 20, 4, 0.3) for _ in range(2)]
    groups[1] = RowGroup(
        groups[1].units + 1000,
        *(groups[1].runs, groups[1].seq_id + 7),
        groups[1].pos,
        groups[1].act,
    )
    path = written(tmp_path / "acts.parquet", groups)
    metadata = pq.ParquetFile(path).metadata
    for i, group in enumerate(groups):
        for column, values in ((1, group.units), (2, group.seq_id)):
            chunk = metadata.row_group(i).column(column)
            assert chunk.statistics.min == values.min()
            assert chunk.statistics.max == values.max()
            assert chunk.statistics.null_count == 0
    assert duckdb.sql(f"SELECT count(*) FROM '{path}' WHERE unit >= 1000").fetchall() == [
        (len(groups[1].act),)
    ]
    hooks = {metadata.row_group(i).column(0).statistics.min for i in range(2)}
    assert hooks == {"blocks.0.mlp.hook_post"}


def test_a_file_may_hold_no_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "acts.parquet", [])
    assert len(pq.read_table(path)) == 0
    assert duckdb.sql(f"SELECT count(*) FROM '{path}'").fetchall() == [(0,)]


@given(
    values=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=400),
    shape=st.sampled_from(["any", "sorted", "small", "constant"]),
)
@settings(max_examples=60, deadline=None)
def test_deltas_of_any_integers_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], shape: str
) -> None:
    seq = np.array(values, np.int32)
    seq = {"any": seq, "sorted": np.sort(seq), "small": seq % 5, "constant": seq * 0 + seq[0]}[
        shape
    ]
    n = len(seq)
    group = RowGroup(
        np.array([7], np.int32), np.array([n]), seq, seq[::-1].copy(), np.ones(n, np.float32)
    )
    path = written(tmp_path_factory.mktemp("delta") / "acts.parquet", [group])
    table = pq.read_table(path)
    np.testing.assert_array_equal(table["seq_id"].to_numpy(), seq)
    np.testing.assert_array_equal(table["pos"].to_numpy(), seq[::-1])
    duck = duckdb.sql(f"SELECT seq_id, pos FROM '{path}'").fetchnumpy()
    np.testing.assert_array_equal(duck["seq_id"], seq)
    assert delta_pack(seq, np.empty(room(n), np.uint8)) <= 4.2 * n + 560


def test_run_lengths_by_hand() -> None:
    out = np.empty(room(3), np.uint8)
    # header is twice the length: 300 -> 600 = 0xd8 0x04, then the value; an empty run is left out
    size = run_lengths(np.array([300, 0, 2]), 2, out)
    assert out[:size].tolist() == [0xD8, 0x04, 0, 4, 2]
