"""Tokenizers: trained on training documents only, exact both ways, shown as people read them."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from lmmono.data.corpora import documents
from lmmono.data.document import PIECE_CHARACTERS
from lmmono.data.planted import Language
from lmmono.data.splits import split_of
from lmmono.data.tokenizers import build_tokenizer
from lmmono.data.tokenizing import plain_encoder
from lmmono.data.vocabulary import shown_tokens
from lmmono.errors import DataError
from lmmono.recipe.sections import (
    BpeTokenizer,
    FilesCorpus,
    FolderTokenizer,
    PlantedCorpus,
    Splits,
    WordTokenizer,
)

PLANTED = PlantedCorpus(n_documents=200)
HALF = Splits(val_fraction=0.5, explain_fraction=0.0, score_fraction=0.0)
ODD_TEXTS = [
    "Hello world",
    "  two  blanks\n\ttab\r\n",
    "don't we'll 12,345.67 ...",
    "Grüße, 世界 🌍 e\u0301 \u200b",
    "literal <|endoftext|> inside",
    "",
    "\x00\x7f",
]


def folder_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return build_tokenizer(FolderTokenizer(kind="folder", path=str(folder)), PLANTED, Splits())


def files(path: Path) -> FilesCorpus:
    return FilesCorpus(kind="files", paths=(str(path),))


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return build_tokenizer(WordTokenizer(), PLANTED, Splits())


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return build_tokenizer(BpeTokenizer(kind="bpe", d_vocab=400), PLANTED, Splits())


def test_words_gives_one_token_per_planted_word(words: PreTrainedTokenizerFast) -> None:
    document = Language(0).document(3)
    assert words.convert_ids_to_tokens(words(document.text)["input_ids"]) == document.words
    assert words.decode(words(document.text)["input_ids"]) == document.text


def test_words_come_from_training_documents_only_by_falling_count() -> None:
    tokenizer = build_tokenizer(WordTokenizer(), PLANTED, HALF)
    counts = Counter(
        word
        for document in documents(PLANTED)
        if split_of(document.text, HALF) == "train"
        for word in document.text.split()
    )
    assert set(tokenizer.get_vocab()) == {*counts, "<unk>", "<|endoftext|>"}
    ranked = tokenizer.convert_ids_to_tokens(list(range(1, len(counts) + 1)))
    assert [counts[word] for word in ranked] == sorted(counts.values(), reverse=True)


def test_a_word_never_seen_is_unknown(words: PreTrainedTokenizerFast) -> None:
    ids = words("the flibbertigibbet")["input_ids"]
    assert words.convert_ids_to_tokens(ids) == ["the", "<unk>"]


def test_end_of_text_is_the_last_id_and_begins_and_ends_text(
    words: PreTrainedTokenizerFast, bpe: PreTrainedTokenizerFast
) -> None:
    for tokenizer in (words, bpe):
        assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
        assert tokenizer.eos_token_id == tokenizer.bos_token_id == len(tokenizer) - 1


def test_bpe_has_exactly_the_size_asked_for_and_gives_any_text_back(
    bpe: PreTrainedTokenizerFast,
) -> None:
    assert len(bpe) == 400
    encode = plain_encoder(bpe)
    for text, ids in zip(ODD_TEXTS, encode(ODD_TEXTS), strict=True):
        assert bpe.decode(ids) == text
        assert bpe.eos_token_id not in ids


def test_bpe_never_sees_a_held_out_document(tmp_path: Path) -> None:
    # words that occur in held-out documents only must stay in single bytes
    lines = [f"{'qqqq' if split_of(f'zz {i}', HALF) == 'val' else ''}" for i in range(100)]
    texts = [f"zz {i}" for i in range(100)]
    held_out = [text for text in texts if split_of(text, HALF) == "val"]
    assert lines.count("qqqq") == len(held_out) > 20
    secret = "vvvv wwww vvvv wwww"
    while split_of(secret, HALF) != "val":
        secret += " vvvv"
    train = "aaaa bbbb aaaa bbbb"
    while split_of(train, HALF) != "train":
        train += " aaaa"
    (tmp_path / "a.txt").write_text(f"{secret}\n\n{train}\n")
    tokenizer = build_tokenizer(BpeTokenizer(kind="bpe", d_vocab=259), files(tmp_path), HALF)
    made = set(tokenizer.get_vocab()) - set(pre_tokenizers.ByteLevel.alphabet())
    assert not any("v" in token or "w" in token for token in made)


def test_equal_text_and_settings_give_an_equal_bpe(bpe: PreTrainedTokenizerFast) -> None:
    again = build_tokenizer(BpeTokenizer(kind="bpe", d_vocab=400), PLANTED, Splits())
    assert again.backend_tokenizer.to_str() == bpe.backend_tokenizer.to_str()


def test_a_vocabulary_larger_than_the_corpus_supports_says_how_many_can_be_made(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.txt").write_text("abab abab")
    none = Splits(val_fraction=0.0, explain_fraction=0.0, score_fraction=0.0)
    with pytest.raises(DataError, match=r"support a vocabulary of (\d+) tokens.*asks for 5000"):
        build_tokenizer(BpeTokenizer(kind="bpe", d_vocab=5000), files(tmp_path), none)
    # 256 bytes, the merges ab and abab (" abab" occurs once), end-of-text
    made = build_tokenizer(BpeTokenizer(kind="bpe", d_vocab=259), files(tmp_path), none)
    assert made.tokenize("abab") == ["abab"]


def test_gpt2s_own_files_give_gpt2s_ids(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "tokenizer_gpt2"
    tokenizer = folder_tokenizer(source)
    assert len(tokenizer) == 50257 and tokenizer.eos_token_id == 50256
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]
    (tmp_path / "vocab.json").write_bytes((source / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((source / "vocab.bpe").read_bytes())
    reference = GPT2TokenizerFast.from_pretrained(tmp_path)
    for renamed in (tokenizer, folder_tokenizer(tmp_path)):
        for text in ODD_TEXTS:
            ids = renamed(text)["input_ids"]
            assert ids == reference(text)["input_ids"]
            assert renamed.decode(ids) == text


def test_a_saved_folder_comes_back_as_it_was(bpe: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    bpe.save_pretrained(tmp_path)
    assert folder_tokenizer(tmp_path)("the end")["input_ids"] == bpe("the end")["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|endoftext|>"


def test_a_folder_that_is_no_tokenizer_says_what_it_wants(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(DataError, match=r"want tokenizer.json, or vocab.json.*found vocab.txt"):
        folder_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ['{"model":', "[]", "3", '{"model": {"type": "BPE"}}', "", "\0"])
def test_a_broken_tokenizer_is_named_with_its_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match="tokenizer.json: broken, or not a tokenizer"):
        folder_tokenizer(tmp_path)


@pytest.mark.parametrize("value", ["[]", '"512"', "{}"])
def test_a_setting_that_no_text_can_be_read_with_is_met_when_the_tokenizer_is_read(
    bpe: PreTrainedTokenizerFast, tmp_path: Path, value: str
) -> None:
    bpe.save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(
        re.sub(r'"model_max_length": \d+', f'"model_max_length": {value}', settings.read_text())
    )
    with pytest.raises(DataError, match="tokenizer.json: broken, or not a tokenizer.*TypeError"):
        folder_tokenizer(tmp_path)


def test_a_folder_tokenizer_without_end_of_text_is_an_error(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="names no end-of-text token.*eos_token"):
        folder_tokenizer(tmp_path)


def test_a_long_text_is_encoded_in_pieces_as_if_it_were_whole(
    bpe: PreTrainedTokenizerFast, words: PreTrainedTokenizerFast
) -> None:
    text = " ".join([*ODD_TEXTS, "the  boats", "don't 12"] * (PIECE_CHARACTERS // 50))
    assert len(text) > 2 * PIECE_CHARACTERS
    for tokenizer in (bpe, words):
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.encode_special_tokens = True
        assert plain_encoder(tokenizer)([text])[0].tolist() == backend.encode(text).ids


def test_shown_tokens_joined_read_as_the_text(
    bpe: PreTrainedTokenizerFast, words: PreTrainedTokenizerFast
) -> None:
    text = Language(0).text(0)
    for tokenizer in (bpe, words):
        shown = shown_tokens(tokenizer)
        assert "".join(shown[i] for i in tokenizer(text)["input_ids"]).strip() == text
        assert shown[-1] == "<|endoftext|>" and len(shown) == len(tokenizer)


def test_bytes_that_are_no_text_show_as_hexadecimal(shared: Path) -> None:
    tokenizer = folder_tokenizer(shared / "data" / "tokenizer_gpt2")
    shown = shown_tokens(tokenizer)
    assert "".join(shown[i] for i in tokenizer("it cost €5 🌍")["input_ids"]) in {
        "it cost €5 <0xF0><0x9F><0x8C><0x8D>",
        "it cost €5 <0xF0><0x9F><0x8C><0x8D>".replace("€", "<0xE2><0x82><0xAC>"),
    }
    assert shown[220] == " " and shown[198] == "\n" and shown[995] == " world"


def test_a_byte_level_vocabulary_without_a_decoder_and_with_foreign_tokens_is_read() -> None:
    letters = ["å", "®", "¶", "Ġa", "<｜begin▁of▁text｜>"]  # the bytes E5 AE B6, a blank and an a
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    shown = shown_tokens(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert shown == ["<0xE5>", "<0xAE>", "<0xB6>", " a", "<｜begin▁of▁text｜>"]


def test_a_sentencepiece_style_vocabulary_shows_blanks_and_bytes(tmp_path: Path) -> None:
    from tokenizers import decoders

    backend = Tokenizer(
        models.BPE({"▁cat": 0, "s": 1, "<0xE2>": 2, "</s>": 3, "▁": 4}, [], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    )
    assert shown_tokens(folder_tokenizer(tmp_path)) == [" cat", "s", "<0xE2>", "</s>", " "]
