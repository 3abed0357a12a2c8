"""Rows taken from any places of memory, copied or widened on the way, and memory to put them in."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float32, Int64, UInt16
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from activation_store.compiled import compiled
from activation_store.hooks import Dtype


def gather(address: Int64[np.ndarray, " n"], dtype: np.dtype[Any], out: np.ndarray) -> None:
    """Put the row of type `dtype` that begins at address[i] to out[i] of out [n, d].

    float16 may become float32, exactly; numpy widens at a fifth of the speed. Nothing checks the
    addresses: a wrong one ends the process.
    """
    if dtype == np.float16 and out.dtype == np.float32:
        _widen(address, out)
    else:
        assert dtype == out.dtype
        _copy(address, out.view(np.uint16))


@intrinsic
@no_type_check
def _as_float(_context: Any, bits: Any) -> Any:
    """Return the number whose bits these are."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(bits), generate


@intrinsic
@no_type_check
def _halves(_context: Any, address: Any) -> Any:
    """Return a pointer to the 16-bit words at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint16)(address), generate


@intrinsic
@no_type_check
def _prefetch(_context: Any, address: Any) -> Any:
    """Have the processor fetch what lies at an address."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], cgutils.voidptr_t)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, *[cgutils.int32_t] * 3])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        # for reading, into every cache, of data
        builder.call(call, [place, *(cgutils.int32_t(number) for number in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(address), generate


# unsigned 32-bit throughout, so that eight numbers are worked on at a time: 64-bit ones halve it
_MAGNITUDE, _SIGN = np.uint32(0x7FFF), np.uint32(0x8000)
_ODD_HALF, _ODD = np.uint32(0x7C00), np.uint32(0x7F800000)
_TO_MANTISSA, _TO_SIGN = np.uint32(13), np.uint32(16)
_SCALE = np.float32(2.0**112)  # 127 - 15: the difference of the exponents' biases
_AHEAD = 2  # rows prefetched: without, the processor waits for memory at every row
_LINE = 64  # bytes in a line of the cache


@compiled
@no_type_check
def _fetch(address: Int64[np.ndarray, " n"], i: int, n_bytes: int) -> None:
    """Prefetch a row, if there is one."""
    if i < len(address):
        for k in range(0, n_bytes, _LINE):
            _prefetch(address[i] + k)


@compiled
@no_type_check
def _copy(address: Int64[np.ndarray, " n"], out: UInt16[np.ndarray, "n d"]) -> None:
    for i in range(len(address)):
        _fetch(address, i + _AHEAD, 2 * out.shape[1])
        row, values = carray(_halves(address[i]), out.shape[1]), out[i]
        for j in range(out.shape[1]):
            values[j] = row[j]


@compiled
@no_type_check
def _widen(address: Int64[np.ndarray, " n"], out: Float32[np.ndarray, "n d"]) -> None:
    for i in range(len(address)):
        _fetch(address, i + _AHEAD, 2 * out.shape[1])
        row, values = carray(_halves(address[i]), out.shape[1]), out[i]
        for j in range(out.shape[1]):
            half = np.uint32(row[j])
            size = np.uint32(half & _MAGNITUDE)
            # infinite and NaN keep the largest exponent; the scale below leaves it as it is
            odd = _ODD if size >= _ODD_HALF else np.uint32(0)
            wide = np.uint32((half & _SIGN) << _TO_SIGN) | np.uint32(size << _TO_MANTISSA) | odd
            # a product instead of an addition to the exponent: it makes subnormals right too
            values[j] = _as_float(np.uint32(wide)) * _SCALE


class _Buffer(NamedTuple):
    memory: np.ndarray
    """The bytes themselves; nothing outside refers to this array."""
    view: weakref.ref[np.ndarray]
    """The array over them that all parts handed out refer to; dead when no part is left."""


class Buffers:
    """Arrays [up to n_rows, width], one for each of some widths and types, used again once free.

    Fresh memory has to be cleared by the operating system before it is written, and what was used
    a moment ago is still in the processor's cache. An array is free when nobody holds a part of it.
    """

    def __init__(
        self, n_rows: int, kinds: Sequence[tuple[int, Dtype | np.dtype[Any]]], kept: int
    ) -> None:
        """Remember the sizes; memory is taken when it is asked for.

        Args:
            n_rows: rows at most.
            kinds: width and type of each array.
            kept: arrays of each kind that are kept to be used again.
        """
        self._n_rows, self._kept = n_rows, kept
        self._kinds = [(width, np.dtype(dtype)) for width, dtype in kinds]
        self._buffers: list[list[_Buffer]] = [[] for _ in kinds]

    def take(self, n: int) -> list[np.ndarray]:
        """Return an array [n, width] of each kind; what is in it is not defined."""
        return [self._take(i, n) for i in range(len(self._kinds))]

    def _take(self, i: int, n: int) -> np.ndarray:
        width, dtype = self._kinds[i]
        free = [buffer.memory for buffer in self._buffers[i] if buffer.view() is None]
        memory = free[-1] if free else np.empty(self._n_rows * width * dtype.itemsize, np.uint8)
        # over a memoryview, so that parts refer to this array and not to the memory itself
        view = np.frombuffer(memory.data, dtype)
        others = [buffer for buffer in self._buffers[i] if buffer.memory is not memory]
        self._buffers[i] = [*others, _Buffer(memory, weakref.ref(view))][-self._kept :]
        return view[: n * width].reshape(n, width)
