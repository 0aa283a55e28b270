"""Random numbers by position: whatever is random is a function of a seed, of what it is for, and of where it is drawn.

No generator is carried along, so that any step can be done again, by any process, without those before it.
"""

import numpy as np

# What a key is for: the second number of every key whose first is a run's seed.
ORDER = 0  # of samples in an epoch
DRAWS = 1  # of a sample's augmentation
DROPOUT = 2  # of a step
WEIGHTS = 3  # of a model before its first step

BITS, STEP = (1 << 64) - 1, 0x9E3779B97F4A7C15


def mix(x):
    """splitmix64's bijection of the integers below 2⁶⁴: of a Python integer, or of every one in a uint64 array."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & BITS
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & BITS
    return x ^ (x >> 31)


def keyed(*numbers: int) -> int:
    """64 bits that depend on these integers alone, and differ where only the last of them differs."""
    key = 0
    for number in numbers:
        key = mix((key ^ (number & BITS)) + STEP & BITS)
    return key


def hashes(key: int, count: int) -> np.ndarray:
    """As many different uint64 numbers, in the order that the key gives them."""
    return mix(np.arange(1, count + 1, dtype=np.uint64) * STEP + key)
