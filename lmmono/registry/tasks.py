"""The labelled tasks: what each tells apart, where it is, and its out-of-domain sets.

A record names columns and splits, it holds no text: `lmmono.data.tasks` reads files below a folder
that the caller names, or the Hugging Face hub. Licences are those that the sources state; where one
states none, that is what is said. Adding a task is adding a record.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from lmmono.errors import DataError
from lmmono.registry.lookup import find

PlantedKind = Literal["planted_topic", "planted_polarity", "planted_agreement"]
"""Tasks that are generated, not read: see `lmmono.data.tasks.planted_tasks`."""

PLANTED: tuple[PlantedKind, ...] = get_args(PlantedKind)

SPLITS: dict[str, str] = {
    "train": "train",
    "dev": "val",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
"""Part that each usual name of a split stands for."""


@dataclass(frozen=True, slots=True)
class TaskTable:
    """Where labelled rows are and what their columns mean."""

    place: str
    """Path below the data folder, or a dataset's name on the hub."""
    config: str | None = None
    """The dataset's configuration, where it has several."""
    text: tuple[str, ...] = ("text",)
    """Columns of the text; several are joined by line breaks."""
    label: str = "label"
    """Column of the class: a name, a number, or a number to compare with `threshold`."""
    labels: Mapping[str, str] | None = None
    """Class that each value of the label column means; rows of other values are left out."""
    threshold: float | None = None
    """Value from which a row is of the class that `labels` gives for `high`, else for `low`."""
    split: str | None = "split"
    """Column of the split; None says that every row is of split `train`."""
    splits: Mapping[str, str] = field(default_factory=lambda: dict(SPLITS))
    """Part that each split goes to; rows of other splits are left out."""
    refuse_others: bool = False
    """Refuse rows of other splits instead."""
    where: Mapping[str, str] = field(default_factory=dict[str, str])
    """Value that a column must have in every row that counts."""
    noisy: str | None = None
    """Column of the class that annotators or rules gave, read as `label` is."""
    pair: str | None = None
    """Column that is the same number in both texts of a contrast pair."""
    blanks: bool = False
    """Leave out rows whose text is blank; they are refused otherwise."""
    max_rows: int | None = None
    """Rows of each split to read of a dataset of the hub; None reads all."""


@dataclass(frozen=True, slots=True)
class Shift:
    """A part of another task that tests the same classes out of domain."""

    task: str
    """Name of the other task's record."""
    part: str = "test"
    """Part of it."""
    labels: Mapping[str, str] | None = None
    """Class here that each class there means, others are left out; None where they are the same."""


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One built-in task."""

    name: str
    """Name in tables, recipes and on the command line."""
    about: str
    """What is told apart, in a sentence."""
    licence: str
    """As the source states it."""
    citation: str
    """Who made the set."""
    label_names: tuple[str, ...]
    """The classes, in the order of the labels."""
    files: tuple[TaskTable, ...] = ()
    """Tables below a data folder; none where only the hub has the set."""
    hub: tuple[TaskTable, ...] = ()
    """Datasets of the Hugging Face hub; none where it does not have the set."""
    ood: Mapping[str, Shift] = field(default_factory=dict[str, Shift])
    """Out-of-domain sets by name."""


def numbered(names: tuple[str, ...]) -> dict[str, str]:
    """Return the classes of a label column that holds numbers.

    >>> numbered(("no", "yes"))
    {'0': 'no', '1': 'yes'}
    """
    return {str(i): name for i, name in enumerate(names)}


# sentiment of reviews

_POLAR = ("negative", "positive")
_TRAIN_TEST = {"train": "train", "test": "test"}
_ALL = {"train": "train", "validation": "val", "test": "test"}
_GLUE = {"train": "train", "validation": "test"}  # the labels of GLUE's test sets are hidden
_DOMAINS = ("books", "dvd", "electronics", "kitchen")


def _named(place: str, names: tuple[str, ...]) -> tuple[TaskTable, ...]:
    return (TaskTable(place, label="label_name", labels={name: name for name in names}),)


def _hub(place: str, names: tuple[str, ...]) -> tuple[TaskTable, ...]:
    return (TaskTable(place, labels=numbered(names), splits=_TRAIN_TEST),)


def _reviews() -> dict[str, Shift]:
    return {f"amazon_{domain}": Shift(f"amazon_{domain}") for domain in _DOMAINS}


def _amazon(domain: str) -> TaskRecord:
    file = TaskTable("cls_amazon4/data.parquet", label="label_name", where={"domain": domain})
    others = {f"amazon_{other}": Shift(f"amazon_{other}") for other in _DOMAINS if other != domain}
    return TaskRecord(
        f"amazon_{domain}",
        f"sentiment of product reviews, domain {domain}",
        "none stated",
        "Blitzer et al. 2007, multi-domain sentiment",
        _POLAR,
        (file,),
        ood=others,
    )


_COUNTERFACTUAL = "imdb_counterfactual/sentiment_pairs.parquet"

_SENTIMENT = (
    TaskRecord(
        "sst2",
        "sentiment of movie-review sentences",
        "none stated",
        "Socher et al. 2013",
        _POLAR,
        (
            TaskTable(
                "cls_sst/sst5_sentences.parquet",
                label="label_name",
                labels={
                    "very negative": "negative",
                    "negative": "negative",
                    "positive": "positive",
                    "very positive": "positive",
                },
            ),
        ),
        (TaskTable("stanfordnlp/sst2", text=("sentence",), labels=numbered(_POLAR), splits=_GLUE),),
        ood={
            "imdb": Shift("imdb"),
            **_reviews(),
            "tweets": Shift("tweet_sentiment", labels={name: name for name in _POLAR}),
            "contrast": Shift("imdb_counterfactual", "ood:contrast"),
            "yelp": Shift("yelp"),
        },
    ),
    TaskRecord(
        "sst2_phrases",
        "sentiment of movie-review phrases, as in GLUE",
        "none stated",
        "Socher et al. 2013; Wang et al. 2018",
        _POLAR,
        _named("cls_sst/sst2_phrases_glue.parquet", _POLAR),
        (TaskTable("nyu-mll/glue", "sst2", ("sentence",), labels=numbered(_POLAR), splits=_GLUE),),
        ood={"imdb": Shift("imdb"), **_reviews()},
    ),
    TaskRecord(
        "mr",
        "sentiment of movie-review snippets; the pool that SST comes from",
        "data not stated (nltk's copy: CC BY 4.0)",
        "Pang and Lee 2005",
        _POLAR,
        _named("cls_mr/data.parquet", _POLAR),
        (
            TaskTable(
                "cornell-movie-review-data/rotten_tomatoes",
                labels=numbered(_POLAR),
                splits=_ALL,
            ),
        ),
        ood={"imdb": Shift("imdb"), **_reviews()},
    ),
    TaskRecord(
        "cr",
        "sentiment of sentences of product reviews",
        "none stated",
        "Hu and Liu 2004",
        _POLAR,
        hub=_hub("SetFit/CR", _POLAR),
    ),
    TaskRecord(
        "imdb",
        "sentiment of whole movie reviews",
        "none stated (research)",
        "Maas et al. 2011",
        _POLAR,
        _named("cls_imdb/data.parquet", _POLAR),
        _hub("stanfordnlp/imdb", _POLAR),
        ood={
            "sst2": Shift("sst2"),
            "mr": Shift("mr"),
            **_reviews(),
            "revised": Shift("imdb_counterfactual", "ood:revised"),
            "contrast": Shift("imdb_counterfactual", "ood:contrast"),
            "yelp": Shift("yelp"),
        },
    ),
    TaskRecord(
        "yelp",
        "sentiment of reviews of businesses, two and four stars and beyond",
        "Yelp dataset terms",
        "Zhang et al. 2015 (arXiv 1509.01626)",
        _POLAR,
        hub=(
            TaskTable(
                "fancyzhx/yelp_polarity",
                labels=numbered(_POLAR),
                splits=_TRAIN_TEST,
                max_rows=20_000,
            ),
        ),
    ),
    *(_amazon(domain) for domain in _DOMAINS),
    TaskRecord(
        "imdb_counterfactual",
        "sentiment of movie reviews; contrast sets are the same reviews revised to the other class",
        "Apache-2.0",
        "Kaushik et al. 2020 (arXiv 1909.12434)",
        _POLAR,
        (
            TaskTable(_COUNTERFACTUAL, label="label_name", where={"version": "original"}),
            TaskTable(
                _COUNTERFACTUAL,
                label="label_name",
                where={"version": "revised"},
                splits={"test": "ood:revised"},
            ),
            TaskTable(
                _COUNTERFACTUAL, label="label_name", splits={"test": "ood:contrast"}, pair="pair"
            ),
        ),
    ),
    TaskRecord(
        "mpqa",
        "polarity of opinion phrases in news",
        "none stated",
        "Wiebe et al. 2005",
        _POLAR,
        (TaskTable("cls_mpqa/data.parquet", label="label_name", blanks=True),),
    ),
)

# topics, questions and kinds of sentence, two with real label noise

_NEWS = ("World", "Sports", "Business", "Sci/Tech")
_QUESTIONS = ("DESC", "ENTY", "HUM", "ABBR", "LOC", "NUM")
_RELATIONS = (
    "Cause-Effect",
    "Component-Whole",
    "Content-Container",
    "Entity-Destination",
    "Entity-Origin",
    "Instrument-Agency",
    "Member-Collection",
    "Message-Topic",
    "Product-Producer",
)
_GROUPS = (
    *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware"),
    *("comp.sys.mac.hardware", "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles"),
    *("rec.sport.baseball", "rec.sport.hockey", "sci.crypt", "sci.electronics", "sci.med"),
    *("sci.space", "soc.religion.christian", "talk.politics.guns", "talk.politics.mideast"),
    *("talk.politics.misc", "talk.religion.misc"),
)
_GROUP_NEWS = {
    **dict.fromkeys(("rec.sport.baseball", "rec.sport.hockey"), "Sports"),
    **{group: "Sci/Tech" for group in _GROUPS if group.startswith(("comp.", "sci."))},
    **{group: "World" for group in _GROUPS if group.startswith("talk.politics.")},
}
_REUTERS = ("earn", "acq", "money-fx", "grain", "crude", "trade", "interest", "ship")
_MONEY = ("earn", "acq", "money-fx", "trade", "interest")


def _wrench(name: str, about: str, names: tuple[str, ...]) -> TaskRecord:
    """Return a task of WRENCH; real noise is the majority vote of its labelling functions."""
    file = TaskTable(f"wrench_{name}/data.parquet", labels=numbered(names), noisy="majority_vote")
    return TaskRecord(
        f"wrench_{name}",
        f"{about}; noisy labels are votes of labelling functions",
        "none stated for this copy (WRENCH: Apache-2.0)",
        "Zhang et al. 2021 (arXiv 2109.11377)",
        names,
        (file,),
    )


_TOPICS = (
    TaskRecord(
        "agnews",
        "topic of news",
        "research and other non-commercial use",
        "Zhang et al. 2015 (arXiv 1509.01626)",
        _NEWS,
        _named("cls_agnews/data.parquet", _NEWS),
        _hub("fancyzhx/ag_news", _NEWS),
        ood={
            "20news": Shift("20news", labels=_GROUP_NEWS),
            "reuters": Shift("reuters", labels=dict.fromkeys(_MONEY, "Business")),
        },
    ),
    TaskRecord(
        "noisy_agnews",
        "topic of news; noisy labels are majorities of three people",
        "MIT (another copy: CC BY-NC-SA 4.0)",
        "NoisyAG-News, released by hhf-hd",
        _NEWS,
        (
            TaskTable(
                "noisy_agnews/data.parquet",
                label="label_name",
                noisy="noisy_label_name",
                splits={"train": "train"},
            ),
            TaskTable("cls_agnews/data.parquet", label="label_name", splits={"test": "test"}),
        ),
        ood={"20news": Shift("20news", labels=_GROUP_NEWS)},
    ),
    TaskRecord(
        "20news",
        "newsgroup of a message; the test messages are later ones",
        "none stated",
        "Lang 1995",
        _GROUPS,
        _named("cls_20news/data.parquet", _GROUPS),
        _hub("SetFit/20_newsgroups", _GROUPS),
    ),
    TaskRecord(
        "reuters",
        "topic of newswire stories that have one of the eight commonest topics",
        "research only",
        "Lewis 1997, Reuters-21578, ModApte",
        _REUTERS,
        _named("cls_reuters21578/modapte.parquet", _REUTERS),
    ),
    TaskRecord(
        "trec",
        "kind of answer that a question asks for",
        "none stated",
        "Li and Roth 2002",
        _QUESTIONS,
        _named("cls_trec/data.parquet", _QUESTIONS),
        (
            TaskTable(
                "CogComp/trec",
                label="coarse_label",
                labels=numbered(("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")),
                splits={"train": "train", "test": "test"},
            ),
        ),
    ),
    _wrench("trec", "kind of answer that a question asks for", _QUESTIONS),
    _wrench("semeval", "relation of two things that a sentence names", _RELATIONS),
    _wrench("youtube", "spam among comments on videos", ("HAM", "SPAM")),
    TaskRecord(
        "subj",
        "subjective and objective sentences about movies",
        "data not stated (nltk's copy: CC BY 4.0)",
        "Pang and Lee 2004",
        ("subjective", "objective"),
        _named("cls_subj/data.parquet", ("subjective", "objective")),
    ),
    TaskRecord(
        "cola",
        "sentences that linguists call acceptable or not",
        "none stated",
        "Warstadt et al. 2019 (arXiv 1805.12471)",
        ("unacceptable", "acceptable"),
        (
            TaskTable(
                "cls_cola/data.parquet",
                label="label_name",
                splits={"train": "train", "dev": "test"},
            ),
        ),
        (
            TaskTable(
                "nyu-mll/glue",
                "cola",
                ("sentence",),
                labels=numbered(("unacceptable", "acceptable")),
                splits={"train": "train", "validation": "test"},
            ),
        ),
    ),
)

# tweets and comments: emotion, irony, offence, hate; sentiment in steps


def _tweets(name: str, about: str, names: tuple[str, ...], hub: tuple[str, ...]) -> TaskRecord:
    """Return a task of TweetEval; `names` are in the order of its labels."""
    return TaskRecord(
        f"tweet_{name}",
        about,
        "each set its own; none stated for the collection",
        "Barbieri et al. 2020 (arXiv 2010.12421)",
        names,
        (TaskTable(f"tweeteval/{name}.parquet", labels=numbered(names)),),
        (TaskTable("cardiffnlp/tweet_eval", name, labels=numbered(hub), splits=_ALL),),
    )


_COMMENTS = (
    _tweets("emotion", "emotion of tweets", *[("anger", "joy", "optimism", "sadness")] * 2),
    _tweets("irony", "irony in tweets", *[("non_irony", "irony")] * 2),
    _tweets("offensive", "offence in tweets", *[("not-offensive", "offensive")] * 2),
    TaskRecord(
        "tweet_sentiment",
        "sentiment of tweets",
        "each set its own; none stated for the collection",
        "Barbieri et al. 2020 (arXiv 2010.12421)",
        ("negative", "neutral", "positive"),
        (  # the file has no training tweets: those for validation are trained on
            TaskTable(
                "tweeteval/sentiment.parquet",
                label="label_name",
                splits={"val": "train", "test": "test"},
            ),
        ),
        (
            TaskTable(
                "cardiffnlp/tweet_eval",
                "sentiment",
                labels=numbered(("negative", "neutral", "positive")),
                splits=_ALL,
            ),
        ),
        ood={
            "sst5": Shift(
                "sst5",
                labels={"negative": "negative", "neutral": "neutral", "positive": "positive"},
            )
        },
    ),
    TaskRecord(
        "sst5",
        "sentiment of movie-review sentences in five steps",
        "none stated",
        "Socher et al. 2013",
        ("very negative", "negative", "neutral", "positive", "very positive"),
        (TaskTable("cls_sst/sst5_sentences.parquet", label="label_name"),),
        (
            TaskTable(
                "SetFit/sst5",
                labels=numbered(
                    ("very negative", "negative", "neutral", "positive", "very positive")
                ),
                splits=_ALL,
            ),
        ),
    ),
    TaskRecord(
        "tweet_hate",
        "hate speech in tweets",
        "each set its own; none stated for the collection",
        "Barbieri et al. 2020 (arXiv 2010.12421)",
        ("not-hate", "hate"),
        hub=(
            TaskTable(
                "cardiffnlp/tweet_eval",
                "hate",
                labels=numbered(("not-hate", "hate")),
                splits=_ALL,
            ),
        ),
        ood={
            "davidson": Shift("davidson", "train", labels={"hate": "hate", "neither": "not-hate"})
        },
    ),
    TaskRecord(
        "davidson",
        "hateful and offensive tweets",
        "MIT",
        "Davidson et al. 2017 (arXiv 1703.04009)",
        ("hate", "offensive", "neither"),
        hub=(
            TaskTable(
                "tdavidson/hate_speech_offensive",
                text=("tweet",),
                label="class",
                labels=numbered(("hate", "offensive", "neither")),
                splits={"train": "train"},
            ),
        ),
    ),
    TaskRecord(
        "civil_comments",
        "toxic comments on news, by half of the raters or more",
        "CC0",
        "Borkan et al. 2019 (arXiv 1903.04561)",
        ("civil", "toxic"),
        hub=(
            TaskTable(
                "google/civil_comments",
                label="toxicity",
                labels={"low": "civil", "high": "toxic"},
                threshold=0.5,
                splits=_ALL,
                max_rows=20_000,
            ),
        ),
        ood={
            "davidson": Shift(
                "davidson",
                "train",
                labels={"hate": "toxic", "offensive": "toxic", "neither": "civil"},
            ),
            "tweets": Shift(
                "tweet_offensive", labels={"offensive": "toxic", "not-offensive": "civil"}
            ),
        },
    ),
)

# two texts: whether one entails the other

_INFERENCE = ("entailment", "neutral", "contradiction")
_PREMISE = ("premise", "hypothesis")
_REVISED = "imdb_counterfactual/nli_revised.parquet"


def _revised(column: str) -> TaskTable:
    return TaskTable(
        _REVISED,
        text=_PREMISE,
        label="label_name",
        where={"version": f"revised_{column}"},
        splits={"test": f"ood:revised_{column}"},
    )


_NLI = (
    TaskRecord(
        "nli_counterfactual",
        "whether a premise entails a hypothesis; contrast sets revise one of them",
        "Apache-2.0",
        "Kaushik et al. 2020 (arXiv 1909.12434)",
        _INFERENCE,
        (
            TaskTable(_REVISED, text=_PREMISE, label="label_name", where={"version": "original"}),
            _revised("premise"),
            _revised("hypothesis"),
        ),
    ),
    TaskRecord(
        "mnli",
        "whether a premise entails a hypothesis; other genres are out of domain",
        "several, see the set",
        "Williams et al. 2018 (arXiv 1704.05426)",
        _INFERENCE,
        hub=(
            TaskTable(
                "nyu-mll/glue",
                "mnli",
                _PREMISE,
                labels=numbered(_INFERENCE),
                splits={
                    "train": "train",
                    "validation_matched": "test",
                    "validation_mismatched": "ood:mismatched",
                },
                max_rows=20_000,
            ),
        ),
        ood={"anli": Shift("anli")},
    ),
    TaskRecord(
        "anli",
        "whether a premise entails a hypothesis, written to fool models; first round",
        "CC BY-NC 4.0",
        "Nie et al. 2020 (arXiv 1910.14599)",
        _INFERENCE,
        hub=(
            TaskTable(
                "facebook/anli",
                text=_PREMISE,
                labels=numbered(_INFERENCE),
                splits={"train_r1": "train", "dev_r1": "val", "test_r1": "test"},
            ),
        ),
    ),
)

TASKS: dict[str, TaskRecord] = {
    record.name: record for record in (*_SENTIMENT, *_TOPICS, *_COMMENTS, *_NLI)
}
"""Tasks that are read, by name."""

TASK_NAMES: tuple[str, ...] = (*PLANTED, *sorted(TASKS))
"""Every task, the planted ones first."""


def find_record(name: str) -> TaskRecord:
    """Return the record of a task that is read.

    Raises:
        DataError: There is none of this name; says which are near.
    """
    if name not in TASKS:
        find("task", name, dict.fromkeys(TASK_NAMES), DataError)
    return TASKS[name]
