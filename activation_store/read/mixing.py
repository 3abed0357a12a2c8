"""The order of a shuffled epoch: blocks of tokens permuted, and mixed pool by pool.

    tokens   | block 0 | block 1 | block 2 | ...         neighbours lie in one block
    epoch    | block 7 | block 2 | ... || block 0 | ...  blocks in random order, cut into pools
    pool     every token of its blocks in random order

The order depends on the seed, the epoch and the sizes alone, and any place of it is found without
going through those before. It comes from a hash, not from a library's generator, so it stays the
same with every version of every library.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64


class Pool(NamedTuple):
    """Tokens that are mixed with each other."""

    tokens: Int64[np.ndarray, " n"]
    """Places of the tokens in stored order, block by block in the order they are read."""
    order: Int64[np.ndarray, " n"]
    """Which of them comes first, second, ..."""


@dataclass(frozen=True, slots=True)
class Mixing:
    """How `n_tokens` tokens are shuffled."""

    n_tokens: int
    block_tokens: int
    """Tokens that are read together."""
    pool_tokens: int
    """Tokens that are mixed together, up to a block more or less."""
    seed: int
    shuffle: bool

    def epoch(self, number: int) -> "Epoch":
        """Return the order of one epoch."""
        n_blocks = -(-self.n_tokens // self.block_tokens)
        blocks = np.arange(n_blocks)
        if self.shuffle:
            blocks = np.argsort(_hashes(n_blocks, self.seed, number, 0))
        n_pools = min(n_blocks, -(-self.n_tokens // self.pool_tokens))
        cuts = np.arange(n_pools + 1) * n_blocks // n_pools
        sizes = np.minimum((blocks + 1) * self.block_tokens, self.n_tokens)
        sizes -= blocks * self.block_tokens
        starts = np.concatenate([[0], np.cumsum(sizes)])[cuts]
        return Epoch(self, number, blocks, cuts, starts)


class Epoch(NamedTuple):
    """The order of one epoch."""

    mixing: Mixing
    number: int
    blocks: Int64[np.ndarray, " blocks"]
    cuts: Int64[np.ndarray, " pools+1"]
    """First block of each pool."""
    starts: Int64[np.ndarray, " pools+1"]
    """Tokens before each pool."""

    @property
    def n_pools(self) -> int:
        """Pools of the epoch."""
        return len(self.cuts) - 1

    def pool(self, number: int) -> Pool:
        """Return the tokens of a pool and their order."""
        spans = self.spans(number)
        tokens = np.concatenate([np.arange(start, stop) for start, stop in spans.tolist()])
        return Pool(tokens, self.order(number))

    def spans(self, number: int) -> Int64[np.ndarray, "spans 2"]:
        """Return the tokens of a pool in the order they are read: first and after the last."""
        size = self.mixing.block_tokens
        # the order within a pool does not depend on the order of its blocks, so read ahead in files
        blocks = np.sort(self.blocks[self.cuts[number] : self.cuts[number + 1]])
        first = blocks[np.diff(blocks, prepend=-2) != 1]
        last = blocks[np.diff(blocks, append=-2) != 1]
        return np.stack([first * size, np.minimum((last + 1) * size, self.mixing.n_tokens)], axis=1)

    def order(self, number: int) -> Int64[np.ndarray, " n"]:
        """Return which token of a pool comes first, second, ...; counted as `spans` lists them."""
        n = int(self.starts[number + 1] - self.starts[number])
        if not self.mixing.shuffle:
            return np.arange(n)
        return np.argsort(_hashes(n, self.mixing.seed, self.number, number + 1))


def _hashes(n: int, seed: int, epoch: int, purpose: int) -> UInt64[np.ndarray, " n"]:
    """Return n different random numbers: splitmix64, a bijection, over a salted counter."""
    salt = np.zeros(1, np.uint64)
    for part in (seed, epoch, purpose):
        salt = _mixed(salt + np.uint64(part % 2**64) + np.uint64(0x9E3779B97F4A7C15))
    return _mixed(salt + np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mixed(z: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
