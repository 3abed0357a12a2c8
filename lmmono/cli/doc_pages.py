"""Pages of `docs/` that are written from the code, so that they cannot say anything else."""

import ast
import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from lmmono.recipe.reference import settings_markdown
from lmmono.recipe.shipped import shipped_recipes


def metrics_markdown() -> str:
    """Return the page of every metric with its formula, and of every scorer with what it needs."""
    from lmmono.registry.metrics import METRICS
    from lmmono.registry.scorers import SCORERS

    parts = [
        "# Metrics and scorers",
        "",
        "One name is one formula. Every stored row names its metric and its version; a changed",
        "formula gets a new one. `lmmono schema --page metrics` writes this page.",
        "",
        "## Metrics",
        "",
        "| metric | version | unit or range | better | formula |",
        "|---|---|---|---|---|",
    ]
    for metric in METRICS.values():
        cells = (f"`{metric.name}`", metric.version, metric.unit, metric.better, metric.equation)
        parts.append(_row(*cells))
    parts += [
        "",
        "## Scorers",
        "",
        "Chance is what a guess gets; where it depends on the data, the controls say it. Least",
        "density: the least share of tokens on which a unit must fire for the scorer to rank its",
        "true explanation first ([results](results/scorers.md)); empty where not measured, none",
        "where it does so at no density.",
        "",
        "| scorer | measures | needs | chance | least density | writes | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for scorer in SCORERS.values():
        needs = ", ".join(scorer.needs) or "the store alone"
        chance = "" if scorer.chance is None else f"{scorer.chance:g}"
        writes = ", ".join(f"`{name}`" for name in scorer.metrics)
        least = "" if scorer.least_density is None else f"{scorer.least_density:g}"
        least = least.replace("inf", "none")
        cells = (scorer.about, needs, chance, least, writes, scorer.citation)
        parts.append(_row(f"`{scorer.name}`", *cells))
    return "\n".join(parts) + "\n"


def recipes_markdown() -> str:
    """Return the page of the recipes that come with lmmono, with the comments at their head."""
    parts = [
        "# Recipes",
        "",
        "They come with lmmono: `lmmono recipes` lists them, `lmmono recipes NAME` copies one to",
        "be changed, `lmmono run NAME` runs it. Every key is told in [settings](settings.md);",
        "`lmmono schema --page recipes` writes this page.",
    ]
    for name, path in shipped_recipes().items():
        parts += ["", f"## {name}", "", "```yaml", *_head(path), "```"]
    return "\n".join(parts) + "\n"


def _head(path: Path) -> list[str]:
    """Return the comments at the head of a recipe, without the line that editors read."""
    head: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line)
    first = 1 if head and "yaml-language-server" in head[0] else 0
    while first < len(head) and head[first].strip() == "#":
        first += 1
    return head[first:]


def api_markdown() -> str:
    """Return the page of the public names of `lmmono` and `activation_store`.

    A sentence for each stands here; the site adds arguments, results and errors from docstrings.
    """
    parts = [
        "# Python",
        "",
        "Every public name with its sentence; `help(lm.capture)` prints the rest, and so does the",
        "site that `make docs` builds. `lmmono schema --page api` writes this page.",
    ]
    for package in ("lmmono", "activation_store"):
        parts += ["", f"## {package}"]
        for name, home in sorted(_exports(package).items()):
            thing = getattr(import_module(package), name)
            sentence = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")
            parts += ["", f"### {package}.{name}", "", sentence]
            if not inspect.ismodule(thing):
                parts += ["", f"::: {home}.{name}"]
    return "\n".join(parts) + "\n"


def _exports(package: str) -> dict[str, str]:
    """Return where each public name of a package is made, as its stub says."""
    stub = Path(str(import_module(package).__file__)).with_suffix(".pyi")
    if not stub.is_file():  # written in the package itself
        return {name: package for name in import_module(package).__all__}
    return {
        alias.name: str(node.module)
        for node in ast.parse(stub.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def _row(*cells: object) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


PAGES: dict[str, Callable[[], str]] = {
    "settings": settings_markdown,
    "metrics": metrics_markdown,
    "recipes": recipes_markdown,
    "api": api_markdown,
}
"""The pages by name: `docs/NAME.md`."""
