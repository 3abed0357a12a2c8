"""Latents of dictionaries in a store: a hook of their own, so that every query serves them.

The latents of the first dictionary of a hook are stored as `<hook>.hook_sae_acts_post`, those of
any further one as `<hook>.<name>.hook_sae_acts_post`. Table `dictionaries` says which is which in
column `latents_hook`; its row is written before the first latent is, so a name is taken once.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import BaseModel, ValidationError
from torch import Tensor

import activation_store as astore
from activation_store.read.replay import Replay
from lmmono.errors import DictionaryError
from lmmono.files.json_files import settings_faults
from lmmono.recipe.sections import Capture
from lmmono.types import Progress, silent

LATENTS = "hook_sae_acts_post"
"""Last part of the name of a hook that holds latents."""

ALL_AT_ONE_COMMIT = 2**62
"""More tokens than any store has."""

CODE_BYTES = 2**28
"""Bytes of dense codes that are made at one time, about."""


@runtime_checkable
class Code(Protocol):
    """What is asked of a dictionary here: every `lm.dictionaries.Dictionary` has it."""

    settings: BaseModel
    hook: str | None
    d_in: int
    d_sae: int
    seed: int
    facts: dict[str, Any]

    @property
    def arch(self) -> str:
        """Kind of code."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        ...

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the code of vectors."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by name."""
        ...


@dataclass(frozen=True, slots=True)
class Latents:
    """Latents of one dictionary as they go into a store."""

    hook: str
    """Hook in the store that holds them."""
    source: str
    """Hook whose vectors are encoded."""
    code: Code
    halves: bool
    """Unit u is max(code, 0) and unit d_sae + u is max(-code, 0)."""
    device: torch.device
    """Where the dictionary's weights are."""

    @property
    def n_units(self) -> int:
        """Units of the hook."""
        return self.code.d_sae * (2 if self.halves else 1)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch units"]:
        """Return the latents of vectors; all NaN where a vector is not finite.

        Raises:
            DictionaryError: A code is negative and `halves` is off.
        """
        finite = torch.isfinite(x).all(-1, keepdim=True)
        acts = self.code.encode(torch.where(finite, x, 0.0).to(self.device))
        if self.halves:
            acts = torch.cat([acts, -acts], -1).clamp_min(0.0)
        elif (acts < 0).any():
            raise DictionaryError(
                f"{self.source}: the {self.code.arch} code has negative values, and a store keeps "
                "what is above a threshold; with halves=True unit u holds max(code, 0) and unit "
                f"{self.code.d_sae} + u holds max(-code, 0)"
            )
        return torch.where(finite.to(acts.device), acts, torch.nan)


def store_latents(
    store: astore.Store,
    dictionary: Code,
    *,
    name: str | None = None,
    max_tokens: int | None = None,
    halves: bool = False,
    commit_tokens: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    **settings: Any,
) -> str:
    """Encode the stored vectors of a dictionary's hook and store the latents as a hook.

    The store then holds what a capture with `dictionaries=[dictionary]` would have given, up to the
    rounding of the stored vectors. A token whose vector is not stored is NaN at every latent.

    One commit at the end makes all of it part of the store: a process that is killed leaves it
    without the hook. With `commit_tokens` the same call goes on after the last commit. Called once
    more, it does nothing.

    Args:
        store: Open with mode "a" or "w"; holds vectors of `dictionary.hook`.
        dictionary: Any fitted dictionary.
        name: In table `dictionaries`; by default made of kind, width and digest.
        max_tokens: Vectors to encode at most, whole sequences; None takes all.
        halves: Store a signed code as two halves: unit u < d_sae holds max(code, 0), unit
            d_sae + u holds max(-code, 0). Without it a negative code is refused.
        commit_tokens: Tokens between commits; None commits once, at the end.
        seed: Seed of the random exemplars.
        progress: Called with tokens done.
        **settings: Fields of the recipe's section `capture`: threshold, max_density, top_k,
            random_k, quantile_k.

    Returns:
        The name of the hook that holds the latents.

    Raises:
        DictionaryError: It is not fitted, of another width or of no known hook, its code is
            negative, or the name belongs to other weights.
        StoreError: The store is read-only or has no vectors of the hook, or the code is too dense.
    """
    rows = _checked(settings)
    replay = Replay(store, named_hook(dictionary))
    latents = claim(store, dictionary, replay.hook, replay.d, name=name, halves=halves)
    at_once = min(8192, CODE_BYTES // (4 * latents.n_units))
    total = replay.n_tokens if max_tokens is None else min(max_tokens, replay.n_tokens)
    done = 0
    with store.writer(
        rows=[rows_settings(latents.hook, latents.n_units, rows)],
        n_ctx=replay.n_ctx,
        seed=seed,
        commit_tokens=commit_tokens or ALL_AT_ONE_COMMIT,
    ) as writer:
        for part in replay.batches(writer.pending, at_once, max_tokens):
            acts = latents.encode(torch.from_numpy(part.vectors))
            writer.add(*part[:4], {latents.hook: acts})
            done += part.doc_ids.size
            progress("latents", min(done, total), total)
    return latents.hook


def claim(
    store: astore.Store,
    code: Code,
    source: str,
    width: int,
    *,
    name: str | None = None,
    halves: bool = False,
) -> Latents:
    """Find or choose the hook that holds the latents of a dictionary, and note it in the store.

    Args:
        store: Open for writing.
        code: The dictionary.
        source: Hook whose vectors are encoded.
        width: Width of that hook.
        name: Of the dictionary; None makes one.
        halves: Store a signed code as two halves.

    Raises:
        DictionaryError: The dictionary is not fitted or of another width, or the name belongs to
            other weights.
        StoreError: The store is read-only.
    """
    if not code.d_in:
        raise DictionaryError(f"{source}: this {code.arch} dictionary is not fitted; fit it first")
    if code.d_in != width:
        raise DictionaryError(
            f"{source}: its vectors have width {width}, the dictionary wants {code.d_in}; it was "
            "fitted on another hook or model"
        )
    stored = store.sql("SELECT * FROM dictionaries WHERE hook = $hook", hook=source)
    rows: list[dict[str, Any]] = stored.to_arrow_table().to_pylist()
    digest = code.digest
    ours = [row for row in rows if row["digest"] == digest and name in (None, row["name"])]
    row = ours[0] if ours else {"name": name or f"{code.arch}_{code.d_sae}_{digest[:8]}"}
    _check_name(row["name"], rows, digest)
    hook = row.get("latents_hook")
    if hook is None:
        hook = _free_hook(store, source, row["name"], rows)
        columns = {key: value for key, value in row.items() if value is not None}
        row = {**_described(code, source, digest), **columns, "latents_hook": hook}
        store.append("dictionaries", [row])
    device = code.tensors()["W_dec"].device
    return Latents(hook, source, code, halves, device)


def claim_all(
    store: astore.Store,
    codes: Sequence[Code] | Mapping[str, Code],
    halves: bool,
    width: Callable[[str], int],
) -> list[Latents]:
    """Return the latents of several dictionaries, given as a list or by hook; see `claim`.

    `width` says how wide a hook is.

    Raises:
        DictionaryError: As `claim`, or one dictionary is given twice.
    """
    if isinstance(codes, Mapping):
        pairs = list(codes.items())
    else:
        pairs = [(named_hook(code), code) for code in codes]
    claims = [claim(store, code, hook, width(hook), halves=halves) for hook, code in pairs]
    hooks = [latents.hook for latents in claims]
    if twice := sorted({hook for hook in hooks if hooks.count(hook) > 1}):
        raise DictionaryError(f"dictionaries: one is given twice: {', '.join(twice)}")
    return claims


def rows_settings(
    hook: str,
    d: int,
    settings: Capture,
    units: tuple[int, ...] | None = None,
    cuts: tuple[float, ...] | None = None,
) -> astore.Rows:
    """Return the store's settings for one hook kept as sparse rows."""
    return astore.Rows(
        hook=hook,
        d=d,
        threshold=settings.threshold,
        max_density=settings.max_density,
        top_k=settings.top_k,
        random_k=settings.random_k,
        quantile_k=settings.quantile_k,
        dtype=settings.dtype,
        units=units,
        top_p=settings.top_p,
        cuts=cuts,
    )


def named_hook(code: Code) -> str:
    """Return the hook that a dictionary is of.

    Raises:
        DictionaryError: It was fitted on bare arrays.
    """
    if not code.hook:
        raise DictionaryError(
            f"this {code.arch} dictionary does not know its hook, because it was fitted on arrays; "
            'set it first: dictionary.hook = "blocks.0.mlp.hook_post"'
        )
    return code.hook


def _checked(settings: dict[str, Any]) -> Capture:
    try:
        return Capture.model_validate(settings)
    except ValidationError as error:
        raise DictionaryError(settings_faults("store_latents", error)) from None


def _check_name(name: str, rows: list[dict[str, Any]], digest: str) -> None:
    """Refuse a name that cannot be part of a hook's, or that is another dictionary's."""
    if not re.fullmatch(r"[\w-]+", name):
        raise DictionaryError(f"name: want letters, digits, _ and -, got {name!r}")
    for other in rows:
        if other["name"] == name and other["digest"] != digest:
            raise DictionaryError(
                f"{other['hook']}: the store has a dictionary {name!r} with other weights "
                f"({str(other['digest'])[:8]}..., this one is {digest[:8]}...); give another name"
            )


def _free_hook(store: astore.Store, source: str, name: str, rows: list[dict[str, Any]]) -> str:
    """Return the plain name for the first dictionary, one with its own name for the others."""
    plain = f"{source}.{LATENTS}"
    captured = store.sql("SELECT 1 FROM hooks WHERE hook = $hook", hook=plain).fetchall()
    taken = bool(captured) or any(row["latents_hook"] == plain for row in rows)
    return f"{source}.{name}.{LATENTS}" if taken else plain


def _described(code: Code, source: str, digest: str) -> dict[str, Any]:
    """Return what table `dictionaries` says of a dictionary."""
    return {
        "hook": source,
        "arch": code.arch,
        "d_in": code.d_in,
        "d_sae": code.d_sae,
        "seed": code.seed,
        "n_tokens": code.facts.get("n_tokens"),
        "settings": code.settings.model_dump(mode="json"),
        "digest": digest,
        "seconds": code.facts.get("seconds"),
    }
