"""Options that commands of several tasks share."""

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """The type of an option that counts."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return int(text)


def add_offset_arguments(parser: argparse.ArgumentParser) -> None:
    """How `visualize_offset.py` draws; the options are the keywords of :func:`lit_backbone.offsets.write_offsets`."""
    parser.add_argument("--grid", action="store_true", help="one sheet of all tokens instead of a picture for each")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to explore the points with, instead")
    help = "draw at most N rows and N columns of tokens, evenly spaced (all)"
    parser.add_argument("--at-most", type=positive, metavar="N", help=help)
