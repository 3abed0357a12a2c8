"""The house: imports, pinned versions, and commands that are written down once."""

import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest

from lmmono.stats.bootstrap import ratio

ROOT = Path(__file__).parents[1]
PACKAGES = ("lmmono", "activation_store")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
LAZY = {"sae_lens", "transformer_lens"}
FREE_OF_TORCH = ("cli", "types", "errors", "files", "registry", "recipe", "runs", "pipeline")


def imported_at_the_top(path: Path) -> set[str]:
    """First parts of the modules that a file imports outside functions and type checking."""
    body = list(ast.parse(path.read_text()).body)
    found: set[str] = set()
    for node in body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Try):
            body += node.body
    return found


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name: version for name, version in pairs}


def distribution(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def test_every_commit_that_a_page_names_exists():
    """A word of 7 to 40 hexadecimal digits, letters and numbers among them, names a commit."""

    def git(*words: str, text: str = "") -> str:
        done = subprocess.run(
            ["git", "-C", ROOT, *words], input=text, capture_output=True, text=True
        )
        return done.stdout

    if git("rev-parse", "--is-shallow-repository").strip() != "false":
        pytest.skip("no checkout with its history")
    pages = [
        ROOT / "README.md",
        ROOT / "lmmono/registry/least_densities.py",
        *(ROOT / "docs").rglob("*.md"),
    ]
    named: dict[str, str] = {}
    for page in pages:
        for word in re.findall(r"\b[0-9a-f]{7,40}\b", page.read_text()):
            if re.search("[a-f]", word) and re.search("[0-9]", word):
                named[word] = page.name
    answers = git("cat-file", "--batch-check", text="\n".join(named)).splitlines()
    lost = [word for word, answer in zip(named, answers, strict=True) if " commit " not in answer]
    assert len(named) > 20
    assert not lost, f"no such commit: {[(word, named[word]) for word in lost]}"


def test_only_the_command_line_prints():
    for path in SOURCES:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        prints = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert not prints or path.parent == ROOT / "lmmono" / "cli", f"{path}:{prints}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_slow_imports_wait_until_they_are_used(path):
    top = imported_at_the_top(path)
    assert not top & LAZY
    part = path.relative_to(ROOT).with_suffix("").parts
    if part[0] == "activation_store" or part[1] in FREE_OF_TORCH:
        assert not top & {"torch", "transformers", "datasets", "accelerate", "tokenizers"}


def test_the_seven_packages_are_real_dependencies_and_all_are_pinned():
    needed = {distribution(text) for text in SETTINGS["project"]["dependencies"]}
    seven = {"torch", "transformers", "transformer-lens", "sae-lens", "datasets", "duckdb"}
    assert seven | {"accelerate"} <= needed
    extras = SETTINGS["project"]["optional-dependencies"].values()
    needed |= {distribution(text) for extra in extras for text in extra}
    versions = pinned()
    assert needed <= set(versions), f"not in constraints.txt: {needed - set(versions)}"
    assert versions["torch"] == "2.13.0"
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in versions.values())


def test_ci_runs_the_readmes_test_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert any(line.startswith("make test") for block in blocks for line in block.splitlines())
    assert "README.md" in script.read_text()
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "- run: .ci/run" in workflow


def test_every_make_target_that_is_named_anywhere_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    assert {"demo", "test", "check", "bench"} <= targets
    for name in (".pre-commit-config.yaml", ".github/workflows/ci.yml", ".ci/run", "Makefile"):
        for named in re.findall(r"(?:entry: |run: |^)make ([a-z ]+)", (ROOT / name).read_text()):
            assert set(named.split()) <= targets, f"{name}: make {named}"
    assert makefile.count("-c constraints.txt") == 1
    assert f"TORCH := {pinned()['torch']}\n" in makefile


@pytest.mark.parametrize("test", ["first", "second"])
def test_shapes_are_checked_in_every_test_however_often_a_function_was_called(test):
    """What `conftest.py` switches on: without it this and all other shapes go by unseen."""
    with pytest.raises(Exception, match="violates type hint"):
        ratio(np.ones(3), np.ones(4))
    for _ in range(50):  # more calls than a test checks
        ratio(np.ones(3), np.ones(3))
