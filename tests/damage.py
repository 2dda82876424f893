"""Damaged copies of files, as disks and networks produce them."""

import random
import re


def damaged(whole: bytes, flips: int) -> list[bytes]:
    """Return damaged copies of a file.

    Copies are truncated at every kilobyte, have one of `flips` random bits flipped, or have a bit flipped that marks a
    member of a zip archive as a folder.
    """
    versions = [whole[:size] for size in range(0, len(whole), 1024)]
    attributes = [8 * (entry.start() + 38) + 4 for entry in re.finditer(b"PK\x01\x02", whole)]  # not covered by a CRC
    for bit in random.Random(0).sample(range(8 * len(whole)), flips) + attributes:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        versions.append(bytes(flipped))
    return versions
