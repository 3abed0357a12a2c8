"""Training: exact to resume, the same on two processes, and stopped with a reason."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch.nn import functional

from lmmono.data.minimal_pairs import MinimalPair
from lmmono.data.tokens import TokenRows
from lmmono.errors import DataError, RecipeError, RunError, TrainError, TrainingStopped
from lmmono.models.build import build_model
from lmmono.models.hooks import run_with_cache
from lmmono.pipeline import train
from lmmono.recipe import Recipe
from lmmono.recipe.sections import CrateModel, Train
from lmmono.runs.folder import Run
from lmmono.training.checkpoint import Position, load_checkpoint, save_checkpoint
from lmmono.training.held_out import evaluate, minimal_pair_accuracy
from lmmono.training.optimizer import build_optimizer, lr_at
from lmmono.training.watch import LossWatch

RECIPE = """
name: tiny
seed: 3
out: {out}
data: {{corpus: {{kind: planted, n_documents: 300}}, n_ctx: 32}}
model: {{arch: crate, n_layers: 1, d_model: 16, n_heads: 2}}
train: {{steps: 24, batch_tokens: 256, warmup_steps: 4, eval_every_steps: 10, eval_tokens: 512,
  precision: fp32}}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(out=tmp_path / "runs"))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was trained at one go."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(RECIPE.format(out=folder / "runs"))
    return train(Recipe.load(folder / "tiny.yaml"))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.dir / "model" / "model.safetensors")


def stop_at(step: int, number: int):
    def report(what: str, done: int, total: int, **facts: float) -> None:
        if done >= step:
            os.kill(os.getpid(), number)

    return report


def test_no_steps_leave_the_untrained_model(recipe_file: Path) -> None:
    run = train(Recipe.load(recipe_file, "name=untrained", "train.steps=0"))
    tokenizer, settings = run.tokenizer, run.recipe.model
    fresh = build_model(
        settings, d_vocab=len(tokenizer), n_ctx=32, seed=3, eos_token_id=tokenizer.eos_token_id
    )
    for name, weight in fresh.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], weight), name
    # about the loss of the uniform distribution
    assert abs(run.val_loss - np.log(len(tokenizer))) < 0.2


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, TrainingStopped), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_stopped_training_goes_on_to_the_bits_of_one_that_never_stopped(
    recipe_file: Path, whole: Run, number: int, raised: type[BaseException]
) -> None:
    recipe = Recipe.load(recipe_file, "name=stopped")
    with pytest.raises(raised):
        train(recipe, progress=stop_at(10, number))
    assert not (recipe.dir / "model").exists()
    resumed = train(recipe)
    assert all(torch.equal(a, weights(whole)[name]) for name, a in weights(resumed).items())
    columns = ["step", "split", "metric", "layer", "value"]
    assert resumed.metrics.select(columns).equals(whole.metrics.select(columns))
    assert not (recipe.dir / "checkpoint").exists()


def test_a_killed_training_goes_on_from_its_last_checkpoint(recipe_file: Path, whole: Run) -> None:
    code = (
        "import os, signal\n"
        "from lmmono.pipeline import train\nfrom lmmono.recipe import Recipe\n"
        "def report(what, done, total, **facts):\n"
        "    if done >= 20: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"train(Recipe.load({str(recipe_file)!r}, 'name=killed', 'train.checkpoint_every_steps=7'),"
        " progress=report)\n"
    )
    assert forks.start("-c", code).wait() == -signal.SIGKILL
    recipe = Recipe.load(recipe_file, "name=killed", "train.checkpoint_every_steps=7")
    assert (
        json.loads((recipe.dir / "checkpoint" / "state.json").read_text())["position"]["step"] == 14
    )
    resumed = train(recipe)
    assert all(torch.equal(a, weights(whole)[name]) for name, a in weights(resumed).items())


def test_the_launcher_names_its_processes_as_they_are_read(tmp_path: Path) -> None:
    # the processes themselves import nothing that is slow; what `forks.launch` starts is named so
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    script = tmp_path / "rank.py"
    script.write_text(
        "import os\nfrom pathlib import Path\nfrom lmmono.files.processes import this_process\n"
        f"assert all(name in os.environ for name in {names})\n"
        "Path(__file__).with_name(os.environ['RANK']).write_text(repr(this_process()))\n"
    )
    # with --cpu the launcher starts one process, whatever number it is told
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    command += ["--dynamo_backend=no", "--main_process_port=0", str(script)]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == [
        f"Processes(rank={rank}, n=2)" for rank in (0, 1)
    ]


@pytest.mark.slow
def test_two_processes_match_one_at_the_same_global_batch(recipe_file: Path, whole: Run) -> None:
    assert forks.launch(2, "-m", "lmmono", "train", recipe_file, "name=two") == [0, 0]
    run = Run.create(Recipe.load(recipe_file, "name=two"))
    assert run.manifest.stages["train"].facts["n_processes"] == 2
    both = weights(run)
    for name, one in weights(whole).items():
        torch.testing.assert_close(both[name], one, atol=1e-5, rtol=0)


def test_micro_batches_change_only_rounding(recipe_file: Path, whole: Run) -> None:
    parts = train(Recipe.load(recipe_file, "name=parts", "train.micro_batch_tokens=64"))
    for name, one in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], one, atol=1e-5, rtol=0)


def test_recomputed_activations_give_the_same_weights(recipe_file: Path, whole: Run) -> None:
    settings = ["name=recomputed", "train.gradient_checkpointing=true"]
    recomputed = train(Recipe.load(recipe_file, *settings))
    for name, one in weights(whole).items():
        torch.testing.assert_close(weights(recomputed)[name], one, atol=1e-6, rtol=0)


def test_arms_that_differ_in_precision_are_trained_one_after_the_other(recipe_file: Path) -> None:
    """Accelerate keeps the precision of a process' first training and refuses another."""
    losses = [
        train(Recipe.load(recipe_file, f"train.precision={kind}", "train.steps=8", f"out=o{i}"))
        for i, kind in enumerate(("fp32", "bf16", "fp32"))
    ]
    first, half, again = (run.val_loss for run in losses)
    assert first == again != half and half == pytest.approx(first, rel=0.05)


def test_a_finished_training_is_not_repeated(whole: Run) -> None:
    before = (whole.dir / "model" / "model.safetensors").stat().st_mtime_ns
    again = train(whole.recipe)
    assert (again.dir / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert again.val_loss == whole.val_loss


def test_the_loss_falls_and_the_log_holds_every_statistic(recipe_file: Path) -> None:
    run = train(Recipe.load(recipe_file, "train.lr=1e-2", "train.steps=60"))
    rows = run.metrics.to_pylist()
    losses = [row["value"] for row in rows if row["metric"] == "loss" and row["split"] == "val"]
    assert losses[-1] < losses[0] - 0.5
    names = {row["metric"] for row in rows if row["layer"] == 0}
    assert names == {
        "density",
        "dead_fraction",
        "kurtosis",
        "ista_step_norm",
        "reconstruction_error",
    }


def test_a_checkpoint_cut_short_is_named_with_the_way_out(recipe_file: Path) -> None:
    recipe = Recipe.load(recipe_file)
    with pytest.raises(TrainingStopped):
        train(recipe, progress=stop_at(10, signal.SIGTERM))
    file = recipe.dir / "checkpoint" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TrainError, match=r"checkpoint.*remove the folder to start again"):
        train(recipe)


def test_a_flipped_bit_of_a_checkpoint_is_found(recipe_file: Path) -> None:
    recipe = Recipe.load(recipe_file)
    with pytest.raises(TrainingStopped):
        train(recipe, progress=stop_at(10, signal.SIGTERM))
    file = recipe.dir / "checkpoint" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4  # in a weight: safetensors reads it without a word
    file.write_bytes(content)
    with pytest.raises(TrainError, match=r"weights.safetensors: other bytes"):
        train(recipe)


@pytest.mark.parametrize("state", ["[]", "{}", "[" * 10_000, '{"position": {"step": "x"}}', "\x00"])
def test_a_damaged_state_of_a_checkpoint_is_told(tmp_path: Path, state: str) -> None:
    (tmp_path / "state.json").write_text(state)
    model = tiny_model()
    with pytest.raises(TrainError, match=r"state.json: damaged: .*remove the folder"):
        load_checkpoint(tmp_path, model, build_optimizer(model, Train()), "digest")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full device")
def test_a_full_disk_in_a_checkpoint_is_told_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, position = tiny_model(), Position(7, "digest", None, [])
    optimizer = build_optimizer(model, Train())
    save_checkpoint(tmp_path / "checkpoint", model, optimizer, position)

    def full(*_: object) -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x" * 100_000)

    monkeypatch.setattr("lmmono.training.checkpoint.save_file", full)
    with pytest.raises(RunError, match="checkpoint: cannot be written: No space left"):
        save_checkpoint(tmp_path / "checkpoint", model, optimizer, position)
    assert load_checkpoint(tmp_path / "checkpoint", model, optimizer, "digest") == position
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_fault_after_the_last_step_costs_no_training(
    recipe_file: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(recipe_file, "name=late")
    monkeypatch.setattr(Run, "save_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(recipe)
    monkeypatch.undo()
    steps: list[int] = []
    resumed = train(recipe, progress=lambda what, done, *_, **__: steps.append(done))
    assert steps == [], "every step was taken before the fault"
    assert all(torch.equal(a, weights(whole)[name]) for name, a in weights(resumed).items())
    assert not (recipe.dir / "checkpoint").exists()


@pytest.mark.parametrize(
    ("pairs", "fault"),
    [
        ('{"good": "' + "the cow . " * 40 + '", "bad": "the"}', "and data.n_ctx is 32"),
        ('{"good": "the cow"}', "want the columns"),
        (None, "no file or folder 'pairs.jsonl'"),
    ],
)
def test_pairs_that_cannot_be_scored_are_told_before_a_step_is_taken(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, pairs: str | None, fault: str
) -> None:
    monkeypatch.chdir(recipe_file.parent)
    if pairs is not None:
        Path("pairs.jsonl").write_text(pairs)
    steps: list[int] = []
    with pytest.raises(DataError, match=fault):
        train(
            Recipe.load(recipe_file, "train.minimal_pairs=pairs.jsonl"),
            progress=lambda what, done, *_, **__: steps.append(done),
        )
    assert steps == []


def test_a_diverging_loss_stops_with_step_and_what_to_change(recipe_file: Path) -> None:
    with pytest.raises(TrainError, match=r"at step \d+.*Lower train.lr \(now 30\)"):
        train(Recipe.load(recipe_file, "train.lr=30", "train.steps=200", "train.warmup_steps=0"))


def test_nan_names_the_first_broken_parameter() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.data[0, 0] = float("nan")
    with pytest.raises(TrainError, match="nan at step 5; first broken parameter: weight"):
        LossWatch(10, None).require_finite([2.0, float("nan")], 4, model, Train())


def test_a_study_is_refused_with_its_runs_named(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match="seed"):
        train(Recipe.load(recipe_file, "seeds=[1, 2]"))


def test_only_matrices_decay_and_the_lr_ends_at_its_floor() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4))
    decayed, free = build_optimizer(model, Train()).param_groups
    assert [p.dim() for p in decayed["params"]] == [2] and decayed["weight_decay"] == 0.1
    assert [p.dim() for p in free["params"]] == [1, 1] and free["weight_decay"] == 0.0
    settings = Train(steps=100, warmup_steps=10, lr=1e-3, min_lr_fraction=0.1)
    assert max(lr_at(k, settings) for k in range(101)) == 1e-3
    assert lr_at(100, settings) == pytest.approx(1e-4)


def tiny_model() -> torch.nn.Module:
    section = CrateModel(arch="crate", n_layers=2, d_model=16, n_heads=2)
    return build_model(section, d_vocab=50, n_ctx=12, seed=0, eos_token_id=0)


def one_document_a_row(ids: np.ndarray) -> TokenRows:
    doc_ids = np.arange(len(ids), dtype=np.int32)[:, None].repeat(ids.shape[1], axis=1)
    return TokenRows(ids.astype(np.uint32), doc_ids, 0, "val")


def test_an_evaluation_agrees_with_plain_numpy_and_scipy() -> None:
    model, ids = tiny_model(), torch.from_numpy(np.random.default_rng(0).integers(0, 50, (7, 12)))
    result = evaluate(model, one_document_a_row(ids.numpy()), batch_rows=3)
    logits, acts = run_with_cache(model, ids, "blocks.*.mlp.hook_post")
    losses = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(7, 11)
    assert result.loss == pytest.approx(float(losses.mean()), abs=1e-6)
    assert result.loss_se == pytest.approx(float(stats.sem(losses.mean(1).numpy())), rel=1e-5)
    assert result.n_tokens == 77
    for layer in result.layers:
        a = acts[f"blocks.{layer.layer}.mlp.hook_post"].flatten(0, 1).double().numpy()
        assert layer.density == pytest.approx((a > 0).mean())
        assert layer.dead_fraction == pytest.approx((a.max(axis=0) == 0).mean())
        alive = a[:, a.std(axis=0) > 0]
        wanted = np.median(stats.kurtosis(alive, axis=0, fisher=False))
        assert layer.kurtosis == pytest.approx(wanted, rel=1e-6)


def test_ista_facts_are_the_spectral_norm_and_the_relative_error() -> None:
    model, rows = tiny_model(), np.random.default_rng(1).integers(0, 50, (2, 12))
    layer = evaluate(model, one_document_a_row(rows), batch_rows=2).layers[1]
    block = model.model.blocks[1]
    d = block.mlp.dictionary.detach().double()
    assert layer.ista_step_norm == pytest.approx(0.1 * float(torch.linalg.svdvals(d)[0]) ** 2)
    names = ["model.blocks.1.ln2", "blocks.1.mlp.hook_post"]
    _, acts = run_with_cache(model, torch.from_numpy(rows), names)
    x, code = (acts[name].double() for name in names)
    error = float((x - code @ d).square().sum() / x.square().sum())
    assert layer.reconstruction_error == pytest.approx(error, rel=1e-5)


def test_minimal_pairs_compare_whole_sentence_probabilities(recipe_file: Path) -> None:
    run = Run.create(Recipe.load(recipe_file))
    model, tokenizer = tiny_model_for(run), run.corpus.tokenizer
    words = [token for token in run.corpus.vocabulary() if token.strip().isalpha()][:40]
    pairs = [
        MinimalPair(good=" ".join(words[i : i + 3]), bad=" ".join(words[i + 1 : i + 6]), group="x")
        for i in range(20)
    ]

    def log_prob(sentence: str) -> float:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(sentence)["input_ids"]]])
        logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return float(logs.gather(1, ids[0, 1:, None]).sum())

    with torch.no_grad():
        wanted = np.mean([log_prob(pair.good) > log_prob(pair.bad) for pair in pairs])
    assert minimal_pair_accuracy(model, tokenizer, pairs, batch_pairs=7) == pytest.approx(wanted)


def tiny_model_for(run: Run) -> torch.nn.Module:
    section = CrateModel(arch="crate", n_layers=1, d_model=16, n_heads=2)
    tokenizer = run.corpus.tokenizer
    return build_model(
        section, d_vocab=len(tokenizer), n_ctx=32, seed=0, eos_token_id=tokenizer.eos_token_id
    )
