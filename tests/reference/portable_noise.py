"""Random bits, noise and fingerprints that are the same on every machine and NumPy.

NumPy does not promise that its generators keep their streams between versions, and golden figures must outlive one.
Everything here is integer arithmetic on splitmix64 (Steele, Lea, Flood 2014), or one exact scaling of it.
"""
import hashlib

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)
N_SKETCH = 16


def random_bits(key, n):
    """n uint64 of 64 random bits each, a pure function of the text `key` and the place."""
    start = np.frombuffer(hashlib.sha256(key.encode()).digest()[:8], "<u8")  # [1]; arrays wrap without a warning
    z = start + np.arange(1, n + 1, dtype=np.uint64) * _STEP
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def noise(key, shape):
    """Bell-shaped noise of mean 0 and variance 1, float64: the scaled sum of the four 16-bit fields of each word."""
    z = random_bits(key, int(np.prod(shape)))
    total = sum(((z >> np.uint64(s)) & np.uint64(0xFFFF)).astype(np.int64) for s in (0, 16, 32, 48))
    # A uniform 16-bit field has mean 65535/2 and variance (2^32 - 1)/12; four of them add up.
    return ((total - 2 * 65535) / np.sqrt((2.0**32 - 1) / 3)).reshape(shape)


def integers(key, n, low, high):
    """n integers in [low, high)."""
    return [low + int(b) % (high - low) for b in random_bits(key, n)]


def sketch(x):
    """Fingerprint [N_SKETCH] of a tensor: its sums under N_SKETCH fixed random sign patterns, float64.

    For a difference d of two tensors, mean(sketch(d)^2) estimates |d|^2 without bias and with relative standard
    deviation sqrt(2 / N_SKETCH), and sketches subtract; so two fingerprints bound the relative L2 distance of the
    tensors, and one wrong row among many moves every sum.
    """
    flat = np.asarray(x, np.float64).reshape(-1)
    bits = random_bits("sketch", len(flat))
    return np.array([np.where((bits >> np.uint64(i)) & np.uint64(1), flat, -flat).sum() for i in range(N_SKETCH)])


def sketch_distance(a, b, norm):
    """Estimated |x_a - x_b| / norm from two fingerprints."""
    return float(np.sqrt(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)) / norm)
