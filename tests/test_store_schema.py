"""The schema as a contract: comments, keys, versions, and rows checked before they go in."""

import re
from datetime import datetime

import duckdb
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_store import small_store

import activation_store as astore
from activation_store.catalog import tables
from activation_store.catalog.tables import SCHEMA_VERSION

PROMISED = {
    *("runs", "documents", "tokens", "vocabulary", "hooks", "acts", "unit_stats", "exemplars"),
    *(
        "vector_shards",
        "dictionaries",
        "explanations",
        "scores",
        "promotes",
        "neighbours",
        "robustness",
        "all_scores",
        "hook_scores",
        "unit_history",
        "unit_lives",
        "unit_steps",
    ),
    *("activations", "vectors", "shards", "meta", "writer_state", "token_ids"),
}
MEANS = (
    "SELECT metric, avg(value) FROM scores GROUP BY metric ORDER BY metric",
    "SELECT metric, avg(value) FROM hook_scores GROUP BY metric ORDER BY metric",
    "SELECT count(*) FROM all_scores WHERE metric IN ('m', 'fvu')",
)
MACROS = {
    *("exemplars", "excerpt", "unit", "coactivation", "token_profile", "fires", "fires_both"),
    *("fires_only", "follows", "like_this", "units_on", "twins", "birth", "death"),
}


@pytest.fixture
def small(tmp_path):
    return small_store(tmp_path / "run")


def test_every_table_and_view_that_is_promised_is_there(small):
    with astore.open(small.path) as store:
        shown = {name for (name,) in store.sql("SHOW TABLES").fetchall()}
        macros = store.sql(
            "SELECT function_name FROM duckdb_functions() WHERE function_type = 'table_macro'"
        ).fetchall()
    assert shown == PROMISED
    assert {name for (name,) in macros} >= MACROS


def test_every_table_and_column_says_what_it_holds(small):
    with duckdb.connect(small.path / "store.duckdb", read_only=True) as con:
        bare = con.execute(
            "SELECT table_name, NULL FROM duckdb_tables() WHERE comment IS NULL"
            " UNION ALL SELECT c.table_name, c.column_name FROM duckdb_columns() c"
            " JOIN duckdb_tables() t USING (table_name) WHERE c.comment IS NULL"
        ).fetchall()
        counts = con.execute(
            "SELECT column_name, comment FROM duckdb_columns() WHERE data_type IN"
            " ('INTEGER', 'BIGINT', 'DOUBLE') AND comment IS NOT NULL"
        ).fetchall()
    assert bare == []
    assert len(counts) > 80
    # names that are counts or shares state their range
    for name, comment in counts:
        if re.match(r"n_|d_|d$|density|.*_fraction$", name):
            assert re.search(r">= [01]|0 to|\(0, 1\]", comment), (name, comment)


def test_a_mean_of_scores_takes_in_neither_controls_nor_means(small):
    rows = [
        {"hook": "h", "unit": 0, "value": 0.2},
        {"hook": "h", "unit": 1, "value": 0.4},
        {"hook": "h", "unit": 0, "value": 0.9, "control": "shuffled"},
        {"hook": "h", "unit": None, "value": 0.3},
        {"hook": "h", "unit": None, "value": 0.8, "control": "shuffled"},
        {"unit": None, "value": 0.6, "dictionary": "pca", "metric": "fvu"},
    ]
    with astore.open(small.path, "a") as store:
        store.append("all_scores", [SCORE | each for each in rows])
        with pytest.raises(astore.QueryError, match="rows of all_scores"):
            store.sql("FROM scores WHERE control IS NULL")
        with pytest.raises(astore.ContentError, match="a view of all_scores"):
            store.append("scores", rows)
        ours = [store.sql(query).fetchall() for query in MEANS]
    with duckdb.connect(small.path / "store.duckdb", read_only=True) as con:
        plain = [con.execute(query).fetchall() for query in MEANS]
    assert ours == plain
    assert ours == [[("fvu", 0.6), ("m", pytest.approx(0.3))], [("m", 0.3)], [(6,)]]


def test_every_table_has_a_key_made_of_its_columns():
    expected = tables.expected_tables()
    assert set(tables.KEYS) == set(expected)
    for table, key in tables.KEYS.items():
        assert set(key) <= set(expected[table])


@pytest.mark.parametrize("mode", ["r", "a"])
@pytest.mark.parametrize(
    ("version", "way_out"),
    [(SCHEMA_VERSION + 1, "pip install -U lmmono"), (SCHEMA_VERSION - 1, "capture it again")],
)
def test_a_store_of_another_schema_is_refused_with_both_versions_and_a_way_out(
    small, mode, version, way_out
):
    with duckdb.connect(small.path / "store.duckdb") as con:
        con.execute("UPDATE meta SET value = $1 WHERE key = 'schema_version'", [str(version)])
    before = (small.path / "store.duckdb").read_bytes()
    words = rf"schema version {version},.*reads {SCHEMA_VERSION};.*{way_out}"
    with pytest.raises(astore.SchemaError, match=words):
        astore.open(small.path, mode)
    with pytest.raises(astore.SchemaError, match=words):
        astore.verify(small.path, repair=True)
    assert (small.path / "store.duckdb").read_bytes() == before
    astore.open(small.path, "w", overwrite=True).close()  # but it may be given up


@pytest.mark.parametrize("version", ["", "two", "²", "9" * 5000])
def test_a_version_that_is_no_number_is_no_store(small, version):
    with duckdb.connect(small.path / "store.duckdb") as con:
        con.execute("UPDATE meta SET value = $1 WHERE key = 'schema_version'", [version])
    with pytest.raises(astore.NotAStoreError, match="schema_version"):
        astore.open(small.path)


def test_the_version_stands_in_one_place(small):
    assert astore.open(small.path).info().schema_version == SCHEMA_VERSION
    assert f"schema version {SCHEMA_VERSION}." in tables.schema_sql().splitlines()[0]


SCORE = {"metric": "m", "metric_version": 1, "hook": "h", "unit": 3, "value": 0.5}


def test_rows_come_as_dicts_arrow_polars_and_duckdb_relations(small):
    with astore.open(small.path, "a") as store:
        store.append("all_scores", [SCORE])
        store.append("all_scores", pa.Table.from_pylist([SCORE | {"unit": 4}]))
        store.append("all_scores", pl.DataFrame([SCORE | {"unit": 5}]))
        relation = duckdb.sql("SELECT 'm' AS metric, 1 AS metric_version, 'h' AS hook, 6 AS unit")
        store.append("all_scores", relation)
        found = store.sql("SELECT unit, value FROM all_scores ORDER BY unit").fetchall()
    assert found == [(3, 0.5), (4, 0.5), (5, 0.5), (6, None)]


def test_the_same_key_replaces_and_nulls_are_equal_in_keys(small):
    with astore.open(small.path, "a") as store:
        for value in (0.1, 0.2):
            row = SCORE | {"value": value}
            without = {"metric": "model", "metric_version": 1, "value": value}
            store.append("all_scores", [row, without])
        found = store.sql("SELECT metric, value FROM all_scores ORDER BY metric").fetchall()
        store.append("all_scores", [SCORE | {"seed": 1, "value": 0.3}])
        assert store.sql("SELECT count(*) FROM all_scores").fetchall()[0] == (3,)
    assert found == [("m", 0.2), ("model", 0.2)]
    assert astore.verify(small.path).ok


@pytest.mark.parametrize(
    ("table", "rows", "told"),
    [
        ("all_scores", [SCORE | {"valeu": 1}], "no column 'valeu'; did you mean value?"),
        ("all_scores", [SCORE | {"unit": "three"}], "all_scores.unit: want INTEGER"),
        ("all_scores", [SCORE | {"unit": 2**40}], "all_scores.unit: want INTEGER"),
        ("all_scores", [SCORE | {"metric": None}], "all_scores.metric: 1 rows have no value"),
        ("all_scores", [{"value": 1.0}], "all_scores.metric: 1 rows have no value"),
        ("all_scores", [SCORE, SCORE], "2 of the rows have the same key: metric='m'"),
        ("runs", [{"run": "a", "recipe": "{not json"}], "Malformed JSON"),
        ("shards", [], "takes no rows from here; these do: all_scores, dictionaries"),
        ("unit_stats", [], "takes no rows from here"),
        ("nothing", [], "takes no rows from here"),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_nothing_is_changed(small, table, rows, told):
    before = (small.path / "store.duckdb").read_bytes()
    with (
        astore.open(small.path, "a") as store,
        pytest.raises(astore.ContentError, match=re.escape(told)),
    ):
        store.append(table, rows)
    assert (small.path / "store.duckdb").read_bytes() == before


def test_json_and_the_time_of_writing_are_filled_in(small):
    with astore.open(small.path, "a") as store:
        store.add_run({"run": "twin", "seed": 1, "recipe": {"a": [1, 2]}, "versions": None})
        run = store.sql("SELECT recipe->'a'->>0, versions, created_at FROM runs").fetchall()[0]
    assert run[:2] == ("1", None)
    assert isinstance(run[2], datetime)


def test_explanations_and_scores_join_activations(small):
    with astore.open(small.path, "a") as store:
        hook = store.sql("SELECT min(hook) FROM acts").fetchall()[0][0]
        store.append(
            "explanations", [{"hook": hook, "unit": 1, "explainer": "token_lookup", "text": "t"}]
        )
        store.append("all_scores", [SCORE | {"hook": hook, "unit": 1, "explainer": "token_lookup"}])
        found = store.sql(
            "SELECT e.text, s.value, count(*) FROM activations a"
            " JOIN explanations e USING (hook, unit) JOIN scores s USING (hook, unit, explainer)"
            " GROUP BY ALL"
        ).fetchall()
    assert found == [("t", 0.5, int((small.acts[hook][..., 1] > 0).sum()))]


texts = st.text(max_size=20)
maybe = st.one_of(st.none(), st.floats(allow_nan=False))


@settings(max_examples=25, suppress_health_check=list(HealthCheck), deadline=None)
@given(
    rows=st.lists(
        st.tuples(texts, st.one_of(st.none(), st.integers(-(2**31), 2**31 - 1)), maybe),
        max_size=8,
        unique_by=lambda row: row[:2],
    ),
    again=st.integers(1, 2),
)
def test_any_rows_come_back_as_they_went_in_however_often(rows, again):
    with duckdb.connect(":memory:") as con:
        con.execute(tables.schema_sql())
        given_rows = [
            {"metric": metric, "metric_version": 1, "unit": unit, "value": value}
            for metric, unit, value in rows
        ]
        for _ in range(again):
            assert tables.replace(con, "all_scores", given_rows) == len(rows)
        found = con.execute("SELECT metric, unit, value FROM all_scores").fetchall()
    assert sorted(found, key=repr) == sorted(rows, key=repr)
