"""The house: budgets, imports, pinned versions, and commands that are written down once."""

import ast
import os
import re
import statistics
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lmmono", "activation_store")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAMES_THAT_SAY_NOTHING = {"utils", "common", "helpers", "manager", "base", "misc"}
LAZY = {"sae_lens", "transformer_lens"}
FREE_OF_TORCH = ("cli", "types", "errors", "recipe", "run", "durable", "manifest", "provenance")


def functions(tree: ast.AST):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


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


def test_functions_and_files_stay_short():
    lengths: list[int] = []
    for path in SOURCES:
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path}: over 400 lines"
        assert path.stem not in NAMES_THAT_SAY_NOTHING, path
        for node in functions(ast.parse(text)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            length = (node.end_lineno or first) - first + 1
            assert length <= 60, f"{path}:{node.lineno}: {node.name} is {length} lines"
            lengths.append(length)
    lengths.sort()
    assert statistics.median(lengths) <= 12
    assert lengths[int(0.9 * (len(lengths) - 1))] <= 35


def test_only_the_command_line_prints():
    for path in SOURCES:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        prints = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert not prints or path == ROOT / "lmmono" / "cli.py", f"{path}:{prints}"


def test_verbs_of_the_command_line_have_short_bodies():
    tree = ast.parse((ROOT / "lmmono" / "cli.py").read_text())
    verbs = [node for node in functions(tree) if node.decorator_list]
    assert len(verbs) >= 9
    for verb in verbs:
        code = verb.body[1:]  # after the docstring
        lines = (code[-1].end_lineno or 0) - code[0].lineno + 1
        assert lines <= 8, f"{verb.name}: {lines} lines"


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
    assert "torch==2.13.0" in makefile
