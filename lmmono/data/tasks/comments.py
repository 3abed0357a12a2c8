"""Built-in tasks of tweets and comments: emotion, irony, offence, hate; sentiment in steps."""

from lmmono.data.tasks.reading import Table, numbered
from lmmono.data.tasks.task_registry import Shift, TaskRecord

_ALL = {"train": "train", "validation": "val", "test": "test"}


def _tweets(name: str, about: str, names: tuple[str, ...], hub: tuple[str, ...]) -> TaskRecord:
    """Return a task of TweetEval; `names` are in the order of its labels."""
    return TaskRecord(
        f"tweet_{name}",
        about,
        "each set its own; none stated for the collection",
        "Barbieri et al. 2020 (arXiv 2010.12421)",
        names,
        (Table(f"tweeteval/{name}.parquet", labels=numbered(names)),),
        (Table("cardiffnlp/tweet_eval", name, labels=numbered(hub), splits=_ALL),),
    )


COMMENTS = (
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
            Table(
                "tweeteval/sentiment.parquet",
                label="label_name",
                splits={"val": "train", "test": "test"},
            ),
        ),
        (
            Table(
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
        (Table("cls_sst/sst5_sentences.parquet", label="label_name"),),
        (
            Table(
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
            Table(
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
            Table(
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
            Table(
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
