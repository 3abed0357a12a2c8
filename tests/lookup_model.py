"""A model whose stream is known by construction: every word is a sparse code, rotated.

Word w has a code of `D` concepts, few of them active; the model looks up code times rotation. So
the code is what a perfect dictionary would find, and the stream hides it in a random basis. The
first `N_LARGE` concepts are ten times as large as the others. A probe that standardises what it
reads gives all concepts of the code the same weight, and cannot tell small from large ones apart in
the stream: so the code helps where small concepts decide and hurts where large ones do.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lmmono.data.tasks.task import Labelled, Task

D, N_LARGE, N_WORDS, TEXT_WORDS = 96, 8, 400, 6
HOOK = "stream"


@cache
def codes() -> Tensor:
    """The code of every word, non-negative; word 0 ends a text and has none."""
    rng = np.random.default_rng(0)
    made = np.zeros((N_WORDS, D), np.float32)
    for row in made[1:]:
        large, small = rng.choice(N_LARGE, 2, False), rng.choice(D - N_LARGE, 6, False) + N_LARGE
        row[large], row[small] = rng.uniform(0.5, 1.5, 2), rng.uniform(0.05, 0.15, 6)
    return torch.from_numpy(made)


@cache
def rotation() -> Tensor:
    """A random rotation of the concepts."""
    drawn = np.random.default_rng(1).standard_normal((D, D))
    return torch.from_numpy(np.linalg.qr(drawn)[0].astype(np.float32))


def true_code(x: Tensor) -> Tensor:
    """The perfect dictionary: the code of the stream's rows."""
    return x @ rotation().T


class Lookup(nn.Module):
    """Words to rotated codes, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = nn.Embedding.from_pretrained(codes() @ rotation())
        self.tokenizer = tokenizer()

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.stream(input_ids))


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<end>": 0} | {f"w{i}": i for i in range(1, N_WORDS)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def texts(n: int, seed: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Return random texts, and the mean code of each."""
    words = np.random.default_rng(seed).integers(1, N_WORDS, (n, TEXT_WORDS))
    return tuple(" ".join(f"w{i}" for i in row) for row in words), codes().numpy()[words].mean(1)


def task(name: str, concepts: list[int]) -> Task:
    """A task whose class is whether some concepts are, in sum, above their median in a text."""
    parts = {}
    for part, n, seed in (("train", 160, 10), ("val", 100, 11), ("test", 400, 12)):
        words, mean = texts(n, seed)
        along = mean[:, concepts].sum(1)
        parts[part] = Labelled(words, (along > np.median(along)).astype(np.int64))
    return Task(name, "which texts have the concepts", "none", "here", ("low", "high"), parts)


@cache
def small_task() -> Task:
    """A sparse code helps: three of the many small concepts decide."""
    return task("small", [30, 50, 70])


@cache
def large_task() -> Task:
    """A sparse code hurts: three of the few large concepts decide."""
    return task("large", [0, 3, 6])
