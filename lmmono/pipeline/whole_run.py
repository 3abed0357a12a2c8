"""Whether a run folder is whole: every file that a stage recorded, every dictionary and store."""

from dataclasses import dataclass, field
from pathlib import Path

from lmmono.errors import LmmonoError, RunError
from lmmono.files.digests import damaged_files
from lmmono.recipe import SECTIONS
from lmmono.runs.folder import Run, open_run


@dataclass(slots=True)
class RunReport:
    """What a check of a run folder read and found."""

    folder: Path
    """The run folder."""
    faults: list[str] = field(default_factory=list)
    """What is damaged or missing, one line each; none where the run is whole."""
    n_files: int = 0
    """Files of finished stages, dictionaries' weights included."""
    n_stores: int = 0
    """Stores, each with all its shards."""
    n_dictionaries: int = 0
    """Dictionaries that were compared with their own digests, finished stage or not."""
    n_inner: int = 0
    """Runs inside this one, such as its untrained control."""

    def __str__(self) -> str:
        counts = {
            "files of stages": self.n_files,
            "stores": self.n_stores,
            "dictionaries": self.n_dictionaries,
            "runs inside": self.n_inner,
        }
        return f"{self.folder}: whole; read {', '.join(f'{n:,} {of}' for of, n in counts.items())}"


def check_run(folder: Path) -> RunReport:
    """Read every byte of a run folder and say what is damaged.

    That is manifest, recipe, what the stages recorded, the prepared corpus, a pretrained model, the
    dictionaries (those of a stage that was stopped too), the stores with their shards, and the
    control runs inside.

    Raises:
        RunError: There is no run folder.
    """
    report = RunReport(folder)
    if not (folder / "manifest.json").is_file():
        open_run(folder)  # says what is there instead
    try:
        run = open_run(folder)
    except RunError as error:
        report.faults += str(error).splitlines()
        return report
    if run.recipe.digest(*SECTIONS) != run.manifest.recipe_digest:
        report.faults.append(
            f"{folder / 'recipe.yaml'}: other settings than manifest.json was written for"
        )
    for record in run.manifest.stages.values():
        if record.state == "finished":
            report.faults += damaged_files(run.dir, record.files)
            report.n_files += len(record.files)
    digest = run.model_facts.get("data_digest")
    corpus = run.cache_dir / "data" / str(digest)[:16]
    if digest and corpus.is_dir():
        from lmmono.data.tokens import TokenCorpus

        report.faults += TokenCorpus(corpus).verify()
    try:
        run.require_same_model(every_byte=True)
    except LmmonoError as error:
        report.faults.append(str(error))
    _check_dictionaries(run, report)
    _check_stores(run, report)
    for inner in sorted([*folder.glob("*/manifest.json"), *folder.glob("steps/*/manifest.json")]):
        of_inner = check_run(inner.parent)
        report.faults += of_inner.faults
        report.n_files += of_inner.n_files
        report.n_stores += of_inner.n_stores
        report.n_dictionaries += of_inner.n_dictionaries
        report.n_inner += of_inner.n_inner + 1
    return report


def _check_dictionaries(run: Run, report: RunReport) -> None:
    """Compare each dictionary with its own digests; the manifest has those of finished stages."""
    folders = sorted(path.parent for path in run.dir.glob("dictionaries/*/*/dictionary.json"))
    report.n_dictionaries += len(folders)
    if folders:
        from lmmono.dictionaries.estimator import verify_dictionary

        places = {fault.partition(": ")[0] for fault in report.faults}
        faults = [fault for folder in folders for fault in verify_dictionary(folder)]
        report.faults += [fault for fault in faults if fault.partition(": ")[0] not in places]


def _check_stores(run: Run, report: RunReport) -> None:
    """Let each store of a run say its faults, and see that none is missing."""
    import activation_store as astore

    for path in sorted(run.dir.glob("*.duckdb")):
        report.n_stores += 1
        try:
            of_store = astore.verify(path)
        except astore.StoreError as error:
            report.faults.append(str(error))
            continue
        if not of_store.ok:
            report.faults += [f"{path}: {line}" for line in str(of_store).splitlines()]
    for stage, name in (("capture", "store"), ("vectors", "vectors")):
        path = run.dir / f"{name}.duckdb"
        record = run.manifest.stages.get(stage)
        if record is not None and record.state == "finished" and not path.exists():
            report.faults.append(f"{path}: missing")
