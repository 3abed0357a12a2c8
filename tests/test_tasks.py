"""Tasks: what a part may hold, planted ones, built-in ones, files, and texts in two parts."""

import csv
import json
from collections import Counter
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from lmmono.data.planted import Habits
from lmmono.data.planted.lexicon import NAMES, Lexicon
from lmmono.data.tasks.overlap import leakage, text_key, without_leakage
from lmmono.data.tasks.planted_tasks import PLANTED_TASKS, planted_task
from lmmono.data.tasks.reading import assemble, find_task, read_table, read_task
from lmmono.data.tasks.task import NO_PARTNER, Labelled, Task
from lmmono.errors import DataError
from lmmono.registry.tasks import PLANTED, TASK_NAMES, TASKS, TaskTable, find_record

SMALL = {"n_train": 80, "n_val": 40, "n_test": 40}
LEXICON = Lexicon()
CUED = {"n_train": 120, "n_val": 8, "n_test": 60}


def part(labels: list[int], first: str = "text") -> Labelled:
    return Labelled(tuple(f"{first} {i}" for i in range(len(labels))), np.array(labels, np.int64))


def task(train: list[int], names: tuple[str, ...] = ("a", "b", "c"), **parts: Labelled) -> Task:
    known = {"train": part(train), "val": part([0], "val"), "test": part([1], "test"), **parts}
    return Task("t", "about", "licence", "source", names, known)


# --- the records ---------------------------------------------------------------------------


BAD_TASKS = [
    (lambda: task([1, 1, 1]), "every text is of class b; want two classes or more"),
    (lambda: task([0, 1]), "2 texts of 3 classes: want one each or more"),
    (lambda: task([0, 2, 2, 0]), "labels with gaps, no text of class b"),
    (lambda: task([0, 1, 3]), "label 3 is no class; want 0 to 2 for a, b, c"),
    (lambda: task([0, 1, -1]), "label -1 is no class"),
    (lambda: task([0, 1], ("a", "a")), "two or more classes of different names"),
    (lambda: task([0, 0], ("a",)), "two or more classes of different names"),
    (lambda: task([0, 1, 2], tests=part([1])), "part 'tests': want train, val, test or ood:<name>"),
    (lambda: Task("t", "", "", "", ("a", "b"), {"train": part([0, 1])}), "no part 'val'"),
    (lambda: task([0, 1, 2]).part("tset"), "did you mean test"),
    (lambda: Labelled(("a", " \n"), np.array([0, 1])), "1 of 2 texts are empty, .* is text 1"),
    (lambda: Labelled(("a",), np.array([0, 1])), "1 texts but 2 labels"),
    (lambda: Labelled(("a",), np.array([0]), noisy=np.array([0, 1])), "1 texts but 2 noisy"),
    (lambda: task([0, 1, 2]).draw("train", 2, seed=0), "2 texts of 3 classes"),
    (lambda: task([0, 1, 2]).draw("train", 4, seed=0), "4 texts asked for, it has 3"),
    (lambda: task([0] * 9 + [1, 2]).draw("train", 9, seed=0), "class b has 1; ask for fewer"),
]


@pytest.mark.parametrize(("make", "message"), BAD_TASKS, ids=[m for _, m in BAD_TASKS])
def test_a_task_that_cannot_be_used_is_refused_with_the_reason(make, message) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_draws_are_balanced_hold_every_class_and_grow() -> None:
    labels = np.random.default_rng(0).choice(3, 500, p=[0.8, 0.15, 0.05]).tolist()
    made = task(labels)
    for seed in range(3):
        few = made.draw("train", 10, seed=seed)
        more = made.draw("train", 45, seed=seed)
        assert np.array_equal(more[:10], few) and len(set(more.tolist())) == 45
        assert np.bincount(made.parts["train"].labels[more]).tolist() == [15, 15, 15]
        shares = made.draw("train", 100, seed=seed, balanced=False)
        counts = np.bincount(made.parts["train"].labels[shares], minlength=3)
        assert np.abs(counts - 100 * np.bincount(labels) / 500).max() <= 2
        assert set(made.subset("train", 3, seed=seed, balanced=False).labels) == {0, 1, 2}
    assert not np.array_equal(made.draw("train", 45, seed=0), made.draw("train", 45, seed=1))


def test_a_part_keeps_partners_that_stay_and_forgets_those_that_go() -> None:
    whole = Labelled(
        ("a", "b", "c", "d"), np.array([0, 1, 0, 1]), np.array([1, 1, 0, 0]), np.array([1, 0, 3, 2])
    )
    some = whole.take(np.array([3, 0, 1]))
    assert some.texts == ("d", "a", "b")
    assert some.pairs.tolist() == [NO_PARTNER, 2, 1]
    assert some.noisy.tolist() == [0, 1, 1]


# --- planted tasks -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> dict[str, Task]:
    return {kind: planted_task(kind, **SMALL) for kind in PLANTED}


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_parts_are_balanced_and_share_no_text(planted, kind) -> None:
    made = planted[kind]
    assert tuple(made.parts) == ("train", "val", "test", "ood:shifted")
    for name, size in (("train", 80), ("val", 40), ("test", 40), ("ood:shifted", 40)):
        counts = np.bincount(made.parts[name].labels, minlength=made.n_classes)
        assert counts.sum() == size and counts.max() - counts.min() <= 1
    found = leakage(made)
    assert found.shared == () and not found.between


def test_a_planted_task_comes_again_at_a_seed_and_shares_no_text_with_another_one(planted) -> None:
    made = planted["planted_agreement"].parts["train"].texts
    again = planted_task("planted_agreement", n_train=80, n_val=2, n_test=2)
    assert again.parts["train"].texts == made
    other = planted_task("planted_agreement", n_train=20, n_val=2, n_test=2, seed=1)
    assert not set(other.parts["train"].texts) & set(made)


def own_label(kind: str, text: str) -> int:
    """The class as a person would work it out from the text."""
    words = [LEXICON.words[LEXICON[word]] for word in text.split()]
    if kind == "planted_topic":
        topics = Counter(word.topics[0] for word in words if len(word.topics) == 1)
        return topics.most_common(1)[0][0] if topics else -1
    if kind == "planted_agreement":
        skipped = ("that", "of", "in", "near", "behind", "beside", "under", "with", "never", "not")
        form = text.split()
        end = min([form.index(stop) for stop in skipped if stop in form], default=len(form))
        nouns = [word for word in words[:end] if word.word_class.name == "NOUN"]
        return int(nouns[-1].number) if nouns else -1
    balance, sign = 0, 1
    for word in words:
        if word.word_class.name == "NEGATOR":
            sign = -1
        elif word.form in ("but", "and", ".", ",", '"'):
            sign = 1 if word.form != "and" else sign
        if word.polarity:
            balance += sign * word.polarity
    return int(balance > 0) if balance else -1


@pytest.mark.parametrize("kind", PLANTED)
def test_the_twin_means_the_same_and_looks_different(planted, kind) -> None:
    made = planted[kind]
    for name in ("test", "ood:shifted"):
        told = [own_label(kind, text) for text in made.parts[name].texts]
        known = [(a, b) for a, b in zip(told, made.parts[name].labels, strict=True) if a >= 0]
        assert len(known) > 20
        assert np.mean([a == b for a, b in known]) > 0.85
    own = made.parts["train"].texts + made.parts["val"].texts
    test, far = made.parts["test"].texts, made.parts["ood:shifted"].texts
    assert distance(shares(own), shares(far)) > distance(shares(own), shares(test))
    assert mean_words(far) > max(mean_words(own), mean_words(test)) + 1


def mean_words(texts: tuple[str, ...]) -> float:
    return float(np.mean([len(text.split()) for text in texts]))


def shares(texts: tuple[str, ...]) -> Counter[str]:
    counts = Counter(word for text in texts for word in text.split())
    total = sum(counts.values())
    return Counter({word: count / total for word, count in counts.items()})


def distance(first: Counter[str], second: Counter[str]) -> float:
    return sum(abs(first[word] - second[word]) for word in first | second) / 2


def test_no_shift_leaves_the_habits_and_a_full_one_changes_negation(planted) -> None:
    def negated(made: Task, name: str) -> float:
        texts = made.parts[name].texts
        return float(np.mean([{"not", "never"} & set(text.split()) != set() for text in texts]))

    kind = "planted_polarity"
    still = planted_task(kind, n_train=4, n_val=4, n_test=40, shift=0.0)
    assert abs(negated(still, "ood:shifted") - negated(still, "test")) < 0.25
    moved = planted[kind]
    assert negated(moved, "ood:shifted") > negated(moved, "test") + 0.1
    assert Habits().mood_kept == 0.9


@cache
def cued(strength: float) -> Task:
    return planted_task("planted_agreement", **CUED, cue=strength)


@pytest.mark.parametrize(("strength", "agreement"), [(0.0, 0.5), (0.6, 0.8), (1.0, 1.0)])
def test_the_cue_goes_with_the_class_exactly_as_often_as_asked(strength, agreement) -> None:
    made = cued(strength)
    names = NAMES.split()[:2]
    wanted = dict.fromkeys(("train", "val", "test", "ood:shifted"), agreement)
    wanted |= {"ood:cue_random": 0.5, "ood:cue_reversed": 1 - agreement}
    assert set(made.parts) == set(wanted)
    for name, share in wanted.items():
        cues = [names.index(text.split()[0]) for text in made.parts[name].texts]
        agrees = int((np.array(cues) == made.parts[name].labels).sum())
        assert agrees == round(share * len(cues)), name


def test_a_reader_of_words_falls_for_a_strong_cue_and_not_for_a_random_one() -> None:
    def accuracy(strength: float, name: str) -> float:
        made = cued(strength)
        words = CountVectorizer(token_pattern=r"^\S+|(?<= )\S+", ngram_range=(1, 2))
        train, test = made.parts["train"], made.parts[name]
        model = LogisticRegression(max_iter=200).fit(words.fit_transform(train.texts), train.labels)
        return float(model.score(words.transform(test.texts), test.labels))

    strong = accuracy(1.0, "test") - accuracy(1.0, "ood:cue_reversed")
    random = accuracy(0.0, "test") - accuracy(0.0, "ood:cue_reversed")
    assert strong > 0.5
    assert abs(random) < 0.25


def test_planted_settings_that_make_no_task_are_refused() -> None:
    for settings, message in (
        ({"name": "planted_topics"}, "did you mean planted_topic"),
        ({"name": "planted_topic", "shift": 2.0}, r"want a shift in \[0, 1\]"),
        ({"name": "planted_topic", "cue": -0.1}, r"want a cue in \[0, 1\]"),
        ({"name": "planted_topic", "n_val": 3}, "3 texts of 8 classes"),
    ):
        with pytest.raises(DataError, match=message):
            planted_task(**settings)
    assert all(len(made.label_names) >= 2 for made in PLANTED_TASKS.values())


# --- texts in two parts --------------------------------------------------------------------


def test_planted_copies_are_found_whatever_their_case_marks_and_blanks() -> None:
    leaky = task(
        [0, 1, 2, 0],
        val=Labelled(("TEXT  0!", "new"), np.array([0, 1])),
        test=Labelled(("'text 1'.", "Text 0", "Text, 0", "newer"), np.array([0, 0, 0, 1])),
    )
    found = leakage(leaky)
    assert found.between == {("train", "val"): 1, ("train", "test"): 2, ("val", "test"): 1}
    first = found.shared[0]
    assert first.places == (("train", 0), ("val", 0), ("test", 1), ("test", 2))
    assert "train and val share 1, train and test share 2" in str(found)
    clean = without_leakage(task([0, 1, 2, 0, 1], **{k: leaky.parts[k] for k in ("val", "test")}))
    assert clean.parts["train"].texts == ("text 2", "text 3", "text 4")
    assert clean.parts["val"].texts == ("new",)
    assert len(clean.parts["test"]) == 4
    assert not leakage(clean).between
    assert text_key("!!!") != text_key("???")


# --- files and the hub ---------------------------------------------------------------------

ROWS = [
    {"text": f"{word} {split} number {i}", "label": label, "split": split}
    for split, n in (("train", 6), ("dev", 2), ("test", 4))
    for i in range(n)
    for word, label in (("good", "pos"), ("bad", "neg"))
]


def write(path, rows) -> None:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_file_becomes_a_task_whatever_its_format(tmp_path, suffix) -> None:
    write(tmp_path / f"mood.{suffix}", ROWS)
    for path in (tmp_path / f"mood.{suffix}", tmp_path):
        made = read_task(path)
        assert made.label_names == ("neg", "pos")
        assert {name: len(found) for name, found in made.parts.items()} == {
            "train": 12,
            "val": 4,
            "test": 8,
        }
        assert made.parts["train"].texts[0] == "good train number 0"
        assert made.parts["train"].labels[0] == 1


def test_what_a_file_does_not_split_is_held_out_by_text(tmp_path) -> None:
    rows = [{"text": f"text {i % 200}", "label": i % 2} for i in range(400)]
    write(tmp_path / "rows.jsonl", rows)
    made = read_task(tmp_path / "rows.jsonl")
    sizes = {name: len(found) for name, found in made.parts.items()}
    assert sum(sizes.values()) == 400
    assert 0.45 < sizes["train"] / 400 < 0.8
    assert leakage(made).shared == ()
    assert made.label_names == ("0", "1")


def test_a_field_may_be_longer_than_the_csv_module_allows(tmp_path) -> None:
    rows = [{"text": f"{i} " + "long " * 40_000, "label": i % 2} for i in range(40)]
    write(tmp_path / "long.csv", rows)
    made = read_task(tmp_path / "long.csv")
    assert sum(map(len, made.parts.values())) == 40
    assert {len(text) for text in made.parts["train"].texts} <= {200_002, 200_003}
    assert csv.field_size_limit() == 131_072, "the limit of others is left as it was"


def test_texts_that_are_tested_on_are_not_learned_from(tmp_path) -> None:
    copies = [{**row, "split": "train"} for row in ROWS if row["split"] == "test"]
    write(tmp_path / "x.jsonl", [*ROWS, *copies])
    assert leakage(read_task(tmp_path / "x.jsonl")).shared == ()
    kept = read_task(tmp_path / "x.jsonl", shared_texts=True)
    assert leakage(kept).between == {("train", "test"): 8}


def test_files_that_make_no_task_are_refused(tmp_path) -> None:
    def refused(rows: list[dict], message: str, **columns) -> None:
        write(tmp_path / "x.jsonl", rows)
        with pytest.raises(DataError, match=message):
            read_task(tmp_path / "x.jsonl", **columns)

    refused(ROWS, "no column 'txt'.*did you mean text", text="txt")
    refused(ROWS, "no column 'klass'", label="klass")
    refused([{"text": "a", "label": 0}, {"text": "b", "label": 2}], "gaps: 0, 2; .* 1 is missing")
    refused([{"text": f"a{i}", "label": "x"} for i in range(20)], "two or more classes")
    refused([{**row, "text": ""} for row in ROWS], "texts are empty")
    refused([{"text": 3, "label": 0}], "want text in 'text', got int")
    refused([{"text": "a", "label": None}], "no label in 'label'")
    refused([{**row, "split": "other"} for row in ROWS], "split 'other' stands for no part")
    some = [{**row, "split": "Test"} if row["split"] == "test" else row for row in ROWS]
    refused(some, "x.jsonl:17: split 'Test' stands for no part; want train.*split=None")
    refused(
        [{"text": "a", "label": 0}, {"text": "b", "label": -1}], "label -1: want numbers from 0"
    )
    huge = [{"text": "a", "label": 0}, {"text": "b", "label": 999_999_999}]
    refused(huge, "gaps: 0, 999999999; .* 1 is missing")
    refused(
        [{**row, "pair": "one"} for row in ROWS], "want a number in 'pair', got 'one'", pair="pair"
    )
    with pytest.raises(DataError, match="no file or folder 'y.jsonl'.*did you mean x.jsonl"):
        read_task(tmp_path / "y.jsonl")
    (tmp_path / "z.csv").write_text("text,label\na,b,c\n")
    with pytest.raises(DataError, match="z.csv:2: want 2 columns"):
        read_task(tmp_path / "z.csv")
    for text, fault in (
        ("text,label\na,0\nb\0c,1\n", "z.csv:3: a NUL character"),
        ("text,label,label\na,0,1\n", "column 'label' stands twice"),
        ("text,label\na,\n", "z.csv:2: no label in 'label'"),
        ('text,label\n"a,0\n', "no readable CSV"),
    ):
        (tmp_path / "z.csv").write_text(text)
        with pytest.raises(DataError, match=fault):
            read_task(tmp_path / "z.csv")
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0.0, np.nan]}), tmp_path / "n.parquet")
    with pytest.raises(DataError, match="no label in 'label'"):
        read_task(tmp_path / "n.parquet")
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(DataError, match=".csv, .tsv, .json, .jsonl or .parquet"):
        read_task(tmp_path / "t.txt")


def test_a_dataset_is_read_through_datasets_by_name(tmp_path) -> None:
    rows = [{"sentence": row["text"], "label": int(row["label"] == "pos")} for row in ROWS]
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", rows[:12])
    write(tmp_path / "set" / "test.jsonl", rows[12:])
    table = TaskTable(
        str(tmp_path / "set"),
        text=("sentence",),
        labels={"0": "bad", "1": "good"},
        splits={"train": "train", "test": "test"},
        max_rows=6,
    )
    found = list(read_table(table, None))
    assert [row.part for row in found] == ["train"] * 6 + ["test"] * 6
    assert {row.label for row in found} == {"bad", "good"}
    missing = TaskTable(str(tmp_path / "none"), splits={"train": "train"})
    with pytest.raises(DataError, match="check its name"):
        list(read_table(missing, None))


def test_thresholds_wanted_values_noise_and_pairs_are_read(tmp_path) -> None:
    rows = [
        {"a": f"p{i}", "b": f"h{i}", "toxic": i / 10, "kind": "x" if i < 8 else "y", "pair": i // 2}
        for i in range(10)
    ]
    write(tmp_path / "x.parquet", rows)
    table = TaskTable(
        "x.parquet",
        text=("a", "b"),
        label="toxic",
        threshold=0.5,
        labels={"low": "civil", "high": "toxic"},
        where={"kind": "x"},
        split=None,
        pair="pair",
    )
    found = list(read_table(table, tmp_path))
    assert [row.label for row in found] == ["civil"] * 5 + ["toxic"] * 3
    assert found[1].text == "p1\nh1"
    made = assemble(
        [*found, *(type(row)("test", *list(fields(row))[1:]) for row in found)],
        name="x",
        about="",
        licence="",
        source="",
        label_names=("civil", "toxic"),
    )
    assert made.parts["test"].pairs.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    with pytest.raises(DataError, match="no row with kind 'z'; it has x, y"):
        list(
            read_table(
                TaskTable("x.parquet", text=("a",), label="toxic", where={"kind": "z"}, split=None),
                tmp_path,
            )
        )


def fields(row):
    return (row.part, row.text, row.label, row.noisy, row.pair)


# --- the built-in tasks --------------------------------------------------------------------


def test_every_record_says_what_it_is_and_its_shifts_exist() -> None:
    assert TASK_NAMES[:3] == PLANTED and len(set(TASK_NAMES)) == len(TASK_NAMES)
    for record in TASKS.values():
        assert record.about and record.licence and record.citation
        assert record.files or record.hub, record.name
        for shift in record.ood.values():
            other = find_record(shift.task)
            mapping = shift.labels or dict.fromkeys(record.label_names)
            assert set(mapping) <= set(other.label_names), record.name
            if shift.labels:
                assert set(shift.labels.values()) <= set(record.label_names), record.name
            else:
                assert set(other.label_names) == set(record.label_names), record.name
        for table in (*record.files, *record.hub):
            if table.labels is not None:
                assert set(table.labels.values()) == set(record.label_names), record.name


def test_a_task_that_is_not_there_says_where_it_is(tmp_path) -> None:
    with pytest.raises(DataError, match="task 'agnew' is not known; did you mean agnews"):
        find_task("agnew")
    with pytest.raises(DataError, match="not on the Hugging Face hub: give the folder that holds"):
        find_task("amazon_books")
    with pytest.raises(DataError, match="hub only, as SetFit/CR"):
        find_task("cr", folder=tmp_path)
    with pytest.raises(DataError, match="no file"):
        find_task("trec", folder=tmp_path)


def test_the_built_in_tasks_are_read_with_their_shifts(shared) -> None:
    folder = shared / "data"
    trec = find_task("trec", folder=folder)
    assert len(trec.parts["test"]) == 500 and trec.n_classes == 6
    shipped = find_task("trec", folder=folder, shared_texts=True)
    assert leakage(shipped).between["train", "test"] > 0
    assert not any(part in ("train", "val") for pair in leakage(trec).between for part in pair)
    books = find_task("amazon_books", folder=folder)
    assert books.ood == ("ood:amazon_electronics",)
    with pytest.raises(DataError, match="no row with domain 'dvd'; it has books, electronics"):
        find_task("amazon_books", folder=folder, ood=["amazon_dvd"])
    with pytest.raises(DataError, match="no out-of-domain set 'amazon_dvds'; did you mean"):
        find_task("amazon_books", folder=folder, ood=["amazon_dvds"])


def test_real_noise_and_contrast_pairs_come_with_their_tasks(shared) -> None:
    folder = shared / "data"
    youtube = find_task("wrench_youtube", folder=folder)
    train = youtube.parts["train"]
    assert train.noisy is not None
    assert 0.05 < (train.noisy != train.labels).mean() < 0.15  # votes are right on 90.4 % of all
    reviews = find_task("imdb_counterfactual", folder=folder)
    contrast = reviews.parts["ood:contrast"]
    assert contrast.pairs is not None and len(contrast) == 976
    assert (contrast.pairs[contrast.pairs] == np.arange(976)).all()
    assert (contrast.labels[contrast.pairs] != contrast.labels).all()
