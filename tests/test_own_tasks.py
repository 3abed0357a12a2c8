"""Tasks of one's own: in a recipe and in Python, several classes, pairs, other domains, faults."""

import csv
from pathlib import Path

import pytest
import torch
from test_cli import call
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import lmmono as lm
from lmmono.data.tasks.reading import asked_tasks
from lmmono.data.tasks.task import PARTS
from lmmono.errors import DataError, RecipeError
from lmmono.recipe import Recipe
from lmmono.recipe.robustness_settings import Robustness

MOODS = ("bad", "fine", "good")
RECIPE = """name: own
seed: 0
model: {arch: gpt2}
robustness:
  suites: [ood]
  tasks: [planted_topic, {path: reviews.csv, text: review, label: stars}]
"""


def write(path: Path, rows: list[dict[str, object]], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def reviews(n: int, start: int = 0) -> list[dict[str, object]]:
    """Reviews of one to three stars, told apart by one word."""
    return [
        {"review": f"n{i % 10} is {MOODS[i % 3]} n{i // 10}", "stars": i % 3 + 1}
        for i in range(start, start + n)
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "reviews.csv", reviews(300))
    words = (*MOODS, "odd")
    films = [{"body": f"n{i} was {words[i % 4]}", "mood": "☹😐☺?"[i % 4]} for i in range(96)]
    write(tmp_path / "films.tsv", films, "\t")
    (tmp_path / "own.yaml").write_text(RECIPE)
    return tmp_path


FILMS = {
    "path": "films.tsv",
    "text": "body",
    "label": "mood",
    "labels": {"☹": "1", "😐": "2", "☺": "3"},
}


@pytest.mark.usefixtures("folder")
def test_a_task_of_a_recipe_is_read_by_its_columns():
    own = {"path": "reviews.csv", "text": "review", "label": "stars", "ood": {"films": FILMS}}
    named, task = asked_tasks(Robustness.model_validate({"tasks": ("planted_topic", own)}))
    assert (named.name, task.name) == ("planted_topic", "reviews")
    assert task.label_names == ("1", "2", "3")
    assert sum(len(task.parts[name]) for name in PARTS) == 300
    shifted = task.parts["ood:films"]
    assert len(shifted) == 72  # what no class is meant by is left out
    assert set(shifted.labels.tolist()) == {0, 1, 2}
    words = [text.split()[-1] for text in shifted.texts]
    assert [MOODS.index(word) for word in words] == shifted.labels.tolist()


def test_a_recipe_writes_its_tasks_as_it_was_given_them(tmp_path):
    section = Robustness.model_validate({"tasks": ("planted_topic", {"path": "a/b.csv"})})
    assert [task.title for task in section.tasks] == ["planted_topic", "b"]
    dumped = section.model_dump(mode="json")["tasks"]
    assert dumped[0] == "planted_topic" and dumped[1]["path"] == "a/b.csv"
    assert Robustness.model_validate_json(section.model_dump_json()) == section


@pytest.mark.usefixtures("folder")
def test_probes_on_a_csv_task_find_what_tells_its_classes_apart_in_other_domains_too():
    words = ["<eos>", "is", "was", "odd", *MOODS, *(f"n{i}" for i in range(100))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(words), n_positions=16, n_embd=32, n_layer=1, n_head=2)
    ).eval()
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    task = lm.read_task("reviews.csv", text="review", label="stars", ood={"films": FILMS})
    found = lm.robustness(
        model,
        task,
        suite="ood",
        hook="blocks.0.hook_resid_pre",
        features={"dense": None},
        seeds=2,
        shots=(8,),
        resamples=2,
    )
    whole = [row for row in found.rows if row["n_shots"] is None]
    assert {row["split"] for row in whole} == {"test", "ood:films"}
    assert {row["task"] for row in whole} == {"reviews"}
    for row in whole:
        assert row["value"] > 0.9, row  # chance is a third


def test_pairs_of_texts_and_rows_in_memory_make_a_task():
    rows = [
        {"premise": f"a{i}", "hypothesis": f"b{i}", "gold": ("yes", "no", "maybe", "who")[i % 4]}
        for i in range(200)
    ]
    task = lm.read_task(rows, text=("premise", "hypothesis"), label="gold", name="nli")
    assert task.label_names == ("maybe", "no", "who", "yes") and task.name == "nli"
    text = task.parts["train"].texts[0]
    premise, hypothesis = text.split("\n")
    assert premise[1:] == hypothesis[1:]
    label = task.label_names[task.parts["train"].labels[0]]
    assert label == rows[int(premise[1:])]["gold"]


@pytest.mark.usefixtures("folder")
def test_what_is_no_task_is_refused_with_the_way_out():
    def refused(message: str, rows: object = "reviews.csv", **columns: object) -> None:
        with pytest.raises(DataError, match=message):
            lm.read_task(rows, **{"text": "review", "label": "stars"} | columns)

    refused("no column 'reviw'; .* did you mean review", text="reviw")
    refused("no column 'star'; .* did you mean stars", label="star")
    refused("no file or folder 'revews.csv'.* did you mean reviews.csv", "revews.csv")
    refused("ood films: no 'txt'; did you mean text", ood={"films": FILMS | {"txt": "x"}})
    refused("films.tsv:2: no column 'stars'", ood={"films": "films.tsv"})
    refused(
        "part ood:films: label '☹'", ood={"films": {k: FILMS[k] for k in ("path", "text", "label")}}
    )
    labels = {"sad": "1"}
    refused("no text of the classes sad; it has", ood={"films": FILMS | {"labels": labels}})
    refused("row 1: want a mapping of columns, got 'b'", [{"review": "a", "stars": 1}, "b"])
    refused("want a file, or rows that are mappings, got int", 5)


BAD_TASKS = [
    ("{path: revews.csv}", r"tasks\[0\].path: want a file.*did you mean reviews.csv"),
    (
        "{path: reviews.csv, label: stars, text: reviw}",
        r"tasks\[0\]: .*no column 'reviw'.*mean review",
    ),
    ("{path: reviews.csv, txt: review}", r"tasks\[0\].txt: unknown key; did you mean text"),
    ("planted_topc", r"tasks\[0\].name: want a built-in task, .* did you mean planted_topic"),
    ("{text: review}", r"tasks\[0\].name: want a built-in task, or a path .*no name and no path"),
    ("{name: sst2, label: x}", r"tasks\[0\].label: sst2 is built in and has its columns"),
    ("{path: x.csv, name: sst2}", r"tasks\[0\].name: a built-in task is called sst2"),
    ("{path: a/x.csv}, {path: b/x.csv}", r"tasks\[1\]: two tasks are called x; give one a name"),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("entry", "message"), BAD_TASKS)
def test_check_tells_what_is_wrong_with_a_task(entry, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.check("own.yaml", f"robustness.tasks=[{entry}]")


@pytest.mark.usefixtures("folder")
def test_check_tells_of_tasks_that_no_suite_uses():
    with pytest.raises(RecipeError, match=r"tasks\[1\]: no suite uses it; name some, such as"):
        Recipe.check("own.yaml", "robustness.suites=[]")


@pytest.mark.usefixtures("folder")
def test_check_takes_a_task_that_is_whole():
    assert call("check", "own.yaml") == 0


def test_a_run_reads_its_own_tasks_before_any_work(folder, capsys):
    write(folder / "reviews.csv", [{"review": "a", "star": 1}])
    assert call("run", "own.yaml") == 2
    assert "no column 'stars'; it has 'review', 'star'" in capsys.readouterr().err
    assert not (folder / "runs/own/model").exists()
