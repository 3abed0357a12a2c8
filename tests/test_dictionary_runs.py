"""The stage `dictionary` of a run: what it fits, writes and skips, and what a stop leaves."""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import forks
import numpy as np
import pytest
import torch

import activation_store as astore
import lmmono as lm
from lmmono.cli.app import main
from lmmono.dictionaries.dictionary_run import VectorSources
from lmmono.errors import DictionaryError, RunError, TrainingStopped
from lmmono.recipe import Recipe
from lmmono.runs.folder import Run, open_run
from lmmono.runs.manifest import Manifest

HOOK, NEURONS = "blocks.0.hook_resid_post", "blocks.0.mlp.hook_post"
STEPS, STOP = 100, 60
TOPK = f"{{arch: topk, expansion: 2, k: 4, steps: {STEPS}, lr: 0.02}}"
RECIPE = f"""\
name: tiny
seed: 0
data: {{corpus: {{n_documents: 300}}, n_ctx: 32}}
model: {{arch: gpt2, n_layers: 1, d_model: 16, n_heads: 2}}
train: {{steps: 12, batch_tokens: 256, warmup_steps: 2, eval_every_steps: 12, eval_tokens: 512}}
capture: {{max_tokens: 1024, max_density: 1.0, top_k: 4, random_k: 2, quantile_k: 1}}
dictionary:
  hooks: [{HOOK}, {NEURONS}]
  learn:
    - {TOPK}
    - {{arch: pca, expansion: 1}}
    - {{arch: raw, k: 4}}
    - {{arch: random, expansion: 2, k: 4}}
  seeds: [0, 1]
  controls: [shuffled, untrained]
  max_tokens: 8192
  batch_tokens: 256
  eval_tokens: 1024
  recovery_tokens: 512
  latents: topk-x2-k4
"""
NAMES = {
    *("topk-x2-k4-seed0", "topk-x2-k4-seed1", "topk-x2-k4-shuffled", "topk-x2-k4-untrained"),
    *("pca-x1", "raw-k4", "random-x2-k4-seed0", "random-x2-k4-seed1"),
}
ONE = (f"dictionary.hooks=[{HOOK}]", f"dictionary.learn=[{TOPK}]", "dictionary.controls=[]")
ALONE = (*ONE, "dictionary.seeds=[0]", "dictionary.latents=null")


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> Path:
    """A working folder with a run that is captured and has no dictionaries yet."""
    folder = tmp_path_factory.mktemp("captured")
    (folder / "tiny.yaml").write_text(RECIPE)
    before = Path.cwd()
    os.chdir(folder)
    try:
        lm.run_stages(lm.train(Recipe.load("tiny.yaml")), "capture")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def learned(captured, tmp_path_factory) -> Run:
    """The run with every dictionary of the recipe."""
    folder = tmp_path_factory.mktemp("learned") / "copy"
    shutil.copytree(captured, folder)
    run = open_run(folder / "runs/tiny")
    return run_dictionaries(run)


def test_damaged_vectors_are_told_before_a_dictionary_is_fitted_on_them(tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    recipe = Recipe.load(tmp_path / "tiny.yaml")
    rng = np.random.default_rng(0)
    with astore.open(tmp_path / "v.duckdb", "w") as store:
        ids, docs = rng.integers(0, 9, (32, 16)), np.arange(32)[:, None].repeat(16, axis=1)
        with store.writer(vectors=[astore.Vectors(HOOK, 4)], n_ctx=16) as writer:
            vectors = rng.standard_normal((32, 16, 4), np.float32)
            writer.add(np.arange(32), ids, docs, "train", {HOOK: vectors})
    sources = VectorSources(
        Run(tmp_path / "run", recipe, Manifest.new(recipe)), astore.open(tmp_path / "v.duckdb")
    )
    assert len(next(sources.vectors(None, (HOOK,)).batches(0))[HOOK]) == 256
    (shard,) = (tmp_path / "v").glob("vectors-*.parquet")
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(astore.ShardError, match=shard.name):
        next(sources.vectors(None, (HOOK,)).batches(0))


@pytest.fixture
def here(captured, tmp_path, monkeypatch) -> Path:
    """A copy of the captured run's folder as the working folder."""
    shutil.copytree(captured, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def opened(*overrides: str) -> Run:
    return Run.create(Recipe.load("tiny.yaml", *overrides))


def run_dictionaries(run: Run, **how) -> Run:
    return lm.run_stages(run, "dictionary", **how)


def query(run: Run, text: str, **params) -> list[tuple]:
    with astore.open(run.store_path) as store:
        return store.sql(text, **params).fetchall()


def activations(run: Run, hook: str, split: str, max_tokens: int, model=None) -> np.ndarray:
    """Activations [tokens, d] as a forward pass gives them."""
    ids = torch.from_numpy(
        run.tokens(split).limit(max_tokens, seed=run.recipe.seed).ids.astype(np.int64)
    )
    _, acts = lm.run_with_cache(model or run.model, ids, hook)
    return acts[hook].flatten(0, 1).numpy().astype(np.float64)


def fvu(x: np.ndarray, hat: np.ndarray) -> float:
    return ((x - hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()


def test_every_entry_is_fitted_on_every_hook_with_every_seed_and_its_controls(learned):
    rows = query(learned, "SELECT hook, name, path, digest FROM dictionaries")
    assert {(hook, name) for hook, name, _, _ in rows} == {
        (hook, name) for hook in (HOOK, NEURONS) for name in NAMES
    }
    for hook, name, path, digest in rows:
        found = lm.load_dictionary(learned.dir / path)
        assert (found.hook, found.digest) == (hook, digest)
        assert path == f"dictionaries/{hook}/{name}"
    assert learned.manifest.stages["dictionary"].facts == {"n_dictionaries": 16, "n_failed": 0}


def test_measures_are_those_of_the_score_split_by_hand(learned):
    x = activations(learned, HOOK, "score", 1024)
    kept = np.abs(x) >= np.sort(np.abs(x), axis=1)[:, [-4]]
    topk = lm.load_dictionary(learned.dir / "dictionaries" / HOOK / "topk-x2-k4-seed1")
    hats = {
        "raw-k4": x * kept,
        "topk-x2-k4-seed1": topk.reconstruct(torch.from_numpy(x).float()).numpy(),
        "pca-x1": x,
    }
    for name, hat in hats.items():
        ((l0, found),) = query(
            learned,
            "SELECT l0, fvu FROM dictionaries WHERE hook = $hook AND name = $name",
            hook=HOOK,
            name=name,
        )
        assert found == pytest.approx(fvu(x, hat), rel=1e-4, abs=1e-8)
        assert l0 == pytest.approx(16 if name == "pca-x1" else 4)


def test_an_untrained_control_is_judged_at_the_untrained_model(learned):
    code = lm.load_dictionary(learned.dir / "dictionaries" / HOOK / "topk-x2-k4-untrained")
    fresh = lm.untrained(learned.model, learned.recipe.seed)
    x = activations(learned, HOOK, "score", 1024, fresh)
    ((found, low, high, control),) = query(
        learned,
        """SELECT value, ci_low, ci_high, control FROM all_scores
           WHERE metric = 'fvu' AND hook = $hook AND dictionary = 'topk-x2-k4-untrained'""",
        hook=HOOK,
    )
    assert found == pytest.approx(fvu(x, code.reconstruct(torch.from_numpy(x).float()).numpy()))
    assert low < found < high and control == "untrained"


def test_seeds_are_compared_and_planted_features_looked_for(learned):
    places = [learned.dir / "dictionaries" / HOOK / f"topk-x2-k4-seed{seed}" for seed in (0, 1)]
    codes = [lm.load_dictionary(place) for place in places]
    alike = query(
        learned,
        """SELECT value FROM all_scores WHERE metric = 'stability_cosine' AND hook = $hook
           AND dictionary = 'topk-x2-k4' AND control IS NULL""",
        hook=HOOK,
    )
    assert alike == [(pytest.approx(lm.stability(codes).cosine.value),)]
    rows = learned.tokens("score").limit(1024, seed=learned.recipe.seed)
    found = lm.recovery(codes[1], (learned.model, rows), max_tokens=512, seed=learned.recipe.seed)
    stored = query(
        learned,
        """SELECT coalesce(control, 'code'), value FROM all_scores
           WHERE metric = 'mcc' AND hook = $hook AND dictionary = 'topk-x2-k4-seed1'""",
        hook=HOOK,
    )
    wanted = {"code": found.code, **found.controls}
    assert dict(stored) == {name: pytest.approx(each.mcc.value) for name, each in wanted.items()}


def test_the_table_shows_results_then_controls_with_what_was_measured(learned):
    tables = lm.reports.run_tables([learned])
    tables = [t for t in tables if t.title.startswith("Dictionaries of tiny")]
    assert sum(len(table.rows) for table in tables) == 16
    (table,) = [table for table in tables if table.title.endswith(f", {HOOK}")]
    assert {row[0] for row in table.rows} == NAMES
    assert [row[1] != "" for row in table.rows] == [False] * 2 + [True] * 6
    cells = dict(zip(table.columns, table.rows[0], strict=True))
    assert cells["dictionary"] == "topk-x2-k4-seed0" and cells["L0"] == "4 [4, 4]"
    for head in ("FVU", "CE (zero)", "dead", "MCC", "stability"):
        assert re.fullmatch(r"[\d.e-]+ \[[\d.e-]+, [\d.e-]+\]", cells[head]), cells[head]
    assert float(cells["random"]) < 1


def test_latents_of_the_named_entry_are_a_hook_that_is_scored_like_neurons(learned):
    latents = f"{HOOK}.hook_sae_acts_post"
    named = query(learned, "SELECT name FROM dictionaries WHERE latents_hook = $h", h=latents)
    assert named == [("topk-x2-k4-seed0",)]
    code = lm.load_dictionary(learned.dir / "dictionaries" / HOOK / "topk-x2-k4-seed0")
    x = activations(learned, HOOK, "explain", 1024)
    acts = code.encode(torch.from_numpy(x).float()).numpy()
    stored = query(
        learned,
        "SELECT unit, seq_id, pos, act FROM activations WHERE hook = $h AND split = 'explain'",
        h=latents,
    )
    seq_ids = learned.tokens("explain").limit(1024, seed=learned.recipe.seed).seq_ids
    found = np.zeros_like(acts)
    for unit, seq, pos, act in stored:
        found[np.searchsorted(seq_ids, seq) * 32 + pos, unit] = act
    assert np.abs(found - acts).max() < 2e-3 * np.abs(acts).max()

    lm.run_stages(learned, "score")
    n = query(learned, "SELECT count(DISTINCT unit) FROM all_scores WHERE hook = $h", h=latents)
    assert n == [(32,)]


def test_a_second_call_does_nothing(learned):
    before = {p: p.stat().st_mtime_ns for p in learned.dir.rglob("*") if p.is_file()}
    run_dictionaries(open_run(learned.dir))
    assert {p: p.stat().st_mtime_ns for p in learned.dir.rglob("*") if p.is_file()} == before


def test_a_changed_section_fits_only_what_is_new_from_the_same_vectors(here):
    run = run_dictionaries(opened(*ALONE))
    vectors = run.dir / "vectors.duckdb"
    before, written = run.manifest.stages, vectors.stat().st_mtime_ns
    fitted: set[str] = set()
    more = (*ALONE[:3], "dictionary.seeds=[0]", f"dictionary.learn=[{TOPK}, {{arch: raw}}]")
    again = opened(*more, "dictionary.latents=null")
    run_dictionaries(again, progress=lambda what, *_, **__: fitted.add(what))
    assert not [what for what in fitted if what.startswith("fit")], "topk was there already"
    assert vectors.stat().st_mtime_ns == written
    for stage in ("train", "capture", "vectors"):
        assert again.manifest.stages[stage] == before[stage]
    assert query(again, "SELECT name, round(fvu, 6) FROM dictionaries WHERE name = 'raw'") == [
        ("raw", 0.0)
    ]


def test_a_stopped_fit_goes_on_to_the_same_bits(here):
    run = opened(*ALONE)

    def stop(what: str, done: int, total: int, **facts: float) -> None:
        if what.startswith("fit") and done == STOP:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingStopped, match="everything is saved"):
        run_dictionaries(run, progress=stop)
    folder = run.dir / "dictionaries" / HOOK / "topk-x2-k4"
    assert (folder / "checkpoint.safetensors").is_file()
    steps: list[int] = []

    def note(what: str, done: int, total: int, **facts: float) -> None:
        if what.startswith("fit"):
            steps.append(done)

    run_dictionaries(opened(*ALONE), progress=note)
    assert (min(steps), max(steps)) == (STOP + 1, STEPS)
    stopped = lm.load_dictionary(folder).digest
    shutil.rmtree(run.dir / "dictionaries")
    again = opened(*ALONE, "dictionary.eval_tokens=512")
    run_dictionaries(again)
    assert lm.load_dictionary(folder).digest == stopped
    assert not (folder / "checkpoint.safetensors").exists()


def test_sigterm_outside_a_fit_ends_the_stage_and_keeps_what_is_finished(here):
    def stop(what: str, done: int, total: int, **facts: float) -> None:
        if what == "evaluate":
            os.kill(os.getpid(), signal.SIGTERM)

    run = opened(*ALONE)
    with pytest.raises(TrainingStopped, match="what was finished is kept"):
        run_dictionaries(run, progress=stop)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert open_run(run.dir).manifest.stages["dictionary"].state == "begun"
    assert lm.load_dictionary(run.dir / "dictionaries" / HOOK / "topk-x2-k4").arch == "topk"


def test_a_fit_that_comes_to_nothing_is_told_after_the_others_are_judged(here):
    hopeless = TOPK.replace(f"steps: {STEPS}, lr: 0.02", "steps: 1, lr: 1e-6")
    learn = f"dictionary.learn=[{hopeless}, {{arch: raw}}]"
    run = opened(*ALONE[:1], learn, "dictionary.controls=[shuffled]", *ALONE[3:])
    with pytest.raises(DictionaryError, match=f"{HOOK}/topk-x2-k4: after the fit FVU is"):
        run_dictionaries(run)
    assert query(run, "SELECT name FROM dictionaries") == [("raw",)]
    text = "SELECT dictionary, control FROM all_scores WHERE metric = 'fvu' AND failure IS NOT NULL"
    assert sorted(query(run, text)) == [("topk-x2-k4", None), ("topk-x2-k4-shuffled", "shuffled")]
    assert open_run(run.dir).manifest.stages["dictionary"].state == "begun"


def test_a_name_whose_latents_are_stored_is_not_given_to_other_weights(here):
    latents = "dictionary.latents=topk-x2-k4"
    run_dictionaries(opened(*ALONE[:-1], latents))
    other = TOPK.replace(str(STEPS), str(STEPS + 1))
    with pytest.raises(DictionaryError, match="latents of another dictionary topk-x2-k4"):
        run_dictionaries(opened(*ALONE[:1], f"dictionary.learn=[{other}]", *ALONE[2:-1], latents))


def test_vectors_can_come_straight_from_the_model(here):
    run = run_dictionaries(opened(*ALONE, "dictionary.source=model"))
    assert not (run.dir / "vectors.duckdb").exists() and "vectors" not in run.manifest.stages
    ((value,),) = query(run, "SELECT fvu FROM dictionaries")
    assert 0 < value < 1


def test_a_run_that_is_not_captured_says_what_to_do(here):
    with pytest.raises(RunError, match="not captured yet; run `lmmono capture"):
        run_dictionaries(opened("capture.top_k=5"))


def call(monkeypatch, *arguments: str) -> int:
    """Run the command line in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["lmmono", *arguments])
    try:
        main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_the_command_line_learns_and_lists_dictionaries(here, monkeypatch, capsys):
    learn = "dictionary.learn=[{arch: raw}, {arch: pca, d_sae: 4}]"
    overrides = (*ALONE[:1], learn, *ALONE[2:])
    assert call(monkeypatch, "dictionary", "tiny.yaml", *overrides) == 0
    assert "Dictionaries of tiny, " in capsys.readouterr().out
    (here / f"runs/tiny/dictionaries/{HOOK}/begun").mkdir()
    assert call(monkeypatch, "ls", "dictionaries", "runs/tiny") == 0
    listed = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[1] for row in listed if len(row) > 1 and row[1] in ("begun", "raw", "pca-4")] == [
        "begun",
        "pca-4",
        "raw",
    ]
    assert call(monkeypatch, "ls", "runs", "runs") == 0
    assert "vectors finished, dictionary finished" in capsys.readouterr().out
    assert call(monkeypatch, "dictionary", "tiny.yaml", "dictionary={learn: []}") == 2
    assert "want a dictionary to learn, got none" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_keeps_its_checkpoint_and_says_so(here, number, code):
    long = f"dictionary.learn=[{TOPK.replace(str(STEPS), '30000')}]"
    often = "dictionary.checkpoint_every_steps=20"
    command = ["dictionary", "tiny.yaml", ALONE[0], long, *ALONE[2:], often]
    process = forks.start("-m", "lmmono", *command)
    checkpoint = here / f"runs/tiny/dictionaries/{HOOK}/topk-x2-k4/checkpoint.safetensors"
    deadline = time.monotonic() + 90
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send(number)
    assert process.wait() == code, process.stderr
    err = process.stderr
    assert "Traceback" not in err and "resumes from" in err
    assert checkpoint.exists()
    assert open_run("runs/tiny").manifest.stages["dictionary"].state == "begun"
