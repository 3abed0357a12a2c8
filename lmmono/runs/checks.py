"""Whether a run folder is whole: every file that a stage recorded, every store, every control."""

from pathlib import Path

from lmmono.errors import LmmonoError, RunError
from lmmono.files.digests import damaged_files
from lmmono.recipe import SECTIONS
from lmmono.runs.folder import Run, open_run


def run_faults(folder: Path) -> list[str]:
    """Return one line for each file of a run folder that is damaged; none where it is whole.

    Reads every byte: manifest, recipe, what the stages recorded, the prepared corpus, the stores
    with their shards, and the control runs inside.

    Raises:
        RunError: There is no run folder.
    """
    if not (folder / "manifest.json").is_file():
        open_run(folder)  # says what is there instead
    try:
        run = open_run(folder)
    except RunError as error:
        return str(error).splitlines()
    faults: list[str] = []
    if run.recipe.digest(*SECTIONS) != run.manifest.recipe_digest:
        faults.append(
            f"{folder / 'recipe.yaml'}: other settings than manifest.json was written for"
        )
    for record in run.manifest.stages.values():
        if record.state == "finished":
            faults += damaged_files(run.dir, record.files)
    digest = run.model_facts.get("data_digest")
    corpus = run.cache_dir / "data" / str(digest)[:16]
    if digest and corpus.is_dir():
        from lmmono.data.tokens import TokenCorpus

        faults += TokenCorpus(corpus).verify()
    try:
        run.require_same_model(every_byte=True)
    except LmmonoError as error:
        faults.append(str(error))
    faults += _store_faults(run)
    for inner in sorted(folder.glob("*/manifest.json")):
        faults += run_faults(inner.parent)
    return faults


def _store_faults(run: Run) -> list[str]:
    """Return the faults that the stores of a run find in themselves."""
    import activation_store as astore

    faults: list[str] = []
    for path in sorted(run.dir.glob("*.duckdb")):
        try:
            report = astore.verify(path)
        except astore.StoreError as error:
            faults.append(str(error))
            continue
        if not report.ok:
            faults += [f"{path}: {line}" for line in str(report).splitlines()]
    for stage, name in (("capture", "store"), ("vectors", "vectors")):
        path = run.dir / f"{name}.duckdb"
        record = run.manifest.stages.get(stage)
        if record is not None and record.state == "finished" and not path.exists():
            faults.append(f"{path}: missing")
    return faults
