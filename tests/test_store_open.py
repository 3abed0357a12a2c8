"""Opening, creating, committing and moving a store; several processes at once; a full disk."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import duckdb
import forks
import pytest
from small_store import HOOK, HOSTILE, N_CTX, N_SEQ, D, fill, make, small_store

import activation_store as astore
from activation_store.catalog import catalogue
from activation_store.shards import names as shards

COUNT = "SELECT count(*) FROM activations"


def python(code: str, *args: object, **settings) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        **settings,
    )


@pytest.fixture
def small(tmp_path):
    return small_store(tmp_path / "run")


def n_acts(small) -> int:
    return sum(int((acts > 0).sum()) for acts in small.acts.values())


@pytest.mark.parametrize("path", ["run", "run/store.duckdb"])
def test_a_store_opens_by_its_folder_or_its_file(small, path):
    with astore.open(small.path.parent / path) as store:
        assert store.sql(COUNT).fetchall() == [(n_acts(small),)]
        assert repr(store).startswith(f"Store({small.path}/store.duckdb")


def test_to_open_a_store_and_to_ask_with_parameters_imports_no_pandas(small):
    """DuckDB imports it at the first bound parameter, which takes longer than all the rest."""
    code = """if True:
        import sys, activation_store as astore
        with astore.open(sys.argv[1]) as store:
            n = len(store.sql("FROM fires($hook, 1)", hook=sys.argv[2]).fetchall())
        print(n > 0, "pandas" in sys.modules)"""
    assert python(code, small.path, HOOK).communicate(timeout=60)[0].split() == ["True", "False"]


def test_an_empty_store_answers_every_view_and_macro_with_typed_nothing(tmp_path):
    with astore.open(tmp_path, "w") as store:
        for source in ("tokens", "activations", "vectors", "vector_shards", "unit('h', 1)"):
            assert store.sql(f"FROM {source}").fetchall() == []
        for source in (
            *("exemplars('h', 1)", "excerpt(1, 2)", "token_profile('h', 1)", "fires('h', 1)"),
            *("fires_both('h:1', 'h:2')", "fires_only('h:1', 'h:2')", "follows('h:1', 'h:2')"),
            *("like_this(1, 2)", "units_on('cat')"),
        ):
            assert store.sql(f"FROM {source}").fetchall() == []
        kinds = store.sql("FROM activations").types
        assert [str(kind) for kind in kinds] == [
            *("VARCHAR", "INTEGER", "INTEGER", "INTEGER", "INTEGER"),
            *("VARCHAR", "INTEGER", "VARCHAR", "FLOAT"),
        ]
        assert store.info().n_tokens == 0


def test_a_store_is_not_overwritten_unless_asked(small):
    with pytest.raises(astore.StoreError, match="overwrite=True"):
        astore.open(small.path, "w")
    old = astore.open(small.path).info().store_id
    with astore.open(small.path, "w", overwrite=True) as store:
        assert store.info().store_id != old
        assert store.sql(COUNT).fetchall() == [(0,)]


def test_a_folder_that_holds_something_else_is_never_overwritten(tmp_path):
    (tmp_path / "store.duckdb").write_text("precious")
    with pytest.raises(astore.NotAStoreError):
        astore.open(tmp_path, "w", overwrite=True)
    assert (tmp_path / "store.duckdb").read_text() == "precious"


@pytest.mark.parametrize("mode", ["r", "a"])
def test_what_is_no_store_is_named_with_a_way_out(tmp_path, mode):
    with pytest.raises(astore.NotAStoreError, match="no store there"):
        astore.open(tmp_path / "nowhere", mode)
    (tmp_path / "text.duckdb").write_text("not a database " * 1000)
    with pytest.raises(astore.NotAStoreError, match="not a DuckDB file"):
        astore.open(tmp_path / "text.duckdb", mode)
    (tmp_path / "empty.duckdb").touch()
    with pytest.raises(astore.NotAStoreError):
        astore.open(tmp_path / "empty.duckdb", mode)
    duckdb.connect(tmp_path / "foreign.duckdb").close()
    with pytest.raises(astore.NotAStoreError, match="not an activation store"):
        astore.open(tmp_path / "foreign.duckdb", mode)
    with duckdb.connect(tmp_path / "other.duckdb") as con:
        con.execute("CREATE TABLE meta AS SELECT 'a' AS key, 'b' AS value")
    with pytest.raises(astore.NotAStoreError, match="schema_version"):
        astore.open(tmp_path / "other.duckdb", mode)


def test_a_truncated_catalogue_is_an_error_that_names_it(small):
    file = small.path / "store.duckdb"
    file.write_bytes(file.read_bytes()[: 3 * file.stat().st_size // 4])
    with pytest.raises(astore.NotAStoreError, match="store.duckdb"):
        astore.open(small.path)


def test_a_store_opened_for_reading_takes_no_rows(small):
    with astore.open(small.path) as store:
        with pytest.raises(astore.StoreError, match="mode='a'"):
            store.append("all_scores", [])
        with pytest.raises(astore.StoreError, match="mode='a'"):
            store.writer(n_ctx=4)
        with pytest.raises(astore.StoreError, match="mode='a'"):
            store.verify(repair=True)


def test_a_closed_store_says_so(small):
    store = astore.open(small.path)
    rows = store.sql(COUNT)
    store.close()
    assert rows.fetchall() == [(n_acts(small),)]
    with pytest.raises(astore.StoreError, match="closed"):
        store.sql(COUNT)


@pytest.mark.parametrize("kind", ["acts", "tokens", "vectors"])
def test_a_missing_or_shortened_shard_is_found_when_the_store_opens(small, kind):
    shard = sorted((small.path / "store").glob(f"{kind}-*"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(astore.ShardError, match=rf"{shard.name} has {len(data) - 1} bytes.*repair"):
        astore.open(small.path)
    shard.unlink()
    with pytest.raises(astore.ShardError, match=f"{shard.name} is missing.*repair"):
        astore.open(small.path)


def test_a_store_can_be_moved_and_read_from_any_folder(small, tmp_path, monkeypatch):
    moved = tmp_path / "it's elsewhere"
    small.path.rename(moved)
    monkeypatch.chdir("/")
    with astore.open(moved) as store:
        assert store.sql(COUNT).fetchall() == [(n_acts(small),)]
    monkeypatch.chdir(moved)
    with astore.open("store.duckdb") as store:
        assert store.sql(COUNT).fetchall() == [(n_acts(small),)]


def test_duckdb_alone_reads_the_store_in_its_folder(small, monkeypatch):
    monkeypatch.chdir(small.path)
    with duckdb.connect("store.duckdb", read_only=True) as con:
        assert con.sql(COUNT).fetchall() == [(n_acts(small),)]
        found = con.sql(f"FROM exemplars('{HOOK}', 1, 3)").fetchall()
    with astore.open(".") as store:
        assert found == store.sql("FROM exemplars($h, 1, 3)", h=HOOK).fetchall()
    monkeypatch.chdir("/")
    with duckdb.connect(small.path / "store.duckdb", read_only=True) as con:
        con.execute("SET file_search_path = $1", [str(small.path)])
        assert con.sql(COUNT).fetchall() == [(n_acts(small),)]


def test_two_stores_join_when_one_is_attached(small, tmp_path):
    other = small_store(tmp_path / "other", seed=1)
    with astore.open(small.path) as store:
        store.attach(other.path, "b")
        both = store.sql(
            "SELECT a.unit, a.density, b.density FROM unit_stats a"
            " JOIN b.unit_stats b USING (hook, unit) WHERE hook = $h ORDER BY unit",
            h=HOOK,
        ).fetchall()
        shared = store.sql(
            "SELECT count(*) FROM activations JOIN b.activations USING (hook, unit, seq_id, pos)"
        ).fetchall()[0]
        excerpts = store.sql("FROM b.exemplars($h, 2, 4)", h=HOSTILE).fetchall()
        pair = store.sql("FROM b.coactivation($h, 1, 2)", h=HOOK).fetchall()
        assert store.sql(COUNT).fetchall() == [(n_acts(small),)]
    assert both == [
        (u, (small.acts[HOOK][..., u] > 0).mean(), (other.acts[HOOK][..., u] > 0).mean())
        for u in range(D)
    ]
    assert shared == (
        sum(int(((small.acts[h] > 0) & (other.acts[h] > 0)).sum()) for h in small.acts),
    )
    with astore.open(other.path) as alone:
        assert excerpts == alone.sql("FROM exemplars($h, 2, 4)", h=HOSTILE).fetchall()
        assert pair == alone.sql("FROM coactivation($h, 1, 2)", h=HOOK).fetchall()


@pytest.mark.parametrize(
    "name",
    ["main", "MEMORY", "Temp", "pg_catalog", "", "a b", 'x"; DROP', "b", "B", "lake_catalogue"],
)
def test_an_attached_store_needs_a_new_plain_name(small, tmp_path, name):
    other = small_store(tmp_path / "other")
    with astore.open(small.path) as store:
        store.attach(other.path, "b")
        with pytest.raises(astore.StoreError, match="want a new name"):
            store.attach(other.path, name)
        with pytest.raises(astore.NotAStoreError):
            store.attach(tmp_path / "nowhere", "c")
        assert store.sql("SELECT count(*) FROM b.hooks").fetchall() == [(3,)]


@pytest.mark.parametrize("name", ["_catalogue", "lake", "store", "é"])
def test_other_names_attach(small, tmp_path, name):
    other = small_store(tmp_path / "other", seed=1)
    with astore.open(small.path) as store:
        store.attach(other.path, name)
        assert store.sql(f'SELECT count(*) FROM "{name}".acts').fetchall() == [(n_acts(other),)]


MACROS = (
    "exemplars($hook, 1)",
    "exemplars('no hook', 1)",
    "exemplar_tokens($hook, 1, 1, 'top', 2, 1, 1)",
    "excerpt(1, 1)",
    "unit($hook, 1)",
    "unit('no hook', 1)",
    "coactivation($hook, 1, 2)",
    "token_profile($hook, 1)",
    "fires($hook, 1)",
    "fires_both($hook || ':1', $hook || ':2')",
    "fires_only($hook || ':1', $hook || ':2')",
    "follows($hook || ':1', $hook || ':2')",
    "like_this(3, 4, of_hook := $hook)",
    "units_on('cat')",
    "twins('', '')",
)


def test_a_macro_in_plain_duckdb_never_answers_with_another_stores_rows(tmp_path):
    mine = make(tmp_path / "mine", seed=0)
    theirs = make(tmp_path / "theirs", seed=1)
    with duckdb.connect() as con, astore.open(theirs.path) as store:
        con.execute("SET file_search_path = $1", [f"{mine.path},{theirs.path}"])
        for name, small in (("mine", mine), ("theirs", theirs)):
            con.execute(f"ATTACH '{small.path}/store.duckdb' AS {name} (READ_ONLY)")
        for macro in MACROS:
            params = {"hook": HOOK} if "$hook" in macro else {}
            con.execute("USE mine")
            with pytest.raises(duckdb.Error, match="this macro is of store"):
                con.execute(f"FROM theirs.{macro}", params).fetchall()
            con.execute("USE theirs")
            rows = con.execute(f"FROM {macro}", params).fetchall()
            assert rows == store.sql(f"FROM {macro}", **params).fetchall()


@pytest.mark.parametrize("name", ["run[1]", "a,b", "c*d", "{x,y}", "back\\slash", "é ü"])
def test_a_path_that_looks_like_a_pattern_is_a_path(small, tmp_path, name, monkeypatch):
    (tmp_path / "run1").symlink_to(small.path)  # what the pattern run[1] would find
    path = tmp_path / name
    with astore.open(path, "w") as store:
        fill(store, small_store(tmp_path / "copy", seed=1))
    assert astore.verify(path).ok
    assert astore.compact(path).merged == 4
    with astore.open(path) as store, astore.open(tmp_path / "copy") as copy:
        assert store.sql(COUNT).fetchall() == copy.sql(COUNT).fetchall()
        assert store.vectors("resid", batch_tokens=4).n_tokens == N_SEQ * N_CTX
        copy.attach(path, "odd")
        assert copy.sql("SELECT count(*) FROM odd.acts").fetchall() == store.sql(COUNT).fetchall()
        next((path / "store").glob("acts-*")).write_bytes(b"")
        with pytest.raises(astore.StoreError) as told:
            store.sql("SELECT sum(act) FROM acts").fetchall()
        assert name in str(told.value)


@pytest.mark.parametrize("name", ["why?/store.duckdb", "x[1].duckdb", "a,b.duckdb"])
def test_a_name_that_duckdb_cannot_keep_is_refused_at_once(tmp_path, name):
    with pytest.raises(astore.StoreError, match="under this name"):
        astore.open(tmp_path / name, "w")
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_written_for_the_oldest_duckdb_that_may_read_it(small):
    with astore.open(small.path, "a") as store:
        store.append("all_scores", [{"metric": "m", "metric_version": 1}])
    with duckdb.connect(small.path / "store.duckdb", read_only=True) as con:
        query = "SELECT tags FROM duckdb_databases() WHERE database_name = 'store'"
        assert con.execute(query).fetchall()[0][0]["storage_version"] == "v1.5.0+"


def test_a_store_of_a_newer_duckdb_is_not_called_damaged(small):
    text = (
        "IO Error: Trying to read a database file with version number 999, but we can only read 68"
    )
    place = catalogue.place(small.path)
    fault = catalogue.unreadable(place, duckdb.IOException(text))
    assert isinstance(fault, astore.SchemaError) and "damaged" not in str(fault)
    assert re.search(r"newer DuckDB.*999.*pip install -U duckdb", str(fault))


def test_a_commit_that_fails_changes_nothing(small):
    where = catalogue.place(small.path)
    before = where.file.read_bytes()
    with pytest.raises(RuntimeError), catalogue.commit(where) as con:
        con.execute("DELETE FROM shards")
        raise RuntimeError
    assert where.file.read_bytes() == before
    assert sorted(path.name for path in small.path.iterdir()) == ["store", "store.duckdb"]


def test_a_reader_keeps_what_it_opened_and_sees_the_commit_after_a_refresh(small):
    with astore.open(small.path) as reader, astore.open(small.path, "a") as writer:
        rows = [{"metric": "m", "metric_version": 1, "value": 0.5}]
        assert writer.append("all_scores", rows) == 1
        assert writer.sql("SELECT value FROM all_scores").fetchall() == [(0.5,)]
        assert reader.sql("SELECT value FROM all_scores").fetchall() == []
        reader.refresh()
        assert reader.sql("SELECT value FROM all_scores").fetchall() == [(0.5,)]


def test_rows_of_several_tables_are_one_commit_or_none(small):
    dictionary = {"hook": HOOK, "name": "d", "arch": "raw", "d_in": 4, "d_sae": 4}
    score = {"metric": "m", "metric_version": 1, "value": 0.5}
    count = "SELECT (SELECT count(*) FROM all_scores), (SELECT count(*) FROM dictionaries)"
    with astore.open(small.path, "a") as store:
        with pytest.raises(astore.ContentError, match="same key"):
            store.append_all({"all_scores": [score], "dictionaries": [dictionary, dictionary]})
        assert store.sql(count).fetchall() == [(0, 0)]
        file = small.path / "store.duckdb"
        before = file.stat().st_ino
        assert store.append_all({"all_scores": [], "dictionaries": []}) == {
            "all_scores": 0,
            "dictionaries": 0,
        }
        assert file.stat().st_ino == before, "no commit without a row"
        for _ in range(2):  # the second commit of a process keeps the views
            added = store.append_all({"all_scores": [score], "dictionaries": [dictionary]})
            assert added == {"all_scores": 1, "dictionaries": 1}
        assert store.sql(count).fetchall() == [(1, 1)]
    with duckdb.connect(file, read_only=True) as con:
        con.execute("SET file_search_path = $1", [str(small.path)])
        assert con.execute(COUNT).fetchall() == [(n_acts(small),)]


APPENDER = """
import sys, activation_store as astore
with astore.open(sys.argv[1], "a") as store:
    for i in range(int(sys.argv[3])):
        row = {"metric": sys.argv[2], "metric_version": 1, "value": i, "seed": i}
        store.append("all_scores", [row])
"""


def test_two_processes_that_write_at_once_lose_nothing_and_a_reader_is_never_blocked(small):
    writers = [forks.start("-c", APPENDER, small.path, name, 5) for name in ("a", "b")]
    seen = []
    while any(writer.process.is_alive() for writer in writers):
        with astore.open(small.path) as store:
            seen.append(store.sql("SELECT count(*) FROM all_scores").fetchall()[0][0])
            assert store.sql(COUNT).fetchall() == [(n_acts(small),)]
    assert [writer.wait() for writer in writers] == [0, 0], [each.stderr for each in writers]
    assert seen == sorted(seen)
    with astore.open(small.path) as store:
        assert store.sql("SELECT count(*), count(DISTINCT metric) FROM all_scores").fetchall() == [
            (10, 2)
        ]


HOLDER = """
import sys, time
from activation_store.catalog import catalogue
with catalogue.locked(catalogue.place(sys.argv[1]).commit_lock):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_names_its_holder_and_ends_with_it(small):
    where = catalogue.place(small.path)
    holder = python(HOLDER, small.path)
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(astore.LockedError, match=f"process {holder.pid} is writing"),
            catalogue.locked(where.commit_lock),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with catalogue.locked(where.commit_lock):
        pass


def test_threads_of_one_process_take_turns_too(small):
    def append(metric: str) -> None:
        with astore.open(small.path, "a") as store:
            for i in range(3):
                store.append("all_scores", [{"metric": metric, "metric_version": 1, "seed": i}])

    threads = [threading.Thread(target=append, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with astore.open(small.path) as store:
        assert store.sql("SELECT count(*) FROM all_scores").fetchall() == [(9,)]


def test_threads_may_share_a_store(small):
    failures = []
    with astore.open(small.path) as store:

        def ask(unit: int) -> None:
            for _ in range(5):
                found = store.sql(
                    "SELECT count(*) FROM acts WHERE hook = $h AND unit = $u", h=HOOK, u=unit
                ).fetchall()[0]
                if found != (int((small.acts[HOOK][..., unit] > 0).sum()),):
                    failures.append((unit, found))

        threads = [threading.Thread(target=ask, args=(unit,)) for unit in range(D)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_killed_writers_leave_the_last_commit(small):
    for delay in (0.0, 0.03, 0.07):
        writer = forks.start("-c", APPENDER, small.path, f"killed{delay}", 10_000)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not rows_of(small, f"killed{delay}"):
            time.sleep(0.01)
        time.sleep(delay)
        writer.send(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        seeds = rows_of(small, f"killed{delay}")
        assert seeds == list(range(len(seeds)))
        assert astore.verify(small.path).ok
    with astore.open(small.path, "a") as store:
        store.append("all_scores", [{"metric": "after", "metric_version": 1}])
    assert sorted(path.name for path in small.path.iterdir()) == ["store", "store.duckdb"]


def rows_of(small, metric: str) -> list[int]:
    with astore.open(small.path) as store:
        found = store.sql("SELECT seed FROM all_scores WHERE metric = $m ORDER BY seed", m=metric)
        return [seed for (seed,) in found.fetchall()]


def test_what_no_commit_lists_does_not_exist_and_is_swept_by_a_writer(small):
    where = catalogue.place(small.path)
    listed = sorted(path.name for path in where.folder.glob("*.parquet"))
    store_id = catalogue.read_meta(where)["store_id"]
    stray = where.folder / shards.shard_name("acts", store_id, 99)
    half = where.folder / (shards.shard_name("acts", store_id, 98) + ".part")
    foreign = where.folder / "notes.parquet"
    for path in (stray, half, foreign):
        path.write_bytes(b"PAR1")
    with astore.open(small.path) as store:
        assert store.sql(COUNT).fetchall() == [(n_acts(small),)]
    assert astore.verify(small.path).left_over == (half.name, stray.name)
    settings = {"rows": [astore.Rows("new", 4)], "n_ctx": 16}
    with astore.open(small.path, "a") as store, store.writer(**settings):
        assert not stray.exists() and not half.exists()
    assert sorted(path.name for path in where.folder.glob("*.parquet")) == sorted(
        [*listed, foreign.name]
    )


def test_a_catalogue_that_another_program_writes_is_left_alone(small):
    code = (
        "import sys, duckdb, time; con = duckdb.connect(sys.argv[1]); "
        "con.execute('CREATE TABLE mine AS SELECT 1'); print('open', flush=True); time.sleep(60)"
    )
    other = python(code, small.path / "store.duckdb")
    try:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(astore.LockedError, match="open for writing"):
            astore.open(small.path)
        with (
            pytest.raises(astore.LockedError, match="open for writing"),
            catalogue.commit(catalogue.place(small.path)) as con,
        ):
            con.execute("SELECT 1")
    finally:
        other.kill()
        other.communicate()


@pytest.fixture
def disk(tmp_path):
    """A disk of 12 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_a_clear_error_and_loses_nothing(disk):
    small = small_store(disk / "run")
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
    rows = [{"metric": "m", "metric_version": 1, "seed": i} for i in range(10)]
    with astore.open(small.path, "a") as store:
        with pytest.raises(astore.WriteError, match=r"disk is full.*intact"):
            store.append("all_scores", rows)
        with pytest.raises(astore.WriteError, match="disk is full"):
            astore.open(disk / "second", "w")
        assert astore.verify(small.path).ok
        ballast.unlink()
        assert store.append("all_scores", rows) == 10
        assert store.sql(COUNT).fetchall() == [(n_acts(small),)]


def test_a_read_only_folder_reads_and_refuses_to_be_written(disk):
    small = small_store(disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with astore.open(small.path, "a") as store:
        assert store.sql(COUNT).fetchall() == [(n_acts(small),)]
        with pytest.raises(astore.WriteError, match=r"no permission.*intact"):
            store.append("all_scores", [{"metric": "m", "metric_version": 1}])
    with pytest.raises(astore.WriteError, match="no permission"):
        astore.open(disk / "new", "w")


def test_the_numbers_of_a_store(small):
    with astore.open(small.path) as store:
        info = store.info()
        assert info.n_tokens == N_SEQ * N_CTX
        assert info.n_acts == n_acts(small)
        assert info.n_vectors == N_SEQ * N_CTX
        assert info.n_documents == small.doc_ids.max() + 1
        assert info.hooks == (HOOK, HOSTILE, "resid")
        files = [path for path in small.path.rglob("*") if path.is_file() and path.suffix]
        assert info.n_bytes == sum(path.stat().st_size for path in files)
        assert str(small.path) in str(info)
        assert [row[0] for row in store.hooks().fetchall()] == [HOOK, HOSTILE, "resid"]


def test_sql_takes_no_more_threads_than_the_process_was_given(small):
    program = """
import sys, activation_store
for trusted in (False, True):
    store = activation_store.open(sys.argv[1], trusted=trusted)
    print(store.sql("SELECT current_setting('threads')").fetchall())
"""
    for given in (3, 1):
        env = {**os.environ, "OMP_NUM_THREADS": str(given)}
        command = [sys.executable, "-c", program, str(small.path)]
        said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        assert said == f"[({given},)]\n" * 2
