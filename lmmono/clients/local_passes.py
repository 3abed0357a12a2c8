"""Forward passes of a local model over rows of token ids: in batches, their shared start once.

A batch lies in memory as `[shared start][padding][rest of each row]`. Reading pads on the right
instead: a causal model's tokens never see what follows, so no mask is needed.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

LOGITS_AT_ONCE = 1 << 27
"""Logits held together: 0.5 GB in single precision."""

Row = list[int]
"""Token ids of one prompt."""


@dataclass(slots=True)
class Expected:
    """What the model expected at consecutive positions."""

    logprobs: list[float] = field(default_factory=list[float])
    """Log-probability of the token that is there, in nats."""
    alternatives: list[list[tuple[int, float]]] = field(
        default_factory=list[list[tuple[int, float]]]
    )
    """Likeliest token ids with their log-probabilities, likeliest first."""

    def add(self, logits: Float[Tensor, "pos d_vocab"], ids: Int[Tensor, " pos"], k: int) -> None:
        """Append positions from the logits that predict them."""
        for some, there in zip(logits.split(256), ids.split(256), strict=True):
            logprobs = torch.log_softmax(some.float(), dim=-1)
            self.logprobs += logprobs.gather(1, there[:, None])[:, 0].tolist()
            best = logprobs.topk(min(k, logprobs.shape[1]))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            self.alternatives += [list(zip(*pair, strict=True)) for pair in pairs]


@dataclass(slots=True)
class Generated(Expected):
    """A continuation of one row."""

    ids: Row = field(default_factory=list[int])
    """Its tokens, without the end of text."""


def shared_start(rows: Sequence[Row]) -> int:
    """Return how many tokens all rows begin with; each keeps one token of its own at least.

    >>> shared_start([[5, 6, 7], [5, 6, 8, 9]]), shared_start([[5, 6]]), shared_start([[1], [1, 2]])
    (2, 0, 0)
    """
    if len(rows) < 2:
        return 0
    first, last = min(rows), max(rows)  # in the order of words, all others lie between these two
    shortest = min(len(row) for row in rows) - 1
    for n, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b or n == shortest:
            return n
    return shortest


class Passes:
    """A model with the settings of its batches.

    Args:
        model: A causal language model in evaluation mode.
        batch_tokens: Most tokens per batch, padding included.
        share: Run the start that all rows share once; False is for measuring what that saves.
    """

    def __init__(self, model: PreTrainedModel, batch_tokens: int, *, share: bool = True) -> None:
        self._model: Any = model
        self._batch_tokens, self._share = batch_tokens, share
        self.n_tokens = 0
        """Tokens run through the model so far, padding included."""
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
        windowed = getattr(model.config.get_text_config(), "sliding_window", None) is not None
        # a window counts places in the cache, padding too: it must not lie between start and rest
        self._windowed = windowed or any(kind != "full_attention" for kind in kinds)

    def read(self, rows: Sequence[Row], k: int) -> Iterator[tuple[int, Expected]]:
        """Yield the place of each row and what was expected at its tokens, from the second on."""
        start, cache, logits = self._run_start(rows, shared_start(rows) if self._share else 0)
        shared = Expected()
        if start:
            shared.add(logits[0, :-1], self._tensor(rows[0][1:start]), k)
        longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        for batch in self._batches(rows, longest_first, self._model.config.get_text_config()):
            ids = [rows[i][start:] for i in batch]
            width = max(map(len, ids))
            padded = self._tensor([row + [0] * (width - len(row)) for row in ids])
            copies = _copies(cache, len(batch))
            out = self._run(padded, past_key_values=copies, use_cache=copies is not None)
            for i, row_logits, row in zip(batch, out.logits, padded, strict=True):
                n = len(rows[i]) - start
                found = Expected(list(shared.logprobs), list(shared.alternatives))
                if start:
                    found.add(logits[0, -1:], row[:1], k)
                found.add(row_logits[: n - 1], row[1:n], k)
                yield i, found

    def generate(
        self,
        rows: Sequence[Row],
        *,
        max_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        end_ids: set[int],
        k: int,
    ) -> Iterator[tuple[int, Generated]]:
        """Yield the place of each row and its continuation."""
        share = self._share and not self._windowed
        start, cache, _ = self._run_start(rows, shared_start(rows) if share else 0)
        longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        for batch in self._batches(rows, longest_first, None, max_tokens):
            ids = [rows[i][start:] for i in batch]
            width = max(map(len, ids))
            padding = [width - len(row) for row in ids]
            ids = self._tensor([[0] * n + row for n, row in zip(padding, ids, strict=True)])
            there = [[1] * start + [0] * n + [1] * (width - n) for n in padding]
            choose = _Choice(temperature, [seeds[i] for i in batch], end_ids, k)
            self._continue(ids, self._tensor(there), _copies(cache, len(batch)), max_tokens, choose)
            yield from zip(batch, choose.found, strict=True)

    def _continue(
        self, ids: Tensor, there: Tensor, cache: Any, max_tokens: int, choose: "_Choice"
    ) -> None:
        cache = DynamicCache(config=self._model.config) if cache is None else cache
        positions = (there.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        for step in range(max_tokens):
            out = self._run(
                ids,
                attention_mask=there,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            ids = choose(out.logits[:, -1])[:, None]
            if choose.all_ended or step == max_tokens - 1:
                return
            there = torch.cat([there, torch.ones_like(ids)], dim=1)
            positions = positions[:, -1:] + 1

    def _run_start(self, rows: Sequence[Row], n: int) -> tuple[int, Any, Any]:
        """Return the length of the shared start, its cache and its logits."""
        if not n:
            return 0, None, None
        cache = DynamicCache(config=self._model.config)
        out = self._run(self._tensor([rows[0][:n]]), past_key_values=cache, use_cache=True)
        return n, out.past_key_values, out.logits

    def _run(self, ids: Tensor, **settings: Any) -> Any:
        self.n_tokens += ids.numel()
        with torch.no_grad():
            return self._model(input_ids=ids, **settings)

    def _tensor(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._model.device)

    def _batches(
        self, rows: Sequence[Row], order: list[int], config: Any, extra: int = 0
    ) -> Iterator[list[int]]:
        """Yield places of rows, longest first, so that each batch is of nearly equal lengths."""
        while order:
            longest = len(rows[order[0]]) + extra
            n = self._batch_tokens // longest
            if config is not None:
                n = min(n, LOGITS_AT_ONCE // (longest * config.vocab_size))
            yield order[: max(n, 1)]
            order = order[max(n, 1) :]


class _Choice:
    """Chooses the next token of each row of a batch and keeps what was chosen."""

    def __init__(self, temperature: float, seeds: list[int], end_ids: set[int], k: int) -> None:
        self.found = [Generated() for _ in seeds]
        self._temperature, self._end_ids, self._k = temperature, end_ids, k
        # one stream of random numbers per row: a row's answer does not depend on its batch
        self._random = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._ended = [False] * len(seeds)

    @property
    def all_ended(self) -> bool:
        """Whether every row has come to its end of text."""
        return all(self._ended)

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, " batch"]:
        chosen = logits.argmax(dim=-1) if self._temperature == 0 else self._drawn(logits)
        for row, (token, found) in enumerate(zip(chosen.tolist(), self.found, strict=True)):
            self._ended[row] |= token in self._end_ids
            if not self._ended[row]:
                found.ids.append(token)
                if self._k:
                    found.add(logits[row : row + 1], chosen[row : row + 1], self._k)
        return chosen

    def _drawn(self, logits: Tensor) -> Tensor:
        shares = torch.softmax(logits.double() / self._temperature, dim=-1).cumsum(dim=-1).cpu()
        drawn = [torch.rand(1, generator=each, dtype=torch.float64) for each in self._random]
        found = torch.searchsorted(shares, torch.stack(drawn) * shares[:, -1:], right=True)
        return found[:, 0].clamp(max=logits.shape[1] - 1).to(logits.device)


def _copies(cache: Any, n: int) -> Any:
    if cache is None:
        return None
    copies = copy.deepcopy(cache)
    copies.batch_repeat_interleave(n)
    return copies
