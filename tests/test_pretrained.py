"""A pretrained model of one's own: opened, run without a recipe, refused where it cannot fit."""

import json
import math
import os
import shutil
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from hub_server import TOKEN, serving
from huggingface_hub import constants
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from small_models import GROUPED, SIZES, tiny
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertLMHeadModel

import activation_store as astore
import lmmono as lm
from lmmono.data.tokenizers import build_tokenizer, read_tokenizer
from lmmono.errors import DataError, ModelError, RecipeError, RunError
from lmmono.models.pretrained import (
    fit_warnings,
    model_folder,
    on_best_device,
    open_section,
    require_fit,
)
from lmmono.pipeline import open_for
from lmmono.pipeline.whole_run import check_run
from lmmono.recipe import sections
from lmmono.recipe.shipped import copy_recipe, shipped_recipes

PLANTED = sections.PlantedCorpus(n_documents=150)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with the words of the planted language, as transformers saves it."""
    folder = tmp_path_factory.mktemp("models") / "my qwen3"
    tokenizer = build_tokenizer(sections.WordTokenizer(), PLANTED, sections.Splits())
    sizes = {**SIZES, **GROUPED, "vocab_size": len(tokenizer), "initializer_range": 0.05}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(model: Path, out: Path) -> list[str]:
    return [
        f"model.path={model}",
        "data.corpus={kind: planted, n_documents: 150}",
        "data.n_ctx=32",
        "capture.max_tokens=1024",
        "capture.batch_tokens=512",
        "explain.units=4",
        f"out={out}",
    ]


@pytest.fixture(scope="module")
def run(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> lm.Run:
    """The run of one line of settings, explained and scored."""
    recipe = lm.Recipe.load(None, *settings(qwen, tmp_path_factory.mktemp("mine")))
    return lm.run_stages(open_for(recipe))


def test_settings_alone_are_a_whole_recipe_named_after_the_model(qwen, tmp_path, monkeypatch):
    recipe = lm.Recipe.load(None, *settings(qwen, tmp_path))
    assert (recipe.name, recipe.seed, recipe.model.arch) == ("my-qwen3", 0, "pretrained")
    assert recipe.data.tokenizer.kind == "model"
    assert recipe.score.scorers[1].name == "simulation_random"
    named = lm.Recipe.load(None, *settings(qwen, tmp_path), "name=other", "seed=7")
    assert (named.name, named.seed) == ("other", 7)
    files = lm.Recipe.load(None, "model.path=gpt2", "data.corpus.paths=[a.txt]")
    assert files.data.corpus.kind == "files", "paths say the kind"
    assert lm.Recipe.load(None, "model.path=gpt2", "data.corpus.name=x").data.corpus.kind == "hub"
    monkeypatch.chdir(tmp_path)
    for few in ((), ("train.steps=5",), ("model.path=x",), ("data.corpus.paths=[x]",)):
        with pytest.raises(RecipeError, match="no recipe: name one .* or give a model and a text"):
            lm.Recipe.load(None, *few)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("train: {lr: 0.1}", "r.yaml:4: train: a pretrained model is not trained; leave"),
        ("data: {tokenizer: {kind: words}}", "r.yaml:4: data.tokenizer: a words tokenizer is"),
        ("data: {tokenizer: {kind: bpe, d_vocab: 300}}", "r.yaml:4: data.tokenizer: a bpe"),
    ],
)
def test_what_a_pretrained_model_cannot_is_told(tmp_path, monkeypatch, text, fault):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(f"name: a\nseed: 0\nmodel: {{path: x/y}}\n{text}\n")
    with pytest.raises(RecipeError) as caught:
        lm.Recipe.load("r.yaml")
    assert str(caught.value).startswith(fault)


def test_only_a_pretrained_model_has_a_tokenizer_of_its_own_and_must_be_there(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("name: a\nseed: 0\nmodel: {arch: crate}\ndata: {tokenizer: {kind: model}}\n")
    with pytest.raises(RecipeError, match=r":4: data.tokenizer: only a pretrained model has"):
        lm.Recipe.load(file)
    file.write_text("name: a\nseed: 0\nmodel: {path: ./absent}\n")
    with pytest.raises(RecipeError, match=r":3: model.path: want a file, folder or glob"):
        lm.Recipe.check(file)
    assert lm.Recipe.check(file, "model.path=org/name"), "a name of the Hub is not looked for"


def test_a_study_may_hold_trained_and_pretrained_arms(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(
        "name: a\nseed: 0\nmodel: {arch: gpt2}\ntrain: {steps: 90}\n"
        "arms: {gpt2: {}, mine: {model: {arch: pretrained, path: x}}}\n"
    )
    trained, mine = lm.Recipe.load(file).runs()
    assert trained.train.steps == 90 and trained.has_learned and not trained.is_pretrained
    assert mine.is_pretrained and mine.has_learned and mine.data.tokenizer.kind == "model"
    changed = lm.Recipe.load(file, "train.steps=95").runs()[1]
    assert changed.digest("data", "model", "train") == mine.digest("data", "model", "train")


def test_a_run_captures_explains_and_scores_what_transformers_own_model_does(run, qwen):
    model = AutoModelForCausalLM.from_pretrained(qwen).eval()
    rows = run.tokens("val")
    with torch.no_grad():
        ids = torch.tensor(rows.ids.astype(np.int64))
        assert run.val_loss == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-5)
    layer, seen = 1, []
    rows = run.tokens("score").limit(1024, seed=0)
    down = model.model.layers[layer].mlp.down_proj
    with down.register_forward_pre_hook(lambda _, args: seen.append(args[0])), torch.no_grad():
        model(input_ids=torch.tensor(rows.ids.astype(np.int64)))
    (acts,) = seen
    with astore.open(run.store_path) as store:
        stored = store.sql(
            "SELECT seq_id, pos, unit, act FROM activations "
            "WHERE hook = $hook AND split = 'score' ORDER BY ALL",
            hook=f"blocks.{layer}.mlp.hook_post",
        ).fetchall()
        row, pos, unit = (acts > 0).nonzero(as_tuple=True)
        places = zip(rows.seq_ids[row.numpy()].tolist(), pos.tolist(), unit.tolist(), strict=True)
        assert [one[:3] for one in stored] == sorted(places)
        numbers = acts[row, pos, unit].tolist()
        places = zip(rows.seq_ids[row.numpy()], pos, unit, numbers, strict=True)
        expected = [one[3] for one in sorted(places)]
        np.testing.assert_allclose([one[3] for one in stored], expected, rtol=1e-4, atol=1e-7)
        about = "SELECT arch, n_layers, d_model, d_vocab FROM runs"
        width = (2, 16, len(run.tokenizer))
        assert store.sql(about).fetchall() == [("qwen3", *width)]
        counted = "SELECT count(DISTINCT unit) FROM scores WHERE metric = 'simulation_random'"
        assert store.sql(counted).fetchall()[0][0] >= 4
    assert not (run.dir / "model").exists(), "the model stays where it is"
    assert "\ntrain:" not in (run.dir / "recipe.yaml").read_text()
    assert lm.Recipe.load(run.dir / "recipe.yaml") == run.recipe
    assert "train" not in run.manifest.stages
    (signed,) = run.warnings
    assert "stores the rest as blocks.0.mlp.hook_post_neg" in signed


def test_its_control_is_its_own_architecture_drawn_anew(run):
    control = lm.open_run(run.dir / "untrained")
    assert control.is_done("score") and control.recipe.model.untrained
    assert control.corpus.digest == run.corpus.digest
    torch.manual_seed(run.recipe.seed)
    drawn = AutoModelForCausalLM.from_config(run.model.config, dtype=torch.float32).state_dict()
    for name, weight in control.model.state_dict().items():
        assert torch.equal(weight, drawn[name]), name
    assert not torch.equal(control.model.lm_head.weight, run.model.lm_head.weight)
    digests = [one.require_whole("capture") or one.store_path for one in (run, control)]
    with astore.open(digests[0]) as a, astore.open(digests[1]) as b:
        query = "SELECT arch, model_digest FROM runs"
        (ours,), (theirs,) = a.sql(query).fetchall(), b.sql(query).fetchall()
    assert ours[0] == theirs[0] == "qwen3" and ours[1] != theirs[1]


def test_a_changed_model_is_refused_and_another_name_is_another_run(run, qwen, tmp_path):
    copy = Path(shutil.copytree(qwen, tmp_path / "model"))
    arguments = [*settings(copy, tmp_path / "runs"), "explain.explainers=[]", "score.scorers=[]"]
    recipe = lm.Recipe.load(None, *arguments)
    made = lm.run_stages(open_for(recipe), "capture")
    weights = copy / "model.safetensors"
    os.utime(weights, (1, 1))  # another time, the same bytes
    assert lm.run_stages(open_for(recipe), "capture").val_loss == run.val_loss
    assert check_run(made.dir).faults == []
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    way_out = r"holds results of another model .*model.safetensors has other bytes.*another name"
    with pytest.raises(RunError, match=way_out):
        lm.run_stages(open_for(recipe), "capture")
    with pytest.raises(RunError, match=way_out):
        _ = lm.open_run(made.dir).model
    assert any("has other bytes" in line for line in check_run(made.dir).faults)
    other = lm.Recipe.load(None, *arguments, "name=other")
    assert lm.run_stages(open_for(other), "capture").is_done("capture")
    shutil.rmtree(copy)
    assert lm.run_stages(open_for(recipe), "capture").is_done("capture"), "results stand without it"


def test_training_it_is_refused(run):
    with pytest.raises(RecipeError, match="a pretrained model is not trained; go on with `lmmono"):
        lm.run_stages(lm.open_run(run.dir), "train")


def test_dictionaries_learn_on_it(run):
    learned = [f"out={run.dir.parent}", "name=learned", "score.controls=false"]
    learned += ["dictionary.hooks=[blocks.1.hook_resid_post]", "dictionary.max_tokens=1024"]
    learned += ["dictionary.learn=[{arch: topk, d_sae: 24, k: 4, steps: 60, lr: 0.02}]"]
    learned += ["dictionary.batch_tokens=256", "dictionary.eval_tokens=512"]
    overrides = [text for text in settings(Path("x"), Path()) if text.split("=")[0] != "out"]
    recipe = lm.Recipe.load(
        None,
        *overrides,
        f"model.path={run.recipe.model.path}",
        *learned,
        "explain.explainers=[]",
        "score.scorers=[]",
    )
    made = lm.run_stages(open_for(recipe), "capture", "dictionary")
    assert made.is_done("dictionary")
    assert list((made.dir / "dictionaries").glob("*/*/dictionary.json"))


def test_rows_and_tokens_that_do_not_fit_are_refused(run, qwen, tmp_path):
    with pytest.raises(ModelError, match=r"data.n_ctx: rows of 64 .* 32 positions .*n_ctx=32 or"):
        require_fit(run.model, run.tokenizer, 64)
    model = tiny("llama")
    with pytest.raises(ModelError, match=r"data.tokenizer: its ids go up to \d+, and .* 0 to 39;"):
        require_fit(model, run.tokenizer, 32)
    model.save_pretrained(tmp_path / "bare")
    recipe = lm.Recipe.load(None, *settings(tmp_path / "bare", tmp_path / "runs"))
    with pytest.raises(DataError, match="is no tokenizer folder"):
        lm.run_stages(open_for(recipe), "capture")


def test_an_encoder_is_refused(qwen, tmp_path):
    tokenizer = read_tokenizer(qwen)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), **sizes, **heads, initializer_range=0.1)
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    recipe = lm.Recipe.load(None, *settings(tmp_path / "bert", tmp_path / "runs"))
    with pytest.raises(ModelError, match="BertLMHeadModel sees later tokens"):
        lm.run_stages(open_for(recipe), "capture")


def test_a_tokenizer_of_another_model_is_told_by_its_tokens_and_by_the_loss(qwen, tmp_path):
    own = read_tokenizer(qwen)
    content = json.loads((qwen / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    words = [word for word, i in vocabulary.items() if word in ("the", "red")]
    vocabulary[words[0]], vocabulary[words[1]] = (vocabulary[word] for word in words[::-1])
    shutil.copytree(qwen, tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content))
    other, chance = read_tokenizer(tmp_path / "other"), math.log(len(own))
    assert fit_warnings(chance + 0.1, own, own) == fit_warnings(1.0, own, None) == []
    (line,) = fit_warnings(chance, other, own)
    assert f"not the model's own: 2 of its {len(own)} tokens" in line
    (line,) = fit_warnings(9.0, own, own)
    assert f"is 9.00 nats per token, and guessing among {len(own)} tokens has {chance:.2f}" in line


def test_a_real_model_under_a_wrong_tokenizer_is_warned_of(shared, tmp_path):
    from lmmono.interop.llama2c import import_llama2c

    home = shared / "data" / "models_llama2c"
    stories = import_llama2c(
        home / "stories260K.bin", tmp_path / "stories", home / "stories260K_tok512.bin"
    )
    content = json.loads((stories / "tokenizer.json").read_text())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    # the last hundreds are single letters and pieces: each gets the id of another one
    rolled = tokens[:259] + tokens[359:] + tokens[259:359]
    content["model"]["vocab"] = {token: i for i, token in enumerate(rolled)}
    wrong = Path(shutil.copytree(stories, tmp_path / "wrong"))
    (wrong / "tokenizer.json").write_text(json.dumps(content))
    text = [f"data.corpus.paths=[{shared}/data/lm_tinystories_sample/stories.parquet]"]
    text += ["data.corpus.max_documents=150", f"out={tmp_path}/runs", "capture.max_tokens=1024"]
    right, bad = (
        lm.run_stages(
            open_for(lm.Recipe.load(None, f"model.path={stories}", *text, *more)), "capture"
        )
        for more in ([], ["name=bad", f"data.tokenizer={{kind: folder, path: {wrong}}}"])
    )
    assert len(right.warnings) == 1 and right.val_loss < 2.0  # gated neurons have both signs
    own, loss, _ = bad.warnings
    assert "not the model's own: 253 of its 512 tokens" in own
    assert bad.val_loss > 6.74 and f"{bad.val_loss:.2f} nats" in loss


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks
def test_open_model_brings_its_tokenizer_and_takes_an_adapter_and_a_type(qwen, tmp_path):
    model = lm.open_model(qwen, device="cpu")
    text = "the red cows"
    logits, acts = lm.run_with_cache(model, text, "blocks.*.mlp.hook_post")
    ids = torch.tensor([read_tokenizer(qwen).encode(text)])
    plain = AutoModelForCausalLM.from_pretrained(qwen).eval()
    with torch.no_grad():
        assert torch.equal(logits, plain(ids).logits)
    assert set(acts) == {"blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"}
    assert lm.open_model(qwen, dtype="bfloat16").dtype == torch.bfloat16
    peft = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora" in name:
                weight.normal_(std=0.3)
        peft.eval().save_pretrained(tmp_path / "lora")
        merged = lm.open_model(qwen, adapter=tmp_path / "lora", device="cpu")
        expected = peft(ids).logits
    assert not torch.allclose(expected, logits, atol=1e-2)
    torch.testing.assert_close(lm.run_with_cache(merged, text)[0], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ModelError, match="no adapter here"):
        lm.open_model(qwen, adapter=qwen)


def test_a_model_spread_over_memory_and_disk_is_captured_as_the_whole_one(qwen, tmp_path):
    names = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"]
    places = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    spread = lm.open_model(qwen, device_map=places)
    assert {weight.device.type for weight in spread.parameters()} == {"cpu", "meta"}
    models = {
        "whole": lm.open_model(qwen, device="cpu"),
        "spread": on_best_device(spread),  # it stays where it is
        "offloaded": cpu_offload(lm.open_model(qwen, device="cpu")),
    }
    facts, query = set(), "SELECT seq_id, pos, unit, act FROM acts ORDER BY ALL"
    for name, model in models.items():
        with astore.open(tmp_path / f"{name}.duckdb", mode="w") as store:
            lm.capture(model, "the red cows", into=store, n_ctx=32, signed=True)
            (digest,) = store.sql("SELECT value FROM meta WHERE key = 'model_digest'").fetchall()
            facts.add((digest, str(store.sql(query).fetchall())))
    assert len(facts) == 1


def test_a_device_map_of_a_recipe_is_for_one_process(qwen, monkeypatch):
    section = sections.PretrainedModel(
        arch="pretrained", path=str(qwen), untrained=True, device_map="auto"
    )
    ids = torch.tensor([[1, 2, 3]])
    plain = open_section(section.model_copy(update={"device_map": None}), seed=3)
    with torch.no_grad():
        assert torch.equal(open_section(section, seed=3)(ids).logits, plain(ids).logits)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModelError, match=r"spreads one model .* 2 processes were launched"):
        open_section(section, seed=3)
    with pytest.raises(ModelError, match="want device='cpu' or device_map='auto', got both"):
        lm.open_model(qwen, device="cpu", device_map="auto")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks
def test_an_adapter_that_adds_tokens_is_refused(qwen, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(qwen)
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(model, prefix).save_pretrained(tmp_path / "prefix")
    with pytest.raises(ModelError, match="adds tokens to every input .*; use a LoRA adapter"):
        lm.open_model(qwen, adapter=tmp_path / "prefix")


def test_models_that_are_not_there_are_told(qwen, tmp_path):
    with pytest.raises(ModelError, match="no such folder; want one that save_pretrained wrote"):
        model_folder("./absent")
    with pytest.raises(ModelError, match="a folder has no revision 'v2'"):
        model_folder(qwen, "v2")
    with pytest.raises(ModelError, match="the Hugging Face Hub gives no model of that name"):
        model_folder("nobody/nothing", offline=True)
    torch.save({}, tmp_path / "pytorch_model.bin")
    shutil.copy(qwen / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"weights as pickles \(.bin\).*save_pretrained it to a"):
        lm.open_model(tmp_path)


def test_a_name_of_the_hub_is_downloaded_once(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        files = {path.name: path.read_bytes() for path in qwen.iterdir()}
        hub.commits["me/qwen3"] = [{}, {**files, "pytorch_model.bin": b"not taken"}]
        folder = model_folder("me/qwen3")
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert not (folder / "pytorch_model.bin").exists()
    assert model_folder("me/qwen3", offline=True) == folder


def test_two_processes_do_a_whole_run_together_and_agree_stage_by_stage(run, qwen, tmp_path):
    less = ["explain.explainers=[token_lookup]", "score.scorers=[token_selectivity]"]
    command = ("-m", "lmmono", "run", *settings(qwen, tmp_path), *less)
    assert forks.launch(2, *command) == [0, 0]
    two = lm.open_run(tmp_path / "my-qwen3")
    assert set(two.manifest.stages) == set(run.manifest.stages)
    assert all(record.state == "finished" for record in two.manifest.stages.values())
    assert lm.open_run(two.dir / "untrained").is_done("score")
    query = """SELECT hook, unit, control, value FROM all_scores
        WHERE metric = 'token_selectivity' ORDER BY ALL"""
    with astore.open(two.store_path) as a, astore.open(run.store_path) as b:
        acts = "SELECT hook, seq_id, pos, unit, act FROM activations ORDER BY ALL"
        assert a.sql(acts).fetchall() == b.sql(acts).fetchall()
        assert a.sql(query).fetchall() == b.sql(query).fetchall()
    assert forks.launch(2, *command) == [0, 0], "all is done: no process waits for another"


def test_recipes_come_with_it_are_run_by_name_and_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "quickstart" in shipped_recipes()
    assert lm.Recipe.load("quickstart") == lm.Recipe.load(shipped_recipes()["quickstart"])
    file = copy_recipe("quickstart", Path())
    assert file.read_bytes() == shipped_recipes()["quickstart"].read_bytes()
    file.write_text(file.read_text().replace("seed: 0", "seed: 5"))
    assert lm.Recipe.load("quickstart.yaml").seed == 5, "a file that is there wins"
    with pytest.raises(RecipeError, match="is there already; say another file"):
        copy_recipe("quickstart", Path())
    with pytest.raises(RecipeError, match="did you mean quickstart"):
        lm.Recipe.load("quikstart")
    with pytest.raises(RecipeError, match="did you mean quickstart"):
        copy_recipe("quikstart", Path())
