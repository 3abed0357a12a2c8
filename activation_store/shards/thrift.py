"""Thrift's compact protocol, as far as the footer and the page headers of a Parquet file need it.

Source: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SHORT = [bytes([n]) for n in range(128)]
_I32, _I64, _BINARY, _LIST, _STRUCT = 5, 6, 8, 9, 12


@dataclass(frozen=True, slots=True)
class Value:
    """An encoded value with its type in the protocol."""

    kind: int
    data: bytes


def varint(n: int) -> bytes:
    """Return n >= 0 in groups of seven bits, the lowest first.

    >>> varint(300).hex()
    'ac02'
    """
    if n < 128:
        return _SHORT[n]
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def zigzag(n: int) -> bytes:
    """Return an integer of either sign as a varint: 0, -1, 1, -2, ...

    >>> zigzag(-2).hex()
    '03'
    """
    return varint(2 * n if n >= 0 else -2 * n - 1)


def i32(n: int) -> Value:
    """Return a 32-bit integer."""
    return Value(_I32, zigzag(n))


def i64(n: int) -> Value:
    """Return a 64-bit integer."""
    return Value(_I64, zigzag(n))


def binary(data: bytes | str) -> Value:
    """Return bytes, or text as UTF-8."""
    data = data.encode() if isinstance(data, str) else data
    return Value(_BINARY, varint(len(data)) + data)


def array(items: Sequence[Value]) -> Value:
    """Return a list of values of one type; an empty one is of structures."""
    kind, n = items[0].kind if items else _STRUCT, len(items)
    head = bytes([n << 4 | kind]) if n < 15 else bytes([0xF0 | kind]) + varint(n)
    return Value(_LIST, head + b"".join(item.data for item in items))


def struct(fields: Mapping[int, Value]) -> Value:
    """Return a structure; `fields` by their number, ascending.

    >>> struct({1: i32(1), 3: struct({})}).data.hex()
    '15022c0000'
    """
    out, last = bytearray(), 0
    for number, value in fields.items():
        assert 0 < number - last < 16
        out += bytes([(number - last) << 4 | value.kind]) + value.data
        last = number
    return Value(_STRUCT, bytes(out) + b"\0")
