"""A language model on this machine, asked in batches."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from lmmono.clients.client import Answer, Heard, Message, Prompt, Read, Reading, Usage
from lmmono.clients.local_passes import Expected, Generated, Passes, Row
from lmmono.errors import ClientError
from lmmono.models.storage import load_model
from lmmono.runs.folder import Run, open_run

SPEAKERS = {"system": "", "user": "User: ", "assistant": "Assistant: "}
"""How turns begin where the tokenizer has no chat template."""


@dataclass(frozen=True, slots=True)
class _Encoded:
    ids: Row
    n_before: int
    """Tokens that the tokenizer puts before the text, such as a beginning of text."""
    pieces: tuple[str, ...]
    """Strings of the others, which join to the text."""


class LocalClient:
    """A causal language model on this machine.

    Prompts are run in batches; the start that all prompts of a call share is run once. Temperature
    0 takes the likeliest token; above it, each prompt has random numbers of its own.

    Args:
        model: A model with its tokenizer, a run, or a folder of either kind.
        tokenizer: Tokenizer of a model that has none of its own; must be a fast one.
        batch_tokens: Most tokens per batch, padding included.
        share_start: Run what prompts share once; False is for measuring what that saves.

    Raises:
        ClientError: There is no tokenizer, or it is not a fast one.
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
        self._model, own, self._label = _opened(model)
        self._tokenizer: Any = own if tokenizer is None else tokenizer
        if not getattr(self._tokenizer, "is_fast", False):
            raise ClientError(
                f"{self._label}: want a fast tokenizer (one with tokenizer.json), got "
                f"{type(self._tokenizer).__name__}; pass tokenizer="
            )
        self._passes = Passes(self._model, batch_tokens, share=share_start)
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
        answers = [self._refusal(len(row), max_tokens) for row in rows]
        fitting = [i for i, answer in enumerate(answers) if answer.failure is None]
        _tell(on_answer, answers)
        drawn = self._passes.generate(
            [rows[i] for i in fitting],
            max_tokens=max_tokens,
            temperature=float(temperature),
            seeds=[_seed(seed, rows[i]) for i in fitting],
            end_ids=self._end_ids,
            k=n_alternatives,
        )
        began = time.perf_counter()
        for place, found in drawn:
            i, now = fitting[place], time.perf_counter()
            usage = Usage(1, len(rows[i]), len(found.ids), None, now - began)
            answers[i], began = self._answer(found, usage), now
            if on_answer is not None:
                on_answer(i, answers[i])
        return answers

    def read(
        self, texts: Sequence[str], *, n_alternatives: int = 0, on_reading: Read | None = None
    ) -> list[Reading]:
        """Return the tokens of each text with log-probabilities; see `Client.read`."""
        encoded = [self._encode(text) for text in texts]
        refusals = [self._refusal(len(each.ids), 0) for each in encoded]
        readings = [Reading(failure=each.failure, detail=each.detail) for each in refusals]
        fitting = [i for i, each in enumerate(readings) if each.failure is None]
        began = time.perf_counter()
        for place, found in self._passes.read([encoded[i].ids for i in fitting], n_alternatives):
            i, now = fitting[place], time.perf_counter()
            usage = Usage(1, len(encoded[i].ids), 0, None, now - began)
            readings[i], began = self._reading(encoded[i], found, usage), now
            if on_reading is not None:
                on_reading(i, readings[i])
        return readings

    @cached_property
    def _end_ids(self) -> set[int]:
        settings: Any = self._model.generation_config
        ends = settings.eos_token_id if settings is not None else None
        ends = ends if isinstance(ends, list) else [ends]
        return {end for end in (*ends, self._tokenizer.eos_token_id) if end is not None}

    def _prompt_ids(self, prompt: Prompt) -> Row:
        if not prompt.messages:
            return self._encode(prompt.text).ids
        if self._tokenizer.chat_template is None:
            return self._encode(_as_text(prompt.messages)).ids
        turns = [{"role": each.role, "content": each.content} for each in prompt.messages]
        # the template writes the special tokens itself
        text = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode(self, text: str) -> _Encoded:
        found = self._tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        special = [bool(each) for each in found["special_tokens_mask"]]
        n_before = special.index(False) if False in special else len(special)
        # a tokenizer made for other models may close the text too; the text goes on here
        stop = len(special) - special[::-1].index(False) if False in special else n_before
        starts = [start for start, _ in found["offset_mapping"][n_before:stop]]
        bounds = [0, *starts[1:], len(text)] if starts else []
        pieces = tuple(text[a:b] for a, b in zip(bounds, bounds[1:], strict=False))
        return _Encoded(found["input_ids"][:stop], n_before, pieces)

    def _refusal(self, n_tokens: int, max_tokens: int) -> Answer:
        if not n_tokens:
            return Answer(None, "no_answer", "nothing is asked")
        n_ctx = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if n_ctx is None or n_tokens + max_tokens <= n_ctx:
            return Answer("")
        detail = f"{n_tokens} tokens and {max_tokens} more do not fit {n_ctx} positions"
        return Answer(None, "no_answer", detail)

    def _answer(self, found: Generated, usage: Usage) -> Answer:
        text = self._tokenizer.decode(found.ids, skip_special_tokens=True)
        if not found.alternatives:
            return Answer(text, usage=usage)
        tokens = tuple(self._string(token) for token in found.ids)
        return Answer(text, tokens=tokens, alternatives=self._named(found), usage=usage)

    def _reading(self, encoded: _Encoded, found: Expected, usage: Usage) -> Reading:
        skipped = max(encoded.n_before - 1, 0)
        none: tuple[None, ...] = () if encoded.n_before else (None,)
        no_alternatives: tuple[dict[str, float], ...] = () if encoded.n_before else ({},)
        return Reading(
            encoded.pieces,
            (*none, *found.logprobs[skipped:]),
            (*no_alternatives, *self._named(found)[skipped:]),
            usage=usage,
        )

    def _named(self, found: Expected) -> tuple[dict[str, float], ...]:
        return tuple(self._by_string(each) for each in found.alternatives)

    def _by_string(self, alternatives: list[tuple[int, float]]) -> dict[str, float]:
        named: dict[str, float] = {}
        for token, logprob in alternatives:
            named.setdefault(self._string(token), logprob)  # of two with one string, the likelier
        return named

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
    own = AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None
    return loaded, own, folder.name


def _as_text(messages: Sequence[Message]) -> str:
    r"""Return turns as plain text that a base model goes on from.

    >>> _as_text([Message("system", "Be brief."), Message("user", "Hi")])
    'Be brief.\n\nUser: Hi\n\nAssistant:'
    """
    turns = [SPEAKERS[message.role] + message.content for message in messages]
    return "\n\n".join([*turns, "Assistant:"])


def _seed(seed: int, row: Row) -> int:
    digest = hashlib.sha256(json.dumps([seed, row]).encode()).digest()
    return int.from_bytes(digest[:7])


def _tell(on_answer: Callable[[int, Answer], None] | None, answers: list[Answer]) -> None:
    if on_answer is not None:
        for i, answer in enumerate(answers):
            if answer.failure is not None:
                on_answer(i, answer)
