"""Rows picked out of an array in any order and widened on the way, in one pass."""

from typing import no_type_check

import numpy as np
from jaxtyping import Int64

from activation_store.compiled import compiled

_SCALE = np.float32(2.0**112)


def gather(x: np.ndarray, rows: Int64[np.ndarray, " n"], out: np.ndarray) -> None:
    """Put x[rows] into `out` [n, d]; float16 may become float32, exactly.

    numpy widens at 0.5 GB/s of float16; this picks and widens at three times that.
    """
    if x.dtype == np.float16 and out.dtype == np.float32:
        _widen(x.view(np.uint16), rows, out.view(np.uint32), out)
    else:
        assert x.dtype == out.dtype
        np.take(x, rows, axis=0, out=out, mode="clip")


# unsigned 32-bit throughout, so that eight numbers are worked on at a time: 64-bit ones halve it
_MAGNITUDE, _SIGN = np.uint32(0x7FFF), np.uint32(0x8000)
_ODD_HALF, _ODD = np.uint32(0x7C00), np.uint32(0x7F800000)
_TO_MANTISSA, _TO_SIGN = np.uint32(13), np.uint32(16)


@no_type_check
@compiled
def _widen(x, rows, bits, out):
    for i in range(len(rows)):
        row, wide, values = x[rows[i]], bits[i], out[i]
        for j in range(len(row)):
            half = np.uint32(row[j])
            size = half & _MAGNITUDE
            # infinite and NaN keep the largest exponent; the scale below leaves it as it is
            odd = _ODD if size >= _ODD_HALF else np.uint32(0)
            wide[j] = ((half & _SIGN) << _TO_SIGN) | (size << _TO_MANTISSA) | odd
        for j in range(len(row)):
            # the exponent's bias is 127 instead of 15; a product also makes subnormals right
            values[j] *= _SCALE
