"""Built-in tasks of topics, questions and kinds of sentence, two with real label noise."""

from lmmono.data.tasks.reading import Table, numbered
from lmmono.data.tasks.task_registry import Shift, TaskRecord

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


def _named(place: str, names: tuple[str, ...]) -> tuple[Table, ...]:
    return (Table(place, label="label_name", labels={name: name for name in names}),)


def _hub(place: str, names: tuple[str, ...]) -> tuple[Table, ...]:
    splits = {"train": "train", "test": "test"}
    return (Table(place, labels=numbered(names), splits=splits),)


def _wrench(name: str, about: str, names: tuple[str, ...]) -> TaskRecord:
    """Return a task of WRENCH; real noise is the majority vote of its labelling functions."""
    file = Table(f"wrench_{name}/data.parquet", labels=numbered(names), noisy="majority_vote")
    return TaskRecord(
        f"wrench_{name}",
        f"{about}; noisy labels are votes of labelling functions",
        "none stated for this copy (WRENCH: Apache-2.0)",
        "Zhang et al. 2021 (arXiv 2109.11377)",
        names,
        (file,),
    )


TOPICS = (
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
            Table(
                "noisy_agnews/data.parquet",
                label="label_name",
                noisy="noisy_label_name",
                splits={"train": "train"},
            ),
            Table("cls_agnews/data.parquet", label="label_name", splits={"test": "test"}),
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
            Table(
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
            Table(
                "cls_cola/data.parquet",
                label="label_name",
                splits={"train": "train", "dev": "test"},
            ),
        ),
        (
            Table(
                "nyu-mll/glue",
                "cola",
                ("sentence",),
                labels=numbered(("unacceptable", "acceptable")),
                splits={"train": "train", "validation": "test"},
            ),
        ),
    ),
)
