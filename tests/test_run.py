"""Run folders: what they record, what they refuse, and what survives a crash."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lmmono.errors import DataError, RunError
from lmmono.files import provenance
from lmmono.files.atomic import disk_faults, write_atomic
from lmmono.pipeline import run_stages
from lmmono.recipe import SECTIONS, Recipe
from lmmono.recipe.explain_settings import Explain
from lmmono.recipe.robustness_settings import Robustness
from lmmono.recipe.sections import Capture, CrateModel, Data, Train
from lmmono.runs.folder import Run, changes, find_runs, open_run
from lmmono.runs.stages import STAGES


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    return Recipe(
        name="one", seed=3, out=str(tmp_path / "runs"), model=CrateModel(arch="crate", n_layers=1)
    )


def changed(recipe: Recipe, **sections) -> Recipe:
    return Recipe.model_validate({**dict(recipe), **sections})


def finish(run: Run, name: str, **values) -> None:
    with run.stage(name) as facts:
        facts |= values


def test_a_new_run_keeps_its_resolved_recipe_and_where_it_comes_from(recipe):
    run = Run.create(recipe)
    assert Recipe.load(run.dir / "recipe.yaml") == recipe
    assert "sparsity: 0.1" in (run.dir / "recipe.yaml").read_text(), "defaults are written out"
    manifest = json.loads((run.dir / "manifest.json").read_text())
    assert manifest["recipe_digest"] == recipe.digest(*SECTIONS)
    assert manifest["seed"] == 3
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert manifest["versions"]["torch"].startswith("2.")
    assert manifest["machine"]["cores"] >= 1
    assert open_run(run.dir).manifest == run.manifest
    assert repr(run).startswith(f"Run({run.dir}, ")


def test_the_manifest_names_the_commit_of_the_working_folder(tmp_path):
    assert provenance.git_commit(tmp_path) is None
    for arguments in (
        ("init", "-q"),
        ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"),
    ):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    commit = provenance.git_commit(tmp_path)
    assert commit is not None and len(commit) == 40
    (tmp_path / "new").touch()
    assert provenance.git_commit(tmp_path) == commit, "untracked files do not change a result"
    subprocess.run(["git", "add", "new"], cwd=tmp_path, check=True)
    assert provenance.git_commit(tmp_path) == f"{commit}-dirty"


def test_a_stage_counts_as_finished_only_when_it_succeeds(recipe):
    run = Run.create(recipe)
    with pytest.raises(ZeroDivisionError), run.stage("train"):
        time.sleep(0.05)
        raise ZeroDivisionError
    assert not run.is_done("train")
    spent = run.manifest.stages["train"].wall_seconds
    assert spent >= 0.05
    finish(run, "train", val_loss=2.5)
    again = open_run(run.dir)
    assert again.is_done("train")
    assert again.val_loss == 2.5
    record = again.manifest.stages["train"]
    assert record.wall_seconds >= spent, "attempts add up"
    assert record.peak_memory_bytes > 1e6
    assert record.started.endswith("+00:00")


PEAKS = """
from lmmono.files import provenance
block = bytearray(b"1") * 200_000_000
high = provenance.peak_memory_bytes()
del block
provenance.reset_peak_memory()
assert provenance.peak_memory_bytes() < high - 150_000_000
block = bytearray(b"1") * 200_000_000
assert provenance.peak_memory_bytes() > high - 50_000_000
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's reset")
def test_peak_memory_is_that_of_the_stage_not_of_the_process():
    subprocess.run([sys.executable, "-c", PEAKS], check=True)  # no other test's memory is in it


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock", "recipe.yaml", "manifest.json"}


def test_what_other_settings_made_is_set_aside_as_a_run_of_its_own(recipe):
    run = Run.create(recipe)
    finish(run, "train", val_loss=1.5)
    finish(run, "capture")
    for name in ("model", "store"):
        (run.dir / name).mkdir()
    for name in ("metrics.parquet", "store.duckdb", "notes.txt"):
        (run.dir / name).touch()

    fewer = Run.create(changed(recipe, capture=Capture(top_k=5)))
    assert list(fewer.manifest.stages) == ["train"], "training had the same settings"
    assert files(run.dir) == {"model", "metrics.parquet", "notes.txt", "replaced"}
    assert fewer.set_aside is not None and files(fewer.set_aside) == {"store", "store.duckdb"}
    old = open_run(fewer.set_aside)
    assert (old.recipe, list(old.manifest.stages)) == (recipe, ["train", "capture"])
    assert changes(old.recipe, fewer.recipe) == ["capture.top_k: 32 before, 5 now"]

    faster = Run.create(changed(recipe, train=Train(lr=1.0)))
    assert faster.manifest.stages == {}
    assert files(run.dir) == {"notes.txt", "replaced"}
    assert faster.set_aside is not None and open_run(faster.set_aside).val_loss == 1.5
    assert faster.set_aside != fewer.set_aside
    assert find_runs(run.dir.parent) == [run.dir]


def test_the_same_settings_set_aside_twice_are_both_kept(recipe):
    other = changed(recipe, train=Train(lr=1.0))
    for settings in (recipe, other, recipe, other):
        run = Run.create(settings)
        finish(run, "train", val_loss=1.0)
    assert len(list((run.dir / "replaced").iterdir())) == 3


def test_other_explanations_stand_beside_the_first_and_undo_nothing(recipe):
    other = changed(recipe, explain=Explain(explainers=("token_lookup",)))
    for stage in ("train", "capture", "score"):
        finish(Run.create(recipe), stage, of="first")
    run = Run.create(other)
    assert run.set_aside is None and run.is_done("capture") and not run.is_done("score")
    finish(run, "explain")
    finish(run, "score", of="second")
    for settings, of in ((recipe, "first"), (other, "second"), (recipe, "first")):
        run = Run.create(settings)
        assert run.is_done("score") and run.manifest.stages["score"].facts == {"of": of}
    # a new store holds neither
    anew = Run.create(changed(recipe, capture=Capture(top_k=5)))
    assert anew.set_aside is not None and anew.manifest.earlier == ()
    finish(anew, "capture")
    assert not Run.create(other).is_done("score")


def test_settings_of_stages_not_begun_may_change(recipe):
    finish(Run.create(recipe), "train", val_loss=1.0)
    other = changed(recipe, capture=Capture(top_k=5), about="with fewer exemplars")
    run = Run.create(other)
    assert run.is_done("train")
    assert open_run(run.dir).recipe == other
    assert run.set_aside is None
    assert run.manifest.recipe_digest == other.digest(*SECTIONS)


def test_one_process_at_a_time_works_in_a_run(recipe):
    run = Run.create(recipe)
    other = Run.create(recipe)
    with (
        run.stage("train"),
        pytest.raises(RunError, match=rf"process \(id {os.getpid()}\)"),
        other.stage("train"),
    ):
        raise AssertionError("the stage must not begin")
    with Run.create(recipe).stage("train"):
        pass


def test_a_killed_process_leaves_no_lock_and_no_finished_stage(recipe):
    run = Run.create(recipe)
    script = (
        "import os, signal, sys; from lmmono.runs.folder import open_run\n"
        "with open_run(sys.argv[1]).stage('train'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(run.dir)], check=False)
    assert done.returncode == -9
    again = open_run(run.dir)
    assert again.manifest.stages["train"].state == "begun"
    with again.stage("train"):
        pass
    assert again.is_done("train")


def test_a_run_whose_making_was_cut_short_is_made_again(recipe):
    run = Run.create(recipe)
    (run.dir / "manifest.json").rename(run.dir / "manifest.json.tmp")
    assert Run.create(recipe).manifest == run.manifest
    (run.dir / "manifest.json").unlink()
    (run.dir / "recipe.yaml").write_text("# somebody's own\n")
    with pytest.raises(RunError, match="no run folder"):
        Run.create(recipe)


def test_folders_that_are_no_run_are_refused_with_the_way_out(recipe, tmp_path):
    run = Run.create(recipe)
    with pytest.raises(RunError, match="no such run folder; did you mean .*/one?"):
        open_run(tmp_path / "runs" / "ones")
    with pytest.raises(RunError, match="holds several runs; name one: .*/one"):
        open_run(tmp_path / "runs")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(RunError, match="no run folder"):
        open_run(foreign)
    with pytest.raises(RunError, match="no run folder"):
        Run.create(changed(recipe, out=str(tmp_path), name="foreign"))
    assert find_runs(tmp_path) == [run.dir]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "damaged: Invalid JSON"),
        (lambda text: "", "damaged: Invalid JSON"),
        (lambda text: "[]", "damaged: .*got a list; restore the file, or remove the folder"),
        (lambda text: "[" * 100_000, "damaged: Invalid JSON: recursion limit"),
        (lambda text: text.replace('"seed": 3', '"seed": "x"'), "seed: Input should be"),
        (lambda text: text.replace('"format": 1', '"format": 99'), "written by a newer lmmono"),
    ],
)
def test_a_damaged_manifest_is_refused(recipe, damage, said):
    path = Run.create(recipe).dir / "manifest.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(RunError, match=said):
        open_run(path.parent)


def test_a_damaged_recipe_is_refused_with_its_faults(recipe):
    path = Run.create(recipe).dir / "recipe.yaml"
    path.write_text(path.read_text().replace("n_layers: 1", "n_layers: x"))
    with pytest.raises(RunError, match=r"recipe.yaml:\d+: model.n_layers: want an integer"):
        open_run(path.parent)
    path.unlink()
    with pytest.raises(RunError, match="no such file"):
        open_run(path.parent)


def test_what_is_not_there_yet_says_how_to_make_it(recipe):
    run = Run.create(recipe)
    for name in ("model", "val_loss", "metrics"):
        with pytest.raises(RunError, match="run `lmmono train .*recipe.yaml` first"):
            getattr(run, name)


def test_a_saved_model_is_read_back_whole(recipe):
    run = Run.create(recipe)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=7, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    vocabulary = {f"w{i}": i for i in range(7)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    for _ in range(2):  # the second time replaces the first
        run.save_model(model, PreTrainedTokenizerFast(tokenizer_object=inner))
    assert not (run.dir / "model.tmp").exists()
    read = open_run(run.dir).model
    assert all(
        (weight == read.state_dict()[name]).all() for name, weight in model.state_dict().items()
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run.dir / "model")
    assert tokenizer.vocab_size == 7 and tokenizer.model_max_length == 8
    (run.dir / "model/tokenizer.json").write_text("[" * 9_999)
    with pytest.raises(DataError, match=r"tokenizer.json: broken, or not a tokenizer"):
        _ = open_run(run.dir).tokenizer
    (run.dir / "metrics.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(RunError, match=r"metrics.parquet: damaged: .*; bring the file back"):
        _ = open_run(run.dir).metrics


def test_a_refused_write_is_the_users_error_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "manifest.json"
    write_atomic(path, "old")
    path.with_name("manifest.json.tmp").mkdir()  # where the new bytes would go
    with pytest.raises(RunError, match=r"manifest.json: cannot be written: .*; check the folder"):
        write_atomic(path, "new")
    assert path.read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full device")
def test_a_full_disk_is_said_to_be_full():
    wanted = "x: cannot be written: No space left on device; free some space"
    with (
        pytest.raises(RunError, match=wanted),
        disk_faults(Path("x")),
        Path("/dev/full").open("w") as file,
    ):
        file.write("y" * 9999)


def test_prepared_corpora_lie_beside_the_runs_or_where_the_environment_says(recipe, monkeypatch):
    run = Run.create(recipe)
    monkeypatch.setenv("LMMONO_CACHE", "elsewhere")
    assert run.cache_dir == Path("elsewhere")
    monkeypatch.delenv("LMMONO_CACHE")
    assert run.cache_dir == run.dir.parent / ".cache"


def test_results_of_text_that_was_edited_are_not_taken_for_those_of_the_new_text(recipe, tmp_path):
    text, table = tmp_path / "a.txt", tmp_path / "reviews.csv"
    text.write_text("one\n")
    table.write_text("text,label\ngood,1\n")
    sources = Data(corpus={"kind": "files", "paths": (str(tmp_path / "*.txt"),)})
    own = Robustness(suites=("noisy_labels",), tasks=({"path": str(table)},))
    run = Run.create(changed(recipe, data=sources, robustness=own))
    for name in ("train", "robustness"):
        finish(run, name, **run.text_facts(STAGES[name]))
    os.utime(text)  # another time, the same bytes
    open_run(run.dir).require_same_texts()
    table.write_text("text,label\ngood,0\n")
    with pytest.raises(RunError, match=r"robustness has read other text.*reviews.csv has other"):
        run_stages(open_run(run.dir))
    file = run.dir / "manifest.json"
    whole = file.read_text()
    manifest = json.loads(whole)
    manifest["stages"]["train"]["facts"]["texts"] = {"a.txt": 1}
    file.write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"train.facts.texts: want digest, size and time"):
        open_run(run.dir).require_same_texts()
    file.write_text(whole)
    table.unlink()
    (tmp_path / "b.txt").write_text("two\n")
    with pytest.raises(RunError, match=r"stage train has read other text.*b.txt is new"):
        run_stages(open_run(run.dir), "train")
    text.unlink()
    (tmp_path / "b.txt").unlink()
    open_run(run.dir).require_same_texts()  # results stand without the text
