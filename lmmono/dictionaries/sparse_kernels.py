"""Compiled loops over the active (token, latent) pairs of a topk or batchtopk step.

Each loop does the rows or latents `first` to `last` and writes only to those, so threads can share
the work and the result does not depend on how. Sums inside a vector may be taken in another order
than written, the same on every call.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast, no_type_check

import numba
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])


def _compiled(function: F) -> F:
    made = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})  # pyright: ignore[reportUntypedFunctionDecorator]
    return cast(F, made(function))


@_compiled
@no_type_check
def choose_in_rows(
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
    lanes = 16
    while (lanes < 4 * k or lanes * lanes < k * d_sae) and lanes < d_sae:
        lanes *= 2
    deep = (d_sae + lanes - 1) // lanes
    row = np.full(deep * lanes, -np.inf, np.float32)
    top = np.empty(lanes, np.float32)
    found, at = np.empty(deep * lanes, np.float32), np.empty(deep * lanes, np.int32)
    for i in range(first, last):
        for j in range(d_sae):
            row[j] = (pre[i, j] + bias[j]) * norm[j]
        top[:] = row[:lanes]
        for r in range(1, deep):
            for lane in range(lanes):
                top[lane] = max(top[lane], row[r * lanes + lane])
        least = _reached_by(top[: min(lanes, d_sae)], k, 12)
        n = 0
        for lane in range(lanes):
            if top[lane] >= least:
                for r in range(deep):
                    # written in any case and kept if it counts: faster than a branch
                    found[n], at[n] = row[r * lanes + lane], r * lanes + lane
                    n += found[n] >= least
        kept = _keep(found, at, n, _reached_by(found[:n], k, 200), k, latents[i])
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
    found: np.ndarray, at: np.ndarray, n: int, least: float, k: int, latents: np.ndarray
) -> int:
    """Write k places whose values reach `least`, those above it first; return how many."""
    kept = 0
    for c in range(n):
        if found[c] > least and kept < k:
            latents[kept] = at[c]
            kept += 1
    for c in range(n):
        if found[c] == least and kept < k:
            latents[kept] = at[c]
            kept += 1
    return kept


@_compiled
@no_type_check
def count_above(
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
def take_above(
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
    """Write latents and acts of the values that `count_above` counted, from `starts` on."""
    for i in range(first, last):
        n = starts[i]
        for j in range(pre.shape[1]):
            act = (pre[i, j] + bias[j]) * norm[j]
            if act > least:
                latents[n], acts[n] = j, act
                n += 1


@_compiled
@no_type_check
def keep_largest(
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
def values_of(
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
def decode(
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
        row[:] = b_dec
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
def by_latent(
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
def gradients(
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
