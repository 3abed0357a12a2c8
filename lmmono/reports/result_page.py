"""A page of results from the runs of a study, as far as it has come; rewritten as often as asked.

What people wrote stays: only what stands between two marks is made anew.

    <!-- lmmono results: begin -->   progress, then the tables
    <!-- lmmono results: end -->
"""

from collections.abc import Sequence
from pathlib import Path

from activation_store.errors import LockedError
from activation_store.printable import number
from lmmono.errors import RunError
from lmmono.files.atomic import write_atomic
from lmmono.files.provenance import git_commit
from lmmono.reports.arm_tables import arm_tables
from lmmono.reports.figures import training_figure
from lmmono.reports.side_by_side import dictionary_tables
from lmmono.reports.study_tables import study_tables
from lmmono.reports.table import ReportTable
from lmmono.reports.training_tables import ALONG
from lmmono.runs.folder import Run, find_runs, open_run
from lmmono.runs.stages import STAGES
from lmmono.types import Progress, silent

BEGIN, END = "<!-- lmmono results: begin -->", "<!-- lmmono results: end -->"


def write_result_page(
    page: Path, studies: Sequence[Path], progress: Progress = silent
) -> list[ReportTable]:
    """Put what the runs of studies have come to into a page, and return its tables.

    Args:
        page: Markdown; made with a title where it is not there.
        studies: Folders of runs.
        progress: Told which arms are compared.

    Raises:
        RunError: There is no run, or the page is no UTF-8 text, or its marks are not one of each in
            order: then nothing is written.
        StoreError: A store cannot be read.
    """
    runs = [open_run(path) for folder in studies for path in find_runs(folder)]
    if not runs:
        folders = ", ".join(map(str, studies))
        raise RunError(f"{folders}: no run there; `lmmono run RECIPE` makes some")
    tables = [progress_table(runs), *_study(runs, studies, progress), *_of_runs(runs)]
    blocks = [markdown(table) for table in tables]
    for i, table in enumerate(tables):
        if table.title == ALONG and table.rows and len(table.columns) > 5:
            figure = training_figure(table, page.parent / "figures" / f"{page.stem}_training.svg")
            blocks[i] += f"\n\n![Scores against loss](figures/{figure.name})"
    body = "\n\n".join([BEGIN, _made(runs, studies, page), *blocks, END])
    write_atomic(page, _with(page, body))
    return tables


def _of_runs(runs: Sequence[Run]) -> list[ReportTable]:
    """Return the tables of arms at several seeds, of dictionaries and of suites."""
    has_seeds = len({run.recipe.arm for run in runs}) < len(runs)
    of_arms = arm_tables(runs) if has_seeds else []
    tables = [*of_arms]
    for run in runs:
        if run.recipe.dictionary.learn and run.is_done("dictionary"):
            tables += dictionary_tables(run)
        # of arms at several seeds the tables of each run would be a page each; claims stay
        if not of_arms or run.recipe.robustness.hypotheses:
            tables += _suites(run)
    return tables


def _made(runs: Sequence[Run], studies: Sequence[Path], page: Path) -> str:
    """Return by which command and from which commits a page was made."""
    records = [record for run in runs for record in run.manifest.stages.values()]
    commits = sorted({record.commit or "unknown" for record in records})
    return (
        f"Made by `lmmono results {' '.join(map(str, studies))} --out {page}` at commit "
        f"{git_commit() or 'unknown'} from {len(runs)} runs in {', '.join(map(str, studies))}, "
        f"whose stages were done at {', '.join(commits) or 'none'}."
    )


def _with(page: Path, body: str) -> str:
    try:
        text = page.read_text("utf-8") if page.exists() else f"# {page.stem}\n\n{BEGIN}\n{END}\n"
    except UnicodeDecodeError as fault:
        raise RunError(f"{page}: is no UTF-8 text ({fault.reason}); name another --out") from None
    counts = text.count(BEGIN), text.count(END)
    if counts not in ((0, 0), (1, 1)) or text.find(BEGIN) > text.find(END):
        # anything else would cut away what people wrote
        raise RunError(
            f"{page}: want the marks {BEGIN} and {END} once each in this order, or neither; "
            f"got {counts[0]} and {counts[1]}"
        )
    if BEGIN not in text:
        return f"{text.rstrip()}\n\n{body}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{body}{after}"


def progress_table(runs: Sequence[Run]) -> ReportTable:
    """Return how far each run has come."""
    rows: list[tuple[object, ...]] = []
    for run in runs:
        asked = [stage.name for stage in STAGES.values() if stage.is_asked(run.recipe)]
        done = [name for name in asked if run.is_done(name)]
        seconds = sum(record.wall_seconds for record in run.manifest.stages.values())
        left = [name for name in asked if name not in done]
        counts = f"{len(done)} of {len(asked)}"
        rows.append((run.name, counts, ", ".join(left) or "-", round(seconds)))
    n_whole = sum(row[2] == "-" for row in rows)
    return ReportTable(
        title="Progress",
        columns=("run", "stages", "left", "seconds"),
        rows=tuple(rows),
        note=f"{n_whole} of the {len(runs)} runs that were begun are whole. seconds: wall time of "
        "all stages so far; the machine may have done other work meanwhile.",
    )


def _study(runs: Sequence[Run], studies: Sequence[Path], progress: Progress) -> list[ReportTable]:
    """Return the tables of arms, where every run belongs to one and a seed is whole."""
    if not all(run.recipe.arm for run in runs) or not any(run.is_done("score") for run in runs):
        return []
    try:
        return list(study_tables(studies, progress))
    except RunError as missing:
        return [ReportTable("Arms", (), (), note=f"Not yet: {missing}")]


def _suites(run: Run) -> list[ReportTable]:
    if not run.recipe.robustness.suites:
        return []
    from lmmono.reports.robustness_tables import suite_tables

    try:
        return suite_tables(run, so_far=True)
    except LockedError:  # it goes on at this moment: the progress says so
        return []


def markdown(table: ReportTable) -> str:
    """Return a table as Markdown, its title as a heading and its note below.

    >>> print(markdown(ReportTable("Two", ("a", "b"), ((1, None),), note="n.")))
    ## Two
    <BLANKLINE>
    | a | b |
    |---|---|
    | 1 |  |
    <BLANKLINE>
    n.
    """
    lines = [f"## {table.title}", ""]
    if table.columns:
        lines += [_row(table.columns), f"|{'---|' * len(table.columns)}"]
        lines += [*map(_row, table.rows), ""]
    return "\n".join([*lines, table.note]).rstrip()


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = number(value, 4) if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
