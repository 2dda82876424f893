"""Check text, comments, messages and names against the language rules of CONTRIBUTING.md.

`tool.check_language` in pyproject.toml lists phrases and exempt paths. `language: ignore` exempts a line.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
TEXT_FILES = ("*.py", "*.md", "*.sh", "*.yaml", "*.yml", "*.toml", "Makefile")
GAP = r"(?:[\s#>\"'_]|[fr]\")+"  # A phrase may continue on the next line of a comment, a quotation or a string.
PHRASES = {
    re.compile(rf"(?<![^\W_])(?:{phrase.replace(' ', GAP)})(?![^\W_])", re.IGNORECASE): replacement
    for phrase, replacement in CONFIG["check_language"]["phrases"].items()
}
PHRASES[re.compile(r'^\s*r?"""\s*(What|Whether|Where|How|That|Which)\b', re.MULTILINE)] = "a verb at the opening"
COMMENTS = {  # except in the second line of a comment
    re.compile(r"(?:\A|^(?!\s*#).*\n)(?:.*[ \t])?#+ *((?:of|by|nor|as|which)\b.*)", re.MULTILINE): "a noun phrase"
}


def files_to_check(named: list[Path], patterns: Sequence[str], exempt: list[str]) -> list[Path]:
    """List the named files, or the tracked and new files of the project, outside the exempt paths."""
    paths = [path.resolve() for path in named]
    if not paths:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
        git = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        paths = [ROOT / line for line in git.stdout.splitlines()]
    return sorted({p for p in paths if p.is_file() and not any(p.is_relative_to(ROOT / parent) for parent in exempt)})


def violations(path: Path) -> list[tuple[int, str]]:
    """Return (line, message) for each violation in a file."""
    text, result = path.read_text(), []
    for regex, replacement in (PHRASES if path.suffix == ".md" else PHRASES | COMMENTS).items():
        for match in regex.finditer(text):
            group = match.lastindex or 0
            number, phrase = text.count("\n", 0, match.start(group)), re.sub(r"[\s#_]+", " ", match[group])
            if "language: ignore" not in text.split("\n")[number]:
                result.append((number + 1, f"phrase '{phrase}'; use {replacement}"))
    return sorted(result)


def main(description: str, tool: str, patterns: Sequence[str], check: Callable[[Path], list[tuple[int, str]]]) -> None:
    """Print the violations in the named files, or in all files, and exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("files", nargs="*", type=Path, help="default: all files of the project")
    files = files_to_check(parser.parse_args().files, patterns, CONFIG[tool]["exclude"])
    report = [f"{os.path.relpath(path)}:{number}: {message}" for path in files for number, message in check(path)]
    sys.exit("\n".join(report) or 0)


if __name__ == "__main__":
    main(__doc__, "check_language", TEXT_FILES, violations)
