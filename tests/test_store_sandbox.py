"""SQL of a caller who is not trusted can read the store, and do nothing else."""

import os
from pathlib import Path

import duckdb
import pytest
from small_store import HOOK, HOSTILE, small_store

import activation_store as astore


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    small = small_store(tmp_path_factory.mktemp("sandbox"))
    outside = small.path.parent / "outside.csv"
    outside.write_text("secret\n1\n")
    with astore.open(small.path) as opened:
        yield opened


def listing(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


WRITES = [
    "CREATE TABLE x AS SELECT 1",
    "CREATE TEMP TABLE x AS SELECT 1",
    "CREATE VIEW x AS SELECT 1",
    "CREATE MACRO x() AS 1",
    "INSERT INTO meta VALUES ('a', 'b')",
    "UPDATE meta SET value = '9'",
    "DELETE FROM shards",
    "DROP VIEW acts",
    "ALTER TABLE meta ADD COLUMN x INTEGER",
    "TRUNCATE shards",
    "COPY (SELECT 1) TO '{out}'",
    "COPY (SELECT 1) TO '{folder}/store/new.parquet'",
    "COPY (SELECT 1 AS unit) TO '{shard}'",
    "COPY meta FROM '{outside}'",
    "EXPORT DATABASE '{out}'",
    "IMPORT DATABASE '{out}'",
    "COPY FROM DATABASE memory TO memory",
    "ATTACH '{out}' AS y",
    "ATTACH ':memory:' AS y",
    "ATTACH '{folder}/store.duckdb' AS y",
    "DETACH memory",
    "USE temp",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{out}'",
    "SET threads = 1",
    "SET enable_external_access = true",
    "SET lock_configuration = false",
    "SET VARIABLE x = 1",
    "RESET threads",
    "PRAGMA enable_profiling",
    "CALL enable_logging(storage = 'file', storage_path = '{out}')",
    "CHECKPOINT",
    "VACUUM",
    "BEGIN",
    "PREPARE x AS SELECT 1",
    "EXECUTE x",
    "CREATE SECRET (TYPE S3)",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}'",
    "EXPLAIN ANALYZE CREATE TABLE x AS SELECT 1",
    "EXPLAIN FROM enable_logging()",
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY (SELECT 1) TO '{out}'",
    "",
    "-- nothing",
]

FUNCTIONS = [
    "FROM enable_logging('QueryLog', storage = 'file', storage_path = '{out}')",
    "SELECT * FROM system.main.enable_logging()",
    'SELECT * FROM "ENABLE_LOGGING"()',
    "SELECT (SELECT count(*) FROM enable_profiling())",
    "WITH x AS (FROM disable_logging()) FROM x",
    "FROM acts WHERE unit IN (SELECT 1 FROM truncate_duckdb_logs())",
    "FROM acts, LATERAL (FROM checkpoint())",
    "FROM force_checkpoint()",
    "FROM query('FROM enable_logging()')",
    "FROM query_table('acts')",
    "FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
    "FROM pandas_scan(1, 2, 3)",
    "FROM arrow_scan(1, 2, 3)",
    "FROM read_csv('{outside}')",
    "FROM read_text('{outside}')",
    "FROM read_blob('/etc/passwd')",
    "FROM read_parquet('{shard}')",
    "FROM read_json('{outside}')",
    "FROM read_duckdb('{folder}/store.duckdb')",
    "FROM sniff_csv('{outside}')",
    "FROM glob('{folder}/*')",
    "FROM parquet_metadata('{shard}')",
    "FROM duckdb_secrets()",
    "FROM which_secret('s3://x', 's3')",
]

FILES = [
    "FROM '{outside}'",
    "FROM '/etc/passwd'",
    "FROM '{folder}/store.duckdb'",
    "FROM '{folder}/store/../outside.csv'",
    "FROM 'outside.csv'",
    "FROM 'https://example.com/x.parquet'",
    "FROM 's3://bucket/x.parquet'",
]


def fill(store, query: str) -> str:
    shard = next(store.place.folder.glob("acts-*.parquet"))
    return query.format(
        out=store.path.parent / "out",
        folder=store.path.parent,
        shard=shard,
        outside=store.path.parent / "outside.csv",
    )


@pytest.mark.parametrize("query", WRITES)
def test_a_statement_that_is_not_one_query_is_refused(store, query):
    before = listing(store.path.parent)
    with pytest.raises(astore.QueryError):
        store.sql(fill(store, query))
    assert listing(store.path.parent) == before


@pytest.mark.parametrize("query", FUNCTIONS)
def test_a_table_function_that_could_do_more_than_read_is_refused(store, query):
    before = listing(store.path.parent)
    with pytest.raises(astore.QueryError, match="not allowed here"):
        store.sql(fill(store, query))
    assert listing(store.path.parent) == before


@pytest.mark.parametrize("query", FILES)
def test_a_file_outside_the_store_is_not_read(store, query, monkeypatch):
    monkeypatch.chdir(store.path.parent)
    with pytest.raises(astore.QueryError):
        store.sql(fill(store, query)).fetchall()


def test_duckdb_itself_refuses_what_the_parse_tree_check_refuses_first(store):
    con = store._con.cursor()
    for query in (
        "COPY (SELECT 1) TO '{out}'",
        "COPY (SELECT 1) TO '{folder}/store/new.parquet'",
        "FROM read_text('/etc/passwd')",
        "FROM glob('/*')",
        "ATTACH '{out}' AS y",
        "INSTALL httpfs",
        "SET enable_external_access = true",
        "SET threads = 1",
        "EXPORT DATABASE '{out}'",
    ):
        with pytest.raises(duckdb.Error):
            con.execute(fill(store, query))
    con.execute("CREATE TEMP TABLE harmless AS SELECT 1")
    assert not (store.path.parent / "out").exists()


def test_the_environment_and_python_variables_are_not_visible(store):
    os.environ["LMMONO_SECRET"] = "x"
    secret_frame = duckdb.sql("SELECT 1 AS a").arrow()  # noqa: F841
    for query in ("SELECT getenv('LMMONO_SECRET')", "FROM secret_frame"):
        with pytest.raises(astore.QueryError):
            store.sql(query)


@pytest.mark.parametrize(
    "query",
    [
        "FROM acts LIMIT 1",
        "SELECT count(*) FROM activations",
        "WITH x AS (SELECT 1 AS a) FROM x",
        "VALUES (1)",
        "DESCRIBE activations",
        "SUMMARIZE unit_stats",
        "SHOW TABLES",
        "EXPLAIN SELECT 1",
        "EXPLAIN ANALYZE FROM acts",
        "PIVOT hooks ON kind IN ('rows', 'vectors') USING count(*)",
        "FROM pragma_table_info('hooks')",
        "FROM duckdb_databases()",
        "SELECT unnest([1, 2])",
        "FROM range(3)",
        "SELECT list_transform([1, 2], lambda x: x + 1)",
        "SELECT hook, unit, max(act) OVER (PARTITION BY unit) FROM acts",
        "SELECT 1 -- a comment; with a semicolon",
    ],
)
def test_queries_that_only_read_run(store, query):
    assert store.sql(query).fetchall()


@pytest.mark.parametrize(
    "text", [HOSTILE, "'; DROP VIEW acts; --", "$unit", "' OR true --", "\\'", "é\n\t%s"]
)
def test_parameters_are_values_and_never_sql(store, text):
    found = store.sql("SELECT $text AS text, count(*) AS n FROM acts WHERE hook = $text", text=text)
    n = store.sql("SELECT count(*) FROM acts").fetchall()[0][0]
    echoed, matches = found.fetchall()[0]
    assert echoed == text
    assert 0 <= matches < n


def test_a_hook_with_a_hostile_name_is_stored_and_found(store):
    assert store.unit(HOSTILE, 1).hook == HOSTILE
    n = store.sql("SELECT count(*) FROM acts WHERE hook = $hook", hook=HOSTILE).fetchall()[0][0]
    assert n > 0
    names = {name for (name,) in store.sql("SELECT DISTINCT hook FROM acts").fetchall()}
    assert names == {HOOK, HOSTILE}


def test_a_catalogue_cannot_point_outside_its_folder(tmp_path):
    small_store(tmp_path / "a")
    with duckdb.connect(tmp_path / "a" / "store.duckdb") as con:
        con.execute("UPDATE shards SET file = '../../b.parquet' WHERE kind = 'vectors'")
    with pytest.raises(astore.NotAStoreError, match="no name of a shard"):
        astore.open(tmp_path / "a")


def test_a_view_planted_in_a_catalogue_is_not_run(tmp_path):
    small_store(tmp_path / "a")
    with duckdb.connect(tmp_path / "a" / "store.duckdb") as con:
        con.execute("CREATE OR REPLACE VIEW acts AS FROM read_text('/etc/passwd')")
    with astore.open(tmp_path / "a") as store:
        assert store.sql("FROM acts").columns == ["hook", "unit", "seq_id", "pos", "act"]


def test_trusted_sql_may_do_anything(tmp_path):
    small = small_store(tmp_path / "a")
    with astore.open(small.path, trusted=True) as store:
        store.sql(f"COPY (FROM hooks) TO '{tmp_path}/hooks.csv'")
        assert store.sql(f"FROM '{tmp_path}/hooks.csv'").fetchall()
        with pytest.raises(astore.QueryError):
            store.sql("DELETE FROM meta")
