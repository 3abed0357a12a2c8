"""Recipes: every fault at once with its line, overrides, arms and seeds, digests, JSON Schema."""

import json
import re
import time
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from lmmono.cli.doc_pages import PAGES
from lmmono.errors import RecipeError
from lmmono.recipe import SECTIONS, Recipe
from lmmono.recipe.recipe import schema_text
from lmmono.recipe.reference import settings_markdown
from lmmono.recipe.sections import CrateModel, Data, Gpt2Model, PlantedCorpus, Train
from lmmono.recipe.tree import read_override
from lmmono.runs.stages import STAGES

RECIPES = Path(__file__).parents[1] / "recipes"

TWINS = """\
name: twins
seed: 0
data:
  corpus: {n_documents: 500}
model:
  arch: crate
  n_layers: 3
train:
  steps: 300
arms:
  crate: {model.arch: crate}
  gpt2: {model.arch: gpt2, train.lr: 1e-3}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a recipe under the name r.yaml in the working folder, and return that name."""
    monkeypatch.chdir(tmp_path)

    def written(text: str) -> str:
        Path("r.yaml").write_text(text)
        return "r.yaml"

    return written


def faults(path: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, *overrides).runs()
    assert str(caught.value) == "\n".join(caught.value.faults)
    return list(caught.value.faults)


def single(path: str, *overrides: str) -> Recipe:
    return Recipe.load(path, "arm=crate", *overrides)


def test_a_faulty_recipe_drives_no_terminal_from_python_either(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text('name: x\nseed: 0\n"\\e]0;title\\a\\u202e": 1\n')
    with pytest.raises(RecipeError, match="unknown key") as told:
        Recipe.load(path)
    for text in (str(told.value), "".join(told.value.faults)):
        assert "<U+001B>]0;title<U+0007><U+202E>" in text and "\x1b" not in text


def test_every_fault_of_a_file_is_told_at_once_with_its_line(write):
    path = write(
        """\
name: "bad name"
seeds: [0, 1]
seed: 3
data:
  n_ctx: 100
  corpus: {kind: plantd}
  tokenizer: {kind: bpe, d_vocab: 3, foo: 1}
model:
  arch: crate
  n_layer: 2
  step_size: fast
train:
  steps: ten
  steps: 5
  warmup_steps: -1
  precision: bf-16
  batch_tokens: true
capture:
  splits: [explain, scor]
  max_tokens: 1.5
arms:
  crate: {model.arch: crate, name: x}
  empty:
"""
    )
    assert faults(path) == [
        "r.yaml:1: name: want text matching ^[A-Za-z0-9][A-Za-z0-9_.-]*$, got 'bad name'",
        "r.yaml:3: seed: want seed (an integer >= 0) or seeds (a list of them), got both",
        "r.yaml:6: data.corpus.kind: want one of files, hub, planted, got 'plantd'; "
        "did you mean planted?",
        "r.yaml:7: data.tokenizer.d_vocab: want an integer >= 257, got 3",
        "r.yaml:7: data.tokenizer.foo: unknown key; known: kind, d_vocab",
        "r.yaml:10: model.n_layer: unknown key; did you mean n_layers?",
        "r.yaml:11: model.step_size: want a number > 0.0 or lipschitz, got 'fast'",
        "r.yaml:13: train.steps: want an integer >= 0, got 'ten'",
        "r.yaml:14: train.steps: written twice, first in line 13",
        "r.yaml:15: train.warmup_steps: want an integer >= 0, got -1",
        "r.yaml:16: train.precision: want one of fp32, bf16, auto, got 'bf-16'; did you mean bf16?",
        "r.yaml:17: train.batch_tokens: want an integer >= 1, got true",
        "r.yaml:19: capture.splits[1]: want one of train, val, explain, score, got 'scor'; "
        "did you mean score?",
        "r.yaml:20: capture.max_tokens: want an integer >= 1 or null, got 1.5",
        "r.yaml:22: arm crate: name: want a setting of a section; "
        "known: data, model, train, capture, dictionary, explain, score, robustness",
        "r.yaml:23: arms.empty: want a mapping, got null",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "r.yaml:1: want a mapping such as `name: my_run`, got nothing"),
        ("- a\n- b\n", "r.yaml:1: want a mapping such as `name: my_run`, got a list"),
        ("name: a\nseed: [1\n", "r.yaml:3: not YAML: "),
        ("name: a\n\tseed: 1\n", "r.yaml:2: not YAML: "),
        ("name: a\nseed: !!python/name:os.system 1\n", "r.yaml:2: seed: want a plain value"),
        ("name: a\n? [x]\n: 1\n", "r.yaml:2: want text as a key"),
    ],
)
def test_what_is_no_recipe_is_said_to_be_none(write, text, fault):
    assert any(line.startswith(fault) for line in faults(write(text)))


LAUGHS = "".join(
    f"x{i}: &x{i} [{', '.join([f'*x{i - 1}' if i else 'lol'] * 9)}]\n" for i in range(7)
)
ONE_LINE = "name: a\nseed: 1\nmodel: {arch: crate}\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (LAUGHS, "r.yaml:2: aliases are not read; write the value of *x0 out"),
        ("name: &a a\nabout: *a\n", "r.yaml:2: aliases are not read"),
        ("a: &a {b: 1}\nc: {<<: *a}\n", "r.yaml:2: aliases are not read"),
        ("about: &a [*a]\n", "r.yaml:1: aliases are not read"),
        ("about: " + "[" * 500 + "]" * 500, "r.yaml:1: want at most 50 lists and mappings"),
        ("a: " + "{b: " * 5000, "r.yaml:1: want at most 50 lists and mappings"),
        ("seeds: [" + "1, " * 30_000 + "]", "r.yaml:1: want at most 10,000 keys and values"),
        (f"about: {'x' * 1_000_001}", "r.yaml: want a recipe of at most 1,000,000 bytes"),
        (ONE_LINE + "train: {steps: " + "9" * 5000 + "}", "train.steps: want a number of at"),
        (ONE_LINE + "train: {lr: 0x" + "f" * 5000 + "}", "r.yaml:4: train.lr: want a number of at"),
        (ONE_LINE + "train: {steps: !!int 4x}", "r.yaml:4: train.steps: want a plain value, got "),
        (ONE_LINE + "train: {steps: !!bool maybe}", "r.yaml:4: train.steps: want a plain value,"),
        (ONE_LINE + "train: {lr: !!float x}", "r.yaml:4: train.lr: want a plain value, got 'x'"),
        (ONE_LINE + "about: !!binary x", "r.yaml:4: about: want a plain value, got the tag"),
        (ONE_LINE + 'about: "\\U00110000"', "r.yaml: not YAML: "),
        (ONE_LINE + 'out: "a\\0b"', "r.yaml:4: out: want text that a file can hold"),
        (ONE_LINE + 'about: "\\ud800"', "r.yaml:4: about: want text that a file can hold"),
        (ONE_LINE.replace("seed: 1", "seeds: []"), "r.yaml:2: seeds: want seed (an integer >= 0) "),
        (ONE_LINE + f"arms: {dict.fromkeys(map(str, range(1001)), {})}", "want at most 1000 runs"),
        (ONE_LINE.replace("seed: 1", f"seeds: {[*range(1001)]}"), "want at most 1000 runs"),
        (ONE_LINE + "--- {}", "r.yaml:4: not YAML: "),
        (ONE_LINE + "%TAG ! !x", "r.yaml:"),
    ],
)  # fmt: skip
def test_a_hostile_file_is_refused_with_a_line_and_quickly(write, text, fault):
    began = time.process_time()
    told = faults(write(text))
    assert any(fault in line for line in told), told
    assert max(map(len, told)) < 400
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    "override",
    [
        *("train.steps=" + "9" * 5000, "about=" + "[" * 500, "about=&a [*a]", "seeds=[]"),
        *('out="a\\0b"', 'about="\\U00110000"', "a." * 60 + "b=1", "train.lr=!!float x"),
    ],
)  # fmt: skip
def test_a_hostile_override_is_refused(write, override):
    assert faults(write(TWINS), override)


def test_a_name_with_a_null_character_is_no_file(write):
    assert faults("a\0.yaml")[0].endswith("cannot be read: embedded null byte")


def test_files_that_cannot_be_read_are_named(write, tmp_path):
    write(TWINS)
    Path("latin.yaml").write_bytes(b"name: caf\xe9\n")
    (missing,) = faults("q.yaml")
    assert missing.startswith("q.yaml: no such file; did you mean ") and "r.yaml" in missing
    assert faults(str(tmp_path)) == [f"{tmp_path}: want a recipe file, got a folder"]
    assert faults("latin.yaml") == ["latin.yaml: not text in UTF-8 (byte 9)"]


def test_a_missing_setting_is_told_at_its_section(write):
    assert faults(write("seed: 1\ndata:\n  corpus: {kind: files}\n")) == [
        "r.yaml:1: model: missing; want a mapping with arch",
        "r.yaml:1: name: missing; want text matching ^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        "r.yaml:3: data.corpus.paths: missing; want a list of at least 1 text",
    ]
    assert faults(write("name: a\nmodel: {n_layers: 2}\n")) == [
        "r.yaml:1: seed: want seed (an integer >= 0) or seeds (a list of them), got neither",
        "r.yaml:2: model.arch: missing; want one of crate, gpt2, pretrained",
    ]


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("train.steps=ten", "want an integer >= 0, got 'ten'"),
        ("train.step=9", "unknown key; did you mean steps?"),
        ("tran.steps=9", "tran: unknown key; did you mean train?"),
        ("train.steps=20", "train.warmup_steps: want fewer than train.steps (20), got 50"),
        ("data.n_ctx=100", "train.batch_tokens: want a multiple of data.n_ctx (100), got 8192"),
        ("model.n_heads=5", "want a divisor of d_model (128), got 5"),
        ("train.steps.x=1", "cannot set train.steps.x: train.steps is 300"),
        ("train=5", "want a mapping, got 5"),
        ("train.lr=.inf", "want a number > 0.0, got inf"),
        ("seed=-1", "want an integer >= 0 and < 4294967296, got -1"),
        ("arm=gpt3", "want one of crate, gpt2, got 'gpt3'"),
        ("arms={}", "arms cannot be overridden; override the setting, or say arm=..."),
        ("train.steps", "want key=value such as train.steps=500"),
        ("=1", "want key=value such as train.steps=500"),
    ],
)
def test_an_override_at_fault_is_named(write, override, fault):
    assert faults(write(TWINS), override) == [f"override {override}: {fault}"]


def test_faults_of_several_overrides_and_of_the_file_come_together(write):
    path = write(TWINS.replace("n_layers: 3", "n_layers: no"))
    assert faults(path, "train.steps=x", "train.lr=[1", "capture.top_k=0") == [
        "override capture.top_k=0: want an integer >= 1, got 0",
        "override train.steps=x: want an integer >= 0, got 'x'",
        "r.yaml:7: model.n_layers: want an integer >= 1, got 'no'",
        "override train.lr=[1: not YAML: expected ',' or ']', but got '<stream end>'",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), ("1e-3", 1e-3), ("1_000", 1000), ("true", True), ("yes", "yes"), ("~", None),
        ("", None), ("'5'", "5"), ("[a, 2]", ("a", 2)), ("{k: [1]}", {"k": (1,)}), ("a b", "a b"),
        ("2020-01-01", "2020-01-01"), ("0x10", 16),
    ],
)  # fmt: skip
def test_an_overrides_value_is_read_as_yaml_1_2(text, value):
    assert read_override(f"a={text}").values == {"a": value}


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text("ab c", min_size=1), st.lists)
)
def test_any_json_value_survives_an_override(value):
    def plain(node):
        return tuple(map(plain, node)) if isinstance(node, list) else node

    assert read_override(f"a={json.dumps(value)}").values == {"a": plain(value)}


def test_arms_and_seeds_give_one_run_folder_each(write):
    recipe = Recipe.load(write(TWINS.replace("seed: 0", "seeds: [3, 5]")))
    assert [(str(r.dir), r.arm, r.seed, r.model.arch) for r in recipe.runs()] == [
        ("runs/twins/crate-seed3", "crate", 3, "crate"),
        ("runs/twins/crate-seed5", "crate", 5, "crate"),
        ("runs/twins/gpt2-seed3", "gpt2", 3, "gpt2"),
        ("runs/twins/gpt2-seed5", "gpt2", 5, "gpt2"),
    ]
    with pytest.raises(RecipeError, match=r"want one run, got 4 \(crate-seed3, .*arm="):
        recipe.only()


def test_a_single_run_lies_under_its_name(write):
    text = TWINS[: TWINS.index("arms:")]
    recipe = Recipe.load(write(text), "out=elsewhere")
    assert recipe.runs() == (recipe,)
    assert recipe.dir == Path("elsewhere/twins")
    seeds = Recipe.load(write(text.replace("seed: 0", "seeds: [1, 2]"))).runs()
    assert [str(r.dir) for r in seeds] == ["runs/twins/seed1", "runs/twins/seed2"]


@pytest.mark.parametrize(
    ("overrides", "folders"),
    [
        (("model.arch=crate",), ["crate"]),
        (("model.arch=gpt2", "train.steps=500"), ["gpt2"]),
        (("arm=gpt2",), ["gpt2"]),
        (("train.lr=0.001",), ["crate", "gpt2"]),
        (("train.lr=0.01",), ["crate"]),
        (("seed=7",), ["crate", "gpt2"]),
        (("seeds=[1, 2]", "arm=crate"), ["crate-seed1", "crate-seed2"]),
    ],
)
def test_overrides_also_select_the_arms_that_agree_with_them(write, overrides, folders):
    runs = Recipe.load(write(TWINS), *overrides).runs()
    assert [run.folder for run in runs] == folders


def test_one_run_left_is_returned_as_that_run(write):
    recipe = Recipe.load(write(TWINS), "model.arch=gpt2", "train.steps=500")
    assert isinstance(recipe.model, Gpt2Model)
    assert (recipe.model.n_layers, recipe.train.lr, recipe.train.steps) == (3, 1e-3, 500)
    assert recipe.runs() == (recipe,)
    assert recipe.only() is recipe


def test_an_override_that_no_arm_agrees_with_leaves_none(write):
    path = write(TWINS.replace("train.lr: 1e-3", "train.steps: 400"))
    path = write(Path(path).read_text().replace("{model.arch: crate}", "{train.steps: 200}"))
    assert faults(path, "train.steps=600") == [
        "override train.steps=600: leaves none of the arms crate, gpt2"
    ]


def test_seed_overrides_replace_the_files_seeds_and_keep_its_folders(write):
    recipe = Recipe.load(write(TWINS.replace("seed: 0", "seeds: [3, 5]")), "seed=5", "arm=crate")
    assert (recipe.seed, str(recipe.dir)) == (5, "runs/twins/crate-seed5")


def test_an_arm_of_another_kind_refuses_explicit_settings_of_the_first(write):
    path = write(TWINS.replace("n_layers: 3", "n_layers: 3\n  sparsity: 0.2"))
    assert faults(path) == [
        "r.yaml:8: arm gpt2: model.sparsity: not a setting of arch: gpt2; leave it out, "
        "or write model: {arch: gpt2, ...}"
    ]


def test_an_arm_may_replace_a_whole_section_and_overrides_win_over_it(write):
    text = TWINS.replace("{model.arch: gpt2, train.lr: 1e-3}", "{model: {arch: gpt2, d_model: 64}}")
    gpt2 = Recipe.load(write(text)).runs()[1]
    assert gpt2.model == Gpt2Model(arch="gpt2", d_model=64)
    smaller = Recipe.load(write(text), "model.d_model=32").runs()
    assert [run.model.d_model for run in smaller] == [32]  # the arm that says 64 is not run
    deeper = Recipe.load(write(text), "model.n_layers=5").runs()
    assert [run.model.n_layers for run in deeper] == [5, 5]


def test_faults_inside_an_arm_name_arm_and_line(write):
    text = TWINS.replace("train.lr: 1e-3", "train.lr: fast, model.n_head: 2, modle.d_model: 3")
    assert faults(write(text)) == [
        "r.yaml:12: arm gpt2: model.n_head: unknown key; did you mean n_heads?",
        "r.yaml:12: arm gpt2: modle.d_model: want a setting of a section; did you mean model?",
        "r.yaml:12: arm gpt2: train.lr: want a number > 0.0, got 'fast'",
    ]


def test_faults_across_sections_are_told_beside_all_others(write):
    text = TWINS.replace("steps: 300", "steps: 300\n  batch_tokens: 1000\ncapture:\n  top_k: no")
    assert faults(write(text)) == [
        "r.yaml:10: train.batch_tokens: want a multiple of data.n_ctx (128), got 1000",
        "r.yaml:12: capture.top_k: want an integer >= 1, got 'no'",
    ]


def test_check_knows_the_files_that_a_recipe_and_its_arms_name(write):
    path = write(
        TWINS.replace(
            "{n_documents: 500}", "{kind: files, paths: [texts, texts/*.txt, text/a.txt]}"
        )
        .replace("model:\n", "  tokenizer: {kind: folder, path: tok}\nmodel:\n")
        .replace("train:\n", "train:\n  minimal_pairs: pairs.jsonl\n")
        .replace("train.lr: 1e-3}", "train.minimal_pairs: pairs/blimp}")
    )
    assert len(Recipe.load(path).runs()) == 2, "a recipe may be read where its files are not"
    Path("texts").mkdir()
    Path("pairs.json").touch()
    with pytest.raises(RecipeError) as caught:
        Recipe.check(path)
    want = "want a file, folder or glob that is there, got"
    assert caught.value.faults == (
        f"r.yaml:4: data.corpus.paths[1]: {want} 'texts/*.txt': there is nothing in texts",
        f"r.yaml:4: data.corpus.paths[2]: {want} 'text/a.txt': there is no folder text",
        f"r.yaml:5: data.tokenizer.path: {want} 'tok'; known: pairs.json, r.yaml, texts",
        f"r.yaml:10: train.minimal_pairs: {want} 'pairs.jsonl'; did you mean pairs.json?",
        f"r.yaml:14: arm gpt2: train.minimal_pairs: {want} 'pairs/blimp': there is no folder pairs",
    )
    for name in ("text", "tok", "pairs"):
        Path(name).mkdir()
    for name in ("texts/b.txt", "text/a.txt", "pairs.jsonl", "pairs/blimp"):
        Path(name).touch()
    assert [run.arm for run in Recipe.check(path)] == ["crate", "gpt2"]


DICTIONARY = """\
dictionary:
  hooks: []
  learn:
    - {arch: topk, expansion: 4, k: 16}
    - {arch: topk, expansion: 4, k: 16, lr: 1e-4}
    - {arch: raw, kk: 3}
    - {arch: tpk}
    - {arch: standard, coefficient: 1, d_sae: 30, k: 4}
    - {arch: batchtopk, k: 3}
    - {arch: kmeans, d_sae: 8, name: a b}
  controls: [shufled]
  latents: topk-x4-k6
"""


def test_dictionaries_are_checked_entry_by_entry(write):
    archs = (
        "batchtopk, dense, dictionary_learning, gated, ica, jumprelu, kmeans, "
        "matching_pursuit, matryoshka_batchtopk, nmf, pca, random, raw, standard, topk"
    )
    assert faults(write(TWINS.replace("arms:", DICTIONARY + "arms:"))) == [
        "r.yaml:11: dictionary.hooks: want a list of at least 1 text, got a list",
        "r.yaml:15: dictionary.learn[2].kk: unknown key; did you mean k?",
        f"r.yaml:16: dictionary.learn[3].arch: want one of {archs}, got 'tpk'; did you mean topk?",
        "r.yaml:17: dictionary.learn[4].k: not a setting of arch: standard; leave it out, "
        "or write dictionary.learn[4]: {arch: standard, ...}",
        "r.yaml:18: dictionary.learn[5].d_sae: want d_sae or expansion, one of them",
        "r.yaml:19: dictionary.learn[6].name: want text matching ^[A-Za-z0-9][A-Za-z0-9_-]*$ "
        "or null, got 'a b'",
        "r.yaml:20: dictionary.controls[0]: want one of shuffled, untrained, got 'shufled'; "
        "did you mean shuffled?",
    ]


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        (
            "dictionary.learn=[{arch: pca, d_sae: 4}, {arch: pca, d_sae: 4, k: 2, name: pca-4}]",
            "dictionary.learn[1].name: want a name of its own: dictionary.learn[0] gives pca-4 too",
        ),
        ("dictionary.seeds=[1, 1]", "want every seed once"),
        (
            "dictionary.latents=topk-x4-k6",
            "want the name of an entry of learn, got 'topk-x4-k6'; did you mean topk-x4-k16?",
        ),
        (
            "dictionary.latents=raw",
            "want a code that is never negative; that of raw is signed",
        ),
    ],
)
def test_dictionaries_must_fit_each_other(write, override, fault):
    section = "dictionary: {learn: [{arch: topk, expansion: 4, k: 16}, {arch: raw}]}\n"
    path = write(TWINS.replace("arms:", section + "arms:"))
    assert faults(path, override) == [f"override {override}: {fault}"]


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("{arch: batchtopk, expansion: 16, k: 32}", "batchtopk-x16-k32"),
        ("{arch: jumprelu, d_sae: 64, target_l0: 7.5}", "jumprelu-64-l0_7_5"),
        ("{arch: jumprelu, d_sae: 64}", "jumprelu-64-c1"),
        ("{arch: standard, d_sae: 64, coefficient: 1e-5}", "standard-64-c1e-05"),
        ("{arch: raw}", "raw"),
        ("{arch: pca, expansion: 1, name: mine}", "mine"),
    ],
)
def test_a_dictionary_without_a_name_is_named_after_what_it_is(write, entry, name):
    recipe = single(write(TWINS), f"dictionary.learn=[{entry}]")
    assert recipe.dictionary.names == (name,)
    assert "name" not in recipe.dictionary.learn[0].settings


def test_every_entry_is_planned_with_every_seed_and_saes_with_their_controls(write):
    learn = "[{arch: topk, expansion: 2, k: 3}, {arch: random, d_sae: 8, k: 3}, {arch: raw}]"
    several = ("dictionary.seeds=[4, 5]", "dictionary.controls=[shuffled]")
    planned = single(write(TWINS), f"dictionary.learn={learn}", *several).dictionary.planned
    assert [(each.name, each.seed, each.control) for each in planned] == [
        ("topk-x2-k3-seed4", 4, None),
        ("topk-x2-k3-seed5", 5, None),
        ("topk-x2-k3-shuffled", 4, "shuffled"),
        ("random-8-k3-seed4", 4, None),
        ("random-8-k3-seed5", 5, None),
        ("raw", 4, None),
    ]
    once = single(write(TWINS), f"dictionary.learn={learn}").dictionary.planned
    assert [each.name for each in once] == ["topk-x2-k3", "random-8-k3", "raw"]


def test_a_changed_dictionary_and_what_reads_it_are_all_that_is_stale(write):
    before = single(write(TWINS))
    more = single(write(TWINS), "dictionary.learn=[{arch: raw}]")
    other = single(write(TWINS), "dictionary.max_tokens=1000")
    deeper = single(write(TWINS), "model.n_layers=4")
    sections = {name: stage.sections for name, stage in STAGES.items()}

    def stale(now: Recipe) -> list[str]:
        return [n for n, parts in sections.items() if now.digest(*parts) != before.digest(*parts)]

    readers = ["explain", "control", "step_scores", "score", "promotes", "robustness", "figures"]
    assert stale(more) == ["dictionary", *readers]
    assert stale(other) == ["vectors", "dictionary", *readers]
    assert stale(deeper) == list(STAGES)


def test_integers_are_taken_for_numbers_and_nothing_else_is_converted(write):
    assert single(write(TWINS), "train.lr=1").train.lr == 1.0
    for wrong in ("train.lr='1'", "train.steps=100.0", "train.compile=1", "name=5"):
        assert len(faults(write(TWINS), wrong)) == 1


def test_a_section_without_a_kind_keeps_the_default_kind(write):
    assert single(write(TWINS)).data.corpus == PlantedCorpus(n_documents=500)


def test_recipes_made_in_python_and_in_yaml_are_equal(write):
    by_hand = Recipe(
        name="twins",
        seed=0,
        data=Data(corpus=PlantedCorpus(n_documents=500)),
        model=CrateModel(arch="crate", n_layers=3),
        train=Train(steps=300),
        arms={"crate": {"model.arch": "crate"}, "gpt2": {"model.arch": "gpt2", "train.lr": 1e-3}},
    )
    assert by_hand == Recipe.load(write(TWINS))
    assert by_hand.runs() == Recipe.load(write(TWINS)).runs()
    assert Recipe.model_validate({**dict(by_hand), "seeds": (4, 5)}).runs()[0].seed == 4


def test_a_digest_covers_seed_and_named_sections_only(write):
    plain = single(write(TWINS))
    assert plain.digest("train") == single("r.yaml", "about=hello", "out=x", "name=y").digest(
        "train"
    )
    assert plain.digest("data") == single("r.yaml", "train.steps=9000").digest("data")
    explicit = single("r.yaml", "train.lr=0.002")  # the default, written out
    assert plain.digest(*SECTIONS) == explicit.digest(*SECTIONS)
    changed = [single("r.yaml", text) for text in ("seed=1", "train.lr=1", "data.n_ctx=64")]
    digests = {recipe.digest("data", "train") for recipe in [plain, *changed]}
    assert len(digests) == 4
    assert all(len(digest) == 64 for digest in digests)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_says_how_to_run_it(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "# yaml-language-server: $schema=recipe.schema.json"
    head = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert f"recipes/{path.name}" in head and "Minutes, hardware" in head
    recipe = Recipe.load(path)
    assert recipe.name == path.stem
    archs = {run.model.arch for run in recipe.runs()}
    single = {"robustness_planted": "crate", "robustness_doses": "crate"}
    single |= {"pretrained": "pretrained"}
    single |= dict.fromkeys(("flint", "continuity", "intervention"), "gpt2")
    # of models that study_depth has trained
    single |= dict.fromkeys(("study_robustness", "study_steering"), "pretrained")
    wanted = {single[path.stem]} if path.stem in single else {"crate", "gpt2"}
    assert archs - {"pretrained"} == wanted - {"pretrained"}
    assert "pretrained" not in wanted or archs == wanted


def test_the_json_schema_agrees_with_loading_and_make_writes_it_where_recipes_look(write):
    assert "recipes/recipe.schema.json: " in (RECIPES.parent / "Makefile").read_text()
    check = jsonschema.Draft202012Validator(json.loads(schema_text()))
    yaml = YAML(typ="safe", pure=True)
    texts = [path.read_text() for path in RECIPES.glob("*.yaml")] + [TWINS]
    assert all(check.is_valid(yaml.load(text)) for text in texts)
    for old, new in {
        "n_layers: 3": "n_layer: 3",
        "arch: crate\n": "arch: lstm\n",
        "train.lr": "train.lrr",
        "seed: 0\n": "",
        "steps: 300": "steps: ten",
    }.items():
        wrong = TWINS.replace(old, new)
        assert not check.is_valid(yaml.load(wrong)), new
        assert faults(write(wrong))


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_that_are_written_from_the_code_are_up_to_date(name: str):
    page = (RECIPES.parent / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert page == PAGES[name](), "make pages"


def test_the_site_leads_to_every_page():
    docs = RECIPES.parent / "docs"
    listed = re.findall(r"^ +- (\S+\.md)$", (docs.parent / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(p.relative_to(docs).as_posix() for p in docs.rglob("*.md"))


def test_the_page_of_settings_has_a_sentence_for_every_key():
    page = settings_markdown()
    keys = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(keys) > 150
    bare = [line for line in keys if line.endswith("|  |") and not re.search(r"kind`|arch`", line)]
    assert bare == []
    # by hand, from the class itself
    assert (
        "| `train.min_lr_fraction` | number >= 0, <= 1 | `0.1` | Learning rate at the end" in page
    )
    assert "| `capture.units` | list of integer >= 0, at least 1, or null | `null` |" in page


def test_the_schema_tells_what_each_key_is_for():
    text = json.loads(schema_text())
    assert text["$defs"]["Train"]["properties"]["steps"]["description"].startswith(
        "Optimizer steps"
    )
    assert text["properties"]["about"]["description"].startswith("What the recipe is for")
