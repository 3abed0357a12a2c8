"""What a study claims before it is run: a file of tests, whose hash stands in every run's manifest.

recipes/registered/study_depth.yaml    families of tests, each between two arms
docs/registered.jsonl                  a line per file: digest, commit and time; only added to
"""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from lmmono.errors import RecipeError
from lmmono.recipe.sections import Fraction, Section


class ArmTest(Section):
    """One test: the mean score of an arm is higher, or lower, than that of another."""

    name: str
    """What tables call it."""
    a: str
    """Arm that the claim is about."""
    b: str
    """Arm that it is held against."""
    scorer: str
    """Scorer of units."""
    explainer: str = "token_lookup"
    """Explainer whose explanations are scored."""
    preset: str | None = None
    """Preset of the scorer."""
    expected: Literal["higher", "lower"]
    """What is claimed of a less b."""


class HolmFamily(Section):
    """A way to look at all tests, corrected together."""

    at: Literal["equal_tokens", "equal_loss"]
    """At the end of training, or where the losses of both meet between kept steps."""
    way: Literal["raw", "defined", "density_matched"] = "raw"
    """Undefined scores as guessing, left out, or at equal densities."""


class ProbeHypothesis(Section):
    """One of H1 to H4 of `lmmono.studies.hypotheses`, as it is going to be tested."""

    name: Literal["H1", "H2", "H3", "H4"]
    """Its name."""
    claim: str
    """What is claimed, in words."""
    controls: tuple[str, ...] = Field(default=(), strict=False)
    """Families of features that it is held against, with a verdict for each."""


class Registration(Section):
    """A file of what is claimed before a study is run."""

    about: str
    """What the study asks, in words."""
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Level of each family after Holm's correction."""
    bound: Fraction = 0.02
    """Differences below this matter to nobody: the bound of equivalence."""
    families: tuple[HolmFamily, ...] = Field(default=(), strict=False)
    """Ways to look at all tests."""
    tests: tuple[ArmTest, ...] = Field(default=(), strict=False)
    """Tests between arms."""
    hypotheses: tuple[ProbeHypothesis, ...] = Field(default=(), strict=False)
    """Hypotheses of the robustness suites."""


def read_registration(path: str | Path) -> Registration:
    """Read a file of registered tests.

    Raises:
        RecipeError: It cannot be read, or is no such file.
    """
    from ruamel.yaml import YAML, YAMLError

    try:
        values: Any = YAML(typ="safe", pure=True).load(Path(path).read_text("utf-8"))
        return Registration.model_validate(values)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        first = str(error).splitlines()[0]
        raise RecipeError([f"{path}: registered tests cannot be read: {first}"]) from None
    except ValidationError as error:
        faults = [
            f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}"
            for fault in error.errors()
        ]
        raise RecipeError(faults) from None


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file of registered tests.

    Raises:
        RecipeError: It cannot be read.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise RecipeError([f"registered: {path}: {error.strerror}"]) from None


def register(path: str | Path, log: str | Path, commit: str | None) -> dict[str, str | None]:
    """Add a line on a file of registered tests to a log; a file that stands there is not added.

    Raises:
        RecipeError: The file is no file of registered tests, or the log cannot be written.
    """
    read_registration(path)
    digest, lines = file_sha256(path), Path(log)
    try:
        before = lines.read_text("utf-8").splitlines() if lines.exists() else []
        for line in map(json.loads, before):
            if line["sha256"] == digest:
                return line
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"file": Path(path).name, "sha256": digest, "commit": commit, "time": now}
        lines.parent.mkdir(parents=True, exist_ok=True)
        with lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecipeError([f"{log}: is no log of registered files: {error}"]) from None
    return entry
