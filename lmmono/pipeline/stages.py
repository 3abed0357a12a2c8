"""The stages of a run, each done if it is not yet: what is done imports nothing heavy."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmmono.runs.folder import Run
else:  # for annotations only
    Run = object


def captured(run: Run) -> Run:
    """Capture, unless that is done: then nothing heavy is imported."""
    if run.is_done("capture"):
        return run
    from lmmono.captures.capture import capture_run
    from lmmono.cli.terminal import shown_progress

    if not speaks():
        return capture_run(run)
    with shown_progress() as progress:
        return capture_run(run, progress=progress)


def learned(run: Run) -> Run:
    """Learn dictionaries, unless that is done or there are none: then nothing heavy is imported."""
    if run.is_done("dictionary") or not run.recipe.dictionary.learn:
        return run
    from lmmono.cli.terminal import shown_progress
    from lmmono.dictionaries.dictionary_run import dictionary_run

    with shown_progress() as progress:
        return dictionary_run(run, progress=progress)


def explained(run: Run) -> Run:
    """Explain, unless that is done or nothing is asked for: then nothing heavy is imported."""
    if run.is_done("explain") or not run.recipe.explain.explainers:
        return run
    from lmmono.cli.terminal import shown_progress
    from lmmono.explanations.explain_run import explain_run

    with shown_progress() as progress:
        return explain_run(run, progress=progress)


def scored(run: Run) -> Run:
    """Score, unless that is done: then nothing heavy is imported."""
    if run.is_done("score"):
        return run
    from lmmono.cli.terminal import shown_progress
    from lmmono.scores.score_run import score_run

    with shown_progress() as progress:
        return score_run(run, progress=progress)


def tested(run: Run) -> Run:
    """Run the robustness suites and draw them, unless that is done or none is named.

    Then nothing heavy is imported.
    """
    if not run.recipe.robustness.suites:
        return run
    if not run.is_done("robustness"):
        from lmmono.cli.terminal import shown_progress
        from lmmono.dictionaries.estimator import load_dictionary
        from lmmono.suites.robustness_run import robustness_run

        with shown_progress() as progress:
            robustness_run(run, load=load_dictionary, progress=progress)
    if not (run.dir / "robustness").is_dir():
        from lmmono.reports.robustness_figures import run_figures

        run_figures(run)
    return run


def speaks() -> bool:
    """Say whether this process speaks for all that `accelerate launch` has started."""
    return os.environ.get("RANK", "0") == "0"
