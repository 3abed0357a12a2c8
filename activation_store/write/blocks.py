"""From what a model gives to what the kernel takes: blocks of float32, and the tiles they hold."""

from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float32, Int32

from activation_store.errors import ContentError
from activation_store.write.kernel import Tiles
from activation_store.write.strips import TILE

Tensor: TypeAlias = Any
"""A numpy array or a torch tensor on any device; torch is never imported for its sake."""


def as_block(hook: str, tensor: Tensor, shape: tuple[int, int, int]) -> Float32[np.ndarray, "..."]:
    """Return activations [batch, n_ctx, d] as C-contiguous float32 in memory; copies if it must.

    Raises:
        ContentError: another shape, or not floating point.
    """
    if tuple(tensor.shape) != shape:
        raise ContentError(
            f"{hook}: activations of shape {list(tensor.shape)}, want [batch, n_ctx, d] = "
            f"{list(shape)}; check the hook's d and the writer's n_ctx."
        )
    if isinstance(tensor, np.ndarray):
        array = tensor
    else:
        moved = tensor.detach().cpu()
        array = (moved if moved.dtype.itemsize > 2 else moved.float()).numpy()
    if array.dtype.kind != "f":
        raise ContentError(f"{hook}: activations of type {array.dtype}, want floating point.")
    return np.ascontiguousarray(array, dtype=np.float32)


def as_tokens(name: str, values: Tensor, shape: tuple[int, ...]) -> Int32[np.ndarray, "..."]:
    """Return ids as int32.

    Raises:
        ContentError: another shape, not whole numbers, or a number beyond int32.
    """
    array = values if isinstance(values, np.ndarray) else np.asarray(_to_numpy(values))
    if array.shape != shape or array.dtype.kind not in "iu":
        raise ContentError(
            f"{name}: {array.dtype} of shape {list(array.shape)}, want whole numbers of shape "
            f"{list(shape)}."
        )
    if array.size and (array.max() > 2**31 - 1 or array.min() < -(2**31)):
        raise ContentError(f"{name}: {array.max()} does not fit in 32 bits.")
    return np.ascontiguousarray(array, dtype=np.int32)


def _to_numpy(values: Tensor) -> Tensor:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else values


def tiles_of(seq: Int32[np.ndarray, " batch"], doc: Int32[np.ndarray, "batch n_ctx"]) -> Tiles:
    """Return the tiles of a block; a negative doc_id marks padding, which is left out.

    Raises:
        ContentError: padding between tokens of one sequence.
    """
    n_ctx = doc.shape[1]
    first, stop = _bounds(seq, doc)
    begin = np.arange(0, n_ctx, TILE)
    low = np.maximum(begin[None, :], first[:, None])
    high = np.minimum(begin[None, :] + TILE, stop[:, None])
    row, _ = filled = np.nonzero(high > low)
    pos = low[filled]
    return Tiles(
        row * n_ctx + pos,
        high[filled] - pos,
        seq[row],
        pos,
        doc.reshape(-1),
        np.empty(0, np.float32),
    )


def _bounds(seq: np.ndarray, doc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first position of each sequence and the one after its last."""
    n, n_ctx = doc.shape
    real = doc >= 0
    if real.all():
        return np.zeros(n, np.int64), np.full(n, n_ctx, np.int64)
    count = real.sum(axis=1)
    first = np.where(count > 0, real.argmax(axis=1), 0)
    stop = np.where(count > 0, n_ctx - real[:, ::-1].argmax(axis=1), 0)
    if (stop - first != count).any():
        at = int(np.flatnonzero(stop - first != count)[0])
        raise ContentError(
            f"sequence {seq[at]}: padding (doc_id < 0) between tokens; want it at the ends only."
        )
    return first, stop
