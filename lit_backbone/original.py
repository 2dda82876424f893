"""Command line options of the original, mmdetection 2 and mmsegmentation 0: accept them or name the replacement."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .safe_reader import printable

# Options of each tool with the names of their values, and the replacement or the answer
OPTIONS: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_name("original_options.yaml").read_text())


class _OriginalOption(argparse.Action):
    """Option of the original. Its help is the replacement, which is added to the namespace, or the answer."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        answer, values = str(self.help), [values] if isinstance(values, str) else values
        if not answer.startswith(("--", "ignored")):
            parser.error(f"argument {option}: {answer}")
        if self.nargs != 0 and not values:
            parser.error(f"argument {option}: expected {self.metavar}")
        if answer.startswith("--"):
            answer = answer.format(shlex.join(values))
            namespace.replaced += shlex.split(answer)
        report(f"{option}: {answer}")


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None, tool: str) -> argparse.Namespace:
    """Parse a command line, in which options of the original are replaced or ignored, with one line for each.

    Replacements are put last, so they override other options, as in the original. Exit with the answer for options that
    have no replacement.
    """
    parser.allow_abbrev = False
    original = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    original.error = parser.error
    for key, answer in OPTIONS[tool].items():
        name, *metavar = key.split()
        nargs = "*" if key.endswith("...") else "?" if metavar else 0
        original.add_argument(name, action=_OriginalOption, nargs=nargs, metavar="".join(metavar), help=answer)
    namespace, args = original.parse_known_args(argv, argparse.Namespace(replaced=[]))
    return parser.parse_args(args + namespace.replaced)


def report(line: str) -> None:
    """Print a line on stderr, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(line), file=sys.stderr)
