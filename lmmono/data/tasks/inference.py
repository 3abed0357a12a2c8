"""Built-in tasks of two texts: whether one entails the other."""

from lmmono.data.tasks.reading import Table, numbered
from lmmono.data.tasks.task_registry import Shift, TaskRecord

_INFERENCE = ("entailment", "neutral", "contradiction")
_PREMISE = ("premise", "hypothesis")
_REVISED = "imdb_counterfactual/nli_revised.parquet"


def _revised(column: str) -> Table:
    return Table(
        _REVISED,
        text=_PREMISE,
        label="label_name",
        where={"version": f"revised_{column}"},
        splits={"test": f"ood:revised_{column}"},
    )


INFERENCE = (
    TaskRecord(
        "nli_counterfactual",
        "whether a premise entails a hypothesis; contrast sets revise one of them",
        "Apache-2.0",
        "Kaushik et al. 2020 (arXiv 1909.12434)",
        _INFERENCE,
        (
            Table(_REVISED, text=_PREMISE, label="label_name", where={"version": "original"}),
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
            Table(
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
            Table(
                "facebook/anli",
                text=_PREMISE,
                labels=numbered(_INFERENCE),
                splits={"train_r1": "train", "dev_r1": "val", "test_r1": "test"},
            ),
        ),
    ),
)
