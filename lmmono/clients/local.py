"""A language model on this machine, asked in batches; the start that all prompts share is run once.

Prompts of one call begin alike: the same instructions, the same demonstrations. Their start is run
once and its keys and values are copied to every row of a batch:

    generating   [shared start][padding][rest of the prompt] -> continuation
    reading      [shared start][rest of the text][padding]      (causal: nothing sees what follows)

Measured on one core (docs/results/scoring_speed.md): 1.36 times one prompt at a time, where batches
alone give 0.83. `transformers.generate` is not used: it also applies what the model's folder says
(penalties, suppressed tokens), so that temperature 0 would not be the likeliest token, and it draws
all rows from one stream, so that an answer would depend on its batch.
"""

import copy
import hashlib
import inspect
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lmmono.clients.client import Answer, Heard, Message, Prompt, Read, Reading, Usage
from lmmono.data.tokenizers import read_tokenizer
from lmmono.errors import ClientError
from lmmono.models.storage import load_model
from lmmono.runs.folder import Run, open_run

SPEAKERS = {"system": "", "user": "User: ", "assistant": "Assistant: "}
"""How turns begin where the tokenizer has no chat template."""

LOGITS_AT_ONCE = 1 << 27
"""Logits held together: 0.5 GB in single precision."""

POSITIONS_AT_ONCE = 256
"""Positions whose log-probabilities are held together, in single precision."""

TokenIds = list[int]
"""Token ids of one prompt."""


@dataclass(frozen=True, slots=True)
class _Encoded:
    ids: TokenIds
    n_before: int
    """Tokens that the tokenizer puts before the text, such as a beginning of text."""
    pieces: tuple[str, ...]
    """Strings of the others, which join to the text."""


class LocalClient:
    """A causal language model on this machine.

    Temperature 0 takes the likeliest token; above it, each prompt has random numbers of its own.

    Args:
        model: A model with its tokenizer, a run, or a folder of either kind.
        tokenizer: Tokenizer of a model that has none of its own; must be a fast one.
        batch_tokens: Most tokens per batch, padding included.
        share_start: Run what prompts share once; False is for measuring what that saves.

    Raises:
        ClientError: There is no tokenizer, or it is not a fast one.
        DataError: The folder's tokenizer cannot be read.
        ModelError: The folder holds no model that can be read.
        RunError: The run has no model.
    """

    def __init__(
        self,
        model: PreTrainedModel | Run | Path | str,
        tokenizer: Any = None,
        *,
        batch_tokens: int = 8192,
        share_start: bool = True,
    ) -> None:
        self._model, own_tokenizer, self._label = _opened(model)
        self._tokenizer: Any = own_tokenizer if tokenizer is None else tokenizer
        if not getattr(self._tokenizer, "is_fast", False):
            raise ClientError(
                f"{self._label}: want a fast tokenizer (one with tokenizer.json), got "
                f"{type(self._tokenizer).__name__}; pass tokenizer="
            )
        self._passes = ModelPasses(self._model, batch_tokens, share=share_start)
        self._strings: dict[int, str] = {}

    def __repr__(self) -> str:
        n = sum(weight.numel() for weight in self._model.parameters())
        return f"LocalClient({self._label}, {n:,} parameters on {self._model.device})"

    @cached_property
    def name(self) -> str:
        """Name of the folder or model, and a hash of weights, tokenizer and chat template."""
        digest = hashlib.sha256(self._tokenizer.backend_tokenizer.to_str().encode())
        digest.update(json.dumps(self._tokenizer.chat_template).encode())
        for name, weight in sorted(self._model.named_parameters()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(
                weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            )
        return f"{self._label}@{digest.hexdigest()[:12]}"

    @property
    def n_tokens_run(self) -> int:
        """Tokens run through the model so far, padding included."""
        return self._passes.n_tokens

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        n_alternatives: int = 0,
        on_answer: Heard | None = None,
    ) -> list[Answer]:
        """Return an answer for each prompt, in order; see `Client.complete`.

        A prompt that is empty or does not fit the context is a failure of its own.
        """
        rows = [self._prompt_ids(prompt) for prompt in prompts]
        answers = [self._checked(len(row), max_tokens) for row in rows]
        fitting = [i for i, answer in enumerate(answers) if answer.failure is None]
        if on_answer is not None:
            for i, answer in enumerate(answers):
                if answer.failure is not None:
                    on_answer(i, answer)
        continuations = self._passes.generate(
            [rows[i] for i in fitting],
            max_tokens=max_tokens,
            temperature=float(temperature),
            seeds=[_row_seed(seed, rows[i]) for i in fitting],
            end_ids=self._end_ids,
            k=n_alternatives,
        )
        began = time.perf_counter()
        for place, continuation in continuations:
            i, now = fitting[place], time.perf_counter()
            usage = Usage(1, len(rows[i]), len(continuation.ids), None, now - began)
            text = self._tokenizer.decode(continuation.ids, skip_special_tokens=True)
            if n_alternatives:
                tokens = tuple(self._string(token) for token in continuation.ids)
                answers[i] = Answer(
                    text, tokens=tokens, alternatives=self._named(continuation), usage=usage
                )
            else:
                answers[i] = Answer(text, usage=usage)
            began = now
            if on_answer is not None:
                on_answer(i, answers[i])
        return answers

    def read(
        self, texts: Sequence[str], *, n_alternatives: int = 0, on_reading: Read | None = None
    ) -> list[Reading]:
        """Return the tokens of each text with log-probabilities; see `Client.read`."""
        encoded = [self._encode(text) for text in texts]
        refusals = [self._checked(len(text.ids), 0) for text in encoded]
        readings = [Reading(failure=refusal.failure, detail=refusal.detail) for refusal in refusals]
        fitting = [i for i, reading in enumerate(readings) if reading.failure is None]
        began = time.perf_counter()
        rows = [encoded[i].ids for i in fitting]
        for place, expected in self._passes.read(rows, n_alternatives):
            i, now = fitting[place], time.perf_counter()
            usage = Usage(1, len(encoded[i].ids), 0, None, now - began)
            # nothing is expected of the very first token; what the tokenizer put first is left out
            n_before = encoded[i].n_before
            skipped = max(n_before - 1, 0)
            logprobs, alternatives = expected.logprobs[skipped:], self._named(expected)[skipped:]
            readings[i] = Reading(
                encoded[i].pieces,
                tuple(logprobs) if n_before else (None, *logprobs),
                alternatives if n_before else ({}, *alternatives),
                usage=usage,
            )
            began = now
            if on_reading is not None:
                on_reading(i, readings[i])
        return readings

    @cached_property
    def _end_ids(self) -> set[int]:
        settings: Any = self._model.generation_config
        ends = settings.eos_token_id if settings is not None else None
        ends = ends if isinstance(ends, list) else [ends]
        return {end for end in (*ends, self._tokenizer.eos_token_id) if end is not None}

    def _prompt_ids(self, prompt: Prompt) -> TokenIds:
        if not prompt.messages:
            return self._encode(prompt.text).ids
        if self._tokenizer.chat_template is None:
            return self._encode(_as_text(prompt.messages)).ids
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
        # the template writes the special tokens itself
        text = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode(self, text: str) -> _Encoded:
        encoding = self._tokenizer(
            text, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        special = [bool(flag) for flag in encoding["special_tokens_mask"]]
        n_before = special.index(False) if False in special else len(special)
        # a tokenizer made for other models may close the text too; here the text goes on
        stop = len(special) - special[::-1].index(False) if False in special else n_before
        starts = [start for start, _ in encoding["offset_mapping"][n_before:stop]]
        bounds = [0, *starts[1:], len(text)] if starts else []
        pieces = tuple(text[a:b] for a, b in zip(bounds, bounds[1:], strict=False))
        return _Encoded(encoding["input_ids"][:stop], n_before, pieces)

    def _checked(self, n_tokens: int, max_tokens: int) -> Answer:
        """Return why a prompt cannot be run, or an empty answer."""
        if not n_tokens:
            return Answer(None, "no_answer", "nothing is asked")
        n_ctx = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if n_ctx is None or n_tokens + max_tokens <= n_ctx:
            return Answer("")
        detail = f"{n_tokens} tokens and {max_tokens} more do not fit {n_ctx} positions"
        return Answer(None, "no_answer", detail)

    def _named(self, expected: "Expected") -> tuple[dict[str, float], ...]:
        named: list[dict[str, float]] = []
        for pairs in expected.alternatives:
            by_string: dict[str, float] = {}
            for token, logprob in pairs:  # of two with one string, the likelier comes first
                by_string.setdefault(self._string(token), logprob)
            named.append(by_string)
        return tuple(named)

    def _string(self, token: int) -> str:
        if token not in self._strings:
            self._strings[token] = self._tokenizer.decode([token])
        return self._strings[token]


def _opened(model: PreTrainedModel | Run | Path | str) -> tuple[PreTrainedModel, Any, str]:
    """Return the model, its tokenizer and what people call it."""
    if isinstance(model, PreTrainedModel):
        label = model.config.name_or_path or model.config.model_type
        return model, getattr(model, "tokenizer", None), Path(label).name
    if isinstance(model, Run):
        return model.model, model.tokenizer, model.name
    folder = Path(model)
    if (folder / "manifest.json").is_file():
        return _opened(open_run(folder))
    loaded = load_model(folder)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return loaded, read_tokenizer(folder) if has_tokenizer else None, folder.name


def _as_text(messages: Sequence[Message]) -> str:
    r"""Return turns as plain text that a base model goes on from.

    >>> _as_text([Message("system", "Be brief."), Message("user", "Hi")])
    'Be brief.\n\nUser: Hi\n\nAssistant:'
    """
    turns = [SPEAKERS[message.role] + message.content for message in messages]
    return "\n\n".join([*turns, "Assistant:"])


def _row_seed(seed: int, row: TokenIds) -> int:
    """Return the seed of one prompt's own random numbers: of the caller's seed and its tokens."""
    digest = hashlib.sha256(json.dumps([seed, row]).encode()).digest()
    return int.from_bytes(digest[:7])  # 56 bits: torch's seeds are signed integers of 64


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
        pieces = zip(logits.split(POSITIONS_AT_ONCE), ids.split(POSITIONS_AT_ONCE), strict=True)
        for some_logits, some_ids in pieces:
            logprobs = torch.log_softmax(some_logits.float(), dim=-1)
            self.logprobs += logprobs.gather(1, some_ids[:, None])[:, 0].tolist()
            best = logprobs.topk(min(k, logprobs.shape[1]))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            self.alternatives += [list(zip(*pair, strict=True)) for pair in pairs]


@dataclass(slots=True)
class Generated(Expected):
    """A continuation of one row."""

    ids: TokenIds = field(default_factory=list[int])
    """Its tokens, without the end of text."""


def shared_start(rows: Sequence[TokenIds]) -> int:
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


class ModelPasses:
    """Forward passes of a causal language model in evaluation mode over rows of token ids."""

    def __init__(self, model: PreTrainedModel, batch_tokens: int, *, share: bool = True) -> None:
        self._model: Any = model
        self._batch_tokens, self._share = batch_tokens, share
        self.n_tokens = 0
        """Tokens run through the model so far, padding included."""
        # transformers renames this argument to `cache`; models of others may know one of the two
        names = inspect.signature(model.forward).parameters
        self._cache_name = "past_key_values" if "past_key_values" in names else "cache"
        config = model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or []
        # a window counts places in the cache, padding too: it must not lie between start and rest
        self._has_window = getattr(config, "sliding_window", None) is not None or any(
            kind != "full_attention" for kind in kinds
        )

    def read(self, rows: Sequence[TokenIds], k: int) -> Iterator[tuple[int, Expected]]:
        """Yield the place of each row and what was expected at its tokens, from the second on."""
        start, cache, logits = self._run_start(rows, self._share)
        in_start = Expected()
        if start:
            in_start.add(logits[0, :-1], self._tensor(rows[0][1:start]), k)
        for batch in self._batches(rows, self._model.config.get_text_config().vocab_size):
            ids = [rows[i][start:] for i in batch]
            width = max(map(len, ids))
            padded = self._tensor([row + [0] * (width - len(row)) for row in ids])
            out = self._run(padded, _copies(cache, len(batch)), use_cache=cache is not None)
            for i, row_logits, row in zip(batch, out.logits, padded, strict=True):
                n = len(rows[i]) - start
                expected = Expected(list(in_start.logprobs), list(in_start.alternatives))
                if start:
                    expected.add(logits[0, -1:], row[:1], k)
                expected.add(row_logits[: n - 1], row[1:n], k)
                yield i, expected

    def generate(
        self,
        rows: Sequence[TokenIds],
        *,
        max_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        end_ids: set[int],
        k: int,
    ) -> Iterator[tuple[int, Generated]]:
        """Yield the place of each row and its continuation."""
        start, cache, _ = self._run_start(rows, self._share and not self._has_window)
        for batch in self._batches(rows, None, max_tokens):
            tails = [rows[i][start:] for i in batch]
            width = max(map(len, tails))
            padding = [width - len(tail) for tail in tails]
            ids = self._tensor([[0] * n + tail for n, tail in zip(padding, tails, strict=True)])
            mask = self._tensor([[1] * start + [0] * n + [1] * (width - n) for n in padding])
            choose = _TokenChoice(temperature, [seeds[i] for i in batch], end_ids, k)
            own_cache = _copies(cache, len(batch))
            if own_cache is None:
                own_cache = DynamicCache(config=self._model.config)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -width:]
            for step in range(max_tokens):
                out = self._run(
                    ids,
                    own_cache,
                    attention_mask=mask,
                    position_ids=positions,
                    use_cache=True,
                    logits_to_keep=1,
                )
                ids = choose(out.logits[:, -1])[:, None]
                if all(choose.has_ended) or step == max_tokens - 1:
                    break
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
                positions = positions[:, -1:] + 1
            yield from zip(batch, choose.continuations, strict=True)

    def _run_start(self, rows: Sequence[TokenIds], share: bool) -> tuple[int, Any, Any]:
        """Return the length of the shared start, its cache and its logits."""
        n = shared_start(rows) if share else 0
        if not n:
            return 0, None, None
        cache = DynamicCache(config=self._model.config)
        return n, cache, self._run(self._tensor([rows[0][:n]]), cache, use_cache=True).logits

    def _run(self, ids: Tensor, cache: Any, **settings: Any) -> Any:
        """Run the model; a cache is filled in place."""
        self.n_tokens += ids.numel()
        settings |= {} if cache is None else {self._cache_name: cache}
        with torch.no_grad():
            return self._model(input_ids=ids, **settings)

    def _tensor(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._model.device)

    def _batches(
        self, rows: Sequence[TokenIds], d_vocab: int | None, extra: int = 0
    ) -> Iterator[list[int]]:
        """Yield places of rows, longest first, so that each batch is of nearly equal lengths.

        With `d_vocab`, the logits of all tokens of a batch are kept within `LOGITS_AT_ONCE`.
        """
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        while order:
            longest = len(rows[order[0]]) + extra
            n = self._batch_tokens // longest
            if d_vocab is not None:
                n = min(n, LOGITS_AT_ONCE // (longest * d_vocab))
            yield order[: max(n, 1)]
            order = order[max(n, 1) :]


class _TokenChoice:
    """Chooses the next token of each row of a batch and keeps what was chosen."""

    def __init__(self, temperature: float, seeds: list[int], end_ids: set[int], k: int) -> None:
        self.continuations = [Generated() for _ in seeds]
        self.has_ended = [False] * len(seeds)
        self._temperature, self._end_ids, self._k = temperature, end_ids, k
        # one stream of random numbers per row: a row's answer does not depend on its batch
        self._random = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, " batch"]:
        chosen = logits.argmax(dim=-1) if self._temperature == 0 else self._drawn(logits)
        for row, token in enumerate(chosen.tolist()):
            self.has_ended[row] |= token in self._end_ids
            if not self.has_ended[row]:
                self.continuations[row].ids.append(token)
                if self._k:
                    one = slice(row, row + 1)
                    self.continuations[row].add(logits[one], chosen[one], self._k)
        return chosen

    def _drawn(self, logits: Tensor) -> Tensor:
        # by inversion: the first token whose cumulated share exceeds a uniform number
        shares = torch.softmax(logits.double() / self._temperature, dim=-1).cumsum(dim=-1).cpu()
        uniform = [torch.rand(1, generator=rng, dtype=torch.float64) for rng in self._random]
        tokens = torch.searchsorted(shares, torch.stack(uniform) * shares[:, -1:], right=True)
        return tokens[:, 0].clamp(max=logits.shape[1] - 1).to(logits.device)


def _copies(cache: Any, n: int) -> Any:
    """Return the cache of a shared start for each row of a batch; None for none."""
    if cache is None:
        return None
    copies = copy.deepcopy(cache)
    copies.batch_repeat_interleave(n)
    return copies
