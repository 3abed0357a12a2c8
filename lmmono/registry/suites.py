"""What a robustness study can name: suites, noises, attacks, codes, learners and hypotheses.

Adding one is adding a record. Choices that code matches on one by one are `Literal`s; the others
are records whose `home` is imported when it is used.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

from lmmono.errors import DataError, RobustnessError
from lmmono.registry.lookup import find, load

LabelNoise = Literal["symmetric", "pair_flip", "matrix", "instance", "annotator", "real"]
"""`symmetric`: to any other class. `pair_flip`: to the next class. `matrix`: by class, to others
in given shares. `instance`: rather where a weak model is unsure. `annotator`: to a weak model's
second choice. `real`: what annotators or rules of the set really gave."""

LABEL_NOISE: tuple[LabelNoise, ...] = get_args(LabelNoise)

ModelNoise = Literal["embedding_gaussian", "embedding_uniform", "hidden_gaussian"]
"""Noise inside the model: on token embeddings, or on the probed rows before any encoder."""

MODEL_NOISE: tuple[ModelNoise, ...] = get_args(ModelNoise)

Attack = Literal["characters", "words"]
"""What an attack edits; see `lmmono.suites.attacks`."""

NonNegativeMap = Literal["relu", "rep_relu", "gelu", "sigmoid", "softplus", "exp", "leakyrelu"]
"""What keeps a code from going below 0; see `lmmono.methods.nonneg`."""

Positives = Literal["dropout", "spans", "sentences"]
"""What a contrastive head holds together: two passes of a text with the model's dropout, two spans
of a text, neighbouring sentences of a text."""

Pooling = Literal["mean", "max", "last"]
"""How the codes of a text's tokens become one."""

TuningMode = Literal["full", "lora", "rslora", "dora", "monolora", "two_branch", "topk_lora"]
"""What is moved when the model itself is tuned: every weight, or those of an adapter; see
`lmmono.methods.adapters`."""

MonoVariant = Literal["relu_out", "relu_both", "relu_code", "topk_code"]
"""Where `monolora` has its non-negative maps: M1 to M4."""

TuningLoss = Literal["ce", "label_smoothing", "gce", "sce", "nonneg_ce"]
"""What a tuned model minimises."""

Judged = Literal["clean", "noisy", "attacked", "tuned", "interpreted"]
"""What a suite judges: probes on test texts as they are, with noise or under attack; or, on texts
as they are, the model tuned next to probes, or tuned models with interpreters of their classes."""


@dataclass(frozen=True, slots=True)
class Suite:
    """One way in which tasks are made harder."""

    name: str
    """Name in recipes and tables."""
    about: str
    """What it does."""
    home: str
    """`module:function`; takes a task and the recipe's section, yields its learning problems."""
    judged: Judged = "clean"
    """What is judged."""
    elsewhere: bool = False
    """Whether probes are judged on the task's other domains too."""
    rows: str | None = None
    """`module:function` that yields its rows, where a room above `suites` holds it."""

    def load(self) -> Callable[..., Any]:
        """Import and return the function that poses the problems."""
        return load(self.home)


_SUITES = (
    Suite(
        "noisy_labels",
        "flipped labels in training and validation",
        "lmmono.suites.suite_draws:noisy_label_draws",
    ),
    Suite(
        "noisy_inputs",
        "clean probes, noise on test texts or in the model",
        "lmmono.suites.suite_draws:clean_draws",
        "noisy",
    ),
    Suite("few_shot", "k labelled texts per class", "lmmono.suites.suite_draws:few_shot_draws"),
    Suite(
        "ood",
        "probes judged on other domains",
        "lmmono.suites.suite_draws:other_domain_draws",
        elsewhere=True,
    ),
    Suite(
        "adversarial",
        "edits of test texts chosen against the probe",
        "lmmono.suites.suite_draws:clean_draws",
        "attacked",
    ),
    Suite(
        "fine_tuning",
        "the model tuned on flipped labels, next to probes",
        "lmmono.suites.suite_draws:tuning_draws",
        "tuned",
    ),
    Suite(
        "flint",
        "classifiers with interpreters by attributes, beside other interpreters",
        "lmmono.suites.suite_draws:clean_draws",
        "interpreted",
        rows="lmmono.methods.flint_suite:flint_rows",
    ),
    Suite(
        "continuity",
        "models tuned with and without constraints, under changes that do and do not matter",
        "lmmono.suites.suite_draws:clean_draws",
        "tuned",
        rows="lmmono.methods.continuity_suite:continuity_rows",
    ),
)

SUITES = {suite.name: suite for suite in _SUITES}
"""Suites by name."""


def find_suite(name: str) -> Suite:
    """Return a suite.

    Raises:
        RobustnessError: There is none of that name.
    """
    return find("suite", name, SUITES, RobustnessError)


FamilySetting = Literal["d", "k", "positives", "map", "spread", "steps"]
"""What a family may be given; see `FamilySettings`."""


@dataclass(frozen=True, slots=True)
class FamilyKind:
    """One kind of feature family: a code that a probe reads and that needs no dictionary."""

    name: str
    """Name in `features`, recipes and tables."""
    about: str
    """What the code is, in one line."""
    home: str
    """`module:function`; takes rows and settings, returns the code."""
    takes: tuple[FamilySetting, ...] = ()
    """Settings that it knows."""
    point: Literal["stream", "neurons"] = "stream"
    """Where it reads: the hook that is probed, or the MLP's neurons of the same layer."""
    reads: Literal["tokens", "texts"] = "tokens"
    """Whether it makes a code of each token, pooled afterwards, or one of a text's mean row."""


_CODES = "lmmono.suites.feature_families"

_FAMILIES = (
    FamilyKind("raw", "the rows as they are", f"{_CODES}:raw"),
    FamilyKind(
        "random_projection",
        "random directions: dense, nothing learned",
        f"{_CODES}:random_projection",
        ("d",),
    ),
    FamilyKind("pca", "the leading principal directions", f"{_CODES}:pca", ("d",)),
    FamilyKind(
        "dense_ae",
        "the hidden layer of an auto-encoder without sparsity",
        f"{_CODES}:dense_ae",
        ("d",),
    ),
    FamilyKind("relu", "what is above the mean, coordinate by coordinate", f"{_CODES}:relu"),
    FamilyKind(
        "random_relu",
        "ReLU of random directions: half sparse, nothing learned",
        f"{_CODES}:random_relu",
        ("d",),
    ),
    FamilyKind(
        "random_topk",
        "the k largest of random directions: sparse, not learned",
        f"{_CODES}:random_topk",
        ("d", "k"),
    ),
    FamilyKind(
        "neurons",
        "all neurons of the layer's MLP; in CRATE its sparse code",
        f"{_CODES}:raw",
        point="neurons",
    ),
    FamilyKind(
        "top_neurons", "the k neurons that vary most", f"{_CODES}:top_neurons", ("k",), "neurons"
    ),
    FamilyKind(
        "cl",
        "a contrastive head on a text's mean row: the polysemantic arm of 2410.21331",
        "lmmono.methods.contrastive:cl",
        ("d", "positives", "spread", "steps"),
        reads="texts",
    ),
    FamilyKind(
        "ncl",
        "the same head with a non-negative map at its end (Wang et al. 2024)",
        "lmmono.methods.contrastive:ncl",
        ("d", "positives", "map", "spread", "steps"),
        reads="texts",
    ),
    FamilyKind(
        "csr",
        "a tied top-k SAE of a text's mean row with a contrastive term (2503.01776)",
        "lmmono.methods.contrastive:csr",
        ("d", "k", "positives", "steps"),
        reads="texts",
    ),
)

BAG_OF_WORDS = "bag_of_words"
"""What the rows of `robustness.bag_of_words` are called: no code of the model."""

FAMILIES = {kind.name: kind for kind in _FAMILIES}
"""Kinds of feature families by name; dictionaries come as encoders."""


@dataclass(frozen=True, slots=True)
class Learner:
    """One way to learn a probe from labels that may be wrong."""

    name: str
    """Name in recipes and tables."""
    about: str
    """What it does and where it comes from."""
    home: str
    """`module:function`; takes problems, returns probes; equal problems and seeds, equal bits."""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further arguments of the function."""

    def load(self) -> Callable[[Any], Any]:
        """Import and return the function that fits probes to problems."""
        function = load(self.home)
        return partial(function, **self.settings) if self.settings else function


def _descended(name: str, about: str) -> Learner:
    """Return a learner by gradient descent; its plan of the same name says what it minimises."""
    return Learner(name, about, "lmmono.probes.gradient:descended", {"plan": name})


_LEARNERS = (
    Learner(
        "logistic",
        "cross entropy, L2 chosen on noisy validation labels",
        "lmmono.probes.logistic:tuned_logistic",
    ),
    Learner(
        "oracle_logistic",
        "cross entropy, L2 chosen on clean validation labels, which no one has",
        "lmmono.probes.logistic:oracle_logistic",
    ),
    Learner(
        "cleanlab",
        "labels at odds with a probe's dropped (Northcutt et al. 2021)",
        "lmmono.probes.cleaning:pruned",
    ),
    Learner(
        "knn_relabel",
        "labels outvoted by those of ten neighbours replaced",
        "lmmono.probes.cleaning:relabelled",
    ),
    Learner(
        "nonneg_ce",
        "cross entropy of max(x, 0) and weights >= 0, without a bias (Wang et al. 2024)",
        "lmmono.methods.nonneg:nonneg_logistic",
    ),
    _descended("label_smoothing", "labels smoothed by 0.1 (Szegedy et al. 2016)"),
    _descended("gce", "generalised cross entropy, q 0.7 (Zhang and Sabuncu 2018)"),
    _descended("sce", "symmetric cross entropy, 6 and 0.1 (Wang et al. 2019)"),
    _descended(
        "forward",
        "loss corrected by the noise matrix, estimated if not given (Patrini et al. 2017)",
    ),
    _descended("elr", "early-learning regularisation, 3 and 0.7 (Liu et al. 2020)"),
    _descended("mixup", "rows and labels mixed with others', uniform shares (Zhang et al. 2018)"),
    _descended("early_stopping", "plain descent without L2, stopped by noisy validation labels"),
    _descended("co_teaching", "two probes that choose easy rows for each other (Han et al. 2018)"),
)

LEARNERS = {learner.name: learner for learner in _LEARNERS}
"""Learners by name."""


def find_learner(name: str) -> Learner:
    """Return a learner.

    Raises:
        RobustnessError: There is none of that name.
    """
    return find("learner", name, LEARNERS, RobustnessError)


@dataclass(frozen=True, slots=True)
class TextCorruption:
    """One kind of noise in texts."""

    name: str
    """Name in tables, recipes and on the command line."""
    about: str
    """What it does, in a sentence."""
    shares: tuple[float, float, float, float, float]
    """Share of the words of a text that are edited, or of the gaps, at severity 1 to 5."""
    home: str | None
    """`module:function` of one edit; None where the caller must give what is needed for it."""
    takes: Literal["word", "pieces"] = "word"
    """What the edit takes: one word, or the pieces of the text and a place among them."""
    places: Literal["words", "gaps"] = "words"
    """What is edited."""

    def count(self, severity: int, n: int, luck: float) -> int:
        """Return how many of `n` places are edited; `luck` in [0, 1) decides the rounding."""
        return 0 if severity == 0 else min(n, int(self.shares[severity - 1] * n + luck))


_EDITS, _TEXTS = "lmmono.data.corruption.edits", "lmmono.data.corruption.text_noise"

_TEXT_CORRUPTIONS = (
    TextCorruption(
        "typos",
        "one slip of the fingers in a word: a neighbouring key, a swap, a letter lost or added",
        (0.01, 0.02, 0.05, 0.1, 0.2),
        f"{_EDITS}:typo",
    ),
    TextCorruption(
        "ocr",
        "one letter of a word, or two, as scanning software misreads print",
        (0.02, 0.05, 0.1, 0.2, 0.4),
        f"{_EDITS}:misread",
    ),
    TextCorruption(
        "homoglyph",
        "one letter of a word as the one of another alphabet that looks the same",
        (0.02, 0.05, 0.1, 0.2, 0.4),
        f"{_EDITS}:lookalike",
    ),
    TextCorruption(
        "case", "words in other capitals", (0.1, 0.2, 0.4, 0.7, 1.0), f"{_EDITS}:recase"
    ),
    TextCorruption(
        "punctuation",
        "marks at the ends of words lost or added",
        (0.05, 0.1, 0.2, 0.3, 0.5),
        f"{_EDITS}:repunctuate",
    ),
    TextCorruption(
        "word_drop",
        "words lost; one stays",
        (0.05, 0.1, 0.15, 0.25, 0.4),
        f"{_TEXTS}:drop_word",
        "pieces",
    ),
    TextCorruption(
        "word_shuffle",
        "words in the place of the next one",
        (0.05, 0.1, 0.2, 0.4, 0.8),
        f"{_TEXTS}:swap_words",
        "pieces",
    ),
    TextCorruption(
        "synonyms", "words that mean nearly the same", (0.1, 0.2, 0.3, 0.5, 0.8), None, "pieces"
    ),
    TextCorruption(
        "formatting",
        "line breaks, tabs, mark-up and list marks between words",
        (0.05, 0.1, 0.2, 0.4, 0.8),
        f"{_TEXTS}:widen_gap",
        "pieces",
        "gaps",
    ),
)

TEXT_CORRUPTIONS = {corruption.name: corruption for corruption in _TEXT_CORRUPTIONS}
"""Kinds of noise in texts by name."""


def find_corruption(name: str) -> TextCorruption:
    """Return a kind of noise in texts.

    Raises:
        DataError: There is none of that name.
    """
    return find("text noise", name, TEXT_CORRUPTIONS, DataError)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """Something to be expected, said before the run, and how it is judged."""

    name: str
    """Name in recipes."""
    claim: str
    """What is expected."""
    home: str
    """`module:function`; takes the evidence, returns findings, p not yet corrected."""

    def load(self) -> Callable[[Any], Any]:
        """Import and return the function that judges."""
        return load(self.home)


_HYPOTHESES = (
    Hypothesis(
        "H1",
        "under realistic label noise (margin rho >= 0.8) a monosemantic code beats the best dense "
        "control of its budget, both tuned on noisy validation labels",
        "lmmono.studies.hypotheses:judge_realistic_noise",
    ),
    Hypothesis(
        "H2",
        "under extreme label noise (margin rho <= 0.2) a monosemantic code beats the best dense "
        "control of its budget, both tuned on noisy validation labels",
        "lmmono.studies.hypotheses:judge_extreme_noise",
    ),
    Hypothesis(
        "H3",
        "over 20 or more dictionaries of one width, the gain under label noise grows with the "
        "chance-corrected semantic consistency",
        "lmmono.studies.hypotheses:judge_doses",
    ),
    Hypothesis(
        "H4",
        "on other domains a monosemantic code lies above the line that the dense controls make of "
        "accuracy at home and elsewhere",
        "lmmono.studies.hypotheses:judge_other_domains",
    ),
)

HYPOTHESES = {hypothesis.name: hypothesis for hypothesis in _HYPOTHESES}
"""Hypotheses by name."""


def find_hypothesis(name: str) -> Hypothesis:
    """Return a hypothesis.

    Raises:
        DataError: There is none of that name.
    """
    return find("hypothesis", name, HYPOTHESES, DataError)
