"""Tokenizers: one token per word, a byte-level BPE trained here, or a folder from elsewhere."""

from collections import Counter
from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmmono.data.corpora import documents
from lmmono.data.splits import split_of
from lmmono.errors import DataError
from lmmono.recipe import sections

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"


def build_tokenizer(
    section: sections.Tokenizer, corpus: sections.Corpus, splits: sections.Splits
) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the settings, trained on training documents only."""
    match section:
        case sections.WordTokenizer():
            return _words(corpus, splits)
        case _:
            raise DataError(f"tokenizer kind {section.kind!r} is not built yet")


def plain_encoder(
    tokenizer: PreTrainedTokenizerFast,
) -> Callable[[list[str]], list[list[int]]]:
    """Return a batch encoder that adds nothing and reads special tokens as ordinary text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()

    def encode(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


def _words(corpus: sections.Corpus, splits: sections.Splits) -> PreTrainedTokenizerFast:
    counts = Counter[str]()
    for document in documents(corpus):
        if split_of(document.text, splits) == "train":
            counts.update(document.text.split())
    del counts[UNKNOWN]
    order = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = {word: i for i, word in enumerate([UNKNOWN, *order])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finished(tokenizer, unk_token=UNKNOWN)


def _finished(tokenizer: Tokenizer, unk_token: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=unk_token,
        clean_up_tokenization_spaces=False,
    )


def shown_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return each token id as people read it."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens)
    return [token if token in special else " " + token for token in tokens]
