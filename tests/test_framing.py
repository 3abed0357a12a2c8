"""What stands around documents and in rows, by hand; and that a model does best with it."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

import lmmono as lm
from lmmono.data.batches import PADDING, train_batches
from lmmono.data.framing import text_start
from lmmono.data.planted import Language
from lmmono.data.tokens import TokenCorpus, prepare
from lmmono.data.truth import row_truth
from lmmono.errors import DataError
from lmmono.interop.llama2c import load_llama2c
from lmmono.recipe import Recipe
from lmmono.recipe.sections import Data

WORDS = ("<s>", "</s>", "a", "b", "c", "<unk>", "<|user|>")
TEXTS = ("a b c", "a", "b b b b b")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|> {{ m.content }}{{ eos_token }}{% endfor %}"
)


def word_tokenizer(*, adds_bos: bool = True, template: str | None = None, bos: str = "<s>"):
    vocabulary = {bos if word == "<s>" else word: i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(w, special=True) for w in (bos, "</s>", "<|user|>")])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def rows_of(corpus: TokenCorpus, split: str = "train") -> tuple[list[list[int]], list[list[int]]]:
    rows = corpus.tokens(split)
    return rows.ids.tolist(), rows.doc_ids.tolist()


def packed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, **settings: object) -> TokenCorpus:
    """The texts as a recipe prepares them, rows of four tokens, all for training."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    given = {
        "corpus": {"kind": "files", "paths": [str(tmp_path / "texts.jsonl")]},
        "tokenizer": {"kind": "folder", "path": str(tmp_path / "tokenizer")},
        "splits": {"val_fraction": 0, "explain_fraction": 0, "score_fraction": 0},
        "n_ctx": 4,
    }
    return prepare(Data.model_validate_json(json.dumps(given | settings)), tmp_path / "cache")


BY_HAND = [
    # the tokenizer adds <s> (0), so it parts documents, and rows go on without it
    (True, {}, [[0, 2, 3, 4], [0, 2, 0, 3], [3, 3, 3, 3]]),
    (True, {"bos": "always"}, [[0, 2, 3, 4], [0, 2, 0, 3], [3, 3, 3, 3]]),
    # the third row goes on in a document, so it starts with <s> and holds three tokens of it
    (True, {"bos": "rows"}, [[0, 2, 3, 4], [0, 2, 0, 3], [0, 3, 3, 3]]),
    (True, {"bos": "never"}, [[2, 3, 4, 1], [2, 1, 3, 3], [3, 3, 3, 1]]),
    (True, {"eos": "always"}, [[0, 2, 3, 4], [1, 0, 2, 1], [0, 3, 3, 3]]),
    # it adds none: an end of text (1) parts documents
    (False, {}, [[2, 3, 4, 1], [2, 1, 3, 3], [3, 3, 3, 1]]),
    (False, {"bos": "always"}, [[0, 2, 3, 4], [0, 2, 0, 3], [3, 3, 3, 3]]),
    (True, {"rows": "documents"}, [[0, 2, 3, 4], [0, 2, 1, 1], [0, 3, 3, 3], [3, 3, 1, 1]]),
    (
        True,
        {"rows": "documents", "bos": "rows"},
        [[0, 2, 3, 4], [0, 2, 1, 1], [0, 3, 3, 3], [0, 3, 3, 1]],
    ),
    (
        True,
        {"rows": "documents", "bos": "never", "eos": "never"},
        [[2, 3, 4, 1], [2, 1, 1, 1], [3, 3, 3, 3], [3, 1, 1, 1]],
    ),
]


@pytest.mark.parametrize(("adds_bos", "settings", "ids"), BY_HAND)
def test_rows_are_those_worked_out_by_hand(tmp_path, adds_bos, settings, ids):
    corpus = packed(tmp_path, word_tokenizer(adds_bos=adds_bos), **settings)
    assert rows_of(corpus)[0] == ids
    facts = corpus.facts["train"]
    n_padding = int((corpus.tokens("train").doc_ids < 0).sum())
    assert facts["n_padding"] == n_padding == ({12: 0, 16: n_padding}[np.size(ids)])
    assert facts["n_tokens"] == sum(corpus.documents["n_tokens"].to_pylist())


def test_every_token_has_its_document_and_padding_has_none(tmp_path):
    apart = packed(tmp_path, word_tokenizer(), rows="documents", bos="rows")
    assert rows_of(apart)[1] == [[0, 0, 0, 0], [1, 1, -1, -1], [2, 2, 2, 2], [2, 2, 2, -1]]
    assert apart.tokens("train").n_documents == 3
    end_to_end = packed(tmp_path, word_tokenizer(), bos="rows")
    assert rows_of(end_to_end)[1] == [[0, 0, 0, 0], [1, 1, 2, 2], [2, 2, 2, 2]]
    assert end_to_end.facts["train"]["n_tokens_dropped"] == 2  # <s> b


def test_rows_of_gemma_all_start_with_bos(tmp_path):
    ids, _ = rows_of(packed(tmp_path, word_tokenizer(bos="<bos>")))
    assert ids == [[0, 2, 3, 4], [0, 2, 0, 3], [0, 3, 3, 3]]


def test_a_text_stands_after_what_its_tokenizer_adds():
    assert text_start(word_tokenizer()) == 0
    assert text_start(word_tokenizer(adds_bos=False)) == 1


def test_settings_that_part_no_documents_are_refused():
    with pytest.raises(ValueError, match="a BOS or an end-of-text between packed documents"):
        Data.model_validate({"bos": "never", "eos": "never"})
    with pytest.raises(ValueError, match="a tokenizer with a chat template"):
        Data.model_validate({"chat": "messages"})


def test_chats_are_rendered_by_the_template_and_its_special_tokens_are_tokens(tmp_path):
    tokenizer = word_tokenizer(template=TEMPLATE)
    messages = [{"role": "user", "content": "a b"}, {"role": "user", "content": "c"}]
    corpus = lm.tokenize(tokenizer, [{"id": 1, "messages": messages}], chat="messages", n_ctx=8)
    (split,) = [name for name, facts in corpus.facts.items() if facts["n_rows"]]
    ids = rows_of(corpus, split)[0]
    assert ids == [[0, 6, 2, 3, 1, 6, 4, 1]]  # one <s>, as the template has it already
    tokenizer.save_pretrained(tmp_path / "chat")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    data = {
        "corpus": {"kind": "files", "paths": (str(tmp_path / "chats.jsonl"),)},
        "tokenizer": {"kind": "folder", "path": str(tmp_path / "chat")},
        "splits": {"val_fraction": 0.0, "explain_fraction": 0.0, "score_fraction": 0.0},
        "chat": "messages",
        "n_ctx": 8,
    }
    assert rows_of(prepare(Data.model_validate(data), tmp_path))[0] == ids


def test_what_is_no_chat_is_refused():
    def refused(rows: list[dict], message: str, template: str | None = TEMPLATE) -> None:
        with pytest.raises(DataError, match=message):
            lm.tokenize(word_tokenizer(template=template), rows, chat="messages")

    refused([{"messages": "hello"}], "row:0: want a list of messages with role and content")
    refused([{"messages": [{"from": "human", "value": "a"}]}], "row:0: want a list of messages")
    refused([{"message": []}], "no column 'messages'; it has 'message'; did you mean message")
    refused([{"messages": []}], "has no chat template", None)
    refuse = "{{ raise_exception('roles must alternate') }}"
    refused([{"messages": [{"role": "x"}]}], "refuses the messages: roles must alternate", refuse)


def test_planted_features_stand_at_their_words_in_rows_of_documents(tmp_path):
    corpus = {"kind": "planted", "n_documents": 30}
    ends = {"rows": "documents", "bos": "always", "eos": "always", "n_ctx": 16}
    made = prepare(Data.model_validate({"corpus": corpus, **ends}), tmp_path)
    rows = made.tokens("train")
    truth = row_truth(made, rows)
    for doc_id in np.unique(rows.doc_ids[rows.doc_ids >= 0]).tolist():
        own = truth[rows.doc_ids == doc_id]
        assert not own[[0, -1]].any()  # the tokens around it
        assert np.array_equal(own[1:-1], Language(0).document(doc_id).truth)
    assert not truth[rows.doc_ids < 0].any()


def test_training_and_its_losses_leave_padding_out(tmp_path):
    corpus = {"kind": "planted", "n_documents": 100}
    settings = {
        "name": "apart",
        "seed": 0,
        "out": str(tmp_path),
        "data": {"corpus": corpus, "n_ctx": 32, "rows": "documents"},
        "model": {"arch": "gpt2", "n_layers": 1, "d_model": 16, "n_heads": 2},
        "train": {"steps": 1, "warmup_steps": 0, "batch_tokens": 32 * 8, "lr": 1e-9},
    }
    run = lm.train(Recipe.model_validate(settings))
    rows = run.tokens("val")
    ids, is_token = torch.from_numpy(rows.ids.astype(np.int64)), rows.doc_ids[:, 1:] >= 0
    with torch.no_grad():
        logits = run.model(ids).logits[:, :-1]
    nats = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    wanted = nats[torch.from_numpy(is_token.ravel())].mean().item()
    assert not is_token.all() and run.val_loss == pytest.approx(wanted, abs=1e-4)
    batch = next(train_batches(run.tokens("train"), 8, seed=0))
    labels = torch.from_numpy(batch)
    assert (labels == PADDING).any() and not (labels[:, 0] == PADDING).any()
    with torch.no_grad():
        loss = run.model(labels.clamp(min=0), labels=labels).loss.item()
    (first,) = [r["value"] for r in run.metrics.to_pylist() if r["metric"] == "loss"][:1]
    assert first == pytest.approx(loss, abs=1e-5)


@pytest.fixture
def stories(shared):
    folder = shared / "data" / "models_llama2c"
    texts = pq.read_table(shared / "data" / "lm_tinystories_sample" / "stories.parquet")["text"]
    model, tokenizer = load_llama2c(folder / "stories260K.bin", folder / "stories260K_tok512.bin")
    model.tokenizer = tokenizer
    return model, texts.to_pylist()[:30]


def story_loss(model, corpus: TokenCorpus) -> float:
    """Mean loss of the words of rows: no BOS, end-of-text or padding is a target."""
    special = torch.tensor(model.tokenizer.all_special_ids)
    total = count = 0
    for split in ("explain", "score"):
        rows = corpus.tokens(split)
        ids = torch.from_numpy(rows.ids.astype(np.int64))
        is_word = torch.from_numpy(rows.doc_ids >= 0) & ~torch.isin(ids, special)
        with torch.no_grad():
            logits = model(ids).logits[:, :-1].flatten(0, 1)
        nats = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        total += nats[is_word[:, 1:].flatten()].sum().item()
        count += int(is_word[:, 1:].sum())
    return total / count


def test_a_llama_predicts_stories_best_with_the_rows_that_auto_makes(stories):
    model, texts = stories

    def loss(**settings: object) -> float:
        return story_loss(model, lm.tokenize(model, texts, n_ctx=128, **settings))

    end_to_end = {bos: loss(rows="packed", bos=bos) for bos in ("auto", "never", "rows")}
    assert end_to_end["auto"] < end_to_end["never"] - 0.03
    assert end_to_end["auto"] < end_to_end["rows"] - 0.03
    apart = {bos: loss(rows="documents", bos=bos) for bos in ("auto", "never")}
    assert apart["auto"] < end_to_end["auto"]
    assert apart["auto"] < apart["never"]


def test_after_another_first_token_a_llama_predicts_worse_and_its_neurons_move(stories):
    model, texts = stories
    tokenizer = model.tokenizer
    words = torch.tensor([tokenizer.encode(t, add_special_tokens=False)[:100] for t in texts])

    def after(first: int) -> tuple[float, torch.Tensor]:
        ids = torch.cat([torch.full((len(words), 1), first), words], dim=1)
        logits, acts = lm.run_with_cache(model, ids, "blocks.3.mlp.hook_post")
        nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), words.flatten())
        return nats.item(), acts["blocks.3.mlp.hook_post"][:, 1:]

    loss, acts = after(tokenizer.bos_token_id)
    other_loss, other_acts = after(tokenizer.eos_token_id)
    assert loss < other_loss - 0.1
    assert (other_acts - acts).norm() > 0.2 * acts.norm()
    rows = lm.tokenize(model, texts, n_ctx=64, rows="documents").tokens("explain")
    assert (rows.ids[rows.doc_ids[:, 0] >= 0][:, 0] == tokenizer.bos_token_id).any()
