"""Search by activation pattern, against numpy over the arrays that the store was made from."""

import numpy as np
import pytest
from planted_store import planted_store
from small_store import HOOK, HOSTILE, N_CTX, N_SEQ, WORDS, D, small_store, split

import activation_store as astore

A, B = f"{HOOK}:1", f"{HOSTILE}:4"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("patterns"))


@pytest.fixture(scope="module")
def store(small):
    with astore.open(small.path) as opened:
        yield opened


def token(small, seq: int, pos: int) -> tuple:
    doc, token_id = int(small.doc_ids[seq, pos]), int(small.token_ids[seq, pos])
    return seq, pos, doc, split(doc), token_id, WORDS[token_id]


def places(mask: np.ndarray, *keys: np.ndarray) -> list[tuple[int, int]]:
    """Positions of a mask, by falling keys, then in order."""
    found = [(int(s), int(p)) for s, p in np.argwhere(mask)]
    return sorted(found, key=lambda at: (*(-float(key[at]) for key in keys), *at))


def test_fires_gives_every_token_of_a_unit_strongest_first(small, store):
    acts = small.acts[HOOK][..., 1]
    expected = [(*token(small, *at), float(acts[at])) for at in places(acts > 0, acts)]
    assert store.sql("FROM fires($h, 1)", h=HOOK).fetchall() == expected


def test_fires_both_and_only_of_units_of_two_hooks(small, store):
    a, b = small.acts[HOOK][..., 1], small.acts[HOSTILE][..., 4]
    both = places((a > 0) & (b > 0), a.astype(np.float64) * b)
    expected = [(*token(small, *at), float(a[at]), float(b[at])) for at in both]
    assert store.sql("FROM fires_both($a, $b)", a=A, b=B).fetchall() == expected
    only = [(*token(small, *at), float(a[at])) for at in places((a > 0) & (b == 0), a)]
    assert store.sql("FROM fires_only($a, $b)", a=A, b=B).fetchall() == only


@pytest.mark.parametrize("within", [1, 3, 5])
def test_follows_gives_the_next_token_of_b_in_the_document(small, store, within):
    a, b = small.acts[HOOK][..., 1], small.acts[HOSTILE][..., 4]
    expected = {}
    for seq, pos in np.argwhere(a > 0).tolist():
        later = [
            p
            for p in range(pos + 1, min(pos + within, N_CTX - 1) + 1)
            if b[seq, p] > 0 and small.doc_ids[seq, p] == small.doc_ids[seq, pos]
        ]
        if later:
            expected[seq, pos] = (later[0] - pos, later[0], WORDS[small.token_ids[seq, later[0]]])
    rows = store.sql("FROM follows($a, $b, within := $w)", a=A, b=B, w=within).fetchall()
    assert {row[:2]: row[6:9] for row in rows} == expected
    assert all(row[5] == a[row[:2]] and row[9] == b[row[0], row[7]] for row in rows)


@pytest.mark.parametrize("hook", [HOOK, None])
def test_like_this_finds_the_largest_cosines(small, store, hook):
    hooks = [hook] if hook else sorted(small.acts)
    codes = np.concatenate([small.acts[h] for h in hooks], axis=-1).astype(np.float64)
    codes = codes.reshape(N_SEQ * N_CTX, -1)
    at = 3 * N_CTX + 4
    assert codes[at].any()
    lengths = np.linalg.norm(codes, axis=1)
    cosine = codes @ codes[at] / np.where(lengths > 0, lengths, 1) / lengths[at]
    cosine[at] = -1
    rows = store.sql("FROM like_this(3, 4, 5, of_hook := $h)", h=hook).fetchall()
    assert [row[3] for row in rows] == pytest.approx(sorted(cosine, reverse=True)[:5])
    for seq, pos, doc, value, n_shared, text in rows:
        one = codes[seq * N_CTX + pos]
        assert cosine[seq * N_CTX + pos] == pytest.approx(value)
        assert n_shared == ((one > 0) & (codes[at] > 0)).sum()
        assert doc == small.doc_ids[seq, pos]
        assert "«" in text


@pytest.mark.parametrize("text", ["cat", " the cat", "sats.", "nowhere"])
def test_units_on_judges_units_as_detectors_of_a_text(small, store, text):
    spans = []
    for seq in range(N_SEQ):
        for first in range(N_CTX):
            for last in range(first, N_CTX):
                words = [WORDS[t] for t in small.token_ids[seq, first : last + 1]]
                one_document = small.doc_ids[seq, first] == small.doc_ids[seq, last]
                if one_document and words[0].strip() and words[-1].strip():
                    spans += [(seq, first, last)] * ("".join(words).strip() == text.strip())
    expected = {}
    for unit in range(D):
        acts = small.acts[HOOK][..., unit]
        fired = [(acts[s, a : b + 1] > 0).sum() for s, a, b in spans]
        n_fired, n_acts = int(np.count_nonzero(fired)), int(sum(fired))
        if n_fired:
            recall, precision = n_fired / len(spans), n_acts / int((acts > 0).sum())
            f1 = 2 * recall * precision / (recall + precision)
            expected[unit] = pytest.approx((n_fired, len(spans), recall, precision, f1))
    rows = store.sql("FROM units_on($t, of_hook := $h)", t=text, h=HOOK).fetchall()
    assert {row[1]: row[2:7] for row in rows} == expected
    assert [row[6] for row in rows] == sorted((row[6] for row in rows), reverse=True)


def test_units_on_puts_the_planted_detector_first(tmp_path):
    with astore.open(planted_store(tmp_path / "a")) as store:
        for unit in range(4):
            best = store.sql("FROM units_on($t) LIMIT 1", t=WORDS[unit]).fetchall()[0]
            assert best[1] == unit
            assert best[6] == 1.0


def test_twins_are_the_units_that_correlate_most(small, tmp_path):
    """The guest is the same store with its units turned round, and one of them noisy."""
    other = small_store(tmp_path / "other")
    with astore.open(small.path) as store:
        store.attach(small.path, "crate")
        store.attach(other.path, "gpt2")
        for names in (("crate", "gpt2"), ("", "gpt2")):
            rows = store.sql("FROM twins($a, $b)", a=names[0], b=names[1]).fetchall()
            assert [(row[:2], row[2:4]) for row in rows] == [
                ((hook, unit), (hook, unit)) for hook in sorted(small.acts) for unit in range(D)
            ]
            assert [row[5] for row in rows] == pytest.approx([1.0] * 2 * D)
        x = small.acts[HOOK][..., 2].reshape(-1)
        table = np.array([np.corrcoef(x, y)[0, 1] for y in small.acts[HOSTILE].reshape(-1, D).T])
        query = "FROM twins('crate', 'gpt2', $h, 2, k := 9, in_hook := $o)"
        rows = store.sql(query, h=HOOK, o=HOSTILE).fetchall()
        assert [row[3] for row in rows] == np.argsort(-table).tolist()
        assert [row[5] for row in rows] == pytest.approx(sorted(table, reverse=True))


def test_twins_of_other_texts_are_refused(small, tmp_path):
    with astore.open(small.path) as store:
        store.attach(small_store(tmp_path / "b", seed=1).path, "other")
        with pytest.raises(astore.QueryError, match="hold other tokens at the same places"):
            store.sql("FROM twins('', 'other')").fetchall()
        with pytest.raises(astore.QueryError, match="nowhere"):
            store.sql("FROM twins('', 'nowhere')").fetchall()


@pytest.mark.parametrize("name", ["memory.main.acts; SELECT 1", "../x", "'/etc/passwd'", "a.b"])
def test_the_name_of_a_twin_is_a_name_and_nothing_else(store, name):
    with pytest.raises(astore.QueryError):
        store.sql("FROM twins($a, '')", a=name).fetchall()


def test_a_unit_that_is_not_written_as_one_is_refused(store):
    for call in ("fires_both('x', 'y')", f"fires_only('{HOOK}:', 'y:1')", f"follows('{A}', 'y')"):
        with pytest.raises(astore.QueryError, match="want HOOK:UNIT, such as"):
            store.sql(f"FROM {call}").fetchall()


def test_plain_duckdb_has_the_same_macros(small, monkeypatch):
    import duckdb

    monkeypatch.chdir(small.path)
    with duckdb.connect(small.path / "store.duckdb", read_only=True) as con:
        n = int((small.acts[HOOK][..., 1] > 0).sum())
        assert len(con.execute("FROM fires($h, 1)", {"h": HOOK}).fetchall()) == n
        assert len(con.execute("FROM twins('', '')").fetchall()) == 2 * D


CALLS = (
    f"fires('{HOOK}', 1)",
    f"fires_both('{HOOK}:1', '{HOOK}:2')",
    f"fires_only('{HOOK}:1', '{HOOK}:2')",
    f"follows('{HOOK}:1', '{HOOK}:2', within := 2)",
    f"like_this(3, 4, 5, of_hook := '{HOOK}')",
    "units_on('cat')",
)


def test_a_lake_has_the_macros_and_so_has_a_store_attached_to_it(small, store, tmp_path):
    pytest.importorskip("duckdb_extension_sqlite_scanner")
    where = {"path": f"ducklake:sqlite:{tmp_path}/c.sqlite", "data_path": str(tmp_path / "data")}
    astore.open(mode="w", **where).close()
    with astore.open(**where) as lake:
        lake.attach(small.path, "crate")
        for call in CALLS:
            assert lake.sql(f"FROM {call}").fetchall() == []
            expected = store.sql(f"FROM {call}").fetchall()
            assert lake.sql(f"FROM crate.{call}").fetchall() == expected != []
        assert len(lake.sql("FROM twins('crate', 'crate')").fetchall()) == 2 * D
