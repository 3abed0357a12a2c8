"""Tokenizers: one token per word, a byte-level BPE trained here, or a folder from elsewhere.

Those made here see training documents only, so no held-out text shapes the vocabulary, and put
`<|endoftext|>` last, as GPT-2 does.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lmmono.data.corpora import document_count, documents
from lmmono.data.document import pieces
from lmmono.data.splits import split_of
from lmmono.errors import DataError
from lmmono.recipe import sections
from lmmono.types import Progress, silent

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""Vocabulary and merges, as transformers and as OpenAI name them."""
SAVED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def build_tokenizer(
    section: sections.Tokenizer,
    corpus: sections.Corpus,
    splits: sections.Splits,
    progress: Progress = silent,
) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the settings; equal settings and text give an equal tokenizer.

    `words` and `bpe` are trained here on every training document of the corpus; `folder` is
    read as it is.

    Args:
        section: Which tokenizer.
        corpus: The text to train on.
        splits: Which of its documents are for training.
        progress: Called with the documents read.

    Raises:
        DataError: If the corpus is too small for the vocabulary, or the folder is no tokenizer
            with an end-of-text token.
    """
    match section:
        case sections.WordTokenizer():
            return _words(_training_texts(corpus, splits, progress))
        case sections.BpeTokenizer():
            return _bpe(_training_texts(corpus, splits, progress), section.d_vocab)
        case sections.FolderTokenizer():
            return _from_folder(Path(section.path).expanduser())
        case sections.ModelTokenizer():
            raise DataError(
                "data.tokenizer: model: rows of a model's own tokenizer are those of a run; "
                "otherwise name its folder (kind: folder, path: ...)"
            )


def tokenizer_fingerprint(section: sections.Tokenizer) -> dict[str, Any]:
    """Return what the tokenizer depends on beside the text, as JSON: settings, bytes of files."""
    if not isinstance(section, sections.FolderTokenizer):
        return section.model_dump(mode="json")
    folder = Path(section.path).expanduser()
    names = {name for pair in GPT2_FILES for name in pair} | set(SAVED_FILES)
    files = sorted(path for path in folder.glob("*") if path.name in names)
    digests = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
    return {"kind": section.kind, "files": digests}


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a tokenizer folder.

    Raises:
        OSError: If the disk refuses.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers has no class for a failed write
        if "os error" in str(error):
            raise OSError(str(error)) from error
        raise


def _training_texts(
    corpus: sections.Corpus, splits: sections.Splits, progress: Progress
) -> Iterator[str]:
    total = document_count(corpus)
    for done, document in enumerate(documents(corpus), start=1):
        if split_of(document.text, splits) == "train":
            yield from pieces(document.text)
        if done % 1000 == 0:
            progress("tokenizer", done, total or done)


def _words(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    counts = Counter[str]()
    for text in texts:
        counts.update(text.split())
    del counts[UNKNOWN], counts[END_OF_TEXT]  # as words of a text they are unknown
    order = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = {word: i for i, word in enumerate([UNKNOWN, *order])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finished(tokenizer, unk_token=UNKNOWN)


def _bpe(texts: Iterator[str], d_vocab: int) -> PreTrainedTokenizerFast:
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=d_vocab - 1,  # end-of-text comes on top
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    size = tokenizer.get_vocab_size() + 1
    if size < d_vocab:
        raise DataError(
            f"the training documents support a vocabulary of {size} tokens, "
            f"data.tokenizer.d_vocab asks for {d_vocab}: lower it or use more text"
        )
    return _finished(tokenizer)


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _finished(tokenizer: Tokenizer, unk_token: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=unk_token,
        clean_up_tokenization_spaces=False,
    )


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    if (folder / "tokenizer.json").is_file():
        return _with_end_of_text(read_tokenizer(folder), folder)
    for vocabulary, merges in GPT2_FILES:
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            model = models.BPE.from_file(str(folder / vocabulary), str(folder / merges))
            return _finished(_byte_level(model))
    names = ", ".join(sorted(path.name for path in folder.glob("*"))[:10])
    raise DataError(
        f"{folder} is no tokenizer folder: want tokenizer.json, or "
        f"{' or '.join(' and '.join(pair) for pair in GPT2_FILES)}; found {names or 'nothing'}"
    )


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer that `save_pretrained` wrote to a folder; runs no code of the folder.

    Raises:
        DataError: There is none, or it is broken.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path}: no such file; want a tokenizer as save_pretrained writes it")
    try:
        # trust_remote_code is never None, transformers' default, which asks on standard input
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        # a setting of a wrong type is met at the first use; no text, for a vocabulary may lack any
        tokenizer.decode(tokenizer.encode(""))
    except Exception as error:  # tokenizers raises bare Exceptions, transformers what it meets
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{path}: broken, or not a tokenizer ({type(error).__name__}: {reason}); copy the "
            "folder again"
        ) from error
    return tokenizer


def _with_end_of_text(tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedTokenizerFast:
    if tokenizer.eos_token is None:
        if END_OF_TEXT not in tokenizer.get_vocab():
            raise DataError(
                f"{folder}: the tokenizer names no end-of-text token and has no {END_OF_TEXT}: "
                'set "eos_token" in its tokenizer_config.json'
            )
        tokenizer.eos_token = END_OF_TEXT
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token
    return tokenizer
