"""Keyed randomness: every random number is a function of (seed, key), so no generator has a state to save.

A key is any sequence of ints and strings, by convention (purpose, sample id, step). Workers, ranks, batch sizes and
restarts cannot change what is drawn. The generator is Philox (Salmon et al., 2011), a counter-based one.
"""

import hashlib

import numpy as np


def rng(seed: int, *key: int | str) -> np.random.Generator:
    """A fresh generator that depends on (seed, *key) alone."""
    digest = hashlib.blake2b(repr((int(seed), *key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def normal(shape: tuple[int, ...], seed: int, *key: int | str) -> np.ndarray:
    """Standard normal float32 numbers of the given shape."""
    return rng(seed, *key).standard_normal(shape, dtype=np.float32)
