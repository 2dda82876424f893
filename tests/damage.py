"""Damage to files as disks and networks cause it."""

import random
import re


def damaged(whole: bytes, flips: int) -> list[bytes]:
    """Versions of a file: cut at every kilobyte, with single bits flipped anywhere, with a zip's members as folders."""
    versions = [whole[:size] for size in range(0, len(whole), 1024)]
    attributes = [8 * (entry.start() + 38) + 4 for entry in re.finditer(b"PK\x01\x02", whole)]  # no CRC covers these
    for bit in random.Random(0).sample(range(8 * len(whole)), flips) + attributes:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        versions.append(bytes(flipped))
    return versions
