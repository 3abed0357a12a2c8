"""The robustness suites of a run: what its recipe names, on its model and its dictionaries.

    runs/x/features.duckdb   codes of the tasks' texts, encoded once and kept
           store.duckdb      table `robustness`

Rows are committed as they are computed, so the same call goes on where an earlier one stopped.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

import activation_store as astore
from lmmono.data.tasks.overlap import leakage
from lmmono.data.tasks.reading import asked_tasks
from lmmono.dictionaries.estimator import load_dictionary
from lmmono.errors import RobustnessError, nearest
from lmmono.models.hooks import match_hooks
from lmmono.models.pretrained import on_best_device
from lmmono.recipe.dictionary_settings import TrainedControl
from lmmono.runs.folder import Run
from lmmono.suites.results import AskedRows, Result, read_results
from lmmono.suites.study import Study
from lmmono.suites.text_codes import FIT_TOKENS
from lmmono.types import Progress, silent

_CONTROLS = tuple(f"-{control}" for control in get_args(TrainedControl))


def robustness_run(run: Run, *, progress: Progress = silent) -> dict[str, Any]:
    """Run the robustness suites of a captured run's recipe; return the facts.

    Args:
        run: Captured; with its dictionaries learned, where the recipe names some.
        progress: Told how many suites are done.

    Raises:
        RobustnessError: A family, dictionary or hook does not fit.
        DataError: A task cannot be read.
        StoreError: The store cannot be read or written.
    """
    settings = run.recipe.robustness
    tasks = asked_tasks(settings)
    with astore.open(run.store_path, mode="a") as store:
        model = on_best_device(run.model)
        families: dict[str, Any] = {family.label: family for family in settings.families}
        study = Study(
            model,
            tasks,
            {**families, **_dictionaries(run)},
            settings,
            store,
            run.tokenizer,
            progress,
            _corpus_texts(run) if settings.fit_on == "corpus" else (),
        )
        outcomes = study.run()
    return {
        "hook": outcomes.hook,
        "features": list(outcomes.features),
        "n_rows": len(outcomes.rows),
        "n_failed": sum(row["failure"] is not None for row in outcomes.rows),
        "hypotheses": list(settings.hypotheses),
        "leakage": {task.name: str(leakage(task)) for task in tasks},
    }


def _corpus_texts(run: Run) -> list[str]:
    """Return texts of the split that dictionaries learn from, enough to fit families on."""
    rows = run.tokens("train")
    few = rows.limit(max(FIT_TOKENS, rows.n_ctx), seed=run.recipe.seed)
    texts = [
        str(run.tokenizer.decode(ids[docs >= 0].tolist(), skip_special_tokens=True))
        for ids, docs in zip(few.ids, few.doc_ids, strict=True)
    ]
    return [text for text in texts if text.strip()]


def run_results(run: Run, store: astore.Store) -> list[Result]:
    """Return the rows of a run's store that its recipe asks for; its suites are done."""
    settings = run.recipe.robustness
    recorded = run.manifest.stages["robustness"].facts.get("features")
    features = [str(name) for name in recorded] if isinstance(recorded, list) else None
    names = [task.title for task in settings.tasks]
    return read_results(store, asked=AskedRows(settings, names, features))


def _dictionaries(run: Run) -> Mapping[str, Callable[[Any], Any]]:
    """Return the encoders of the dictionaries that the recipe names, of its hook or of one hook.

    Raises:
        RobustnessError: A name matches none, or they are of several hooks and none is named.
    """
    settings = run.recipe.robustness
    if not settings.dictionaries:
        return {}
    folder = run.dir / "dictionaries"
    hooks = sorted({place.parent.name for place in folder.glob("*/*/dictionary.json")})
    if settings.hook is not None:
        hooks = match_hooks(run.model, settings.hook)[:1]
    encoders: dict[str, Callable[[Any], Any]] = {}
    for pattern in settings.dictionaries:
        places = _matching(folder, hooks, pattern)
        if len({place.parent.name for place in places}) > 1:
            names = ", ".join(sorted({place.parent.name for place in places}))
            raise RobustnessError(
                f"robustness.dictionaries: {pattern} is at several hooks ({names}); name one as "
                "robustness.hook"
            )
        encoders |= {place.name: load_dictionary(place).encode for place in places}
    return encoders


def _matching(folder: Path, hooks: list[str], pattern: str) -> list[Path]:
    saved = [
        about.parent
        for hook in hooks
        for about in sorted((folder / hook).glob("*/dictionary.json"))
    ]
    places = [
        place
        for place in saved
        if place.name == pattern
        or (fnmatchcase(place.name, pattern) and not place.name.endswith(_CONTROLS))
    ]
    if not places:
        way_out = nearest(pattern, [place.name for place in saved]) if saved else "there are none"
        where = ", ".join(hooks) or "any hook"
        raise RobustnessError(f"robustness.dictionaries: no {pattern!r} at {where}; {way_out}")
    return places
