"""Computes random numbers as a function of a seed, a purpose and a position.

There is no generator with a state, so any process can repeat any step without the steps before it.
"""

import numpy as np

# Purposes of keys: the second number of every key; the first is the run's seed.
ORDER = 0  # order of samples in an epoch
AUGMENTATION = 1  # augmentation of a sample
DROPOUT = 2  # dropout in a step
WEIGHTS = 3  # initial weights of a model

ROUNDS = 8  # of the Feistel network; four would do for a cipher of large blocks, but these may have a few bits
BITS, STEP = (1 << 64) - 1, 0x9E3779B97F4A7C15


def mix(x):
    """Applies splitmix64's bijection of the integers below 2⁶⁴ to an integer or to every element of a uint64 array."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & BITS
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & BITS
    return x ^ (x >> 31)


def keyed(*numbers: int) -> int:
    """Hashes integers to 64 bits; two keys that differ only in the last integer are different."""
    key = 0
    for number in numbers:
        key = mix((key ^ (number & BITS)) + STEP & BITS)
    return key


def hashes(key: int, count: int) -> np.ndarray:
    """Returns `count` different uint64 numbers, in an order that depends on the key."""
    return mix(np.arange(1, count + 1, dtype=np.uint64) * STEP + key)


def shuffled(key: int, index: int, n: int) -> int:
    """Returns the place of an index in a permutation of n indices that depends on the key, without storing it.

    A Feistel network permutes the integers of as many bits as n − 1 has; what falls on n or above is permuted again,
    twice at most on average. So the image of 0 … n − 1 is 0 … n − 1.
    """
    bits = (n - 1).bit_length()
    low = bits // 2
    mask, high_mask = (1 << low) - 1, (1 << bits - low) - 1
    while True:
        high, index = index >> low, index & mask
        for number in range(0, ROUNDS, 2):
            high ^= keyed(key, number, index) & high_mask
            index ^= keyed(key, number + 1, high) & mask
        index |= high << low
        if index < n:
            return index
