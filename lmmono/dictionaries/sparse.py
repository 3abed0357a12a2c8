"""A training step of topk and batchtopk that computes active (token, latent) pairs only.

sae-lens multiplies dense matrices six times a step: encode, decode, and four times backwards. Of
those only the encoder's product needs all latents; in the others all but k of d_sae terms are zero.
Here the encoder's product is dense, and the rest goes pair by pair. The sums are those of sae-lens
(the loss for dead latents included), so weights agree up to rounding; the classes, the optimizer,
the schedules and the counters are sae-lens' own. CPU and float32 only; its gain over sae-lens' own
step is measured in docs/results/dictionary_speed.md.

    x [n, d_in] -> pre [n, d_sae] -> pairs (token, latent, value) -> error [n, d_in] -> gradients

A decoder norm multiplies a pre-activation before the choice and divides the act after it. Its two
gradients cancel, so the act is ReLU(pre-activation) and the norm decides the choice alone.

The compiled loops at the end each do the rows or latents `first` to `last` and write only to those,
so threads can share the work and the result does not depend on how. Sums inside a vector may be
taken in another order than written, the same on every call.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, cast, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

GUESS = 0.95
"""Share of the last batch's smallest act from which on batchtopk looks for this batch's: batches
differ by little, so one look mostly finds enough pairs, and few too many."""


class Scratch:
    """Memory that steps use again, one array for each name."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def take(self, name: str, *shape: int, dtype: Any = np.float32) -> np.ndarray:
        """Return an array with whatever it held before; valid until the name is taken again."""
        size = int(np.prod(shape))
        array = self._arrays.get(name)
        if array is None or array.size < size:
            array = self._arrays[name] = np.empty(size, dtype)
        return array[:size].reshape(shape)


@dataclass(frozen=True)
class ActivePairs:
    """Active pairs, token by token."""

    starts: np.ndarray
    """[n + 1]: the pairs of token i are starts[i] to starts[i + 1]."""
    latents: np.ndarray
    """[pairs]."""
    values: np.ndarray
    """[pairs]: ReLU(x W_enc + b_enc), before any norm; those of zero stand for nothing."""


@dataclass(frozen=True)
class StepResult:
    """What a step says of its batch."""

    x: Tensor
    """[n, d_in], in scaled units."""
    loss: float
    """The loss that was stepped on."""
    squared_error: float
    """Sum over the batch of the squared error of the reconstruction."""
    n_active: int
    """Pairs with an act above zero."""


class SparseStep:
    """The step of one sae-lens `SAETrainer`, where `supports` says so."""

    def __init__(self, trainer: Any, scratch: Scratch) -> None:
        self._trainer, self._sae, self._scratch = trainer, trainer.sae, scratch
        self._guess = 0.0  # before the first batch every act above zero is looked at
        trainer.optimizer.param_groups[0]["fused"] = True  # one pass over weights and moments
        encoder = self._sae.W_enc
        # a latent's weights lie side by side, as the loops over latents read and write them
        encoder.data = encoder.data.T.contiguous().T

    @staticmethod
    def supports(settings: Any, device: str) -> bool:
        """Say whether a fit takes this step: topk or batchtopk on a CPU, unless turned off."""
        return device == "cpu" and getattr(settings, "sparse_step", False)

    @torch.no_grad()
    def step(self, batch: Float[Tensor, "n d_in"]) -> StepResult:
        """Do what `SAETrainer.step` does with a batch, up to rounding."""
        trainer, sae, take = self._trainer, self._sae, self._scratch.take
        trainer.n_training_samples += len(batch)
        x = trainer.activation_scaler(batch).contiguous()
        dead = trainer.dead_neurons  # as of before this batch, as sae-lens has it
        n, d_in, d_sae = len(x), sae.cfg.d_in, sae.cfg.d_sae
        w_dec, b_dec = sae.W_dec.numpy(), sae.b_dec.numpy()

        # encode: the only product that needs every latent, then the choice of pairs
        centred = x - sae.b_dec
        pre = take("pre", n, d_sae)
        torch.mm(centred, sae.W_enc, out=torch.from_numpy(pre))
        pairs = self._choose(pre)

        # decode: error = values @ w_dec + b_dec - x, loss = sum |error|^2 / n
        error, squared = take("error", n, d_in), take("squared", n)
        of_tokens = (pairs.starts, pairs.latents, pairs.values, w_dec, b_dec, x.numpy())
        _shared(n, lambda a, b: _decode(*of_tokens, a, b, error, squared))
        errors = torch.from_numpy(error)
        squared_error = float(squared.sum(dtype=np.float64))
        # dead latents model the error itself, so before it is scaled in place to a gradient
        auxiliary = self._dead_gradients(pre, errors, dead) if dead.any() else None
        errors.mul_(2.0 / n)

        # backward: the pairs sorted by latent, so that a thread owns the rows that it writes
        bounds = take("bounds", d_sae + 1, dtype=np.int64)
        tokens = take("tokens", len(pairs.values), dtype=np.int32)
        values = take("sorted", len(pairs.values))
        _by_latent(pairs.starts, pairs.latents, pairs.values, bounds, tokens, values)
        d_enc, d_dec = take("d_enc", d_sae, d_in), take("d_dec", d_sae, d_in)
        d_bias = take("d_bias", d_sae)
        of_latents = (bounds, tokens, values, w_dec, error, centred.numpy())
        _shared(d_sae, lambda a, b: _gradients(*of_latents, a, b, d_enc, d_dec, d_bias))
        sae.W_enc.grad = torch.from_numpy(d_enc).T
        sae.W_dec.grad = torch.from_numpy(d_dec)
        sae.b_enc.grad = torch.from_numpy(d_bias)
        loss = squared_error / n
        if auxiliary is not None:
            loss += auxiliary.add(centred, sae)
        # b_dec is added to the output and taken off the input, where the sign turns
        sae.b_dec.grad = errors.sum(0) - sae.W_enc @ sae.b_enc.grad

        # the rest of SAETrainer.step: counters, clipping to its norm of 1, Adam, schedules
        fired = torch.from_numpy(np.diff(bounds))
        trainer.n_forward_passes_since_fired += 1
        trainer.n_forward_passes_since_fired[fired > 0] = 0
        trainer.act_freq_scores += fired
        trainer.n_frac_active_samples += trainer.cfg.train_batch_size_samples
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.lr_scheduler.step()
        return StepResult(x, loss, squared_error, int(fired.sum()))

    def _choose(self, pre: np.ndarray) -> ActivePairs:
        """Choose the pairs of a batch: k of every token, or the int(k n) largest acts of all."""
        sae, take, n = self._sae, self._scratch.take, len(pre)
        bias, norm = sae.b_enc.numpy(), sae.W_dec.norm(dim=-1).numpy()
        if sae.cfg.architecture() == "topk":
            k = sae.cfg.k
            latents, values = take("latents", n, k, dtype=np.int32), take("values", n, k)
            _shared(n, lambda a, b: _choose_in_rows(pre, bias, norm, k, a, b, latents, values))
            return ActivePairs(np.arange(0, n * k + 1, k), latents.reshape(-1), values.reshape(-1))

        # batchtopk: take all acts above a guess, and lower it until there are enough of them
        wanted, least = int(sae.cfg.k * n), self._guess
        counts = take("counts", n, dtype=np.int64)

        def starts_above(bound: float) -> np.ndarray:
            _shared(n, lambda a, b: _count_above(pre, bias, norm, bound, a, b, counts))
            return np.concatenate([[0], np.cumsum(counts)])

        starts = starts_above(least)
        while starts[-1] < wanted and least > 0.0:
            least = 0.8 * least if least > 1e-6 else 0.0
            starts = starts_above(least)
        latents = take("latents", int(starts[-1]), dtype=np.int32)
        acts = take("acts", int(starts[-1]))
        _shared(n, lambda a, b: _take_above(pre, bias, norm, least, a, b, starts, latents, acts))
        many = len(acts) > wanted
        smallest = np.partition(acts, len(acts) - wanted)[len(acts) - wanted] if many else 0.0
        kept, smallest = _keep_largest(starts, latents, acts, smallest, wanted)
        if kept:
            self._guess = GUESS * smallest
            # sae-lens' running threshold: with it the trained SAE codes a token by itself
            sae.update_topk_threshold(torch.tensor([smallest], dtype=torch.float32))
        values = take("values", kept)
        _shared(n, lambda a, b: _values_of(pre, bias, starts, latents, a, b, values))
        return ActivePairs(starts, latents[:kept], values)

    def _dead_gradients(self, pre: np.ndarray, error: Tensor, dead: Tensor) -> "DeadGradients":
        """Return the gradients of sae-lens' `calculate_topk_aux_loss`."""
        sae = self._sae
        where = dead.nonzero().squeeze(-1)
        n, n_dead, k = len(pre), len(where), sae.cfg.d_in // 2  # sae-lens' choice of k
        scale = sae.cfg.aux_loss_coefficient * min(n_dead / k, 1.0)
        k = min(k, n_dead)
        values = torch.from_numpy(pre)[:, where] + sae.b_enc[where]
        w_dec = sae.W_dec[where]
        if k < n_dead:
            chosen = (values * w_dec.norm(dim=-1)).topk(k, sorted=False).indices
            mask = torch.zeros_like(values).scatter_(-1, chosen, 1.0)
            values = values * mask
        else:
            mask = None
        rest = values @ w_dec + error  # the residual is x - reconstruction
        loss = scale * rest.square().sum(-1).mean()
        rest *= 2.0 * scale / n
        slopes = rest @ w_dec.T
        if mask is not None:
            slopes *= mask
        return DeadGradients(where, loss, values.T @ rest, slopes)


@dataclass(frozen=True)
class DeadGradients:
    """Gradients of the loss that lets dead latents model the residual."""

    where: Tensor
    """Which latents are dead."""
    loss: Tensor
    d_dec: Tensor
    """[n_dead, d_in]."""
    slopes: Tensor
    """[n, n_dead], of the pre-activations."""

    def add(self, centred: Tensor, sae: Any) -> float:
        """Add them to those of the SAE and return the loss."""
        sae.W_dec.grad.index_add_(0, self.where, self.d_dec)
        sae.W_enc.grad.T.index_add_(0, self.where, self.slopes.T @ centred)
        sae.b_enc.grad.index_add_(0, self.where, self.slopes.sum(0))
        return float(self.loss)


def _shared(n: int, part: Callable[[int, int], None]) -> None:
    """Do `part(first, last)` over 0 to n, on as many threads as torch has."""
    threads = torch.get_num_threads()
    if threads == 1:
        part(0, n)
        return
    # four parts to a thread, so that one whose rows are light takes the next
    edges = np.linspace(0, n, 4 * threads + 1).astype(int).tolist()
    list(_pool(threads).map(part, edges[:-1], edges[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sparse-step")


F = TypeVar("F", bound=Callable[..., Any])


def _compiled(function: F) -> F:
    # sums over d_in may be reordered, for vector units; NaN and infinity keep their meaning, since
    # a broken loss is known by them
    compiler = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})  # pyright: ignore[reportUntypedFunctionDecorator]
    return cast(F, compiler(function))


@_compiled
@no_type_check
def _choose_in_rows(
    pre: np.ndarray,
    bias: np.ndarray,
    norm: np.ndarray,
    k: int,
    first: int,
    last: int,
    latents: np.ndarray,
    values: np.ndarray,
) -> None:
    """Find the k largest of (pre + bias) * norm in each row of `pre` [n, d_sae].

    Writes their latents and ReLU(pre + bias) to [n, k]; among equals the choice is arbitrary but
    always the same. The row is split into lanes: the k-th largest of the lanes' maxima is no more
    than the k-th largest of all, so only lanes that reach it are looked at.
    """
    d_sae = pre.shape[1]
    # so many lanes that k of them can hold the k largest, and that few have to be read in full
    lanes = 16
    while (lanes < 4 * k or lanes * lanes < k * d_sae) and lanes < d_sae:
        lanes *= 2
    deep = (d_sae + lanes - 1) // lanes
    row = np.full(deep * lanes, -np.inf, np.float32)
    top = np.empty(lanes, np.float32)
    acts, at = np.empty(deep * lanes, np.float32), np.empty(deep * lanes, np.int32)
    for i in range(first, last):
        for j in range(d_sae):
            row[j] = (pre[i, j] + bias[j]) * norm[j]
        for lane in range(lanes):  # numba takes seconds to compile a copy of one array to another
            top[lane] = row[lane]
        for r in range(1, deep):
            for lane in range(lanes):
                top[lane] = max(top[lane], row[r * lanes + lane])
        # 12 halvings: a bound that only says which lanes to read need not be exact
        least = _reached_by(top[: min(lanes, d_sae)], k, 12)
        n = 0
        for lane in range(lanes):
            if top[lane] >= least:
                for r in range(deep):
                    # written in any case and kept if it counts: faster than a branch
                    acts[n], at[n] = row[r * lanes + lane], r * lanes + lane
                    n += acts[n] >= least
        # 200 halvings end at neighbouring floats: the k-th largest itself
        kept = _keep(acts, at, n, _reached_by(acts[:n], k, 200), k, latents[i])
        latents[i, kept:], values[i, kept:] = 0, 0.0  # NaN is not larger than anything
        for p in range(kept):
            j = latents[i, p]
            values[i, p] = max(pre[i, j] + bias[j], np.float32(0.0))


@_compiled
@no_type_check
def _reached_by(values: np.ndarray, k: int, halvings: int) -> float:
    """Return a number that at least k values reach; with halvings enough, the largest such."""
    low, high = np.float32(np.inf), np.float32(-np.inf)
    for c in range(len(values)):
        low, high = min(low, values[c]), max(high, values[c])
    for _ in range(halvings):
        middle = np.float32(0.5) * (low + high)
        if not low < middle < high:
            break
        n = np.int32(0)
        for c in range(len(values)):
            n += np.int32(values[c] >= middle)
        if n < k:
            high = middle
        else:
            low = middle
            if n == k:
                break
    return low


@_compiled
@no_type_check
def _keep(
    acts: np.ndarray, at: np.ndarray, n: int, least: float, k: int, latents: np.ndarray
) -> int:
    """Write k places whose values reach `least`, those above it first; return how many."""
    kept = 0
    for c in range(n):
        if acts[c] > least and kept < k:
            latents[kept] = at[c]
            kept += 1
    for c in range(n):
        if acts[c] == least and kept < k:
            latents[kept] = at[c]
            kept += 1
    return kept


@_compiled
@no_type_check
def _count_above(
    pre: np.ndarray,
    bias: np.ndarray,
    norm: np.ndarray,
    least: float,
    first: int,
    last: int,
    counts: np.ndarray,
) -> None:
    """Count in each row the values of ReLU(pre + bias) * norm above `least` >= 0."""
    for i in range(first, last):
        n = 0
        for j in range(pre.shape[1]):
            n += (pre[i, j] + bias[j]) * norm[j] > least
        counts[i] = n


@_compiled
@no_type_check
def _take_above(
    pre: np.ndarray,
    bias: np.ndarray,
    norm: np.ndarray,
    least: float,
    first: int,
    last: int,
    starts: np.ndarray,
    latents: np.ndarray,
    acts: np.ndarray,
) -> None:
    """Write latents and acts of the values that `_count_above` counted, from `starts` on."""
    for i in range(first, last):
        n = starts[i]
        for j in range(pre.shape[1]):
            act = (pre[i, j] + bias[j]) * norm[j]
            if act > least:
                latents[n], acts[n] = j, act
                n += 1


@_compiled
@no_type_check
def _keep_largest(
    starts: np.ndarray, latents: np.ndarray, acts: np.ndarray, least: float, k: int
) -> tuple[int, float]:
    """Keep, in place, the k pairs of largest act, of which `least` is the smallest.

    Returns:
        The number kept and the smallest act kept.
    """
    above = 0
    for p in range(starts[-1]):
        above += acts[p] > least
    equal, kept, begin = k - above, 0, 0
    smallest = np.inf
    for i in range(len(starts) - 1):
        end = starts[i + 1]
        for p in range(begin, end):
            take = acts[p] > least
            if not take and acts[p] == least and equal > 0:
                take = True
                equal -= 1
            if take:
                latents[kept], acts[kept] = latents[p], acts[p]
                smallest = min(smallest, acts[p])
                kept += 1
        begin = end
        starts[i + 1] = kept
    return kept, smallest


@_compiled
@no_type_check
def _values_of(
    pre: np.ndarray,
    bias: np.ndarray,
    starts: np.ndarray,
    latents: np.ndarray,
    first: int,
    last: int,
    values: np.ndarray,
) -> None:
    """Write pre + bias of each pair."""
    for i in range(first, last):
        for p in range(starts[i], starts[i + 1]):
            values[p] = pre[i, latents[p]] + bias[latents[p]]


@_compiled
@no_type_check
def _decode(
    starts: np.ndarray,
    latents: np.ndarray,
    values: np.ndarray,
    w_dec: np.ndarray,
    b_dec: np.ndarray,
    x: np.ndarray,
    first: int,
    last: int,
    error: np.ndarray,
    squared: np.ndarray,
) -> None:
    """Write the error of the reconstruction, values @ w_dec + b_dec - x, and its squared norm."""
    d_in = x.shape[1]
    for i in range(first, last):
        row = error[i]
        for c in range(d_in):
            row[c] = b_dec[c]
        for p in range(starts[i], starts[i + 1]):
            value = values[p]
            if value > 0.0:
                direction = w_dec[latents[p]]
                for c in range(d_in):
                    row[c] += value * direction[c]
        total = np.float32(0.0)
        for c in range(d_in):
            row[c] -= x[i, c]
            total += row[c] * row[c]
        squared[i] = total


@_compiled
@no_type_check
def _by_latent(
    starts: np.ndarray,
    latents: np.ndarray,
    values: np.ndarray,
    bounds: np.ndarray,
    tokens: np.ndarray,
    sorted_values: np.ndarray,
) -> None:
    """Sort the pairs by latent, those of one latent by token; pairs without value are left out."""
    bounds[:] = 0
    for p in range(starts[-1]):
        bounds[latents[p] + 1] += values[p] > 0.0
    for j in range(1, len(bounds)):
        bounds[j] += bounds[j - 1]
    place = bounds[:-1].copy()
    for i in range(len(starts) - 1):
        for p in range(starts[i], starts[i + 1]):
            if values[p] > 0.0:
                j = latents[p]
                tokens[place[j]], sorted_values[place[j]] = i, values[p]
                place[j] += 1


@_compiled
@no_type_check
def _gradients(
    bounds: np.ndarray,
    tokens: np.ndarray,
    values: np.ndarray,
    w_dec: np.ndarray,
    grad: np.ndarray,
    x: np.ndarray,
    first: int,
    last: int,
    d_enc: np.ndarray,
    d_dec: np.ndarray,
    d_bias: np.ndarray,
) -> None:
    """Write the gradients of encoder rows, decoder rows and encoder biases of some latents.

    `grad` [n, d_in] is that of the reconstruction, `x` [n, d_in] the encoder's input.
    """
    d_in = grad.shape[1]
    for j in range(first, last):
        enc, dec, direction = d_enc[j], d_dec[j], w_dec[j]
        enc[:], dec[:] = 0.0, 0.0
        bias = np.float32(0.0)
        for p in range(bounds[j], bounds[j + 1]):
            g, row, value = grad[tokens[p]], x[tokens[p]], values[p]
            slope = np.float32(0.0)
            for c in range(d_in):
                slope += g[c] * direction[c]
            for c in range(d_in):
                dec[c] += value * g[c]
                enc[c] += slope * row[c]
            bias += slope
        d_bias[j] = bias
