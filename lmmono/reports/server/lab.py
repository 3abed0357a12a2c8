"""What a model does with a text that somebody types: activations, and what an edit changes."""

import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from activation_store.write.recording import input_device
from lmmono.data.framing import text_start
from lmmono.data.vocabulary import shown_tokens
from lmmono.errors import ModelError
from lmmono.models.hooks import Edit, editing, hook_names, run_with_cache

LONGEST_TEXT = 4_000
"""Characters of a text; a context of a thousand tokens is about as long."""
MOST_NEW = 64
"""Tokens of a continuation."""
SHOWN_TOKENS = 10
"""Next tokens listed."""
KINDS = ("ablate", "scale", "set", "steer")
"""What can be done to a unit; `steer` adds to its activation."""


@dataclass(frozen=True, slots=True)
class TextReading:
    """A text as the model reads it."""

    tokens: list[str]
    """Strings of its tokens, a BOS included where the model wants one."""
    acts: dict[tuple[str, int], list[float]]
    """Activation on each token, by hook and unit."""


@dataclass(frozen=True, slots=True)
class NextToken:
    """A token that may come next."""

    token: str
    before: float
    """Probability without the edit."""
    after: float
    """Probability with it."""


@dataclass(frozen=True, slots=True)
class EditEffect:
    """What an edit of one unit changes, at every position of the text and after it."""

    tokens: list[NextToken]
    """The likeliest next tokens of both, most changed first."""
    kl: float
    """KL divergence of the next token's distribution, from before to after, in nats."""
    continuation_before: str
    continuation_after: str


class Lab:
    """The model of one run. A pass at a time: hooks are attached to the one model."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast, n_ctx: int) -> None:
        self._model, self._tokenizer, self._n_ctx = model, tokenizer, n_ctx
        self._turn = threading.Lock()

    @cached_property
    def hooks(self) -> frozenset[str]:
        """Hooks that the model itself has; latents of dictionaries are none."""
        return frozenset(hook_names(self._model))

    def _require(self, hook: str) -> None:
        if hook not in self.hooks:
            raise ModelError(
                f"{hook} is no hook of the model itself, so it cannot be run here; choose one of "
                "its neurons"
            )

    def _ids(self, text: str, n_more: int = 0) -> torch.Tensor:
        if len(text) > LONGEST_TEXT:
            raise ModelError(
                f"want a text of at most {LONGEST_TEXT:,} characters, got {len(text):,}"
            )
        tokenizer, n_ctx = self._tokenizer, self._n_ctx
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
        start = text_start(tokenizer)
        if start is not None and (not ids or start != tokenizer.eos_token_id):
            ids = [start, *ids]
        if not ids:
            raise ModelError("the text is empty: its tokenizer makes no token of it")
        if len(ids) + n_more > n_ctx:
            raise ModelError(
                f"want at most {n_ctx - n_more} tokens, for the context has {n_ctx}; got {len(ids)}"
            )
        return torch.tensor([ids], device=input_device(self._model))

    @cached_property
    def _vocabulary(self) -> list[str]:
        return shown_tokens(self._tokenizer)

    def _strings(self, ids: list[int]) -> list[str]:
        known = self._vocabulary
        # a model's head can be wider than its tokenizer
        return [known[i] if i < len(known) else f"[{i}]" for i in ids]

    def read(self, text: str, units: list[tuple[str, int]]) -> TextReading:
        """Return the activations of units on each token of a text.

        Raises:
            ModelError: The text is too long, or a hook is not one of the model.
        """
        hooks = sorted({hook for hook, _ in units})
        for hook in hooks:
            self._require(hook)
        ids = self._ids(text)
        acts: dict[tuple[str, int], list[float]] = {}
        with self._turn:
            if hooks:
                _, cache = run_with_cache(self._model, ids, hooks)
                for hook, unit in units:
                    acts[hook, unit] = cache[hook][0].flatten(1)[:, unit].float().tolist()
        return TextReading(self._strings(ids[0].tolist()), acts)

    def strongest(
        self, text: str, largest: dict[str, list[float | None]], k: int
    ) -> list[tuple[str, int]]:
        """Return the k units that come closest to the largest act they are known to have.

        Args:
            text: What the model reads.
            largest: By hook, the largest act of each unit in the store; None or <= 0 leaves it out.
            k: How many, over all hooks.
        """
        ids = self._ids(text)
        hooks = [hook for hook in largest if hook in self.hooks]
        if not hooks:
            return []
        with self._turn:
            _, cache = run_with_cache(self._model, ids, hooks)
        shares: list[tuple[float, str, int]] = []
        for hook in hooks:
            most = cache[hook][0].flatten(1).amax(0).float()
            scale = torch.tensor([m or 0.0 for m in largest[hook]])[: len(most)]
            share = torch.where(scale > 0, most.cpu()[: len(scale)] / scale.clamp_min(1e-12), 0.0)
            values, at = share.topk(min(k, len(share)))
            shares += [(v, hook, i) for v, i in zip(values.tolist(), at.tolist(), strict=True)]
        return [
            (hook, unit)
            for share, hook, unit in sorted(shares, key=lambda s: -s[0])[:k]
            if share > 0
        ]

    def edit(
        self, text: str, hook: str, unit: int, kind: str, value: float, *, max_tokens: int = 24
    ) -> EditEffect:
        """Return what an edit of one unit changes; continuations take the likeliest token.

        Args:
            text: What the model reads.
            hook: Hook of the unit, one of the model itself.
            unit: Index of the unit.
            kind: One of `KINDS`.
            value: Factor of `scale`, activation of `set`, what `steer` adds; `ablate` has none.
            max_tokens: Tokens of each continuation.

        Raises:
            ModelError: The text is too long, the hook or the unit is not one of the model, or the
                kind is unknown.
        """
        self._require(hook)
        if kind not in KINDS:
            raise ModelError(f"want one of {', '.join(KINDS)}, got {kind!r}")
        max_tokens = min(max_tokens, MOST_NEW)
        ids = self._ids(text, max_tokens)
        model = self._model
        with self._turn:
            edit = self._edit_of(model, ids, hook, unit, kind, value)
            before, text_before = self._next(model, ids, max_tokens)
            with editing(model, edit):
                after, text_after = self._next(model, ids, max_tokens)
        kl = float((before.exp() * (before - after)).nansum())
        chosen = {
            *before.topk(SHOWN_TOKENS).indices.tolist(),
            *after.topk(SHOWN_TOKENS).indices.tolist(),
        }
        p, q = before.exp(), after.exp()
        moved: list[float] = (q - p).abs().tolist()
        order = sorted(chosen, key=moved.__getitem__, reverse=True)
        strings = self._strings(order)
        tokens = [
            NextToken(string, float(p[i]), float(q[i]))
            for string, i in zip(strings, order, strict=True)
        ]
        return EditEffect(tokens, kl, text_before, text_after)

    @staticmethod
    def _edit_of(model: Any, ids: Any, hook: str, unit: int, kind: str, value: float) -> Edit:
        if kind == "steer":
            _, cache = run_with_cache(model, ids, hook)
            direction = torch.zeros(cache[hook][0, 0].numel())
            if unit >= len(direction):
                raise ModelError(f"{hook} has units 0 to {len(direction) - 1}, got {unit}")
            direction[unit] = 1.0
            return Edit(hook, "add", value, direction=direction)
        if kind == "ablate":
            return Edit(hook, "ablate", units=[unit])
        return Edit(hook, kind, value, units=[unit])

    def _next(self, model: Any, ids: torch.Tensor, max_tokens: int) -> tuple[torch.Tensor, str]:
        """Return log-probabilities of the next token, and the likeliest continuation."""
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1].float()
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=self._tokenizer.eos_token_id,
            )
        continuation = self._tokenizer.decode(output[0, ids.shape[1] :].tolist())
        return logits.log_softmax(-1).cpu(), str(continuation)
