"""The command line: its verbs on a tiny study, its exit codes, and how fast it answers."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import numpy as np
import pyarrow as pa
import pytest

import activation_store as astore
from lmmono.cli.app import app, main
from lmmono.dictionaries.classical import Classical
from lmmono.runs.folder import open_run

TINY = """\
name: tiny
seed: 0
data: {corpus: {n_documents: 300}, n_ctx: 32}
model: {arch: crate, n_layers: 1, d_model: 16, n_heads: 2}
train: {steps: 12, batch_tokens: 256, warmup_steps: 2, eval_every_steps: 6, eval_tokens: 512}
capture: {max_tokens: 1024, max_density: 1.0, top_k: 4, random_k: 2, quantile_k: 1}
arms:
  crate: {model.arch: crate}
  gpt2: {model.arch: gpt2}
"""
HOOK = "blocks.0.mlp.hook_post"


def call(*arguments: object) -> int:
    """Run the command line in this process and return its exit code."""
    before, sys.argv = sys.argv, ["lmmono", *map(str, arguments)]
    try:
        main()
    except SystemExit as left:
        return int(left.code or 0)
    finally:
        sys.argv = before
    return 0


def started(*arguments: object, **options) -> subprocess.Popen[str]:
    """Start the command line as a process of its own."""
    command = [sys.executable, "-m", "lmmono", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **options)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with the tiny recipe in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with the tiny study, run to its end."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert call("run", "tiny.yaml") == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def study(finished, tmp_path, monkeypatch) -> Path:
    """A copy of the finished study as the working folder."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("arguments", [["--help"], ["check", "tiny.yaml"]], ids=["help", "check"])
def test_help_and_check_answer_without_what_is_slow_to_import(here, arguments):
    script = (
        "import sys\n"
        f"sys.argv = ['lmmono', *{arguments!r}]\n"
        "from lmmono.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as left: assert not left.code, left.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    slow = {"torch", "transformers", "sae_lens", "datasets", "duckdb", "pandas", "scipy", "sklearn"}
    assert not slow & set(done.stderr.split())


def test_check_tells_all_faults_of_all_files_and_writes_nothing(here, capsys):
    Path("a.yaml").write_text(TINY.replace("steps: 12", "steps: ten"))
    Path("b.yaml").write_text(TINY.replace("n_heads: 2", "n_head: 2"))
    before = sorted(here.rglob("*"))
    assert call("check", "tiny.yaml", "a.yaml", "b.yaml", "capture.top_k=0") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "override capture.top_k=0: want an integer >= 1, got 0",
        "a.yaml:5: train.steps: want an integer >= 0, got 'ten'",
        "b.yaml:4: model.n_head: unknown key; did you mean n_heads?",
    ]
    assert call("check", "tiny.yaml") == 0
    assert capsys.readouterr().out == "tiny.yaml: ok, 2 runs: runs/tiny/crate, runs/tiny/gpt2\n"
    assert sorted(here.rglob("*")) == before


def test_schema_prints_or_writes_the_same(here, capsys):
    assert call("schema") == 0
    assert call("schema", "--out", "s.json") == 0
    assert Path("s.json").read_text() == capsys.readouterr().out
    assert json.loads(Path("s.json").read_text())["title"] == "Recipe"


def test_run_finishes_every_run_and_compares_them_and_a_second_run_skips(study, capsys):
    manifests = sorted(study.rglob("manifest.json"))
    assert len(manifests) == 2
    for path in manifests:
        stages = open_run(path.parent).manifest.stages
        assert {name: record.state for name, record in stages.items()} == {
            "train": "finished",
            "capture": "finished",
            "score": "finished",
            "promotes": "finished",
        }
    times = [path.stat().st_mtime_ns for path in manifests]
    assert call("run", "tiny.yaml") == 0
    out, err = capsys.readouterr()
    assert "of tiny/crate" in out and "of tiny/gpt2" in out and HOOK in out
    assert max(map(len, out.splitlines())) <= 100
    assert "train" not in err, "nothing was left to do"
    assert f"next: lmmono show runs/tiny/crate {HOOK}:" in err
    assert [path.stat().st_mtime_ns for path in manifests] == times


def test_changed_settings_redo_what_depends_on_them_and_say_so(study, capsys):
    arguments = ("tiny.yaml", "arm=crate", "capture.top_k=2")
    assert call("capture", *arguments) == 0
    out, err = capsys.readouterr()
    assert "Captured of tiny/crate" in out and HOOK in out
    assert "other settings' results set aside in runs/tiny/crate/replaced/" in err
    assert "  capture.top_k: 4 before, 2 now\n" in err
    assert "train" not in err, "training had the same settings"
    assert call("capture", *arguments) == 0
    assert capsys.readouterr().err.startswith("results: runs/tiny/crate\nnext: lmmono score")


@pytest.mark.parametrize("form", ["csv", "json", "arrow"])
def test_sql_gives_the_same_rows_in_every_form(study, capfdbinary, form):
    query = "SELECT hook, unit FROM unit_stats WHERE hook = $hook AND unit < $n ORDER BY unit"
    code = call(
        "sql", "runs/tiny/crate", query, f"--{form}", "--param", f"hook={HOOK}", "--param", "n=3"
    )
    assert code == 0
    out = capfdbinary.readouterr().out
    read = {
        "csv": lambda: [line.split(",") for line in out.decode().replace('"', "").split()[1:]],
        "json": lambda: [row.values() for row in json.loads(out)],
        "arrow": lambda: [row.values() for row in pa.ipc.open_stream(out).read_all().to_pylist()],
    }
    rows = [(hook, int(unit)) for hook, unit in read[form]()]
    assert rows == [(HOOK, 0), (HOOK, 1), (HOOK, 2)]


def test_sql_prints_a_table_and_joins_runs_by_their_folders(study, capsys):
    query = (
        "SELECT count(*) AS pairs FROM crate.unit_stats a JOIN gpt2.unit_stats b USING (hook, unit)"
    )
    assert call("sql", "runs/tiny/crate", "runs/tiny/gpt2", query) == 0
    out = capsys.readouterr().out
    assert "pairs" in out and "64" in out
    assert call("sql", "runs/tiny/crate", f"FROM exemplars('{HOOK}', 3, 1)", "--csv") == 0
    assert "«" in capsys.readouterr().out, "the excerpt marks the peak"


def test_sql_reads_files_and_pipes_and_several_statements(study, capsys, monkeypatch):
    text = (
        "-- two questions\nSELECT 1 AS one;\nSELECT $n AS n, unit FROM unit_stats LIMIT 2; -- end\n"
    )
    Path("q.sql").write_text(text)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    for question in (["--file", "q.sql"], ["-"]):
        assert call("sql", "runs/tiny/crate", *question, "--param", "n=3", "--json") == 0
        first, second = json.loads(capsys.readouterr().out)
        assert first["rows"] == [{"one": 1}]
        assert [row["n"] for row in second["rows"]] == [3, 3]
    assert call("sql", "runs/tiny/crate", text) == 2
    assert "give its value by --param n=" in capsys.readouterr().err
    assert call("sql", "runs/tiny/crate", "SELECT 1; DROP TABLE hooks") == 2
    assert capsys.readouterr().out == "", "nothing runs before all is known to be harmless"


def test_sql_helps_and_limits_what_a_table_shows(study, capsys):
    assert call("sql", "runs/tiny/crate", ".help") == 0
    out = capsys.readouterr().out
    assert "exemplars(of_hook, of_unit" in out and "hook_scores" in out
    assert call("sql", "runs/tiny/crate", ".help", "scores", "--json") == 0
    (table,) = json.loads(capsys.readouterr().out)
    assert "control" not in {row["column"] for row in table["rows"]}
    assert call("sql", "runs/tiny/crate", ".help score") == 2
    assert "did you mean scores" in capsys.readouterr().err
    assert call("sql", "runs/tiny/crate", "FROM range(250)") == 0
    assert "The first 100 rows" in capsys.readouterr().out
    assert call("sql", "runs/tiny/crate", "FROM range(250)", "--limit", 3, "--csv") == 0
    assert len(capsys.readouterr().out.split()) == 4


def test_runs_of_one_leaf_name_are_told_apart_by_the_folder_above(study, capsys):
    shutil.copytree("runs/tiny/crate", "runs/other/crate")
    query = (
        "SELECT (SELECT count(*) FROM other_crate.hooks) = count(*) AS same FROM tiny_crate.hooks"
    )
    assert call("sql", "runs/tiny/crate", "runs/other/crate", query, "--json") == 0
    assert json.loads(capsys.readouterr().out) == [{"same": True}]


def test_show_gives_one_unit_whole(study, capsys):
    assert call("show", "runs/tiny/crate", "blocks.0:3", "--json") == 0
    tables = {t["title"].partition(", ")[2]: t["rows"] for t in json.loads(capsys.readouterr().out)}
    with astore.open("runs/tiny/crate") as store:
        unit = store.unit(HOOK, 3)
        acts = [each.act for each in unit.exemplars(8)]
        ((value, shuffled),) = store.sql(
            """SELECT max(value) FILTER (control IS NULL), max(value) FILTER (control = 'shuffled')
            FROM all_scores WHERE hook = $hook AND unit = 3 AND metric = 'token_selectivity'""",
            hook=HOOK,
        ).fetchall()
    stats = {row["statistic"]: row["value"] for row in tables["statistics"]}
    assert stats["max_act"] == unit.max_act and stats["n_tokens"] == unit.n_tokens
    assert [row["act"] for row in tables["strongest exemplars"]] == acts
    (score,) = (row for row in tables["scores"] if row["scorer"] == "token_selectivity")
    assert score["score"]["value"] == value and score["controls"] == {"shuffled": shuffled}
    assert call("show", "runs/tiny/crate", "blocks.7:3") == 2
    assert HOOK in capsys.readouterr().err


def test_every_verb_that_prints_rows_has_one_door(study, capsys):
    for verb in ("train", "capture", "score", "run"):
        target = "tiny.yaml" if verb == "run" else "runs/tiny/crate"
        assert call(verb, target, "--json") == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed and all(printed), verb
    assert call("ls", "runs", "--wide") == 0


ODD = {
    "SELECT hook::INTEGER FROM hooks": None,
    "SELECT ln(0)": None,
    "SELECT 1 AS a, 2 AS a, 3 AS a_1": [{"a": 1, "a_2": 2, "a_1": 3}],
    'SELECT 1 AS "[/]"': [{"[/]": 1}],
    "SELECT 'infinity'::DATE AS d, '-infinity'::TIMESTAMP AS t": [
        {"d": "infinity", "t": "-infinity"}
    ],
    "SELECT row(1, 2) AS r": [{"r": {"": 2}}],
    "SELECT {'a': [1.5, 'nan'::DOUBLE]} AS s": [{"s": {"a": [1.5, None]}}],
    "SELECT MAP {'k': 1} AS m": [{"m": {"k": 1}}],
    "SELECT '\\xAA'::BLOB AS b, INTERVAL 2 DAY AS i, '101'::BIT AS c": [
        {"b": "\\xAA", "i": "2 days", "c": "101"}
    ],
    "SELECT 'nan'::DOUBLE AS x, sum(range) AS n, 1.5 AS d FROM range(3)": [
        {"x": None, "n": 3, "d": 1.5}
    ],
    "-- a comment first\nSELECT 1 AS one": [{"one": 1}],
}


@pytest.mark.parametrize("query", ODD)
@pytest.mark.parametrize("form", ["table", "csv", "json", "arrow"])
def test_sql_of_any_type_is_shown_and_what_fails_is_told(study, capfd, query, form):
    told_apart = form == "arrow" and "row(1, 2)" in query
    code = call("sql", "runs/tiny/crate", query, *([] if form == "table" else [f"--{form}"]))
    captured = capfd.readouterr() if form != "arrow" else None
    if ODD[query] is None:
        assert code == 2
    elif not told_apart:
        assert code == 0
        if form == "json":
            assert captured is not None and json.loads(captured.out) == ODD[query]


def test_a_result_that_arrow_cannot_hold_is_told(study, capfd):
    query = f"SELECT {'[' * 200}1{']' * 200} AS deep"
    assert call("sql", "runs/tiny/crate", query, "--json") == 0
    assert call("sql", "runs/tiny/crate", query, "--arrow") == 2
    assert "Arrow cannot hold the result: Recursion level" in capfd.readouterr().err


@pytest.mark.parametrize("query", ["DROP TABLE scores", "COPY scores TO 'x.csv'", "SELECT nothing"])
def test_sql_that_could_write_or_fails_is_refused(study, capsys, query):
    assert call("sql", "runs/tiny/crate", query) == 2
    out, err = capsys.readouterr()
    assert out == "" and err != "" and "Traceback" not in err
    assert not Path("x.csv").exists()


def test_generate_goes_on_from_a_prompt_and_repeats_itself(study, capsys):
    arguments = ("generate", "runs/tiny/gpt2", "the", "--max-tokens", 5, "--seed", 1)
    assert [call(*arguments), call(*arguments)] == [0, 0]
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.startswith("the ")
    assert call("generate", "runs/tiny/gpt2", "the", "--max-tokens", 500) == 2
    assert "within 32 tokens, got 1 + 500" in capsys.readouterr().err


def test_verify_names_each_damaged_file_of_a_run(study, capsys):
    run = study / "runs/tiny/crate"
    pca = Classical("pca", d_sae=2).fit(np.eye(4, dtype=np.float32))
    pca.save(run / "dictionaries/hook/pca")  # no stage is finished that would know it
    assert call("verify", "runs/tiny/crate") == 0
    told = re.fullmatch(
        r"runs/tiny/crate: whole; read (\d+) files of stages, 1 stores, 1 dictionaries, .*\n",
        capsys.readouterr().out,
    )
    n_model = len(list((run / "model").iterdir()))
    assert told is not None and int(told[1]) == n_model + 1, "the model's files and metrics.parquet"
    weights = "dictionaries/hook/pca/weights.safetensors"
    shard = next((run / "store").iterdir())
    for name in ("model/model.safetensors", "metrics.parquet", shard, weights):
        content = bytearray((run / name).read_bytes())
        content[len(content) // 2] ^= 1
        (run / name).write_bytes(content)
    (run / "model/config.json").unlink()
    assert call("verify", "runs/tiny/crate") == 2
    err = capsys.readouterr().err
    damaged = ("model.safetensors: other bytes", "config.json: missing", f"{weights}: other bytes")
    for name in (*damaged, "metrics.parquet"):
        assert name in err
    assert "store" in err and "Traceback" not in err


def test_a_flipped_bit_of_the_model_is_found_before_it_is_used(study, capsys):
    weights = study / "runs/tiny/crate/model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 8
    weights.write_bytes(content)
    assert call("generate", "runs/tiny/crate", "the") == 2
    assert call("capture", "runs/tiny/crate", "capture.top_k=2") == 2
    err = capsys.readouterr().err
    assert err.count("model.safetensors: other bytes than were written") == 2


def test_a_run_folder_that_is_named_is_the_one_worked_on(study, tmp_path, monkeypatch, capsys):
    moved = tmp_path / "elsewhere" / "mine"
    moved.parent.mkdir()
    shutil.copytree(study / "runs/tiny/crate", moved)
    monkeypatch.chdir(moved.parent)
    assert call("train", "../elsewhere/mine") == 0
    assert call("score", "mine", "capture.top_k=2") == 2, "its capture has other settings now"
    assert call("capture", "mine", "capture.top_k=2") == 0
    assert sorted(path.name for path in moved.parent.iterdir()) == ["mine"]
    assert open_run(moved).recipe.capture.top_k == 2
    assert (moved / "replaced").is_dir()
    capsys.readouterr()
    assert call("capture", "mine", "out=new", "name=other") == 2, "a new place is a new run"
    assert "new/other" in capsys.readouterr().err


def test_ls_survives_what_is_damaged(study, capsys):
    (study / "runs/tiny/crate/manifest.json").write_text("[" * 5_000)
    (study / "runs/tiny/gpt2/recipe.yaml").write_text("name: [")
    place = study / "runs/tiny/gpt2/dictionaries/blocks.0.mlp.hook_post"
    for i, text in enumerate(("[]", "{}", "not json", '{"d_in": 4}')):
        (place / f"sae{i}").mkdir(parents=True)
        (place / f"sae{i}" / "dictionary.json").write_text(text)
    assert call("ls", "runs") == 0
    assert call("ls", "stores") == 0
    out = capsys.readouterr().out
    assert all(f"runs/tiny/{name} " in out for name in ("crate", "gpt2")) and "damaged" in out


def test_text_of_a_model_and_a_file_drives_no_terminal(study, capsys, monkeypatch):
    hostile = "\x1b]0;title\x07 \u202egnp"
    monkeypatch.setattr("lmmono.runs.generation.generate", lambda *_, **__: hostile)
    assert call("generate", "runs/tiny/crate") == 0
    assert call("check", f"{hostile}.yaml") == 2
    assert call("sql", "runs/tiny/crate", f"SELECT '{hostile}' AS \"{hostile}\"") == 0
    assert call("sql", "runs/tiny/crate", f"SELECT '{hostile}'", "--csv") == 0
    out, err = capsys.readouterr()
    assert not set(out + err) & set("\x1b\x07\u202e")
    assert "<U+001B>]0;title<U+0007>" in out and "<U+202E>" in out


def test_memory_that_runs_out_is_told(here, monkeypatch, capsys):
    def greedy(*_: object) -> None:
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr("lmmono.recipe.Recipe.check", greedy)
    assert call("check", "tiny.yaml") == 2
    assert "not enough memory: Unable to allocate 9 TiB" in capsys.readouterr().err


def test_every_verb_has_an_example_in_its_help():
    from typer.main import get_command

    def verbs(command, path=()):
        for name, inner in getattr(command, "commands", {}).items():
            yield from verbs(inner, (*path, name))
        if not hasattr(command, "commands"):
            yield " ".join(path), command

    for name, verb in verbs(get_command(app)):
        assert f"Example: lmmono {name}" in (verb.help or ""), name


@pytest.mark.parametrize(
    ("what", "where", "said"),
    [
        ("recipes", ".", "runs/tiny/gpt2"),
        ("runs", "runs", "train finished, capture finished, score finished"),
        ("stores", "runs", "runs/tiny/crate/store.duckdb"),
        ("hooks", "runs/tiny/crate", HOOK),
    ],
)
def test_ls_lists_what_is_there(study, capsys, what, where, said):
    assert call("ls", what, where) == 0
    assert said in capsys.readouterr().out


def test_store_info_and_verify_look_at_a_runs_store(study, capsys):
    assert call("store", "info", "runs/tiny/crate") == 0
    assert call("store", "verify", "runs/tiny/crate") == 0
    assert HOOK in capsys.readouterr().out
    shard = next(Path("runs/tiny/crate/store").glob("acts-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-50])
    assert call("store", "verify", "runs/tiny/crate") == 2
    assert call("sql", "runs/tiny/crate", "SELECT 1") == 2
    assert shard.name in capsys.readouterr().err


def damage_model(study: Path) -> list[str]:
    weights = study / "runs/tiny/crate/model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return ["generate", "runs/tiny/crate"]


def damage_manifest(study: Path) -> list[str]:
    manifest = study / "runs/tiny/crate/manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    return ["run", "tiny.yaml"]


def foreign_store(study: Path) -> list[str]:
    (study / "runs/tiny/crate/store.duckdb").write_bytes(b"SQLite format 3\0" * 300)
    return ["sql", "runs/tiny/crate", "SELECT 1"]


def foreign_folder(study: Path) -> list[str]:
    (study / "mine").mkdir()
    (study / "mine/notes.txt").touch()
    return ["sql", "mine", "SELECT 1"]


DAMAGES = [damage_model, damage_manifest, foreign_store, foreign_folder]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_and_foreign_files_are_told_in_one_message(study, capsys, damage):
    assert call(*damage(study)) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err and len(err.strip().splitlines()) <= 3
    assert any(word in err for word in ("tiny", "mine"))


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("", [], "the corpus is empty"),
        ("Too short.", [], ""),
        ("word " * 400 + "\n\nother " * 400, ["data.tokenizer={kind: bpe, d_vocab: 9000}"], "9000"),
    ],
    ids=["an empty corpus", "a corpus shorter than a row", "a vocabulary that is too large"],
)
def test_text_that_cannot_be_used_is_told_before_training(here, capsys, text, overrides, said):
    Path("empty.txt").write_text(text)
    corpus = "data.corpus={kind: files, paths: [empty.txt]}"
    assert call("train", "tiny.yaml", "arm=crate", corpus, *overrides) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "No such command"),
        (["check"], "Missing argument"),
        (["sql", "nowhere", "SELECT 1"], "nowhere: no such run folder"),
        (["sql", "nowhere", "SELECT 1", "--csv", "--json"], "at most one"),
        (["sql", "nowhere"], "want a run and a query"),
        (["run", "tinny.yaml"], "tinny.yaml: no such file; did you mean tiny.yaml?"),
        (["train", "tiny.yaml", "train.lr=fast"], "override train.lr=fast: want a number"),
        (["train", "tiny.yaml", "out=/dev/null/x"], "cannot be written: Not a directory"),
        (
            ["capture", "tiny.yaml", "arm=crate"],
            "not trained yet; run `lmmono train runs/tiny/crate`",
        ),
        (["import", "crate-lm", "tiny.yaml", "--out", "x"], "tiny.yaml"),
    ],
)
def test_mistakes_are_told_in_one_message_with_exit_code_2(here, capsys, arguments, said):
    assert call(*arguments) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_our_own_mistakes_keep_their_trace(here, monkeypatch):
    monkeypatch.setattr("lmmono.recipe.Recipe.check", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("check", "tiny.yaml")


def test_a_reader_that_leaves_early_is_no_error(study):
    process = started("sql", "runs/tiny/crate", "FROM activations", "--csv", cwd=study)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) in (0, 1)
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_training_is_kept_and_goes_on(here, number, code):
    long = ("train", "tiny.yaml", "arm=crate", "train.steps=100000")
    process = forks.start("-m", "lmmono", *long)
    run = here / "runs/tiny/crate"
    deadline = time.monotonic() + 60
    while not (run / "metrics.parquet").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send(number)
    assert process.wait() == code, process.stderr
    err = process.stderr
    assert "Traceback" not in err and "the same command" in err
    assert (run / "checkpoint").is_dir()
    assert open_run(run).manifest.stages["train"].state == "begun"
