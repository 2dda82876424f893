"""Command line options of the original, mmdetection 2 and mmsegmentation 0: accept them or name the replacement."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from .safe_reader import printable

# Options of each tool with the names of their values, and the replacement or the answer
OPTIONS: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_name("original_options.yaml").read_text())


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None, tool: str) -> argparse.Namespace:
    """Parse a command line, in which options of the original are replaced or ignored, with one line for each.

    Replacements are put last, so they override other options, as in the original. Exit with the answer for options that
    have no replacement.
    """
    parser.allow_abbrev = False
    table = {key.split()[0]: (key.split()[1:], answer) for key, answer in OPTIONS[tool].items()}
    tokens, args, replaced = list(sys.argv[1:] if argv is None else argv), [], []
    while tokens:
        token = tokens.pop(0)
        name, equals, value = token.partition("=")
        if name not in table:
            args.append(token)
            continue
        metavars, answer = table[name]
        values = [value] if equals else []
        while metavars and not equals and tokens and not tokens[0].startswith("--"):
            values.append(tokens.pop(0))
            if not metavars[0].endswith("..."):
                break
        if not answer.startswith(("--", "ignored")):
            parser.error(f"argument {name}: {answer}")
        if metavars and not values:
            parser.error(f"argument {name}: expected {metavars[0]}")
        if not answer.startswith("ignored"):
            words: list[str] = []
            for word in answer.split():
                words += values if word == "{}" else [word.replace("{}", "".join(values))]
            replaced += words
            answer = " ".join(words)
        report(f"{name}: {answer}")
    return parser.parse_args([*args, *replaced])


def report(line: str) -> None:
    """Print a line on stderr, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(line), file=sys.stderr)
