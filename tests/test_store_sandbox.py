"""SQL of a caller who is not trusted can read the store, and do nothing else."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import duckdb
import pytest
from small_store import HOOK, HOSTILE, small_store

import activation_store as astore
from activation_store.catalog import catalogue, door


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
    "FROM histogram_values('me' || 'ta', key)",
    "FROM histogram(concat('me', 'ta'), key)",
    "FROM pragma_table_info((SELECT 'meta'))",
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
    for _ in range(2):  # what passed once is not looked at again; what did not is
        with pytest.raises(astore.QueryError, match="not allowed here"):
            store.sql(fill(store, query))
    assert listing(store.path.parent) == before


def test_a_query_too_deep_for_a_look_at_its_tree_is_refused(store):
    assert store.sql("SELECT " + "+".join(["1"] * 200)).fetchall() == [(200,)]
    for query in ("+".join(["1"] * 900), "abs(" * 900 + "1" + ")" * 900):
        with pytest.raises(astore.QueryError, match="nests some hundred operators"):
            store.sql(f"SELECT {query}")


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


def test_the_tree_of_a_query_is_looked_at_once(store, monkeypatch):
    looked: list[str] = []
    monkeypatch.setattr(door, "_check_node", lambda node: looked.append(node.get("type", "")))
    assert store.sql("SELECT 11 AS once").fetchall() == [(11,)] and looked
    n_nodes = len(looked)
    assert store.sql("SELECT 11 AS once").fetchall() == [(11,)]
    assert len(looked) == n_nodes
    assert store.sql("SELECT 12 AS once").fetchall() == [(12,)]
    assert len(looked) > n_nodes


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


OWN_VIEW = "CREATE OR REPLACE VIEW acts AS FROM read_text('/etc/passwd')"
PROFILE = "SELECT count(*) FROM enable_profiling(save_location = '{loot}', format = 'json')"
HOSTILE_CATALOGUES = {
    "a view in place of meta": "ALTER TABLE meta RENAME TO kept;"
    f" CREATE VIEW meta AS SELECT k.* FROM kept k, ({PROFILE}) t",
    "a view in place of all_scores": "DROP TABLE all_scores CASCADE;"
    f" CREATE VIEW all_scores AS {PROFILE}",
    "a view in place of shards": "ALTER TABLE shards RENAME TO kept;"
    " CREATE VIEW shards AS SELECT * FROM kept "
    " WHERE (SELECT sum(range) FROM range(10000000000000)) > 0",
    "a view of its own": "CREATE VIEW mine AS FROM read_text('/etc/passwd')",
    "a macro of its own": "CREATE MACRO count(x) AS 7",
    "a table macro of its own": f"CREATE MACRO mine() AS TABLE {PROFILE}",
    "a column that is computed": "CREATE TABLE m (key VARCHAR, v VARCHAR, value VARCHAR AS"
    " (CASE WHEN current_setting('lock_configuration')::BOOLEAN THEN error('it ran') ELSE v END));"
    " INSERT INTO m SELECT key, value FROM meta; DROP TABLE meta; ALTER TABLE m RENAME TO meta",
    "a default": "ALTER TABLE vocabulary ALTER token SET DEFAULT (error('it ran'))",
    "a check": "CREATE TABLE v (token_id INTEGER, token VARCHAR, CHECK (length(token) > 0));"
    " DROP TABLE vocabulary; ALTER TABLE v RENAME TO vocabulary",
}


@pytest.mark.parametrize("statements", HOSTILE_CATALOGUES.values(), ids=HOSTILE_CATALOGUES)
@pytest.mark.parametrize("trusted", [False, True])
def test_a_store_of_a_stranger_runs_nothing_whatever_is_done_with_it(tmp_path, statements, trusted):
    small = small_store(tmp_path / "a")
    loot = tmp_path / "loot.json"
    with duckdb.connect(small.path / "store.duckdb") as con:
        con.execute(statements.format(loot=loot))
    loot.unlink(missing_ok=True)
    with astore.open(small_store(tmp_path / "b").path) as other:
        for call in (
            lambda: astore.open(small.path, trusted=trusted),
            lambda: astore.open(small.path, "a", trusted=trusted),
            lambda: astore.open(small.path, "w", overwrite=True),
            lambda: astore.verify(small.path, repair=True),
            lambda: astore.compact(small.path),
            lambda: other.attach(small.path, "guest"),
        ):
            told = r"a\/store.duckdb: (holds a view or macro|.* is computed by an expression)"
            with pytest.raises(astore.NotAStoreError, match=told):
                call()
        assert other.sql("SELECT count(*) FROM meta").fetchall()[0][0] > 0
    assert not loot.exists()


def test_the_views_of_the_file_are_never_run(tmp_path):
    small = small_store(tmp_path / "a")
    with duckdb.connect(small.path / "store.duckdb") as con:
        con.execute(OWN_VIEW)
    with astore.open(small.path, "a") as store:
        for query in ('FROM "Catalogue of".acts', 'SUMMARIZE "catalogue of".main.meta'):
            with pytest.raises(astore.QueryError, match="is the file of the catalogue"):
                store.sql(query)
        assert store.sql("FROM acts").columns == ["hook", "unit", "seq_id", "pos", "act"]
        assert store.append("all_scores", [{"metric": "m", "metric_version": 1}]) == 1
    assert astore.verify(small.path).ok


def test_every_connection_of_the_package_is_shut_before_its_first_query(tmp_path):
    small = small_store(tmp_path / "a")
    place = catalogue.place(small.path)
    with (
        pytest.raises(RuntimeError, match="give the draft up"),
        catalogue.opened(place) as con,
        catalogue.commit(place) as draft,
    ):
        for inside in (con, draft):
            for query in ("FROM read_text('/etc/passwd')", "SET threads = 2", "LOAD httpfs"):
                with pytest.raises(duckdb.Error):
                    inside.execute(query)
        raise RuntimeError("give the draft up")


ENDLESS = {
    "count": "SELECT count(*) FROM range(1000000000000)",
    "join": "SELECT count(*) FROM acts a, acts b, acts c, acts d, acts e",
    "recursion": "WITH RECURSIVE t AS (SELECT 1 AS a UNION ALL SELECT a + 1 FROM t)"
    " SELECT max(a) FROM t",
}


@pytest.mark.parametrize("query", ENDLESS.values(), ids=ENDLESS)
def test_a_query_ends_at_its_limit_of_time(store, query):
    limits = astore.QueryLimits(seconds=0.3)
    with astore.open(store.path, limits=limits) as limited:
        began = time.monotonic()
        with pytest.raises(astore.QueryError, match="took longer than 0.3 s"):
            limited.sql(query).fetchall()
        with pytest.raises(astore.QueryError, match="took longer than 0.3 s"):
            limited.sql(f"SELECT * FROM ({query}) WHERE $x = 1", x=1)
        assert time.monotonic() - began < 30
        assert limited.sql("SELECT 1").fetchall() == [(1,)]


@pytest.fixture
def default_sigint():
    """Python's own handler, also where a background job has inherited that SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_sigint")
@pytest.mark.parametrize("params", [{}, {"x": 1}])
def test_ctrl_c_stops_a_query_and_the_store_stays_usable(store, params):
    query = f"{ENDLESS['count']} WHERE {'$x' if params else '1'} = 1"
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        store.sql(query, **params).fetchall()
    assert time.monotonic() - began < 30
    assert store.sql("SELECT 1").fetchall() == [(1,)]


QUERYING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits none
import activation_store as astore
from lmmono.cli import main
astore.open(sys.argv[1]).sql("SELECT $n", n=1).df()  # what a query imports is imported
sys.argv = ["lmmono", "sql", sys.argv[1], sys.argv[2]]
print("begin", flush=True)
main()
"""
WRITING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import activation_store as astore
with astore.open(sys.argv[1], "a") as store:
    print("begin", flush=True)
    for n in range(10**9):
        row = {"metric": "m", "metric_version": 1, "unit": 0, "value": float(n)}
        store.append("all_scores", [row | {"unit": unit} for unit in range(n, n + 20_000)])
"""


@pytest.mark.parametrize(("program", "code"), [(QUERYING, 130), (WRITING, -signal.SIGINT)])
def test_ctrl_c_ends_a_process_that_is_inside_duckdb(tmp_path, program, code):
    """Python itself dies of SIGINT where nobody handles the KeyboardInterrupt: code -2."""
    small = small_store(tmp_path / "run")
    command = [sys.executable, "-c", program, str(small.path), ENDLESS["count"]]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.readline()
        before, deadline = busy_seconds(child.pid), time.monotonic() + 60
        while busy_seconds(child.pid) < before + 1.5 and time.monotonic() < deadline:
            time.sleep(0.05)  # opening a store takes less; then it is DuckDB that works
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == code, err
    assert "RuntimeError: Query interrupted" not in err.split("The above exception")[-1]
    if code == 130:
        assert "stopped; what was finished is kept" in err and "Traceback" not in err
    assert astore.verify(small.path).ok
    with astore.open(small.path) as store:
        n_acts = sum(int((acts > 0).sum()) for acts in small.acts.values())
        assert len(store.sql("FROM acts").fetchall()) == n_acts


def busy_seconds(pid: int) -> float:
    """Return the processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_rows_memory_and_spill_have_limits(store):
    limits = astore.QueryLimits(rows=3, memory_bytes=300_000_000, spill_bytes=1_000_000)
    with astore.open(store.path, limits=limits) as limited:
        assert len(limited.sql("FROM acts LIMIT 3").fetchall()) == 3
        with pytest.raises(astore.QueryError, match="more than 3 rows"):
            limited.sql("FROM acts").df()
        shown = dict(limited.sql("SELECT name, value FROM duckdb_settings() LIMIT 0").fetchall())
        assert shown == {}
        query = "SELECT value FROM duckdb_settings() WHERE name = $name"
        assert limited.sql(query, name="memory_limit").fetchall() == [("286.1 MiB",)]
        (spill,) = limited.sql(query, name="max_temp_directory_size").fetchall()[0]
        assert spill == "976.5 KiB"
    with pytest.raises(astore.StoreError, match="seconds: want a number > 0, got -1.0"):
        astore.QueryLimits(seconds=-1.0)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT list_sum(range(3000000000))",
        "SELECT repeat('a', 10000000000000000000)",  # more than 63 bits, and less than 65
        "SELECT unnest(generate_series(1, 3e9::BIGINT))",
        "SELECT length(main.repeat('a', 3_000_000_000))",
        "FROM acts WHERE length(lpad('a', 200000000000000000000, 'b')) > 1",
        "FROM unnest(range(3000000000))",
        "FROM range(10) t(i), unnest(list_resize([i], 3000000000))",
    ],
)
def test_one_value_that_no_limit_would_end_is_refused(store, query):
    with pytest.raises(astore.QueryError, match="makes one value of that size"):
        store.sql(query)
    assert store.sql("SELECT count(*) FROM range(3000000)").fetchall() == [(3_000_000,)]
    assert store.sql("SELECT len(range(1000)), repeat('a', 3)").fetchall() == [(1000, "aaa")]


def test_what_fails_while_it_runs_is_an_error_of_the_store(store):
    for query in ("SELECT hook::INTEGER FROM hooks", "SELECT ln(-1)", "SELECT error('no')"):
        with pytest.raises(astore.QueryError):
            store.sql(query).fetchall()


@pytest.mark.parametrize("query", ["SELECT sleep_ms(1)", "SELECT write_log('x')"])
def test_functions_that_wait_or_write_are_refused(store, query):
    with pytest.raises(astore.QueryError, match="is not allowed here"):
        store.sql(query)


def test_trusted_sql_may_do_anything(tmp_path):
    small = small_store(tmp_path / "a")
    with astore.open(small.path, trusted=True) as store:
        store.sql(f"COPY (FROM hooks) TO '{tmp_path}/hooks.csv'")
        assert store.sql(f"FROM '{tmp_path}/hooks.csv'").fetchall()
        with pytest.raises(astore.QueryError):
            store.sql("DELETE FROM meta")
