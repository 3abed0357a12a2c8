"""The settings of the robustness suites, and the names that they may hold.

Holds names alone, so that `lmmono check` knows them without what they stand for; a test compares
them with the registries.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from lmmono.errors import nearest
from lmmono.recipe.sections import Count, Fraction, Section, clash

SuiteName = Literal["noisy_labels", "noisy_inputs", "few_shot", "ood", "adversarial", "fine_tuning"]
TaskName = Literal[
    "planted_topic",
    "planted_polarity",
    "planted_agreement",
    "20news",
    "agnews",
    "amazon_books",
    "amazon_dvd",
    "amazon_electronics",
    "amazon_kitchen",
    "anli",
    "civil_comments",
    "cola",
    "cr",
    "davidson",
    "imdb",
    "imdb_counterfactual",
    "mnli",
    "mpqa",
    "mr",
    "nli_counterfactual",
    "noisy_agnews",
    "reuters",
    "sst2",
    "sst2_phrases",
    "sst5",
    "subj",
    "trec",
    "tweet_emotion",
    "tweet_hate",
    "tweet_irony",
    "tweet_offensive",
    "tweet_sentiment",
    "wrench_semeval",
    "wrench_trec",
    "wrench_youtube",
    "yelp",
]
LearnerName = Literal[
    "logistic",
    "oracle_logistic",
    "label_smoothing",
    "gce",
    "sce",
    "forward",
    "elr",
    "mixup",
    "early_stopping",
    "co_teaching",
    "cleanlab",
    "knn_relabel",
]
LabelNoise = Literal["symmetric", "pair_flip", "matrix", "instance", "annotator", "real"]
TextNoise = Literal[
    "typos",
    "ocr",
    "homoglyph",
    "case",
    "punctuation",
    "word_drop",
    "word_shuffle",
    "synonyms",
    "formatting",
]
ModelNoise = Literal["embedding_gaussian", "embedding_uniform", "hidden_gaussian"]
"""Noise inside the model: on token embeddings, or on the probed rows before any encoder."""
Attack = Literal["characters", "words"]
Pooling = Literal["mean", "max", "last"]
Hypothesis = Literal["H1", "H2", "H3", "H4"]
TuningMode = Literal["full", "lora"]
TuningLoss = Literal["ce", "label_smoothing", "gce", "sce"]
LearningRate = Annotated[float, Field(gt=0.0)]

FAMILY_SETTINGS: dict[str, tuple[str, ...]] = {
    "raw": (),
    "random_projection": ("d",),
    "pca": ("d",),
    "dense_ae": ("d",),
    "relu": (),
    "random_relu": ("d",),
    "random_topk": ("d", "k"),
    "neurons": (),
    "top_neurons": ("k",),
}
"""Feature families that need no dictionary, with the settings that each takes."""

MARGINS = (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1)
"""Signal margins rho = 1 - rate C / (C - 1): equally hard for any number of classes C."""
REALISTIC = (0.0, 0.02, 0.05, 0.1)
"""Rates of label noise that real sets have."""
SHOTS = (1, 4, 16, 64, 256)


class Family(
    Section,
    json_schema_extra={
        "type": ["string", "object"],
        "if": {"type": "string"},
        "then": {"enum": list(FAMILY_SETTINGS)},
    },
):
    """A feature family; one with its own settings is written as its name alone."""

    name: str = Field(json_schema_extra={"enum": list(FAMILY_SETTINGS)})
    """The kind; see `docs/robustness.md`."""
    d: Count | None = None
    """Width of the code."""
    k: Count | None = None
    """Coordinates that stay."""

    @model_validator(mode="after")
    def _check_names(self) -> "Family":
        if self.name not in FAMILY_SETTINGS:
            way_out = nearest(self.name, FAMILY_SETTINGS)
            raise clash(f"want a feature family, got {self.name!r}; {way_out}", "name")
        takes = FAMILY_SETTINGS[self.name]
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
    return entry if isinstance(entry, dict | Family) else {"name": entry}


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
    families: tuple[Annotated[Family, BeforeValidator(_named)], ...] = (Family(name="raw"),)
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
    input_noise: tuple[TextNoise | ModelNoise, ...] = (
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
    hypotheses: tuple[Hypothesis, ...] = ()
    """What is expected, said before the run; the report gives each its verdict."""
    processes: Count = 1
    """Processes that fit probes; changes no result."""

    @model_validator(mode="after")
    def _check_once(self) -> "Robustness":
        raise_repeats(self, ("suites", "tasks", "families", "learners", "poolings", "budgets"))
        if self.suites and not self.families and not self.dictionaries:
            raise clash("want a family or a dictionary to read", "families", "dictionaries")
        return self


MODEL_NOISE: tuple[str, ...] = get_args(ModelNoise)
