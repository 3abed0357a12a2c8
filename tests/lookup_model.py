"""A model whose stream is known by construction: every word is a sparse code, rotated.

Word w has a code of `D` concepts, few of them active; the model looks up code times rotation. So
the code is what a perfect dictionary would find, and the stream hides it in a random basis.
"""

from functools import cache

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lmmono.data.tasks.task import Labelled, Task

D, N_WORDS, N_ACTIVE, TEXT_WORDS = 96, 400, 4, 6
HOOK = "stream"


@cache
def codes() -> Tensor:
    """The code of every word, non-negative; word 0 ends a text and has none."""
    rng = np.random.default_rng(0)
    made = np.zeros((N_WORDS, D), np.float32)
    for row in made[1:]:
        row[rng.choice(D, N_ACTIVE, replace=False)] = rng.uniform(0.5, 1.5, N_ACTIVE)
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

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        return self.stream(input_ids)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<end>": 0} | {f"w{i}": i for i in range(1, N_WORDS)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def texts(n: int, seed: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Return random texts, and the mean code of each."""
    words = np.random.default_rng(seed).integers(1, N_WORDS, (n, TEXT_WORDS))
    return tuple(" ".join(f"w{i}" for i in row) for row in words), codes().numpy()[words].mean(1)


def task(name: str, direction: np.ndarray, n: int = 1200) -> Task:
    """A task whose class is whether the mean code goes far along a direction, halved by rank."""
    parts = {}
    for seed, part in enumerate(("train", "val", "test")):
        words, mean = texts(n if part == "train" else 400, 10 + seed)
        along = mean @ direction
        parts[part] = Labelled(words, (along > np.median(along)).astype(np.int64))
    return Task(name, "a planted direction", "none", "drawn here", ("low", "high"), parts)


def concept_task() -> Task:
    """A sparse code helps: the class is a sum of three concepts of the 96."""
    direction = np.zeros(D, np.float32)
    direction[[3, 40, 77]] = 1.0
    return task("concepts", direction)


def coordinate_task() -> Task:
    """A sparse code does not help: the class is one coordinate of the stream, many concepts."""
    return task("coordinate", rotation().numpy()[:, 0])
