"""`lmmono report`: runs in one HTML file that opens from disk, without a network.

Styles and scripts are written into the file, each with its hash in a content-security policy that
allows nothing else. Units' pages lie in it compressed, and are unpacked when they are asked for;
the first one of the list is there without scripts too.
"""

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

import activation_store as astore
from activation_store.pages import UnitPage, unit_pages
from activation_store.pages.templating import environment, static
from activation_store.pages.unit_page import Counting
from activation_store.printable import number
from lmmono.errors import RunError
from lmmono.files.atomic import write_atomic
from lmmono.registry.metrics import METRICS
from lmmono.reports.figures import pareto_figure
from lmmono.reports.layer_summary import layer_summaries
from lmmono.reports.pages.interest import (
    CRITERION,
    MIN_ACTIVATIONS,
    ONE_TOKEN,
    Interesting,
    best_of,
    ranked,
)
from lmmono.reports.pages.twins import SAMPLED_TOKENS, Twin, best_twins
from lmmono.reports.run_figures import (
    attribute_figure,
    figure_svg,
    layer_figure,
    loss_figure,
    score_figure,
)
from lmmono.reports.side_by_side import run_tables
from lmmono.reports.table import ReportTable
from lmmono.reports.unit_tables import explanation_tables, score_tables
from lmmono.runs.folder import Run, find_runs, open_run
from lmmono.types import Progress, silent

OWN = "lmmono.reports.pages"
SECTIONS = (
    ("training", "Training"),
    ("layers", "Layers"),
    ("scores", "Scores"),
    ("dictionaries", "Dictionaries"),
    ("robustness", "Robustness"),
    ("flint", "Attributes of classes"),
    ("explanations", "Explanations"),
)
N_LISTED = 10
"""Units in the list that a report begins with."""
N_TWINS = 6
"""Units of each hook that are put beside their twins."""

_UNITS = """
SELECT s.hook, s.unit, s.n_active, s.density, s.kurtosis, s.max_act, a.value, a.ci_low, a.ci_high
FROM unit_stats s
LEFT JOIN (
    SELECT hook, unit, value, ci_low, ci_high FROM scores WHERE metric = 'token_selectivity'
    QUALIFY row_number() OVER (PARTITION BY hook, unit ORDER BY created_at DESC) = 1
) a USING (hook, unit)
ORDER BY s.hook, coalesce(a.ci_low, -1) DESC, s.unit
"""


_RELEVANCES = """
SELECT dictionary, explainer, preset, unit, value FROM all_scores
WHERE metric = 'attribute_relevance' AND control IS NULL AND value IS NOT NULL ORDER BY ALL
"""


@dataclass(frozen=True)
class OfflineReport:
    """Runs as one HTML page, in memory until it is saved."""

    html: str = field(repr=False)
    """The whole file."""
    runs: tuple[str, ...]
    """Folders of the runs."""
    n_units: int
    """Units with a page in it."""

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all, and return its path.

        Raises:
            RunError: It cannot be written.
        """
        write_atomic(Path(path), self.html)
        return Path(path)

    def __repr__(self) -> str:
        size = len(self.html.encode()) / 1e6
        return f"OfflineReport({', '.join(self.runs)}: {self.n_units} unit pages, {size:.1f} MB)"


@dataclass(frozen=True, slots=True)
class _Pair:
    """A unit beside its twin, as the page names them."""

    twin: Twin
    left: str
    right: str
    names: tuple[str, str]


def report(
    *runs: str | Path | Run, units: int | None = 8, progress: Progress = silent
) -> OfflineReport:
    """Return a report of runs, side by side; each must be captured.

    Args:
        runs: Run folders, opened runs, or folders that hold runs, as a study's.
        units: Units of each hook that get a page, those most worth a look; None takes all.
        progress: Called with units done.

    Raises:
        RunError: There is no such run, or it holds no store yet.
        StoreError: A store cannot be opened.
    """
    opened = [run for each in runs for run in _opened(each)]
    if not opened:
        raise RunError("report: want a run; `lmmono run quickstart` makes one")
    for run in opened:
        if not run.store_path.is_file():
            raise RunError(f"{run.dir}: holds no store yet; run `lmmono capture {run.dir}` first")
    with ExitStack() as stack:
        stores = [stack.enter_context(run.reading()) for run in opened]
        names = [run.name for run in opened]
        best = [ranked(store, max(units or 0, 2 * N_LISTED)) for store in stores]
        hooks: list[dict[str, Any]] = []
        chosen: list[dict[str, list[int]]] = []
        for store, name, rows in zip(stores, names, best, strict=True):
            rows_of = _rows_of(store)
            hooks += [{"run": name, "hook": hook, "rows": some} for hook, some in rows_of.items()]
            chosen.append(_chosen(rows_of, rows, units))
        pairs = _pairs(stores, names, chosen)
        for run, twin in ((pair.names[1], pair.twin) for pair in pairs):
            here = chosen[names.index(run)].setdefault(twin.hook, [])
            here += [] if twin.twin in here else [twin.twin]
        parts = [
            _run_pages(store, name, rows[: 2 * N_LISTED], units_of, progress)
            for store, name, rows, units_of in zip(stores, names, best, chosen, strict=True)
        ]
        pages = {page_id: html for part in parts for page_id, html in part.pages.items()}
        firsts = [
            (name, part.listed[0], part.best)
            for name, part in zip(names, parts, strict=True)
            if part.best is not None
        ]
        # the most selective units stand at the head of the page, with more said of them
        tables = [
            table for table in run_tables(opened) if not table.title.startswith("Most selective")
        ]
        for store, name in zip(stores, names, strict=True):
            tables += [*explanation_tables(store, name), *score_tables(store, name)]
        facts = [_facts(run) for run in opened]
        html = _html(
            runs=facts,
            facts=_by_run([of_run["facts"] for of_run in facts]),
            stages=_by_run([of_run["stages"] for of_run in facts]),
            first=max(firsts, key=lambda first: _place(first[1]), default=None),
            listed=[
                (name, [(unit, _page_id(name, unit.hook, unit.unit)) for unit in part.listed])
                for name, part in zip(names, parts, strict=True)
            ],
            criterion=CRITERION.format(
                metric="token_selectivity", least=MIN_ACTIVATIONS, share=f"{ONE_TOKEN:.0%}"
            ),
            figures=_figures(opened, stores),
            tables=tables,
            pairs=pairs,
            sampled=SAMPLED_TOKENS,
            hooks=hooks,
            page_id=_page_id,
            pages=pages,
            metrics=_metrics(stores),
        )
    return OfflineReport(html, tuple(str(run.dir) for run in opened), len(pages))


class _RunPages(NamedTuple):
    """What one run brings to a report."""

    pages: dict[str, str]
    """HTML of unit pages by their id, packed."""
    listed: list[Interesting]
    """The units most worth a look, the best first."""
    best: UnitPage | None
    """The page of the first of them."""


def _run_pages(
    store: astore.Store,
    name: str,
    rows: list[dict[str, Any]],
    units_of: dict[str, list[int]],
    progress: Progress,
) -> _RunPages:
    """Return the pages of the chosen units of a run and of those listed, each made once."""
    pages: dict[str, str] = {}
    of_candidates: dict[tuple[str, int], UnitPage] = {}
    counting = Counting(store)
    for hook, units in units_of.items():
        candidates = [row["unit"] for row in rows if row["hook"] == hook]
        settings: dict[str, Any] = {"link": _linker(name), "counting": counting}
        for page in unit_pages(store, hook, [*units, *candidates], name=name, **settings):
            if page.unit in candidates:
                of_candidates[hook, page.unit] = page
            if page.unit in units:
                pages[page.id] = _packed(page.html)
        progress(f"pages {hook}", len(pages), len(pages))
    listed = best_of(rows, of_candidates)[:N_LISTED]
    shown = [of_candidates[unit.hook, unit.unit] for unit in listed]
    for page in shown:
        pages.setdefault(page.id, _packed(page.html))
    return _RunPages(pages, listed, shown[0] if shown else None)


def _opened(each: str | Path | Run) -> list[Run]:
    if isinstance(each, Run):
        return [each]
    folder = Path(each)
    if folder.is_dir() and not (folder / "manifest.json").is_file() and find_runs(folder):
        return [open_run(path) for path in find_runs(folder)]
    return [open_run(folder)]


def _page_id(name: str, hook: str, unit: int) -> str:
    return UnitPage(name, hook, unit, {}, {}, lambda hook, unit: f"{hook}:{unit}", None).id


def _linker(name: str) -> Callable[[str, int], str]:
    return lambda hook, unit: f"#{_page_id(name, hook, unit)}"


def _rows_of(store: astore.Store) -> dict[str, list[dict[str, Any]]]:
    """Return the units of each hook by their statistics."""
    rows_of: dict[str, list[dict[str, Any]]] = {}
    for row in store.sql(_UNITS).to_arrow_table().to_pylist():
        rows_of.setdefault(row.pop("hook"), []).append(row)
    return rows_of


def _chosen(
    rows_of: dict[str, list[dict[str, Any]]], best: Sequence[dict[str, Any]], units: int | None
) -> dict[str, list[int]]:
    """Return the units of each hook that get a page: the best, all where `units` is None."""
    units_of: dict[str, list[int]] = {}
    for hook, rows in rows_of.items():
        if units is None:
            units_of[hook] = [row["unit"] for row in rows]
            continue
        # where no unit is scored, those that fire and are most peaked
        peaked = sorted(
            (row for row in rows if row["n_active"]), key=lambda row: -(row["kurtosis"] or 0)
        )
        scored = [row["unit"] for row in best if row["hook"] == hook]
        units_of[hook] = (scored or [row["unit"] for row in peaked])[:units]
    return units_of


def _pairs(
    stores: Sequence[astore.Store], names: Sequence[str], chosen: Sequence[dict[str, list[int]]]
) -> list[_Pair]:
    """Return the first run's chosen units beside their twins in each other run."""
    asked = [(hook, unit) for hook, units in chosen[0].items() for unit in units[:N_TWINS]]
    pairs: list[_Pair] = []
    for store, name in zip(stores[1:], names[1:], strict=True):
        for twin in best_twins(stores[0], store, asked):
            left = _page_id(names[0], twin.hook, twin.unit)
            right = _page_id(name, twin.hook, twin.twin)
            pairs.append(_Pair(twin, left, right, (names[0], name)))
    return pairs


def _place(unit: Interesting) -> float:
    """Return what the first unit of a report is chosen by, among the best of each run."""
    return unit.margin - unit.is_one_token


def _facts(run: Run) -> dict[str, Any]:
    """Return what a manifest says of a run."""
    stages = {
        name: f"{number(record.wall_seconds)} s, {number(record.peak_memory_bytes / 1e6)} MB"
        + ("" if record.state == "finished" else f", {record.state}")
        for name, record in run.manifest.stages.items()
    }
    facts = {k: v for k, v in run.model_facts.items() if isinstance(v, int | float | str)}
    recipe = (run.dir / "recipe.yaml").read_text("utf-8")
    return {
        "name": run.name,
        "folder": str(run.dir),
        "about": run.recipe.about,
        "facts": {"folder": str(run.dir), "commit": run.manifest.commit or "not known"}
        | {"seed": run.manifest.seed}
        | facts,
        "stages": stages,
        "warnings": run.warnings,
        "versions": json.dumps(dict(run.manifest.versions), indent=1),
        "machine": json.dumps(dict(run.manifest.machine), indent=1),
        "recipe": recipe,
        "command": f"lmmono run {run.dir}",
    }


def _by_run(facts: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return what several runs say of each name, None where one says nothing."""
    names = dict.fromkeys(name for of_run in facts for name in of_run)
    return {name: [of_run.get(name) for of_run in facts] for name in names}


def _figures(
    runs: Sequence[Run], stores: Sequence[astore.Store]
) -> dict[str, list[tuple[str, Markup]]]:
    """Return the figures by section, each with what is seen on it."""
    layers = layer_summaries(runs)
    made: dict[str, list[tuple[str, Markup]]] = {}
    drawn: list[tuple[str, str, Callable[[Any], Any], Any]] = [
        ("training", "Loss over steps, training and held-out documents", loss_figure, runs),
        ("layers", "Density, kurtosis and dead share by layer and run", layer_figure, layers),
        ("scores", "Scores by layer and run, with controls", score_figure, layers),
        ("dictionaries", "L0 against FVU of dictionaries, controls in grey", pareto_figure, stores),
        (
            "dictionaries",
            "L0 against the loss that dictionaries recover",
            partial(pareto_figure, y="ce_loss_recovered (zero)"),
            stores,
        ),
    ]
    for section, label, draw, source in drawn:
        try:
            figure = draw(source)
        except RunError:  # nothing of the kind was measured
            continue
        made.setdefault(section, []).append((label, figure_svg(figure, label)))
    for run, store in zip(runs, stores, strict=True):
        made.setdefault("flint", []).extend(_attributes(run.name, store))
        if run.recipe.robustness.suites and run.is_done("robustness"):
            made.setdefault("robustness", []).extend(_robustness(run))
    return made


def _attributes(name: str, store: astore.Store) -> list[tuple[str, Markup]]:
    """Return the class-by-attribute matrices of a run's interpreters, such as FLINT."""
    matrices: dict[tuple[str, str], dict[tuple[str, int], float]] = {}
    for feature, task, label, unit, value in store.sql(_RELEVANCES).fetchall():
        matrices.setdefault((task or "", feature or ""), {})[label or "", unit] = value
    drawn: list[tuple[str, Markup]] = []
    for (task, feature), cells in matrices.items():
        classes = list(dict.fromkeys(label for label, _ in cells))
        units = sorted({unit for _, unit in cells})
        values = [[cells.get((label, unit), math.nan) for unit in units] for label in classes]
        title = f"{name}: {feature} on {task}, relevance of attributes to classes"
        figure = attribute_figure(values, classes, [str(unit) for unit in units], title=title)
        drawn.append((title, figure_svg(figure, title)))
    return drawn


def _robustness(run: Run) -> list[tuple[str, Markup]]:
    # scipy and numba take seconds to import, and most runs have no suites
    from lmmono.reports.robustness_figures import robustness_panels
    from lmmono.suites.robustness_run import run_results

    with run.reading() as store:
        results = run_results(run, store)
    families = run.recipe.robustness.families
    if not families:
        return []
    panels = robustness_panels(results, families[0].label)
    return [
        (f"{run.name}: {name}", figure_svg(figure, f"{run.name}: {name} over levels"))
        for name, figure in panels.items()
    ]


def _metrics(stores: Sequence[astore.Store]) -> list[dict[str, Any]]:
    """Return the metrics that the stores hold, with their versions and formulas."""
    query = """SELECT DISTINCT metric, metric_version FROM all_scores
        UNION SELECT DISTINCT metric, metric_version FROM robustness ORDER BY ALL"""
    held = sorted({row for store in stores for row in store.sql(query).fetchall()})
    return [
        {
            "name": name,
            "version": version,
            "equation": METRICS[name].equation if name in METRICS else "not of this release",
            "unit": METRICS[name].unit if name in METRICS else "",
            "sql": f"SELECT * FROM all_scores WHERE metric = '{name}'",
        }
        for name, version in held
    ]


def _packed(html: str) -> str:
    """Return markup as base64 of gzip, which every browser since 2023 unpacks by itself."""
    # level 6 takes a third of the time of 9, for 2 % more bytes
    return base64.b64encode(gzip.compress(html.encode(), 6, mtime=0)).decode()


def _html(**values: Any) -> str:
    css = Markup(static("unit.css") + static("page.css", OWN))
    scripts = [Markup(static("unit.js")), Markup(static("page.js", OWN))]
    policy = (
        f"default-src 'none'; style-src {_hash(css)}; script-src {' '.join(map(_hash, scripts))}; "
        "base-uri 'none'; form-action 'none'"
    )
    template = environment(OWN).get_template("report.html.jinja")
    version = metadata.version("lmmono")
    tables_of: dict[str, list[ReportTable]] = {name: [] for name, _ in SECTIONS}
    for table in values.pop("tables"):
        tables_of[_section(table)].append(table)
    figures = {name: values["figures"].get(name, []) for name, _ in SECTIONS}
    values |= {"figures": figures, "tables_of": tables_of, "sections": SECTIONS}
    return template.render(
        css=css, scripts=scripts, policy=policy, version=version, cell_text=_cell, **values
    )


def _section(table: ReportTable) -> str:
    """Return the section of a report that a table belongs to, by what its title begins with."""
    heads = {"Layers": "layers", "Dictionaries": "dictionaries", "Units of": "explanations"}
    heads |= {"Scores of": "scores", "Best and worst": "scores"}
    return next(
        (name for head, name in heads.items() if table.title.startswith(head)), "robustness"
    )


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _cell(cell: object) -> str:
    """Return a cell of a table as text."""
    if cell is None:
        return ""
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return number(cell)
    return str(cell)
