"""Text as a caller has it: what is read as what, into rows and into a store, and first mistakes."""

import contextlib
import csv
from inspect import unwrap
from pathlib import Path

import pytest
import torch
from test_docs import BLOCK
from test_framing import word_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import activation_store as astore
import lmmono as lm
from lmmono.data.splits import split_of
from lmmono.data.tokens import TokenCorpus
from lmmono.errors import DataError, ModelError, RecipeError, RobustnessError, RunError
from lmmono.models.hooks import _token_ids
from lmmono.recipe.sections import Splits

ROOT = Path(__file__).parents[1]
TOKENIZER = word_tokenizer()
HALF = Splits(val_fraction=0.0, explain_fraction=0.5, score_fraction=0.5)


def parts(corpus: TokenCorpus) -> dict[str, list[list[int]]]:
    return {
        split: corpus.tokens(split).ids.tolist()
        for split, facts in corpus.facts.items()
        if facts["n_rows"]
    }


def test_texts_stand_in_rows_of_their_own_and_in_the_split_of_their_hash():
    texts = ["a b", "c", "b b b"]
    corpus = lm.tokenize(TOKENIZER, texts, n_ctx=3)
    rows = {"a b": [[0, 2, 3]], "c": [[0, 4, 1]], "b b b": [[0, 3, 3], [3, 1, 1]]}
    wanted: dict[str, list[list[int]]] = {}
    for text in texts:
        wanted.setdefault(split_of(text, HALF), []).extend(rows[text])
    assert parts(corpus) == wanted
    assert corpus.documents["name"].to_pylist() == ["text:0", "text:1", "text:2"]
    assert len(corpus.digest) == 64
    assert lm.tokenize(TOKENIZER, ["c"], n_ctx=3).digest != corpus.digest


def test_a_folder_of_rows_goes_with_the_last_that_refers_to_it():
    corpus = lm.tokenize(TOKENIZER, "a b")
    (split,) = parts(corpus)
    rows, folder = corpus.tokens(split), corpus.dir
    del corpus
    assert rows.corpus is not None and folder.is_dir()
    del rows
    assert not folder.exists()


def test_files_datasets_and_mappings_are_packed_and_padded(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("a b\n\na b\n")  # copies stand in one split
    Path("y.csv").write_text("id,body\n1,a b\n2,a b\n")
    rows = [[0, 2, 3, 0], [2, 3, 1, 1]]
    table = [{"id": 1, "body": "a b"}, {"id": 2, "body": "a b"}]
    for source in (
        "x.txt",
        Path("x.txt"),
        "*.txt",
        ["x.txt"],
        "y.csv",
        table,
        datasets.Dataset.from_list(table),
        datasets.Dataset.from_list(table).to_iterable_dataset(),
    ):
        assert list(parts(lm.tokenize(TOKENIZER, source, n_ctx=4)).values()) == [rows], source
    apart = lm.tokenize(TOKENIZER, "x.txt", n_ctx=4, rows="documents")
    assert list(parts(apart).values()) == [[[0, 2, 3, 1]] * 2]
    whole = lm.tokenize(TOKENIZER, "x.txt", n_ctx=8, split="file")
    assert whole.documents["n_tokens"].to_pylist() == [5]
    assert lm.tokenize(TOKENIZER, table, max_documents=1).documents.num_rows == 1
    assert lm.tokenize(TOKENIZER, "a.csv is a file").documents.num_rows == 1


MISTAKES = [
    ("", "texts: the text is empty"),
    ([], "at least one text, got an empty list"),
    (["a", None], r"texts\[1\]: want text, got NoneType"),
    (["a", " \n"], r"texts\[1\]: the text is empty"),
    ("nowhere.txt", "no file or folder 'nowhere.txt'"),
    ("*.csv", "no file matches"),
    ({"train": []}, "got a mapping of 'train'; choose one split"),
    (5, "want a text, a list of texts, .* got int"),
    ([{"n": 1}], "no column of text among 'n'; name the one to read as text_column"),
]


@pytest.mark.parametrize(("texts", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_what_is_no_text_is_refused(texts, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_text("a")
    with pytest.raises(DataError, match=message):
        lm.tokenize(TOKENIZER, texts)


def test_settings_and_tokenizers_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="tokenize: .*greater than or equal to 2"):
        lm.tokenize(TOKENIZER, "a", n_ctx=1)
    with pytest.raises(DataError, match="needs the model's tokenizer: open .* lm.open_model"):
        lm.tokenize(torch.nn.Linear(1, 1), "a")


# under test, beartype refuses what is not as annotated before our own words are reached
FIRST_MISTAKES = [
    (lambda: unwrap(lm.train)("recipe.yaml"), RecipeError, "got 'recipe.yaml'; lm.Recipe.load"),
    (
        lambda: unwrap(TokenCorpus.tokens)(lm.tokenize(TOKENIZER, "a"), "vall"),
        DataError,
        "no split 'vall'; did you mean val",
    ),
    (
        lambda: unwrap(lm.robustness)(torch.nn.Linear(1, 1), [("a good film", "pos")]),
        RobustnessError,
        "want names or tasks of lm.read_task, got tuple",
    ),
    (
        lambda: unwrap(_token_ids)(torch.nn.Linear(1, 1), ["a"], None),
        ModelError,
        "one text .* list",
    ),
    (
        lambda: _token_ids(torch.nn.Linear(1, 1), "", word_tokenizer(adds_bos=False)),
        ModelError,
        "the text is empty",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), FIRST_MISTAKES)
def test_first_mistakes_get_words_of_ours(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a model, its tokenizer and texts."""
    folder = tmp_path_factory.mktemp("mine")
    words = ["<eos>", *(f"w{i}" for i in range(30))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words),
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        activation_function="relu",
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "my-model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.save_pretrained(folder / "my-model")
    (folder / "texts").mkdir()
    for i in range(4):
        text = "\n\n".join(f"w{i} w{j} w{i + j}" for j in range(20))
        (folder / "texts" / f"{i}.txt").write_text(text)
    with (folder / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("review", "title"), *[(f"w{i} w3", "w1 w2") for i in range(9)]]
        )
    return folder


def test_a_store_of_texts_holds_what_the_model_computes_on_each(folder):
    model = lm.open_model(folder / "my-model")
    texts = ["w1 w2 w3", "w4", "w5 w6"]
    hook = "blocks.1.mlp.hook_post"
    with astore.open(folder / "texts.duckdb", mode="w") as store:
        lm.capture(model, texts, hooks=hook, n_ctx=8, max_density=1.0, into=store)
        acts = store.sql("SELECT doc_id, pos, unit, act FROM activations ORDER BY ALL").fetchall()
        kept = store.sql("SELECT name FROM documents ORDER BY doc_id").fetchall()
    assert kept == [("text:0",), ("text:1",), ("text:2",)]
    for doc_id, text in enumerate(texts):
        _, recorded = lm.run_with_cache(model, text, hook)
        dense = recorded[hook][0]
        own = {(pos, unit): act for d, pos, unit, act in acts if d == doc_id and pos < len(dense)}
        wanted = {(p, u): dense[p, u].item() for p, u in (dense > 0).nonzero().tolist()}
        assert own == pytest.approx(wanted, abs=1e-6)


def test_settings_of_texts_are_no_settings_of_tokens(folder):
    model = lm.open_model(folder / "my-model")
    corpus = lm.tokenize(model, "w1")
    with astore.open(folder / "refused.duckdb", mode="w") as store:
        for tokens in (corpus, corpus.tokens(next(iter(parts(corpus))))):
            with pytest.raises(RunError, match="n_ctx: settings of texts; tokens are given"):
                lm.capture(model, tokens, n_ctx=4, into=store)


def test_the_guide_to_capturing_does_what_it_says(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    ((language, block),) = BLOCK.findall((ROOT / "docs" / "capturing.md").read_text())
    assert language == "python"
    with contextlib.suppress(FileNotFoundError):
        Path("mine.duckdb").unlink()
    exec(block, {})
    told = capsys.readouterr().out
    assert "0.txt:1" in told and "text is read" not in told
