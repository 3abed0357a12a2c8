"""Recipes with robustness suites: the section, the stage, the verb, and going on after a kill."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import duckdb
import numpy as np
import pytest
from lookup_model import HOOK, Lookup, large_task, true_code
from ruamel.yaml import YAML
from test_cli import call
from test_docs import BLOCK
from test_own_tasks import write as write_csv

import activation_store as astore
import lmmono as lm
from lmmono.errors import RecipeError, RobustnessError
from lmmono.recipe import Recipe
from lmmono.runs.folder import open_run
from lmmono.runs.stages import STAGES

ROOT = Path(__file__).parents[1]
PLANTED = ROOT / "recipes" / "robustness_planted.yaml"
SMALL = {
    "data": {"corpus": {"kind": "planted", "n_documents": 300}, "n_ctx": 32},
    "model": {"arch": "crate", "n_layers": 2, "d_model": 16, "n_heads": 2},
    "train": {"steps": 6, "batch_tokens": 256, "warmup_steps": 2, "eval_tokens": 512},
    "capture": {"hooks": ["blocks.1.mlp.hook_post"], "max_tokens": 1024, "max_density": 1.0},
}
FEW = {
    "tasks": ["planted_polarity"],
    "suites": ["noisy_labels", "noisy_inputs", "ood"],
    "families": ["raw", {"name": "random_topk", "k": 4}],
    "seeds": 1,
    "n_train": 60,
    "n_val": 40,
    "n_test": 60,
    "n_noised": 40,
    "margins": [1.0, 0.4],
    "severities": [2],
    "shots": [2],
    "input_noise": ["word_drop", "hidden_gaussian"],
}
EVERY = """SELECT * EXCLUDE (created_at, seconds, settings), settings->>'digest' AS digest
    FROM robustness ORDER BY ALL"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder in which the planted recipe, made small, was run by its verbs."""
    folder, yaml = tmp_path_factory.mktemp("robust"), YAML()
    recipe = yaml.load(PLANTED)
    recipe.update(SMALL)
    recipe["robustness"].update(FEW)
    learn = {"arch": "topk", "d_sae": 32, "k": 4, "steps": 30, "lr": 0.02, "name": "sae"}
    recipe["dictionary"].update(
        {"learn": [learn], "max_tokens": 4096, "batch_tokens": 256, "eval_tokens": 512}
    )
    (folder / "recipes").mkdir()
    yaml.dump(recipe, folder / "recipes" / PLANTED.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for verb in ("train", "capture", "dictionary", "robustness"):
            assert call(verb, f"recipes/{PLANTED.name}") == 0
    return folder


def test_a_run_has_a_row_of_every_family_condition_and_seed(folder):
    run = open_run(folder / "runs/robustness_planted")
    assert run.is_done("robustness") and run.is_done("figures")
    facts = run.manifest.stages["robustness"].facts
    with astore.open(run.store_path) as store:
        n = dict(store.sql("SELECT suite, count(*) FROM robustness GROUP BY 1").fetchall())
        families = store.sql("SELECT DISTINCT feature FROM robustness ORDER BY 1").fetchall()
        odd = store.sql(
            """SELECT count(*) FROM robustness WHERE failure IS NULL AND
            (value IS NULL OR n IS NULL OR ci_low > value OR ci_high < value OR seed IS NULL)"""
        ).fetchall()
    # 2 rates; 2 kinds of noise at 2 levels; whole and 2 shots on 2 parts; by 3 families
    assert n == {"noisy_labels": 6, "noisy_inputs": 12, "ood": 12}
    assert families == [("random_topk-4",), ("raw",), ("sae",)] and odd == [(0,)]
    assert facts["hook"] == "blocks.1.hook_resid_post" and facts["n_rows"] == 30
    assert facts["hypotheses"] == ["H1", "H2"], "said in the recipe, before the run"
    with duckdb.connect(str(run.dir / "features.duckdb"), read_only=True) as con:
        assert con.execute("SELECT count(*) FROM codes").fetchall() == [(3,)]
    assert facts["leakage"] == {"planted_polarity": "task planted_polarity: no text in two parts"}


def test_a_run_has_its_figures_and_a_verdict_on_what_it_registered(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    drawn = Path("runs/robustness_planted/robustness")
    kinds = ("hidden_gaussian", "word_drop")
    names = [*(f"noisy_inputs_{kind}.svg" for kind in kinds), "noisy_labels_symmetric.svg"]
    assert sorted(path.name for path in drawn.iterdir()) == names
    assert call("robustness", f"recipes/{PLANTED.name}") == 0
    told, figures = capsys.readouterr()
    assert all(f"{drawn / name}\n" in figures for name in names)
    assert "Hypotheses registered before the run, robustness_planted" in told
    assert told.count("not tested") == 2, "H1 and H2 have no row of their margins here"


def test_a_second_run_computes_nothing_and_a_changed_one_only_what_changed(
    folder, monkeypatch, capsys
):
    monkeypatch.chdir(folder)
    name, path = f"recipes/{PLANTED.name}", "runs/robustness_planted/store.duckdb"
    with astore.open(path) as store:
        before = store.sql("SELECT max(created_at), count(*) FROM robustness").fetchall()
    assert call("robustness", name) == 0
    with astore.open(path) as store:
        assert store.sql("SELECT max(created_at), count(*) FROM robustness").fetchall() == before
    more = ("robustness.seeds=2", "robustness.suites=[noisy_labels]", "robustness.hypotheses=[H3]")
    assert call("robustness", name, *more) == 0
    told = capsys.readouterr()
    assert "other settings' results set aside" in told.err, "with their figures"
    assert len(list(Path("runs/robustness_planted/replaced").glob("*/robustness/*.svg"))) == 3
    assert "H3" in told.out and "not tested" in told.out
    with astore.open(path) as store:
        new = store.sql(
            "SELECT DISTINCT suite, seed FROM robustness WHERE created_at > $then",
            then=before[0][0],
        ).fetchall()
    assert new == [("noisy_labels", 1)]
    assert call("robustness", name, "robustness.suites=[]") == 2


def test_the_guide_does_what_it_says(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    blocks = BLOCK.findall((ROOT / "docs" / "robustness.md").read_text())
    languages = [language for language, _ in blocks]
    assert languages == ["yaml", "bash", "python", "yaml", "python", "yaml", "yaml"]
    write_csv(folder / "reviews.csv", [{"review": f"r{i}", "stars": i % 5 + 1} for i in range(60)])
    write_csv(folder / "films.csv", [{"body": "x", "mood": "sad"}, {"body": "y", "mood": "glad"}])
    for name in ("pairs", "novels"):
        rows = [
            {"premise": f"{name} {i}", "hypothesis": "b", "gold": ("yes", "no")[i % 2]}
            for i in range(40)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for text in (text for language, text in blocks if language == "yaml"):
        (folder / "guide.yaml").write_text("name: g\nseed: 0\nmodel: {arch: crate}\n" + text)
        assert call("check", "guide.yaml") == 0
    commands = blocks[1][1].splitlines()
    assert [line.split()[1] for line in commands] == ["run", "robustness", "ls", "sql"]
    query = commands[3].split('"')[1]
    assert call("sql", "runs/robustness_planted", query, "--csv") == 0
    assert '"sae",' in capsys.readouterr().out.splitlines()[-1]
    exec(blocks[4][1], {})
    assert capsys.readouterr().out.endswith("('0', '1', '2')\n")
    exec(blocks[2][1], {})
    told = capsys.readouterr().out
    assert "20 rows computed, 0 were there" in told and told.splitlines()[-1] == "12 0"


def test_a_bare_model_chooses_its_hook_on_clean_validation_texts(folder):
    model = open_run(folder / "runs/robustness_planted").model
    few = {"seeds": 1, "n_train": 60, "n_val": 40, "n_test": 40, "margins": (0.5,), "rates": ()}
    found = lm.robustness(model, "planted_polarity", features={"dense": None}, **few)
    assert found.store is None and found.hook in lm.models.match_hooks(
        model, "blocks.*.hook_resid_post"
    )
    assert found.n_computed == len(found.rows) == 1 and found.n_found == 0
    assert "in memory" in repr(found) and "noisy_labels planted_polarity symmetric" in repr(found)
    assert found.df().shape[0] == 1


def study(path: Path, stop_after: int | None = None) -> lm.studies.Outcomes:
    """Run a study into a store; with a number, kill this process after so many groups of rows."""

    append, left = astore.Store.append, [stop_after]

    def dying(store, table, rows):
        made = append(store, table, rows)
        if table == "robustness" and left[0] is not None:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
        return made

    with pytest.MonkeyPatch.context() as patch, astore.open(path, "a") as store:
        patch.setattr(astore.Store, "append", dying)
        return lm.robustness(
            Lookup(),
            large_task(),
            suite=("noisy_labels", "few_shot", "noisy_inputs"),
            features={"raw": None, "code": true_code},
            hook=HOOK,
            into=store,
            seeds=2,
            n_train=None,
            n_val=50,
            n_test=80,
            n_noised=40,
            margins=(1.0, 0.6),
            rates=(),
            shots=(4,),
            resamples=2,
            input_noise=("hidden_gaussian",),
            severities=(3,),
        )


def test_a_killed_study_goes_on_and_ends_with_the_same_rows(tmp_path):
    for name in ("steady", "killed"):
        (tmp_path / name).mkdir()
        astore.open(tmp_path / name / "store.duckdb", "w").close()
    whole = study(tmp_path / "steady" / "store.duckdb")
    assert whole.n_found == 0 and whole.n_computed == 8 + 4 + 8
    path, done = tmp_path / "killed" / "store.duckdb", 0
    for _ in range(2):
        child = os.fork()
        if not child:
            study(path, stop_after=2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        with astore.open(path) as store:
            rows = store.sql("SELECT count(*), max(created_at) FROM robustness").fetchall()
        assert rows[0][0] > done, "what was committed stays"
        done = rows[0][0]
    time.sleep(0.01)
    rest = study(path)
    assert rest.n_found == done and rest.n_computed == whole.n_computed - done
    with astore.open(path) as killed, astore.open(tmp_path / "steady") as steady:
        assert killed.sql(EVERY).fetchall() == steady.sql(EVERY).fetchall()
        old = killed.sql(
            "SELECT count(*) FROM robustness WHERE created_at <= $then", then=rows[0][1]
        ).fetchall()
    assert old == [(done,)], "no row was computed twice"


def test_two_processes_give_what_one_gives():
    settings = {"hook": HOOK, "n_train": None, "n_val": 40, "n_test": 60, "seeds": 2}
    some = {"margins": (1.0, 0.6), "rates": (), "features": {"raw": None, "code": true_code}}
    one, two = (
        lm.robustness(Lookup(), large_task(), **settings, **some, processes=n) for n in (1, 2)
    )
    for a, b in zip(one.rows, two.rows, strict=True):
        assert (a["feature"], a["level"], a["seed"]) == (b["feature"], b["level"], b["seed"])
        assert a["value"] == pytest.approx(b["value"], abs=1 / 60)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{suites: [noisy_label]}", "robustness.suites[0]: want one of noisy_labels"),
        ("{families: [rawr]}", "want a feature family, got 'rawr'; did you mean raw?"),
        ("{families: [{name: raw, d: 4}]}", "robustness.families[0].d: raw has no such setting"),
        ("{suites: [ood], families: []}", "want a family or a dictionary to read"),
        ("{tasks: [sst3]}", "did you mean sst"),
        ("{margins: [1.5]}", "robustness.margins[0]: want a number"),
        ("{learners: [logistic, logistic]}", "robustness.learners[1]: want each once"),
    ],
)
def test_what_is_named_wrongly_is_told_with_its_line(tmp_path, text, fault):
    path = tmp_path / "r.yaml"
    path.write_text(f"name: r\nseed: 0\nmodel: {{arch: crate}}\nrobustness: {text}\n")
    with pytest.raises(RecipeError) as told:
        Recipe.load(path)
    assert any(fault in line and line.startswith(f"{path}:4") for line in told.value.faults), told


def test_a_changed_suite_leaves_the_other_stages(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: r\nseed: 0\nmodel: {arch: crate}\nrobustness: {suites: [ood]}\n")
    before, now = Recipe.load(path), Recipe.load(path, "robustness.seeds=9")
    parts = {name: stage.sections for name, stage in STAGES.items()}
    stale = [n for n, of in parts.items() if now.digest(*of) != before.digest(*of)]
    assert stale == ["robustness", "figures"]


def test_dictionaries_that_are_not_there_and_other_models_stores_are_told(folder, monkeypatch):
    monkeypatch.chdir(folder)
    name = f"recipes/{PLANTED.name}"
    assert call("robustness", name, "robustness.dictionaries=[sea]") == 2
    learned = Path("runs/robustness_planted/dictionaries/blocks.1.hook_resid_post")
    shutil.copytree(learned / "sae", learned / "sae-untrained")
    assert call("robustness", name, "robustness.dictionaries=['*untrained']") == 2, "a control"
    shutil.rmtree(learned / "sae-untrained")
    run = open_run(folder / "runs/robustness_planted")
    other = lm.untrained(run.model)
    other.tokenizer = run.tokenizer
    with (
        astore.open(run.store_path, mode="a") as store,
        pytest.raises(RobustnessError, match="activations of another model"),
    ):
        lm.robustness(
            other, "planted_polarity", suite="few_shot", hook="blocks.1.hook_resid_post", into=store
        )
    assert np.isfinite(run.val_loss)
