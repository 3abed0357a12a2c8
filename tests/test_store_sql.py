"""What views, macros and Python calls answer, against the arrays that the store was made from."""

import re
from collections import Counter

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_store import HOOK, HOSTILE, N_CTX, N_SEQ, WORDS, D, small_store, split

import activation_store as astore
from activation_store.catalog import catalogue, door
from activation_store.unit import marked


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("sql"))


@pytest.fixture(scope="module")
def store(small):
    with astore.open(small.path) as opened:
        yield opened


def test_activations_are_the_stored_acts_with_their_tokens(small, store):
    rows = store.sql("FROM activations WHERE hook = $h ORDER BY unit, seq_id, pos", h=HOOK)
    acts = small.acts[HOOK].transpose(2, 0, 1)
    expected = [
        (
            *(HOOK, int(u), int(s), int(p)),
            int(small.doc_ids[s, p]),
            split(int(small.doc_ids[s, p])),
            int(small.token_ids[s, p]),
            WORDS[small.token_ids[s, p]],
            float(acts[u, s, p]),
        )
        for u, s, p in np.argwhere(acts > 0)
    ]
    assert rows.fetchall() == expected


def test_a_store_that_lost_its_tokens_still_shows_its_acts(tmp_path):
    small = small_store(tmp_path / "a")
    for shard in (small.path / "store").glob("tokens-*"):
        shard.unlink()
    assert astore.verify(small.path, repair=True).ok
    with astore.open(small.path) as store:
        found = store.sql("SELECT count(*), count(token) FROM activations").fetchall()[0]
    assert found == (sum(int((acts > 0).sum()) for acts in small.acts.values()), 0)


def test_tokens_and_vectors_come_back_as_written(small, store):
    found = store.sql("FROM tokens ORDER BY seq_id, pos").fetchall()
    assert [row[4] for row in found] == small.token_ids.reshape(-1).tolist()
    assert [row[5] for row in found] == [WORDS[t] for t in small.token_ids.reshape(-1)]
    vectors = store.sql("SELECT vector FROM vectors ORDER BY seq_id, pos").fetchall()
    expected = small.vectors.astype(np.float16).reshape(-1, 4)
    assert np.array_equal(np.array([v for (v,) in vectors], np.float16), expected)
    assert store.sql("SELECT hook, n_rows FROM vector_shards").fetchall() == [
        ("resid", N_SEQ * N_CTX)
    ]


@pytest.mark.parametrize(("seq", "pos"), [(0, 0), (3, 5), (7, 15), (11, 15)])
def test_all_activations_of_one_token(small, store, seq, pos):
    found = store.sql(
        "SELECT hook, unit, act FROM acts WHERE seq_id = $s AND pos = $p ORDER BY hook, unit",
        s=seq,
        p=pos,
    ).fetchall()
    assert found == [
        (hook, unit, float(small.acts[hook][seq, pos, unit]))
        for hook in sorted(small.acts)
        for unit in range(D)
        if small.acts[hook][seq, pos, unit] > 0
    ]


def window(small, seq: int, pos: int, before: int, after: int) -> tuple[str, int, list[str]]:
    doc = small.doc_ids[seq, pos]
    places = [
        p
        for p in range(pos - before, pos + after + 1)
        if 0 <= p < N_CTX and small.doc_ids[seq, p] == doc
    ]
    tokens = [WORDS[small.token_ids[seq, p]] for p in places]
    text = "".join(marked(t) if p == pos else t for p, t in zip(places, tokens, strict=True))
    return text, places[0], tokens


@pytest.mark.parametrize(("seq", "pos"), [(0, 0), (3, 5), (7, 15), (11, 2)])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 1), (100, 100)])
def test_an_excerpt_stays_in_its_document_and_marks_its_peak(small, store, seq, pos, before, after):
    (found,) = store.sql("FROM excerpt($s, $p, $b, $a)", s=seq, p=pos, b=before, a=after).fetchall()
    text, first, tokens = window(small, seq, pos, before, after)
    assert found == (seq, pos, small.doc_ids[seq, pos], first, text, tokens)


@pytest.mark.parametrize("hook", [HOOK, HOSTILE])
@pytest.mark.parametrize("k", [1, 4, 100])
def test_exemplars_are_ranked_and_carry_their_text(small, store, hook, k):
    found = store.sql("FROM exemplars($h, 2, $k)", h=hook, k=k).fetchall()
    acts = small.acts[hook][..., 2].reshape(-1)
    assert [row[0] for row in found] == list(range(1, min(k, 10) + 1))
    assert [row[1] for row in found] == sorted(acts.tolist(), reverse=True)[:k][:10]
    for _, act, _, doc, seq, pos, token, text in found:
        assert small.acts[hook][seq, pos, 2] == act
        assert small.doc_ids[seq, pos] == doc
        assert token == WORDS[small.token_ids[seq, pos]]
        assert text == window(small, seq, pos, 16, 8)[0]


def test_python_exemplars_equal_those_of_sql_and_carry_the_act_of_every_token(small, store):
    rows = store.sql("FROM exemplars($h, 3, 5)", h=HOOK).fetchall()
    exemplars = store.exemplars(HOOK, 3, 5)
    assert [(e.rank, e.act, e.bin, e.doc_id, e.seq_id, e.pos) for e in exemplars] == [
        row[:6] for row in rows
    ]
    assert [e.text for e in exemplars] == [row[7] for row in rows]
    for e in exemplars:
        span = slice(e.first_pos, e.first_pos + len(e.tokens))
        assert e.acts == tuple(small.acts[HOOK][e.seq_id, span, 3].tolist())
    assert store.exemplars(HOOK, 3, 5, kind="random") == []


def test_tokens_without_a_string_are_shown_by_their_ids(tmp_path):
    small = small_store(tmp_path / "a")
    with catalogue.commit(catalogue.place(small.path)) as con:
        con.execute("DELETE FROM vocabulary WHERE token_id <> 1")
    with astore.open(small.path) as store:
        (first,) = store.exemplars(HOOK, 2, 1, before=2, after=2)
        ids = small.token_ids[first.seq_id, first.first_pos : first.first_pos + len(first.tokens)]
        assert first.tokens == tuple(" cat" if i == 1 else f"[{i}]" for i in ids)
        rows = store.sql("FROM exemplars($h, 2, 1, before := 2, after := 2)", h=HOOK).fetchall()
        assert rows[0][7] == first.text
        near = store.sql("FROM excerpt($s, $p, 2, 2)", s=first.seq_id, p=first.pos).fetchall()
        assert near[0][4:] == (first.text, list(first.tokens))


def test_parameters_may_have_any_name(store):
    assert store.sql("SELECT $query + $self", **{"query": 1, "self": 2}).fetchall() == [(3,)]


def test_a_parameter_is_the_same_value_written_out_as_bound(store):
    values = {
        "a": "it's $b -- é",
        "b": -3,
        "c": 2**40,
        "d": 0.25,
        "e": True,
        "f": [1, 2],
        "g": ["'"],
    }
    query = "SELECT $a AS a, - $b AS b, $c AS c, $d AS d, $e AS e, $f AS f, $g AS g, '$a' AS own"
    assert door.with_literals(query, values) is not None
    rows = store.sql(query, **values).fetchall()
    with astore.open(store.path) as again:
        con = again._cursor()
        assert con.execute(query, values).fetchall() == rows
        assert (
            con.execute(query, values)
            .to_arrow_table()
            .equals(store.sql(query, **values).to_arrow_table())
        )
    assert door.with_literals("SELECT $a", {"a": "x", "b": 1}) is None, "DuckDB says what is wrong"
    assert door.with_literals("SELECT $a$ $b $a$, $b", {"b": 1}) is None


def test_rows_that_are_here_are_what_duckdb_gives(store):
    query = """
        SELECT i, i::FLOAT AS x, nullif(i, 2) AS gap, 's' || i AS s, [i] AS l, i::HUGEINT AS h
        FROM range(4) t(i) WHERE i < $n
    """
    here, own = store.sql(query, n=4), store._cursor().execute(query, {"n": 4})
    assert here.fetchall() == own.fetchall()
    some = store.sql(f"SELECT i, x, gap, s FROM ({query})", n=4)
    assert some._table is not None
    mine, theirs = some.fetchnumpy(), store.sql(f"SELECT i, x, gap, s FROM ({query})", n=4)
    for name, values in theirs._relation.fetchnumpy().items():
        assert mine[name].dtype == values.dtype
        assert np.ma.allequal(mine[name], values)
        assert np.ma.isMaskedArray(mine[name]) == np.ma.isMaskedArray(values)


def test_a_unit_has_its_statistics_and_shows_itself(small, store):
    unit = store.unit(HOOK, 3)
    acts = small.acts[HOOK][..., 3]
    assert unit.density == (acts > 0).mean()
    assert unit.max_act == acts.max()
    assert unit.n_active == (acts > 0).sum()
    assert unit.threshold == 0.0
    assert unit.exemplars(2)[0].act == acts.max()
    lines = repr(unit).splitlines()
    assert lines[0].startswith(f"{HOOK} unit 3: density ")
    assert len(lines) == 9
    assert "«" in lines[1]
    with pytest.raises(AttributeError, match="density"):
        _ = unit.nothing


def test_a_notebook_shows_text_as_text(store):
    html = store.unit(HOSTILE, 1)._repr_html_()
    assert "it&#39;s &#34;x&#34;" in html and "it's" not in html
    assert "&lt;b&gt;" in "".join(store.unit(HOSTILE, unit)._repr_html_() for unit in range(D))


def test_an_unknown_unit_names_the_hooks_there_are(store):
    for hook, unit in (("blocks.9", 0), (HOOK, D), (HOOK, -1)):
        with pytest.raises(astore.ContentError, match=r"hook_post \(units 0 to 5\)"):
            store.unit(hook, unit)


@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("b", [1, 4])
def test_coactivation_counts_tokens_where_both_are_stored(small, store, a, b):
    x, y = (small.acts[HOOK][..., u].reshape(-1).astype(np.float64) for u in (a, b))
    n, n_a, n_b, both, expected, lift, jaccard, cosine = store.sql(
        "FROM coactivation($h, $a, $b)", h=HOOK, a=a, b=b
    ).fetchall()[0]
    assert (n, n_a, n_b) == (x.size, (x > 0).sum(), (y > 0).sum())
    assert both == ((x > 0) & (y > 0)).sum()
    assert expected == pytest.approx(n_a * n_b / n)
    assert lift == pytest.approx(both / expected)
    assert jaccard == pytest.approx(both / ((x > 0) | (y > 0)).sum())
    assert cosine == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)))


def test_a_token_profile_counts_the_tokens_a_unit_is_stored_at(small, store):
    found = store.sql("FROM token_profile($h, 4)", h=HOSTILE).fetchall()
    acts = small.acts[HOSTILE][..., 4].reshape(-1).astype(np.float64)
    tokens = small.token_ids.reshape(-1)
    total = Counter(tokens.tolist())
    expected = {}
    for token in np.unique(tokens[acts > 0]).tolist():
        on = acts[(acts > 0) & (tokens == token)]
        share = on.size / total[token]
        expected[token] = (WORDS[token], on.size, total[token], share, on.mean(), on.max())
    assert {row[0]: row[1:] for row in found} == expected
    means = [row[5] for row in found]
    assert means == sorted(means, reverse=True)


def test_results_come_as_polars_arrow_and_pandas(store):
    query = "SELECT unit, count(*) AS n FROM acts WHERE hook = $h GROUP BY unit ORDER BY unit"
    rows = store.sql(query, h=HOOK).fetchall()
    assert store.sql(query, h=HOOK).pl().rows() == rows
    assert pa.table(store.sql(query, h=HOOK)).num_rows == len(rows)
    assert store.sql(query, h=HOOK).df().shape == (len(rows), 2)


@pytest.mark.parametrize(
    ("query", "params", "told"),
    [
        ("SELEC 1", {}, "syntax error"),
        ("SELECT nothing FROM acts", {}, "nothing"),
        ("FROM nowhere", {}, "nowhere"),
        ("SELECT $a + $b", {"a": 1}, r"Parameters given: \$a"),
        ("SELECT 1", {"a": 1}, r"Parameters given: \$a"),
        ("SELECT CAST($a AS INTEGER)", {"a": "x"}, "convert"),
    ],
)
def test_a_wrong_query_says_what_is_wrong(store, query, params, told):
    with pytest.raises(astore.QueryError, match=f"(?i){told}"):
        store.sql(query, **params).fetchall()


def test_shards_are_plain_parquet_for_polars_and_pyarrow(small, store):
    n = store.sql("SELECT count(*), sum(act) FROM acts").fetchall()[0]
    pattern = small.path / "store" / "acts-*.parquet"
    frame = pl.scan_parquet(pattern).select(pl.len(), pl.col("act").sum()).collect()
    assert frame.row(0) == n
    files = sorted((small.path / "store").glob("acts-*.parquet"))
    assert sum(pq.read_metadata(file).num_rows for file in files) == n[0]


def test_a_filter_on_hook_and_unit_or_on_a_sequence_reaches_the_files(store):
    plan = store.sql(
        "EXPLAIN SELECT act FROM activations WHERE hook = $h AND unit = $u", h=HOOK, u=3
    ).fetchall()[0][1]
    assert re.search("unit ?= ?3", plan)
    assert plan.count("acts-") <= 2  # the shards of one hook; those of the other are dropped
    token = store.sql("EXPLAIN FROM acts WHERE seq_id = $s AND pos = $p", s=3, p=4)
    text = token.fetchall()[0][1]
    assert re.search("seq_id ?= ?3", text)
    assert re.search("pos ?= ?4", text)
