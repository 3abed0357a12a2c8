"""Built-in tasks of sentiment in reviews."""

from lmmono.data.tasks.reading import Table, numbered
from lmmono.data.tasks.task_registry import Shift, TaskRecord

_POLAR = ("negative", "positive")
_TRAIN_TEST = {"train": "train", "test": "test"}
_ALL = {"train": "train", "validation": "val", "test": "test"}
_GLUE = {"train": "train", "validation": "test"}  # the labels of GLUE's test sets are hidden
_DOMAINS = ("books", "dvd", "electronics", "kitchen")


def _named(place: str, names: tuple[str, ...]) -> tuple[Table, ...]:
    return (Table(place, label="label_name", labels={name: name for name in names}),)


def _hub(place: str, names: tuple[str, ...]) -> tuple[Table, ...]:
    splits = {"train": "train", "test": "test"}
    return (Table(place, labels=numbered(names), splits=splits),)


def _reviews() -> dict[str, Shift]:
    return {f"amazon_{domain}": Shift(f"amazon_{domain}") for domain in _DOMAINS}


def _amazon(domain: str) -> TaskRecord:
    file = Table("cls_amazon4/data.parquet", label="label_name", where={"domain": domain})
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

SENTIMENT = (
    TaskRecord(
        "sst2",
        "sentiment of movie-review sentences",
        "none stated",
        "Socher et al. 2013",
        _POLAR,
        (
            Table(
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
        (Table("stanfordnlp/sst2", text=("sentence",), labels=numbered(_POLAR), splits=_GLUE),),
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
        (Table("nyu-mll/glue", "sst2", ("sentence",), labels=numbered(_POLAR), splits=_GLUE),),
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
            Table(
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
            Table(
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
            Table(_COUNTERFACTUAL, label="label_name", where={"version": "original"}),
            Table(
                _COUNTERFACTUAL,
                label="label_name",
                where={"version": "revised"},
                splits={"test": "ood:revised"},
            ),
            Table(
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
        (Table("cls_mpqa/data.parquet", label="label_name", blanks=True),),
    ),
)
