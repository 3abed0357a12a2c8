"""What made a run: commit, versions, machine, and a record of every stage, as `manifest.json`."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from lmmono.errors import RunError
from lmmono.files import provenance
from lmmono.files.atomic import write_atomic
from lmmono.files.json_files import read_json
from lmmono.recipe import SECTIONS, Recipe
from lmmono.recipe.registration import file_sha256
from lmmono.runs.stages import STAGES

FORMAT = 1
"""Version of the manifest; a folder of a newer one is refused."""


class StageRecord(BaseModel):
    """What is known of one stage of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: Literal["begun", "finished"]
    """`begun` until the stage has succeeded, also when it was interrupted."""
    digest: str
    """Hash of the settings that decide the result."""
    started: str
    """Time (UTC, ISO 8601) at which the last attempt began."""
    commit: str | None
    """Git commit of the working folder at that time."""
    wall_seconds: float
    """Time taken, all attempts together."""
    peak_memory_bytes: int
    """Most of all attempts, of this process: `lmmono.files.provenance.peak_memory_bytes`."""
    facts: dict[str, JsonValue]
    """What the stage says of its result."""
    files: dict[str, str] = {}
    """SHA-256 of each file that it made, by its path in the run folder; stores sum themselves."""

    @classmethod
    def begin(cls, digest: str, before: "StageRecord | None") -> "StageRecord":
        """Return the record of an attempt that begins now; an earlier attempt's costs go on."""
        earlier = before if before and before.digest == digest else None
        return cls(
            state="begun",
            digest=digest,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=provenance.git_commit(),
            wall_seconds=earlier.wall_seconds if earlier else 0.0,
            peak_memory_bytes=earlier.peak_memory_bytes if earlier else 0,
            facts={},
        )

    def after(self, began: float) -> "StageRecord":
        """Return the record with the costs since `began` (`time.monotonic`) added."""
        wall = round(self.wall_seconds + time.monotonic() - began, 3)
        peak = max(self.peak_memory_bytes, provenance.peak_memory_bytes())
        return self.model_copy(update={"wall_seconds": wall, "peak_memory_bytes": peak})


class Manifest(BaseModel):
    """What made a run; kept as `manifest.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    """Version of this record."""
    recipe_digest: str
    """Hash of the seed and all sections."""
    seed: int
    """The run's seed."""
    commit: str | None
    """Git commit of the working folder when the run was made."""
    versions: dict[str, str]
    """Python and packages then."""
    machine: dict[str, str | int]
    """System, cores and memory then."""
    stages: dict[str, StageRecord]
    """The stages begun so far."""
    registered: dict[str, str] | None = None
    """File of what was claimed before the run, its sha256 and when that was read; None without."""
    earlier: tuple[tuple[str, StageRecord], ...] = ()
    """Stages finished with other settings whose rows are still in the store, by name."""

    @classmethod
    def new(cls, recipe: Recipe) -> "Manifest":
        """Return the manifest of a run that begins now, here."""
        return cls(
            format=FORMAT,
            recipe_digest=recipe.digest(*SECTIONS),
            seed=recipe.seed,
            commit=provenance.git_commit(),
            versions=provenance.versions(),
            machine=provenance.machine(),
            stages={},
            registered=_registered(recipe),
        )

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Return the manifest of a run folder.

        Raises:
            RunError: It is cut short, changed, unreadable, or of a newer lmmono.
        """
        path = folder / "manifest.json"
        way_out = "restore the file, or remove the folder and run again"
        version = read_json(path, dict, RunError, way_out=way_out).get("format", 0)
        if isinstance(version, int) and version > FORMAT:
            raise RunError(
                f"{path}: written by a newer lmmono (format {version}, this one reads up to "
                f"{FORMAT}); update lmmono"
            )
        return read_json(path, cls, RunError, way_out=way_out)

    def write(self, folder: Path) -> None:
        """Write `manifest.json`; a crash leaves the old one or the new one.

        Raises:
            RunError: The folder cannot be written.
        """
        write_atomic(folder / "manifest.json", self.model_dump_json(indent=2) + "\n")

    def stale_stages(self, recipe: Recipe) -> list[str]:
        """Return the stages begun with other settings than a recipe's."""
        return [
            name
            for name, stage in STAGES.items()
            if name in self.stages and self.stages[name].digest != recipe.digest(*stage.sections)
        ]


def _registered(recipe: Recipe) -> dict[str, str] | None:
    """Return what a run is going to test, by the digest of the file that says so."""
    if recipe.registered is None:
        return None
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"file": recipe.registered, "sha256": file_sha256(recipe.registered), "time": now}
