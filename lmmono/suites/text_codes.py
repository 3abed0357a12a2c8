"""Texts to codes: token rows at a hook, a family's code of each, pooled to one vector a text.

Each text is read after an end-of-text token, as documents are in training; that token has no part
in the pooling. Noise inside the model is put on token embeddings, or on the rows of the hook before
any family sees them: one draw per text and seed, the same for every family, whatever the batch.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from activation_store.write.recorder import digest as weights_digest
from activation_store.write.recording import input_device
from lmmono.errors import RobustnessError, nearest
from lmmono.models.hooks import attached, bare, hook_names, hook_width, match_hooks, run_until
from lmmono.probes.text_reader import TextReader
from lmmono.registry.suites import MODEL_NOISE, Pooling
from lmmono.suites.feature_families import FeatureFamily

SIGMAS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6)
"""Standard deviation of noise inside the model by severity, as a share of what it is put on: the
root mean square of token embeddings, or each dimension's deviation of the hook's rows."""

FIT_TOKENS = 20_000
"""Token rows that families are fitted on, at most."""

FIT_TEXTS = 2_000
"""Texts that these rows come from, at most: short ones have fewer tokens than `FIT_TOKENS`."""

BATCH_TOKENS = 8192
"""Tokens per forward pass, padding included; bounds its memory."""

EMBED = "hook_embed"


@dataclass(frozen=True, slots=True)
class InputNoise:
    """Noise inside the model."""

    kind: str
    """`embedding_gaussian`, `embedding_uniform` (zero-mean) or `hidden_gaussian`."""
    severity: int
    """0 to 5; see `SIGMAS`."""
    seed: int
    """Seed of the draw."""

    def __post_init__(self) -> None:
        if self.kind not in MODEL_NOISE:
            raise RobustnessError(f"noise {self.kind!r}: {nearest(self.kind, MODEL_NOISE)}")
        if not 0 <= self.severity < len(SIGMAS):
            raise RobustnessError(f"{self.kind}: severity {self.severity}: want 0 to 5")

    def draw(self, index: int, stream: int, shape: tuple[int, int]) -> Float[Tensor, "n d"]:
        """Return the noise of one text, of the standard deviation of its severity."""
        random = np.random.default_rng((self.seed, MODEL_NOISE.index(self.kind), stream, index))
        if self.kind == "embedding_uniform":
            drawn = random.uniform(-(3**0.5), 3**0.5, shape)
        else:
            drawn = random.standard_normal(shape)
        return torch.from_numpy((SIGMAS[self.severity] * drawn).astype(np.float32))


@dataclass(frozen=True, slots=True)
class ProbedCode:
    """One pooled code of texts: what a probe reads."""

    name: str
    """Name in tables: the family's, and the pooling where it is not the first."""
    family: FeatureFamily
    """The code of token rows."""
    hook: str
    """Hook that the rows come from."""
    pooling: Pooling
    """How a text's codes become one."""


@dataclass(frozen=True, slots=True, eq=False)
class TextCodes:
    """Codes of some texts."""

    codes: dict[str, Float32[np.ndarray, "n _"]]
    """One row per text, by the name of the code."""
    n_truncated: int
    """Texts longer than the model's context, cut there."""
    n_tokenless: int
    """Texts without a token, read as an end-of-text token alone."""


class TextEncoder:
    """A model with codes of its hooks; fitted once, then used on any text.

    Attributes:
        codes: What is computed, by name.
        model: The model.
        reader: Its tokenizer, with the bounds of the model.
        model_digest: SHA-256 of the model's weights.
        n_ctx: Most tokens of a text; None where the model has no limit.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, codes: Sequence[ProbedCode], *, seed: int = 0
    ) -> None:
        """Look up hooks and widths; the model is run later, in evaluation mode.

        Raises:
            RobustnessError: There is no tokenizer, or two codes have one name.
            ModelError: A hook matches nothing.
        """
        network = bare(model)
        self.reader = TextReader(network, tokenizer)
        names = [code.name for code in codes]
        if len(set(names)) < len(names):
            raise RobustnessError(f"features: want names of their own, got {', '.join(names)}")
        self.codes = {code.name: code for code in codes}
        self.model_digest, self.model = weights_digest(network), network
        self.n_ctx = self.reader.n_ctx
        self._seed = seed
        self._scales: dict[str, Float[Tensor, " d"]] = {}

    @property
    def hooks(self) -> list[str]:
        """Hooks that the codes read, each once."""
        return list(dict.fromkeys(code.hook for code in self.codes.values()))

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` was called."""
        return bool(self._scales)

    def fit(self, texts: Sequence[str]) -> "TextEncoder":
        """Fit every family on token rows of clean training texts, without their labels.

        Raises:
            RobustnessError: There is no text.
            DataError: A family does not fit the rows.
        """
        if not texts:
            raise RobustnessError("families want texts to be fitted on, got none")
        chosen: list[int] = np.random.default_rng(self._seed).permutation(len(texts)).tolist()
        rows: dict[str, list[Tensor]] = {hook: [] for hook in self.hooks}
        ids = self.reader.read([texts[i] for i in chosen[:FIT_TEXTS]])[0]
        ends = np.cumsum([len(row) for row in ids])
        n_texts = int(np.searchsorted(ends, FIT_TOKENS)) + 1
        for batch in self._batches(ids[:n_texts], None):
            for hook, acts in batch.rows.items():
                rows[hook].append(acts)
        origin = origin_of(self.model_digest, texts)
        for hook in self.hooks:
            here = torch.cat(rows[hook])[:FIT_TOKENS]
            self._scales[hook] = here.std(0)
            for code in self.codes.values():
                if code.hook != hook or code.family.d:
                    continue
                if code.family.reads == "tokens":
                    code.family.fit(here, origin=f"{hook} {origin}")
                else:
                    whole = EncodedTexts(self, hook, [texts[i] for i in chosen[:FIT_TEXTS]])
                    means = whole.means(ids)
                    code.family.fit(means, origin=f"{hook} {origin}", texts=whole)
        return self

    @torch.no_grad()
    def encode(
        self,
        texts: Sequence[str],
        *,
        names: Sequence[str] | None = None,
        noise: InputNoise | None = None,
    ) -> TextCodes:
        """Return the codes of texts, in their order.

        Args:
            texts: Any texts; those longer than the context are cut and counted.
            names: Codes to compute; None takes all.
            noise: Noise inside the model; text i gets draw i of its seed.

        Raises:
            RobustnessError: Not fitted yet, or a code is not finite.
        """
        if not self.is_fitted:
            raise RobustnessError("the encoder is not fitted; fit it on training texts first")
        wanted = [code for name, code in self.codes.items() if names is None or name in names]
        ids, n_truncated, n_tokenless = self.reader.read(texts)
        pooled: dict[str, list[Tensor]] = {code.name: [] for code in wanted}
        order: list[int] = []
        for batch in self._batches(ids, noise):
            order += batch.texts
            acts: dict[tuple[str, int], Tensor] = {}  # of a family once, whatever its poolings
            for code in wanted:
                key = (code.hook, id(code.family))
                rows = batch.rows[code.hook]
                if code.family.reads == "texts":
                    code_rows = code.family.transform(pool(rows, batch.lengths, "mean"))
                    pooled[code.name].append(code_rows.cpu())
                    continue
                if key not in acts:
                    acts[key] = code.family.transform(rows)
                pooled[code.name].append(pool(acts[key], batch.lengths, code.pooling).cpu())
        place = np.argsort(order)
        codes = {
            name: torch.cat(parts).numpy().astype(np.float32)[place]
            for name, parts in pooled.items()
        }
        for name, x in codes.items():
            if not np.isfinite(x).all():
                n_bad = int((~np.isfinite(x).all(axis=1)).sum())
                raise RobustnessError(
                    f"{name}: features of {n_bad} of {len(x)} texts are not finite"
                )
        return TextCodes(codes, n_truncated, n_tokenless)

    @torch.no_grad()
    def token_rows(
        self, hook: str, ids: Sequence[np.ndarray], dropout_seed: int | None = None
    ) -> list[Float[Tensor, "pos d"]]:
        """Return the rows of each text at a hook; with a seed, under the model's dropout."""
        order: list[int] = []
        parts: list[Tensor] = []
        device = input_device(self.model)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(dropout_seed or 0)
            for batch in self._batches(ids, None, with_dropout=dropout_seed is not None):
                order += batch.texts
                parts += batch.rows[hook].split(batch.lengths)
        return [parts[i] for i in np.argsort(order)]

    def _batches(
        self, ids: Sequence[np.ndarray], noise: InputNoise | None, *, with_dropout: bool = False
    ) -> "Iterator[_TokenRows]":
        """Run the model over texts of similar length together; yields rows without padding."""
        was_training = self.model.training
        self.model.train(with_dropout)
        try:
            for texts in _alike([len(row) for row in ids]):
                yield self._run([ids[i] for i in texts], texts, noise)
        finally:
            self.model.train(was_training)

    def _run(
        self, ids: Sequence[np.ndarray], texts: list[int], noise: InputNoise | None
    ) -> "_TokenRows":
        lengths = [max(1, len(row) - 1) for row in ids]
        with self._noised(noise, texts, lengths):
            acts = run_until(self.model, self.reader.block(ids), self.hooks)
        rows: dict[str, Tensor] = {}
        for stream, hook in enumerate(self.hooks):
            flat = acts[hook].flatten(2).float()
            begins = [min(1, len(row) - 1) for row in ids]  # a text without tokens has the first
            parts = [
                flat[i, begin : begin + n]
                for i, (begin, n) in enumerate(zip(begins, lengths, strict=True))
            ]
            if noise is not None and noise.kind == "hidden_gaussian":
                scale = self._scales[hook]
                parts = [
                    part + scale * noise.draw(i, stream, (len(part), part.shape[1])).to(part.device)
                    for i, part in zip(texts, parts, strict=True)
                ]
            rows[hook] = torch.cat(parts)
        return _TokenRows(texts, lengths, rows)

    def _noised(
        self, noise: InputNoise | None, texts: list[int], lengths: list[int]
    ) -> AbstractContextManager[None]:
        """Return the context in which token embeddings are noisy; the first token never is."""
        if noise is None or noise.kind == "hidden_gaussian" or not noise.severity:
            return nullcontext()
        if EMBED not in hook_names(self.model):
            raise RobustnessError(f"{noise.kind}: the model has no {EMBED} to put noise on")
        table: Any = self.model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        scale = float(table.weight.detach().float().square().mean().sqrt())

        def add(x: Tensor) -> Tensor:
            changed = x.clone()
            for row, (i, n) in enumerate(zip(texts, lengths, strict=True)):
                n = min(n, x.shape[1] - 1)
                drawn = scale * noise.draw(i, 0, (n, x.shape[2]))
                changed[row, 1 : 1 + n] += drawn.to(x.device, x.dtype)
            return changed

        return attached(self.model, {EMBED: add})


@dataclass(frozen=True, slots=True, eq=False)
class EncodedTexts:
    """Texts with their rows at one hook: the `TextRows` that families are fitted on."""

    encoder: TextEncoder
    hook: str
    texts: Sequence[str]

    def ids(self, texts: Sequence[str]) -> list[Int64[np.ndarray, " pos"]]:
        """Return the token ids of texts, the token before each first."""
        return self.encoder.reader.read(texts)[0]

    def means(
        self, ids: Sequence[np.ndarray], dropout_seed: int | None = None
    ) -> Float[Tensor, "n d"]:
        """Return the mean row of each text; with a seed, under the model's dropout."""
        rows = self.encoder.token_rows(self.hook, ids, dropout_seed)
        return torch.stack([of_text.mean(0) for of_text in rows])


@dataclass(frozen=True, slots=True, eq=False)
class _TokenRows:
    """Token rows of some texts."""

    texts: list[int]
    lengths: list[int]
    rows: Mapping[str, Float[Tensor, "n_tokens d"]]


def pool(
    codes: Float[Tensor, "n_tokens d"], lengths: Sequence[int], pooling: Pooling
) -> Float[Tensor, "n_texts d"]:
    """Return one vector per text from the codes of its tokens, which lie one after the other."""
    parts = codes.split(list(lengths))
    match pooling:
        case "mean":
            return torch.stack([part.mean(0) for part in parts])
        case "max":
            return torch.stack([part.amax(0) for part in parts])
        case "last":
            return torch.stack([part[-1] for part in parts])


def probed_codes(
    families: Mapping[str, FeatureFamily], model: nn.Module, hook: str, poolings: Sequence[Pooling]
) -> list[ProbedCode]:
    """Return every family with every pooling, each at its hook.

    A family that brings a hook reads that; one of neurons reads those of the hook's layer.

    Raises:
        RobustnessError: The hook is in no layer, and a family wants its neurons.
        ModelError: A hook matches nothing, or has no width per token.
    """
    codes: list[ProbedCode] = []
    for name, family in families.items():
        if family.reads == "texts" and tuple(poolings) != ("mean",):
            raise RobustnessError(
                f"{name}: reads the mean row of a text, so poolings want to be [mean], got "
                f"{list(poolings)}; take it in a study of its own"
            )
        place = family.hook or hook
        if not family.hook and family.point == "neurons":
            before, _, rest = hook.partition("blocks.")
            layer = rest.partition(".")[0]
            if before or not layer.isdigit():
                raise RobustnessError(
                    f"{family.name}: {hook} is in no layer; give a hook blocks.N...."
                )
            place = f"blocks.{layer}.mlp.hook_post"
        (where,) = match_hooks(model, place)
        hook_width(model, where)
        for i, pooling in enumerate(poolings):
            codes.append(ProbedCode(f"{name}:{pooling}" if i else name, family, where, pooling))
    return codes


def streams(model: nn.Module) -> list[str]:
    """Return the hooks that a probe may read by default: the stream after each block."""
    return match_hooks(model, "blocks.*.hook_resid_post")


def origin_of(*parts: str | Sequence[str]) -> str:
    """Return a SHA-256 (hex) of texts."""
    whole = hashlib.sha256()
    for part in parts:
        for text in [part] if isinstance(part, str) else part:
            whole.update(hashlib.sha256(text.encode(errors="surrogatepass")).digest())
        whole.update(b"/")
    return whole.hexdigest()


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield texts in batches of similar length, each of about `BATCH_TOKENS` with its padding."""
    batch: list[int] = []
    for i in np.argsort(lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[i] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
