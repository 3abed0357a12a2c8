"""What a capture will take on this machine: measured on a few random tokens before it starts."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import activation_store as astore
from lmmono.captures.capture import stream
from lmmono.data.tokens import TokenRows
from lmmono.files.provenance import peak_memory_bytes, reset_peak_memory
from lmmono.models.build import build_model
from lmmono.models.hooks import bare
from lmmono.models.pretrained import on_best_device, open_section
from lmmono.recipe import Recipe
from lmmono.recipe.sections import Capture, PretrainedModel, SkippedTokens

N_BATCHES = 3
"""Forward passes that are captured; the first, which compiles, is not timed."""
D_VOCAB = 4096
"""Vocabulary of a model that is not trained yet, whose tokenizer is not known: a capture stops
before the logits, so that hardly counts."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Speed and size of a capture, measured on random tokens."""

    tokens_per_second: float
    """Tokens a second, model and store together."""
    bytes_per_token: float
    """Bytes of shards per token; text whose units fire more or less often takes more or less."""
    peak_bytes: int
    """Most memory of the process, model included. Further tokens take no more: what units keep is
    full after a few dozen documents, and the trial commits twice."""

    def told(self, n_tokens: int) -> str:
        """Return a line for so many tokens.

        >>> Forecast(1000.0, 4200.0, 2_200_000_000).told(400_000)  # doctest: +ELLIPSIS
        'about 400,000 tokens: 7 min, 1.7 GB, 2.2 GB of memory (1,000 tokens/s, 4.20 kB per...
        """
        seconds, size = n_tokens / self.tokens_per_second, n_tokens * self.bytes_per_token / 1e9
        duration = f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
        rates = (
            f"{self.tokens_per_second:,.0f} tokens/s, {self.bytes_per_token / 1e3:.2f} kB per token"
        )
        memory = f"{self.peak_bytes / 1e9:.1f} GB of memory"
        sizes = f"{duration}, {size:.1f} GB, {memory}"
        return f"about {n_tokens:,} tokens: {sizes} ({rates}, random tokens)"


def forecast(model: nn.Module, settings: Capture, *, n_ctx: int, seed: int = 0) -> Forecast:
    """Capture a few batches of random tokens into a store that is thrown away; return what it took.

    Raises:
        ModelError: A hook matches nothing, or rows do not fit the model.
        StoreError: A hook is too dense to be stored.
    """
    settings = settings.model_copy(update={"skip": SkippedTokens()})  # random rows have no BOS
    n_rows = max(1, settings.batch_tokens // n_ctx)
    network: Any = bare(model)  # torch types what a module holds as tensors and modules
    d_vocab = int(network.config.vocab_size)
    shape = ((N_BATCHES + 1) * n_rows, n_ctx)
    ids = np.random.default_rng(seed).integers(0, d_vocab, shape).astype(np.uint32)
    docs = np.repeat(np.arange(len(ids), dtype=np.int32)[:, None], n_ctx, axis=1)
    times: list[float] = []
    reset_peak_memory()

    def tick(*_: Any, **_known: Any) -> None:
        times.append(time.perf_counter())

    with (
        tempfile.TemporaryDirectory() as folder,
        astore.open(Path(folder) / "store.duckdb", mode="w") as store,
    ):
        rows = TokenRows(ids, docs, 0, "explain")
        stream(model, [rows[: N_BATCHES * n_rows]], settings, store, seed, tick)
        seconds = times[-1] - times[0]
        ((n_bytes,),) = store.sql("SELECT sum(n_bytes) FROM shards").fetchall()
        # a commit that replaces the rows of one before takes more memory than the first
        stream(model, [rows], settings, store, seed, tick)
    timed = (N_BATCHES - 1) * n_rows * n_ctx
    n_tokens = N_BATCHES * n_rows * n_ctx
    return Forecast(timed / seconds, n_bytes / n_tokens, peak_memory_bytes())


def forecast_recipe(recipe: Recipe) -> str:
    """Return a line of what a run's capture will take; its model is opened, or drawn untrained.

    Raises:
        ModelError: The model cannot be read, or a hook matches nothing.
        StoreError: A hook is too dense to be stored.
    """
    settings, n_ctx = recipe.capture, recipe.data.n_ctx
    if isinstance(recipe.model, PretrainedModel):
        model = open_section(recipe.model, recipe.seed)
    else:
        model = build_model(recipe.model, d_vocab=D_VOCAB, n_ctx=n_ctx, seed=recipe.seed)
    model = on_best_device(model)
    measured = forecast(model, settings, n_ctx=n_ctx, seed=recipe.seed)
    if settings.max_tokens is None:
        return measured.told(1_000_000) + "; the recipe captures all tokens of its splits"
    return measured.told(settings.max_tokens * len(settings.splits))
