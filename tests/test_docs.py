"""The README: every fenced block is run, or checked where running makes no sense, and counted.

Blocks run in order in one folder, as a reader would run them, with the recipes made small.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import forks
import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = BLOCK.findall((ROOT / "README.md").read_text())
GUIDE_BLOCKS = BLOCK.findall((ROOT / "docs" / "dictionaries.md").read_text())
EXPLAINING_BLOCKS = BLOCK.findall((ROOT / "docs" / "explaining.md").read_text())
REPORT_BLOCKS = BLOCK.findall((ROOT / "docs" / "report.md").read_text())
YOUR_MODEL_BLOCKS = BLOCK.findall((ROOT / "docs" / "your_model.md").read_text())
METHODS_BLOCKS = BLOCK.findall((ROOT / "docs" / "methods.md").read_text())
STORE_BLOCKS = BLOCK.findall((ROOT / "activation_store" / "README.md").read_text())
RUNS = "runs/quickstart/crate"
SMALL = {
    "data": {"corpus": {"kind": "planted", "n_documents": 300}, "n_ctx": 32},
    "model": {"arch": "crate", "n_layers": 2, "d_model": 16, "n_heads": 2},
    "train": {"steps": 20, "batch_tokens": 512, "warmup_steps": 5, "eval_tokens": 1024},
    "capture": {"max_tokens": 4096, "max_density": 1.0},
    "dictionary": {
        "hooks": ["blocks.1.hook_resid_post"],
        "learn": [
            {"arch": "topk", "d_sae": 32, "k": 8, "steps": 60, "lr": 0.02},
            {"arch": "raw", "k": 8},
        ],
        "seeds": [0, 1],
        "max_tokens": 8192,
        "batch_tokens": 256,
        "eval_tokens": 1024,
        "latents": "topk-32-k8",
    },
    # so small a CRATE stays dense at the default sparsity, and dense codes are refused as rows
    "arms": {
        "crate": {"model.arch": "crate", "model.sparsity": 1.0},
        "gpt2": {"model.arch": "gpt2"},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder like a checkout's, whose recipes take seconds."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    yaml = YAML()
    for path in (folder / "recipes").glob("*.yaml"):
        recipe = yaml.load(path)
        recipe.update(SMALL)
        yaml.dump(recipe, path)
    return folder


def run_bash(block: str, folder: Path) -> Counter[str]:
    """Run the `lmmono` lines of a block; see that what other lines name is there."""
    counted: Counter[str] = Counter()
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        counted[words[0]] += 1
        if words[0] == "lmmono":
            forks.run("-m", "lmmono", *words[1:], cwd=folder)
        elif words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(words[1:]) <= set(targets), line
        elif words[0] == "accelerate":
            assert words[1:4] == ["launch", "-m", "lmmono"], line
            assert words[4] in ("run", "train"), line
            assert "=" in words[5] or (ROOT / words[5]).is_file(), line
        else:
            raise AssertionError(f"no test runs this line of the README: {line}")
    return counted


def run_python(block: str, folder: Path) -> Counter[str]:
    strict = "import warnings\nwarnings.filterwarnings('error', module='__main__')\n"
    forks.run("-c", strict + block, cwd=folder)
    return Counter({"python": 1})


def run_sql(block: str, folder: Path) -> Counter[str]:
    queries = [text for text in block.split(";") if text.strip()]
    for query in queries:
        # after a `--`, since a query that begins with a comment looks like an option
        forks.run("-m", "lmmono", "sql", RUNS, "--", query, cwd=folder)
    return Counter({"sql": len(queries)})


def test_every_block_of_the_readme_does_what_it_says(folder):
    runners = {"bash": run_bash, "python": run_python, "sql": run_sql}
    counted: Counter[str] = Counter()
    for language, block in BLOCKS:
        counted += runners[language](block, folder)
    languages = Counter(language for language, _ in BLOCKS)
    assert set(languages) == set(runners), "the same tour on the command line, in Python, in SQL"
    assert counted["python"] == languages["python"]
    assert counted["sql"] >= languages["sql"]
    assert counted["lmmono"] >= 5 and counted["make"] >= 2
    names = [words.split()[0] for _, block in BLOCKS for words in block.splitlines() if words]
    assert counted["lmmono"] == names.count("lmmono"), "a line was passed over"


def test_the_guide_to_dictionaries_does_what_it_says(folder):
    counted: Counter[str] = Counter()
    for language, block in GUIDE_BLOCKS:
        if language == "yaml":
            (folder / "guide.yaml").write_text(
                "name: guide\nseed: 0\nmodel: {arch: crate}\n" + block
            )
            counted += run_bash("lmmono check guide.yaml", folder)
        else:
            counted += {"bash": run_bash, "python": run_python}[language](block, folder)
    assert counted == {"lmmono": 4, "python": 1}
    assert (folder / "pareto.svg").is_file()


def test_the_guide_to_explaining_does_what_it_says(folder):
    runners = {"bash": run_bash, "python": run_python, "sql": run_sql}
    counted: Counter[str] = Counter()
    for language, block in EXPLAINING_BLOCKS:
        if language == "yaml":
            text = "name: guide\nseed: 0\nmodel: {arch: crate}\n" + block
            (folder / "guide.yaml").write_text(text)
            counted += run_bash("lmmono check guide.yaml", folder)
        else:
            counted += runners[language](block, folder)
    assert counted == {"lmmono": 4, "python": 1, "sql": 3}
    assert list((folder / "upload").glob("*/1-lmmono/scores/batch-0.jsonl.gz"))
    assert len(list((folder / "neurons" / "1").glob("*.jsonl"))) == 16


def test_the_guide_to_reports_does_what_it_says(folder):
    counted: Counter[str] = Counter()
    for language, block in REPORT_BLOCKS:
        counted += {"bash": run_bash, "python": run_python}[language](block, folder)
    assert counted == {"lmmono": 3, "python": 1}
    assert "Where to look first" in (folder / "report.html").read_text()
    assert (folder / "both.html").is_file() and (folder / "layers.svg").is_file()


def test_the_guide_to_a_model_of_ones_own_does_what_it_says(tmp_path):
    from small_models import SIZES
    from transformers import AutoConfig, AutoModelForCausalLM

    from lmmono.data.planted import Language
    from lmmono.data.tokenizers import build_tokenizer
    from lmmono.recipe import sections

    corpus = sections.PlantedCorpus(n_documents=200)
    tokenizer = build_tokenizer(sections.WordTokenizer(), corpus, sections.Splits())
    sizes = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 128}
    config = AutoConfig.for_model("gpt2", **sizes | {"initializer_range": 0.02})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "my-model")
    tokenizer.save_pretrained(tmp_path / "my-model")
    planted = Language(corpus.language_seed)
    (tmp_path / "texts").mkdir()
    text = "\n\n".join(planted.text(i) for i in range(corpus.n_documents))
    (tmp_path / "texts" / "all.txt").write_text(text)
    counted: Counter[str] = Counter()
    for language, block in YOUR_MODEL_BLOCKS:
        if language == "yaml":
            head = "name: guide\nseed: 0\nmodel: {arch: crate}\n"
            (tmp_path / "guide.yaml").write_text(head + block)
            counted += run_bash("lmmono check guide.yaml", tmp_path)
        else:
            counted += {"bash": run_bash, "python": run_python}[language](block, tmp_path)
    assert counted == {"lmmono": 4, "python": 1, "accelerate": 1}
    assert (tmp_path / "runs" / "mine" / "my-model" / "untrained" / "store.duckdb").is_file()


def test_the_guide_to_methods_does_what_it_says(folder):
    counted: Counter[str] = Counter()
    script = ""
    for language, block in METHODS_BLOCKS:
        if language == "yaml":
            text = "name: guide\nseed: 0\nmodel: {arch: crate}\n" + block
            (folder / "guide.yaml").write_text(text)
            counted += run_bash("lmmono check guide.yaml", folder)
        elif language == "python":  # one reader, one session: names go on from block to block
            script += block
        else:
            counted += run_bash(block, folder)
    counted += run_python(script, folder)
    assert counted["python"] == 1 and counted["lmmono"] >= 2


def test_the_guide_to_methods_names_every_method():
    from lmmono.registry.methods import METHODS

    named = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "methods.md").read_text()))
    assert set(METHODS) <= named


def test_the_guide_to_explaining_names_every_explainer_scorer_and_kind():
    from lmmono.records.sampler import KINDS
    from lmmono.registry.explainers import EXPLAINERS
    from lmmono.registry.scorers import SCORERS

    text = (ROOT / "docs" / "explaining.md").read_text()
    named = set(re.findall(r"`(\w+)`", text))
    assert {*EXPLAINERS, *SCORERS, *KINDS} <= named


def test_the_python_tour_finds_features_better_than_its_control(folder):
    told = forks.run("recipes/tour.py", cwd=folder)
    found, control = (float(n) for n in re.findall(r"(?:features|row): (0\.\d+)", told))
    assert abs(control - 0.5) < 0.1 and found > control + 0.05, told


def test_the_stores_readme_works_without_lmmono(tmp_path):
    assert [language for language, _ in STORE_BLOCKS] == ["python"]
    guard = "import sys\nsys.modules['lmmono'] = None\n"
    command = [sys.executable, "-c", guard + STORE_BLOCKS[0][1]]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "mine" / "store.duckdb").is_file()


def test_the_readme_is_short_and_points_at_what_exists():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    assert text.count("```") % 2 == 0
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_commands_that_the_readme_names_in_passing_exist():
    from lmmono.cli.app import app

    text = (ROOT / "README.md").read_text()
    known = {c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    named = set(re.findall(r"`lmmono ([a-z]+)", text))
    assert named <= known, named - known
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
