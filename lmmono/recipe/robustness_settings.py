"""The settings of the robustness suites; names come from `lmmono.registry`."""

from collections.abc import Callable
from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    Field,
    model_serializer,
    model_validator,
)

from lmmono.errors import nearest
from lmmono.recipe.objective_settings import (
    AnyObjective,
    FlintSettings,
    Perturbation,
    raise_equal_names,
)
from lmmono.recipe.section import Count, Fraction, OneOf, Section, clash, named_by
from lmmono.registry.suites import (
    FAMILIES,
    HYPOTHESES,
    LEARNERS,
    MODEL_NOISE,
    SUITES,
    TEXT_CORRUPTIONS,
    Attack,
    FamilySetting,
    LabelNoise,
    MonoVariant,
    NonNegativeMap,
    Pooling,
    Positives,
    TuningLoss,
    TuningMode,
)
from lmmono.registry.tasks import TASK_NAMES

SuiteName = Annotated[str, OneOf(SUITES)]
LearnerName = Annotated[str, OneOf(LEARNERS)]
InputNoise = Annotated[str, OneOf([*TEXT_CORRUPTIONS, *MODEL_NOISE])]
HypothesisName = Annotated[str, OneOf(HYPOTHESES)]
LearningRate = Annotated[float, Field(gt=0.0)]

MARGINS = (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1)
"""Signal margins rho = 1 - rate C / (C - 1): equally hard for any number of classes C."""
REALISTIC = (0.0, 0.02, 0.05, 0.1)
"""Rates of label noise that real sets have."""
SHOTS = (1, 4, 16, 64, 256)


def _is_none(value: Any) -> bool:
    return value is None  # a field that came later: recipes without it keep their digest


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
    positives: Positives | None = Field(default=None, exclude_if=_is_none)
    """What a contrastive head holds together; null takes spans. See `docs/methods.md`."""
    map: NonNegativeMap | None = Field(default=None, exclude_if=_is_none)
    """What keeps the code of `ncl` from going below 0; null takes rep_relu."""
    spread: bool | None = Field(default=None, exclude_if=_is_none)
    """Add the undocumented term of 2410.21331's code that spreads activations; null leaves it out.
    """
    steps: Count | None = Field(default=None, exclude_if=_is_none)
    """Steps of a contrastive head's training; null takes its own number."""

    @model_validator(mode="after")
    def _check_names(self) -> "FamilySettings":
        if self.name not in FAMILIES:
            way_out = nearest(self.name, FAMILIES)
            raise clash(f"want a feature family, got {self.name!r}; {way_out}", "name")
        takes = FAMILIES[self.name].takes
        for setting in get_args(FamilySetting):
            if getattr(self, setting) is not None and setting not in takes:
                names = ", ".join(takes) or "none"
                raise clash(f"{self.name} has no such setting; it has: {names}", setting)
        return self

    @property
    def label(self) -> str:
        """Name in tables: the kind with its settings, such as pca-16 or ncl-512-sentences."""
        values = [self.d, self.k, self.positives, self.map]
        values += [None if self.steps is None else f"{self.steps}steps"]
        values += [name for name in ("spread",) if self.spread]
        return "-".join([self.name, *(str(value) for value in values if value is not None)])


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


class OtherDomain(Section, json_schema_extra={"type": ["string", "object"]}):
    """Labelled texts of another domain; a file alone is written as its path."""

    path: str
    """File or folder; every row of it is tested on, whatever its split."""
    text: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Column of the text, or columns of a pair; null takes the task's."""
    label: str | None = None
    """Column of the class; null takes the task's."""
    labels: dict[str, str] = {}
    """Class of the task that each class there means, others left out; none where they are equal."""


class TaskSettings(
    Section,
    json_schema_extra={
        "type": ["string", "object"],
        "if": {"type": "string"},
        "then": {"enum": list(TASK_NAMES)},
    },
):
    """A built-in task by its name, or one of your own by its file and columns."""

    name: str | None = None
    """Name of a built-in task; for your own, its name in tables, the file's by default."""
    path: str | None = None
    """File or folder of labelled rows of your own: .csv, .tsv, .json, .jsonl, .parquet."""
    text: str | Annotated[tuple[str, ...], Field(min_length=1)] = "text"
    """Column of the text; several, such as premise and hypothesis, are joined by line breaks."""
    label: str = "label"
    """Column of the class, a name or a number."""
    split: str | None = "split"
    """Column of train, val or test; where there is none, texts are held out by a hash."""
    noisy: str | None = None
    """Column of the class that annotators really gave, if there is one."""
    pair: str | None = None
    """Column that is the same number in both texts of a contrast pair, if there is one."""
    ood: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")],
        Annotated[OtherDomain, named_by("path")],
    ] = {}
    """Texts of other domains by name: a file, or its own columns and classes."""

    @model_validator(mode="after")
    def _check_kind(self) -> "TaskSettings":
        if self.path is None:
            if self.name not in TASK_NAMES:
                got = "no name and no path" if self.name is None else repr(self.name)
                way_out = nearest(self.name or "", TASK_NAMES) if self.name else ""
                raise clash(
                    f"want a built-in task, or a path to rows of your own; got {got}; "
                    f"{way_out or '`lmmono ls tasks` lists the built-in ones'}",
                    "name",
                )
            if odd := sorted(self.model_fields_set - {"name"}):
                raise clash(f"{self.name} is built in and has its columns; leave it out", odd[0])
        elif self.title in TASK_NAMES:
            raise clash(f"a built-in task is called {self.title}; give yours another", "name")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, write: Callable[[Any], Any]) -> Any:
        return self.name if self.path is None else write(self)

    @property
    def title(self) -> str:
        """Name in tables."""
        return self.name or PurePath(self.path or "").stem


class Tuning(Section):
    """Suite `fine_tuning`: the model itself, tuned on the draws of `noisy_labels`."""

    modes: tuple[TuningMode, ...] = Field(default=("full", "lora"), min_length=1)
    """`full` moves every weight; the others add low-rank updates to the model's linear layers."""
    variants: tuple[MonoVariant, ...] = Field(
        default=("relu_both",), min_length=1, exclude_if=lambda v: v == ("relu_both",)
    )
    """Where `monolora` has its non-negative maps, each tuned by itself; see `docs/methods.md`."""
    k: Count = Field(default=4, exclude_if=lambda v: v == 4)
    """Coordinates of a code that stay, of variant `topk_code` and mode `topk_lora`."""
    ranks: tuple[Count, ...] = Field(default=(8,), min_length=1)
    """Ranks of an adapter's updates, each tuned by itself; whatever it is, they are scaled by 2."""
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
    """The same for adapters."""
    pooling: Literal["mean", "last"] = "mean"
    """How the tokens of a text become the one vector that the head reads."""
    margins: tuple[Fraction, ...] = (1.0, 0.8, 0.4, 0.2)
    """Signal margins that decide rates of label noise; kinds are those of `label_noise`."""
    rates: tuple[Fraction, ...] = ()
    """Further rates of label noise."""
    seeds: Count | None = None
    """Repetitions; null takes as many as the other suites."""
    # left out where empty, so that recipes without objectives keep the digests that they had
    objectives: tuple[AnyObjective, ...] = Field(default=(), exclude_if=lambda chosen: not chosen)
    """Loss terms added to the loss; `lmmono ls methods` lists them."""
    objective_sets: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], tuple[AnyObjective, ...]
    ] = Field(default={}, exclude_if=lambda chosen: not chosen)
    """Named lists of objectives in place of that, each tuned by itself: rows `tuned-full+NAME`."""

    @model_validator(mode="after")
    def _check_once(self) -> "Tuning":
        raise_repeats(self, ("modes", "variants", "ranks", "full_lr", "lora_lr"))
        raise_equal_names(self.objectives)
        for name, objectives in self.objective_sets.items():
            raise_equal_names(objectives, f"objective_sets.{name}")
        if self.objectives and self.objective_sets:
            raise clash("want objectives, or sets of them", "objectives", "objective_sets")
        return self


FlintBaseline = Literal[
    "linear_probe", "topics", "sae_head", "neurons", "concepts", "concepts_corrected", "lime"
]


class ContinuityStudy(Section):
    """Suite `continuity`: outputs, gradients, saliency and accuracy of models that are tuned."""

    noises: tuple[Annotated[Perturbation, named_by("kind")], ...] = Field(
        default_factory=lambda: (
            Perturbation(kind="typos"),
            Perturbation(kind="word_drop"),
            Perturbation(kind="word_shuffle"),
        )
    )
    """Noises of test texts; those that no objective perturbs with are held out."""
    n_texts: Count = 200
    """Test texts of every part."""
    graded_words: Count = 3
    """Words that graded edits of planted texts replace: 0 to all of them change an attribute."""
    attacks: tuple[Attack, ...] = ("characters",)
    """Attacks on texts; each also tries on a model what it found against the first one."""
    radii: tuple[Annotated[float, Field(gt=0.0)], ...] = (0.05, 0.1, 10.0)
    """Radii of the attack on token embeddings, over their norm; 10 shows whether it works."""
    cue: Fraction | None = None
    """Strength of a spurious cue in planted tasks, on which each model is tuned once more; null
    leaves that out."""

    @model_validator(mode="after")
    def _check_noises(self) -> "ContinuityStudy":
        for i, noise in enumerate(self.noises):
            if noise.kind not in TEXT_CORRUPTIONS:
                raise clash(
                    f"{noise.kind} is no noise of texts; see radii", f"noises.{i}", "noises"
                )
        raise_repeats(self, ("noises", "attacks", "radii"))
        return self


class FlintStudy(Section):
    """Suite `flint`: classifiers with interpreters by attributes, beside other interpreters."""

    modes: tuple[Literal["by_design", "post_hoc"], ...] = ("by_design", "post_hoc")
    """`by_design`: classifier and interpreter learn together; `post_hoc`: an interpreter reads the
    finished classifier."""
    ablations: tuple[Literal["no_regularisers", "l1_only"], ...] = ()
    """By design without entropies and L1, or with L1 alone."""
    floors: tuple[Literal["shuffled_labels", "untrained_model"], ...] = ()
    """By design from training labels in a random order, or from the model before its training: what
    a number is worth where there is nothing to learn, or little to learn it with."""
    baselines: tuple[FlintBaseline, ...] = ("linear_probe", "topics")
    """Other interpreters of the same classifier. `concepts` are those of CB-LLM, small, with and
    without the correction of their scores; `lime` explains text by text."""
    interpreter: FlintSettings = Field(default_factory=FlintSettings)
    """Settings of FLINT, as those of objective `flint`."""
    objectives: tuple[AnyObjective, ...] = ()
    """Further loss terms of one more interpreter by design, `flint_objectives`, such as continuity
    of its attributes."""
    epochs: Count = 3
    """Passes over the training texts, of the classifier and of an interpreter post hoc."""
    steps: Count | None = None
    """Steps in all, in place of `epochs`."""
    batch_texts: Count = 32
    """Texts per step; of fewer than there are attributes diversity is underestimated."""
    lr: LearningRate = 5e-5
    """Highest learning rate of the model's weights."""
    pooling: Literal["mean", "last"] = "mean"
    """How the classifier pools the tokens of a text."""
    edit: Annotated[str, OneOf(TEXT_CORRUPTIONS)] = "typos"
    """Noise, of severity 3, for agreement on noisy texts and for what it does to explanations."""
    n_explained: Count = 50
    """Test texts that are taken apart for faithfulness and gradients."""
    n_lime: Count = 20
    """Test texts that LIME explains."""
    maximise: Annotated[int, Field(ge=0)] = 4
    """Attributes that a text is searched for, of the first seed."""

    @model_validator(mode="after")
    def _check_once(self) -> "FlintStudy":
        raise_repeats(self, ("modes", "ablations", "floors", "baselines"))
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of all that is compared, the classifier alone first."""
        modes = [f"flint_{mode}" for mode in self.modes]
        modes += ["flint_objectives"] if self.objectives else []
        floors = [f"flint_{floor}" for floor in self.floors]
        return ("black_box", *modes, *self.ablations, *floors, *self.baselines)


class Robustness(Section):
    """Which codes are compared on which tasks, made harder in which ways."""

    suites: tuple[SuiteName, ...] = ()
    """Ways in which tasks are made harder; none by default."""
    tasks: tuple[Annotated[TaskSettings, named_by("name")], ...] = (
        TaskSettings(name="planted_topic"),
    )
    """Tasks by name (`lmmono ls tasks`), or your own: {path: x.csv, text: body, label: stars}."""
    folder: str | None = None
    """Folder with the sets of tasks that are not planted, as `lmmono ls tasks` names them."""
    families: tuple[Annotated[FamilySettings, named_by("name")], ...] = Field(
        default_factory=lambda: (FamilySettings(name="raw"),)
    )
    """Feature families, by name or with settings; others are compared with the first."""
    fit_on: Literal["task", "corpus"] = "task"
    """Text that families are fitted on, without labels: the task's training texts, or the text that
    the run's dictionaries are learned from, so that no code has seen more of the task."""
    bag_of_words: bool = False
    """Learn from the words of the same texts too, in suites that judge texts as they are: what any
    code of a model is held against."""
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
    fine_tuning: Tuning = Field(default_factory=Tuning)
    """How suite `fine_tuning` tunes the model."""
    continuity: ContinuityStudy = Field(
        default_factory=ContinuityStudy, exclude_if=lambda chosen: chosen == ContinuityStudy()
    )
    """What suite `continuity` does to the texts of models that `fine_tuning` tunes."""
    flint: FlintStudy = Field(
        default_factory=FlintStudy, exclude_if=lambda chosen: chosen == FlintStudy()
    )
    """How suite `flint` makes classifiers that explain themselves."""
    hypotheses: tuple[HypothesisName, ...] = ()
    """What is expected, said before the run; the report gives each its verdict."""
    processes: Count = 1
    """Processes that fit probes; changes no result."""

    @model_validator(mode="after")
    def _check_once(self) -> "Robustness":
        raise_repeats(self, ("suites", "tasks", "families", "learners", "poolings", "budgets"))
        titles = [task.title for task in self.tasks]
        for i, title in enumerate(titles):
            if title in titles[:i]:
                raise clash(f"two tasks are called {title}; give one a name", f"tasks.{i}", "tasks")
        if self.suites and not self.families and not self.dictionaries:
            raise clash("want a family or a dictionary to read", "families", "dictionaries")
        return self
