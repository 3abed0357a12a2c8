"""The dictionaries of a run: fitted, judged, and written beside what they are about.

    runs/x/vectors.duckdb, vectors/          vectors of the split `train`, captured once and kept
           dictionaries/<hook>/<name>/       one folder per dictionary, checkpoints on the way there
           store.duckdb                      tables `dictionaries` and `scores`, latents as hooks

What is finished is skipped, so the same call goes on where an earlier one stopped.
"""

import signal
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Literal

import torch
from torch import nn

import activation_store as astore
from lmmono.captures.capture import capture
from lmmono.dictionaries.dictionary_rows import judge
from lmmono.dictionaries.estimator import Dictionary
from lmmono.dictionaries.fitting import Fit, Sources, fit_all, fits_of
from lmmono.errors import DictionaryError, TrainingStopped
from lmmono.models.hooks import match_hooks
from lmmono.runs.folder import Run
from lmmono.types import Progress, silent


def dictionary_run(run: Run, *, progress: Progress = silent) -> dict[str, int]:
    """Learn and judge the dictionaries of a captured run's recipe; return the facts.

    Every entry is fitted on every hook with every seed. A fit that comes to nothing does not stop
    the others; they are judged first, and then it is told. On shuffled vectors, or on those of an
    untrained model, nothing is what there may be to find: there it is a row of `scores` instead.

    Raises:
        DictionaryError: Vectors are too few, or fits came to nothing; names all of them.
        ModelError: A hook name matches nothing.
        TrainingStopped: SIGTERM arrived; everything is saved.
    """
    settings = run.recipe.dictionary
    hooks = match_hooks(_on_device(run.model), settings.hooks)
    stored = settings.source == "store"
    vectors = astore.open(run.dir / "vectors.duckdb") if stored else None
    with _terminable():
        fits, sources = fits_of(run, hooks), Sources(run, vectors)
        failures = fit_all(fits, sources, settings, progress)
        with astore.open(run.store_path, mode="a") as store:
            judge(run, fits, sources, store, failures, progress)
            _store_latents(run, fits, store, progress)
        serious = [text for fit, text in failures.items() if fit.planned.control is None]
        if serious:
            raise DictionaryError("\n".join(dict.fromkeys(serious)))
    return {"n_dictionaries": len(fits) - len(failures), "n_failed": len(failures)}


def vectors_run(run: Run, *, progress: Progress = silent) -> dict[str, int]:
    """Capture the vectors of the split `train`, from which dictionaries learn; return the facts."""
    recipe, path = run.recipe, run.dir / "vectors.duckdb"
    hooks = match_hooks(_on_device(run.model), recipe.dictionary.hooks)
    mode: Literal["a", "w"] = "a" if path.exists() else "w"
    with astore.open(path, mode) as store:
        rows = run.tokens("train").limit(recipe.dictionary.max_tokens)
        capture(run.model, rows, hooks=(), vectors=hooks, into=store, progress=progress)
        info = store.info()
        return {"n_tokens": info.n_tokens, "n_bytes": info.n_bytes}


def _on_device(model: nn.Module) -> nn.Module:
    """Move a model to the GPU, where there is one."""
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _store_latents(run: Run, fits: Sequence[Fit], store: astore.Store, progress: Progress) -> None:
    """Capture the latents of the dictionaries that the recipe names, on the run's own tokens."""
    settings = run.recipe.dictionary
    chosen = [fit for fit in fits if fit.has_latents(settings) and fit.is_finished]
    if not chosen:
        return
    codes: Mapping[str, Dictionary] = {fit.hook: fit.load() for fit in chosen}
    given = run.recipe.capture
    parts = [
        run.tokens(split).limit(given.max_tokens).limit(settings.latents_tokens)
        for split in given.splits
    ]
    kept = given.model_dump(exclude={"hooks", "vectors", "splits", "max_tokens"})
    capture(
        run.model,
        parts,
        hooks=(),
        dictionaries=codes,
        into=store,
        seed=run.recipe.seed,
        progress=progress,
        **kept,
    )


@contextmanager
def _terminable() -> Generator[None]:
    """Let SIGTERM end the block as Ctrl-C does; fits have their own way, which saves first.

    What is written here is written whole or not at all, so it may end anywhere.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TrainingStopped(
            "dictionary: stopped by SIGTERM; what was finished is kept, the same command goes on "
            "from there"
        )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
