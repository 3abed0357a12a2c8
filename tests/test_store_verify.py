"""Every byte of a store is checked; a repair drops what is lost, and only that."""

import re

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from small_store import HOOK, N_CTX, N_SEQ, small_store

import activation_store as astore
from activation_store.catalog import catalogue
from activation_store.catalog.tables import SCHEMA_VERSION
from activation_store.shards import names as shards


@pytest.fixture
def small(tmp_path):
    return small_store(tmp_path / "run")


def shard_of(small, kind: str, number: int = 0):
    return sorted((small.path / "store").glob(f"{kind}-*"))[number]


def flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_a_whole_store_is_found_whole(small):
    report = astore.verify(small.path)
    assert report.ok
    assert report.faults == report.dropped == report.left_over == ()
    assert report.n_shards == 7
    assert report.n_bytes == sum(p.stat().st_size for p in (small.path / "store").glob("*.parquet"))
    assert str(report).endswith("ok")
    with astore.open(small.path) as store:
        assert store.verify() == report


@pytest.mark.parametrize("kind", ["acts", "tokens", "vectors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.999])
def test_one_flipped_bit_anywhere_in_a_shard_is_found(small, kind, share):
    shard = shard_of(small, kind)
    flip(shard, int(share * shard.stat().st_size))
    report = astore.verify(small.path)
    assert not report.ok
    assert len(report.faults) == 1
    assert report.faults[0].startswith(f"{shard.name}: its sha256 is")


def test_a_flipped_bit_in_the_catalogue_is_never_read_as_data(small):
    file = small.path / "store.duckdb"
    with duckdb.connect(file) as con:  # many rows, so that most of the file holds some of them
        con.execute(
            "INSERT INTO documents (doc_id, split, name)"
            " SELECT i, 's', md5(i::VARCHAR) FROM range(99, 50000) t(i)"
        )
    total = "SELECT sum(hash(d)) FROM documents d"
    with astore.open(small.path) as store:
        right = store.sql(total).fetchall()[0]
    whole, found = file.read_bytes(), 0
    for at in np.linspace(12_288, len(whole) - 1, 8).astype(int):
        flip(file, int(at))
        try:
            with astore.open(small.path) as store:
                assert store.sql(total).fetchall()[0] == right
        except astore.NotAStoreError as fault:
            found += 1
            assert "checksum" in str(fault)
            with pytest.raises(astore.NotAStoreError, match=r"store.duckdb: .*damaged.*checksum"):
                astore.verify(small.path)
        file.write_bytes(whole)
    assert found > 3


def test_missing_and_shortened_shards_are_all_named(small):
    shard_of(small, "vectors").unlink()
    short = shard_of(small, "tokens", 1)
    short.write_bytes(short.read_bytes()[:100])
    report = astore.verify(small.path)
    assert sorted(report.faults) == [
        f"{short.name}: has 100 bytes, want {listed_bytes(small, short.name)}",
        f"{shard_of_kind(small, 'vectors')}: is missing",
    ]


def listed(small) -> list[shards.Shard]:
    with duckdb.connect(small.path / "store.duckdb", read_only=True) as con:
        return shards.listed(con)


def listed_bytes(small, name: str) -> int:
    return next(shard.n_bytes for shard in listed(small) if shard.file == name)


def shard_of_kind(small, kind: str) -> str:
    return next(shard.file for shard in listed(small) if shard.kind == kind)


def test_a_repair_drops_only_what_is_lost_and_says_what(small):
    lost = shard_of(small, "acts", 0)
    flip(lost, 200)
    row = next(shard for shard in listed(small) if shard.file == lost.name)
    with astore.open(small.path, "a") as store:
        report = store.verify(repair=True)
        assert report.ok
        (said,) = report.dropped
        assert said.startswith(
            f"{row.n_rows} rows of acts of {row.hook}, sequences {row.seq_min} to {row.seq_max}"
        )
        assert lost.name in said
        for hook, acts in small.acts.items():
            stored = acts > 0
            if hook == row.hook:
                stored[row.seq_min : row.seq_max + 1] = False
            n = store.sql("SELECT count(*) FROM acts WHERE hook = $h", h=hook).fetchall()[0]
            assert n == (stored.sum(),)
        assert store.sql("SELECT count(*) FROM tokens").fetchall()[0] == (N_SEQ * N_CTX,)
        assert store.sql("SELECT count(*) FROM vectors").fetchall()[0] == (N_SEQ * N_CTX,)
        assert store.unit(HOOK, 1).max_act == small.acts[HOOK][..., 1].max()
    assert lost.exists()
    again = astore.verify(small.path)
    assert again.ok
    assert again.left_over == (lost.name,)


def test_a_repair_of_a_whole_store_changes_nothing(small):
    before = (small.path / "store.duckdb").read_bytes()
    assert astore.verify(small.path, repair=True).dropped == ()
    assert (small.path / "store.duckdb").read_bytes() == before


def test_a_store_with_every_shard_lost_still_opens_after_a_repair(small):
    for path in (small.path / "store").glob("*.parquet"):
        path.unlink()
    report = astore.verify(small.path, repair=True)
    assert report.ok
    assert len(report.dropped) == 7
    with astore.open(small.path) as store:
        assert store.sql("SELECT count(*) FROM activations").fetchall()[0] == (0,)
        assert store.exemplars(HOOK, 1, 2)[0].tokens == ()


def rewritten(small, kind: str, change) -> str:
    """Replace a shard by a changed table under a right checksum, and return its name."""
    path = shard_of(small, kind)
    pq.write_table(change(pq.read_table(path)), path)
    with catalogue.commit(catalogue.place(small.path)) as con:
        con.execute(
            "UPDATE shards SET n_bytes = $1, checksum = $2 WHERE file = $3",
            [path.stat().st_size, shards.checksum(path), path.name],
        )
    return path.name


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("acts", lambda t: t.take(np.arange(t.num_rows)[::-1]), "not sorted by unit, seq_id, pos"),
        ("tokens", lambda t: t.take([0, 0, *range(2, t.num_rows)]), "not sorted by seq_id, pos"),
        ("tokens", lambda t: t.slice(0, 5), "has 5 rows, want 96"),
        ("acts", lambda t: t.drop_columns("hook"), "has columns unit, seq_id, pos, act, want"),
        ("acts", lambda t: t.set_column(3, "pos", t["pos"].cast("uint16")), "pos is uint16"),
    ],
)
def test_a_shard_with_other_content_than_listed_is_found(small, kind, change, told):
    name = rewritten(small, kind, change)
    (fault,) = astore.verify(small.path).faults
    assert fault.startswith(f"{name}: ")
    assert told in fault


def test_rows_listed_twice_and_wrong_counts_are_found(small):
    with duckdb.connect(small.path / "store.duckdb") as con:
        con.execute("INSERT INTO vocabulary SELECT * FROM vocabulary LIMIT 1")
        con.execute("UPDATE hooks SET n_acts = n_acts + 1 WHERE kind = 'vectors'")
    faults = astore.verify(small.path).faults
    assert len(faults) == 3
    assert faults[0].startswith("table vocabulary: more than one row with the key token_id")
    assert faults[1] == "table hooks: resid (vectors) has 193 rows, its shards list 192"
    assert faults[2] == "table vocabulary: has 11 rows, the last commit left 10"


def test_a_shard_that_breaks_after_the_store_was_opened_is_named_by_the_query(small):
    with astore.open(small.path) as store:
        shard = shard_of(small, "acts", -1)
        shard.write_bytes(bytes(shard.stat().st_size))
        with pytest.raises(astore.ShardError, match=rf"{shard.name}(?s:.*)repair"):
            store.sql("SELECT sum(act) FROM acts WHERE unit > $u", u=-1)


def test_a_shard_of_the_right_size_that_is_no_parquet_is_named_when_the_store_opens(small):
    shard = shard_of(small, "vectors")
    size = shard.stat().st_size
    shard.write_bytes(bytes(size))
    with pytest.raises(astore.ShardError, match=rf"{shard.name}.*repair"):
        astore.open(small.path)


LIES = {
    "no row for": "DELETE FROM hooks WHERE kind = 'rows'",
    "table hooks: has 0 rows, the last commit left 3": "DELETE FROM hooks",
    "counts 1192 tokens, the store holds 192": "UPDATE hooks SET n_tokens = 1192",
    "6 units whose density is not in 0 to 1": "UPDATE unit_stats SET density = 2",
    "exemplars whose act is not finite": "UPDATE exemplars SET act = 'nan' WHERE unit = 1",
    "does not say how many rows table hooks has": "DELETE FROM meta WHERE key = 'n_rows hooks'",
    "width d of -5": "UPDATE hooks SET d = -5",
    "shards hold unit 5": "UPDATE hooks SET d = 3 WHERE kind = 'rows'",
    "name unit 9": "UPDATE exemplars SET unit = 9 WHERE unit = 1",
    "tokens that no shard holds": "UPDATE exemplars SET seq_id = 999 WHERE unit = 1",
    "such as seq_id 0, pos 77": "UPDATE exemplars SET pos = 77, seq_id = 0 WHERE unit = 1",
    "table vocabulary: has 0 rows, the last commit left 10": "DELETE FROM vocabulary",
    "column q999 is missing": "ALTER TABLE unit_stats DROP COLUMN q999",
    "column act is VARCHAR, want FLOAT": "ALTER TABLE exemplars ALTER act TYPE VARCHAR",
    "table robustness: is missing": "DROP TABLE robustness",
    "column n_rows may be NULL, want NOT NULL": "ALTER TABLE shards ALTER n_rows DROP NOT NULL",
    "the state of capture x cannot be read": (
        "INSERT INTO writer_state VALUES ('capture x', 'garbage'::BLOB)"
    ),
    "the state of y cannot be read": (
        "INSERT INTO writer_state VALUES ('y', '{\"file\": 3}'::BLOB)"
    ),
}


@pytest.mark.parametrize(("words", "lie"), LIES.items())
def test_a_lie_in_the_rows_of_the_catalogue_is_found(small, words, lie):
    with duckdb.connect(small.path / "store.duckdb") as con:
        con.execute(lie)
    faults = astore.verify(small.path).faults
    assert any(words in fault for fault in faults), faults


def test_exemplars_of_tokens_that_a_repair_dropped_are_no_fault(small):
    shard_of(small, "tokens").unlink()
    assert astore.verify(small.path, repair=True).ok
    assert astore.verify(small.path).ok


@pytest.mark.parametrize(
    ("told", "replaced"),
    [
        ("column value is INTEGER, want VARCHAR", ("meta", f"{SCHEMA_VERSION} AS value")),
        ("column file may be NULL", ("shards", "NULL::VARCHAR AS file")),
        ("column seq_min is VARCHAR", ("shards", "'a' AS seq_min")),
        ("table shards: CHECK.* is missing", ("shards", "'evil' AS kind")),
    ],
)
def test_a_catalogue_of_other_types_is_one_message_whatever_is_done_with_it(small, told, replaced):
    table, values = replaced
    with duckdb.connect(small.path / "store.duckdb") as con:
        con.execute(f"CREATE TABLE x AS SELECT * REPLACE ({values}) FROM {table}")
        con.execute(f"DROP TABLE {table}; ALTER TABLE x RENAME TO {table}")
    assert any(re.search(told, fault) for fault in astore.verify(small.path).faults)
    for mode in ("r", "a"):
        with pytest.raises(astore.NotAStoreError, match="damaged: table"):
            astore.open(small.path, mode)
