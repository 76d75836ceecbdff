"""Weights made from their names by integer arithmetic, as the fixtures' were: nothing has to be stored."""

import math
import zlib

import numpy as np


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 in [-1, 1): the upper 24 bits of a 32-bit mix of the position and the name's checksum."""
    bits = np.arange(math.prod(shape), dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits ^= bits >> np.uint32(shift)
        bits *= np.uint32(factor)
    return (2 * ((bits >> np.uint32(8)) / 2**24) - 1).reshape(shape)


def weight(name: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """float32: "matrix" has variance 1 / fan-in, "norm" is 1 +- 0.2, "vector" +- 0.1, "embedding" +- 0.3."""
    values = uniform(name, tuple(shape))
    scale = {"matrix": math.sqrt(3 / math.prod(shape[1:])), "norm": 0.2, "vector": 0.1, "embedding": 0.3}[kind]
    return (scale * values + (kind == "norm")).astype(np.float32)
