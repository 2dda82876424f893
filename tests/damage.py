"""What disks and networks do to files."""

import random


def damaged(whole: bytes, flips: int) -> list[bytes]:
    """Versions of a file: cut at every kilobyte, and with single bits flipped anywhere."""
    versions = [whole[:size] for size in range(0, len(whole), 1024)]
    for bit in random.Random(0).sample(range(8 * len(whole)), flips):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        versions.append(bytes(flipped))
    return versions
