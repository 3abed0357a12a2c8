"""The scores of a run: what `lmmono run` measures on every captured hook."""

import activation_store as astore
from lmmono.errors import RunError
from lmmono.manifest import STAGES
from lmmono.run import Run
from lmmono.scoring.statistics import score_token_selectivity
from lmmono.types import Progress, silent


def score_run(run: Run, *, progress: Progress = silent) -> Run:
    """Score the units of every hook that the run's store holds as rows, unless that is done.

    Raises:
        RunError: the run is not captured yet, or another process works on it.
        StoreError: the store cannot be read or written.
    """
    if run.is_done("score"):
        return run
    if not run.is_done("capture"):
        raise RunError(f"{run.dir}: not captured yet; run `lmmono capture {run.dir}` first")
    digest = run.recipe.digest(*STAGES["score"].sections)
    with run.stage("score", digest) as stage, astore.open(run.store_path, mode="a") as store:
        found = store.sql("SELECT DISTINCT hook FROM unit_stats ORDER BY hook").fetchall()
        hooks = [str(hook) for (hook,) in found]
        for n_done, hook in enumerate(hooks, start=1):
            score_token_selectivity(store, hook)
            progress(f"score {run.name}", n_done, len(hooks))
        stage.facts.update(hooks=hooks)
    return run
