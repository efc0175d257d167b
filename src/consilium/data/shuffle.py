"""Permutations that depend on their key alone: not on a generator's version, nor on what was drawn before."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def permutation(count: int, *key: int | str) -> NDArray[np.int64]:
    """Return a permutation of ``range(count)`` by sorting SplitMix64 hashes of the index under the key."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    start = np.frombuffer(digest[:8], dtype="<u8")
    # The finaliser of Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
    state = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(state ^ (state >> np.uint64(31)), kind="stable")
