"""The settings of the robustness suites; names come from `lmmono.registry`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lmmono.errors import nearest
from lmmono.recipe.sections import Count, Fraction, OneOf, Section, clash
from lmmono.registry.suites import (
    FAMILIES,
    HYPOTHESES,
    LEARNERS,
    MODEL_NOISE,
    SUITES,
    TEXT_CORRUPTIONS,
    Attack,
    LabelNoise,
    Pooling,
    TuningLoss,
    TuningMode,
)
from lmmono.registry.tasks import TASK_NAMES

SuiteName = Annotated[str, OneOf(SUITES)]
TaskName = Annotated[str, OneOf(TASK_NAMES)]
LearnerName = Annotated[str, OneOf(LEARNERS)]
InputNoise = Annotated[str, OneOf([*TEXT_CORRUPTIONS, *MODEL_NOISE])]
HypothesisName = Annotated[str, OneOf(HYPOTHESES)]
LearningRate = Annotated[float, Field(gt=0.0)]

MARGINS = (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1)
"""Signal margins rho = 1 - rate C / (C - 1): equally hard for any number of classes C."""
REALISTIC = (0.0, 0.02, 0.05, 0.1)
"""Rates of label noise that real sets have."""
SHOTS = (1, 4, 16, 64, 256)


class FamilySettings(
    Section,
    json_schema_extra={
        "type": ["string", "object"],
        "if": {"type": "string"},
        "then": {"enum": list(FAMILIES)},
    },
):
    """A feature family; one with its own settings is written as its name alone."""

    name: str = Field(json_schema_extra={"enum": list(FAMILIES)})
    """The kind; see `docs/robustness.md`."""
    d: Count | None = None
    """Width of the code."""
    k: Count | None = None
    """Coordinates that stay."""

    @model_validator(mode="after")
    def _check_names(self) -> "FamilySettings":
        if self.name not in FAMILIES:
            way_out = nearest(self.name, FAMILIES)
            raise clash(f"want a feature family, got {self.name!r}; {way_out}", "name")
        takes = FAMILIES[self.name].takes
        for setting in ("d", "k"):
            if getattr(self, setting) is not None and setting not in takes:
                known = ", ".join(takes) or "none"
                raise clash(f"{self.name} has no such setting; it has: {known}", setting)
        return self

    @property
    def label(self) -> str:
        """Name in tables: the kind with its settings, such as pca-16."""
        sizes = [str(size) for size in (self.d, self.k) if size is not None]
        return "-".join([self.name, *sizes])


def raise_repeats(section: Section, fields: tuple[str, ...]) -> None:
    """Check that no value stands twice in a setting.

    Raises:
        PydanticCustomError: One does.
    """
    for field in fields:
        values = getattr(section, field)
        for i, value in enumerate(values):
            if value in values[:i]:
                raise clash("want each once", f"{field}.{i}", field)


def _named(entry: Any) -> Any:
    return entry if isinstance(entry, dict | FamilySettings) else {"name": entry}


class Tuning(Section):
    """Suite `fine_tuning`: the model itself, tuned on the draws of `noisy_labels`."""

    modes: tuple[TuningMode, ...] = Field(default=("full", "lora"), min_length=1)
    """`full` moves every weight; `lora` adds low-rank updates to the model's linear layers."""
    ranks: tuple[Count, ...] = Field(default=(8,), min_length=1)
    """Ranks of LoRA's updates, each tuned by itself; whatever the rank, updates are scaled by 2."""
    loss: TuningLoss = "ce"
    """What is made small."""
    epochs: Count = 3
    """Passes over the training texts; kept is what does best on noisy validation labels."""
    steps: Count | None = None
    """Steps in all, in place of `epochs`; they are judged after every pass and at the end."""
    batch_texts: Count = 16
    """Texts per step."""
    full_lr: tuple[LearningRate, ...] = Field(default=(5e-5,), min_length=1)
    """Highest learning rates of mode full; of several, the best on noisy validation labels."""
    lora_lr: tuple[LearningRate, ...] = Field(default=(5e-4,), min_length=1)
    """The same for LoRA."""
    pooling: Literal["mean", "last"] = "mean"
    """How the tokens of a text become the one vector that the head reads."""
    margins: tuple[Fraction, ...] = (1.0, 0.8, 0.4, 0.2)
    """Signal margins that decide rates of label noise; kinds are those of `label_noise`."""
    rates: tuple[Fraction, ...] = ()
    """Further rates of label noise."""
    seeds: Count | None = None
    """Repetitions; null takes as many as the other suites."""

    @model_validator(mode="after")
    def _check_once(self) -> "Tuning":
        raise_repeats(self, ("modes", "ranks", "full_lr", "lora_lr"))
        return self


class Robustness(Section):
    """Which codes are compared on which tasks, made harder in which ways."""

    suites: tuple[SuiteName, ...] = ()
    """Ways in which tasks are made harder; none by default."""
    tasks: tuple[TaskName, ...] = ("planted_topic",)
    """Tasks; see `lmmono ls tasks`."""
    folder: str | None = None
    """Folder with the sets of tasks that are not planted, as `lmmono ls tasks` names them."""
    families: tuple[Annotated[FamilySettings, BeforeValidator(_named)], ...] = (
        FamilySettings(name="raw"),
    )
    """Feature families, by name or with settings; others are compared with the first."""
    dictionaries: tuple[str, ...] = ()
    """The run's dictionaries of the hook, by name or glob; a glob takes no controls."""
    learners: tuple[LearnerName, ...] = ("logistic",)
    """How probes are learned; see `docs/robustness.md`."""
    hook: str | None = None
    """Hook that families read; null chooses a stream once on clean validation texts."""
    poolings: tuple[Pooling, ...] = Field(default=("mean",), min_length=1)
    """How the codes of a text's tokens become one; the first is not named in tables."""
    budgets: tuple[Count, ...] = ()
    """Probes that may read only so many coordinates, beside those that read all."""
    seeds: Count = 5
    """Repetitions: subsets and noise are drawn anew, the same for every family."""
    n_train: Count | None = 1000
    """Training texts per repetition, drawn in the set's shares; null takes all."""
    n_val: Count | None = 500
    """Validation texts, as noisy as the training texts; null takes all."""
    n_test: Count | None = 2000
    """Test texts of every part, drawn once; null takes all."""
    label_noise: tuple[LabelNoise, ...] = ("symmetric",)
    """Kinds of label noise."""
    margins: tuple[Fraction, ...] = MARGINS
    """Signal margins that decide rates of label noise, whatever the number of classes."""
    rates: tuple[Fraction, ...] = REALISTIC
    """Further rates of label noise."""
    input_noise: tuple[InputNoise, ...] = (
        "typos",
        "word_drop",
        "embedding_gaussian",
        "hidden_gaussian",
    )
    """Kinds of noise on test inputs."""
    severities: tuple[Annotated[int, Field(ge=0, le=5)], ...] = (1, 2, 3, 4, 5)
    """Severities of noise on inputs; 0, the clean text, is always there."""
    n_noised: Count = 500
    """Test texts that get noise."""
    synonyms: str | None = None
    """File of synonyms or word vectors for noise and attacks on words; null takes WordNet."""
    shots: tuple[Count, ...] = SHOTS
    """Labelled examples per class of suite `few_shot`."""
    resamples: Count = 20
    """Repetitions at least where a probe has 64 examples or fewer in all."""
    attacks: tuple[Attack, ...] = ("characters", "words")
    """Attacks on finished probes."""
    n_attacked: Count = 50
    """Test texts that are attacked."""
    fine_tuning: Tuning = Tuning()
    """How suite `fine_tuning` tunes the model."""
    hypotheses: tuple[HypothesisName, ...] = ()
    """What is expected, said before the run; the report gives each its verdict."""
    processes: Count = 1
    """Processes that fit probes; changes no result."""

    @model_validator(mode="after")
    def _check_once(self) -> "Robustness":
        raise_repeats(self, ("suites", "tasks", "families", "learners", "poolings", "budgets"))
        if self.suites and not self.families and not self.dictionaries:
            raise clash("want a family or a dictionary to read", "families", "dictionaries")
        return self
