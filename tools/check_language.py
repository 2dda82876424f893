"""Check Markdown, comments, docstrings, messages and names against the language rules of CONTRIBUTING.md.

`tool.check_language` in pyproject.toml lists phrases and exempt paths. `language: ignore` exempts a line.
"""

import argparse
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
TEXT_FILES = ("*.py", "*.md", "*.sh", "*.yaml", "*.yml", "*.toml", "Makefile")
GAP = r"(?:\n\|[fr]*|[\s#>\"'_])+"  # A phrase may continue on the next line of a comment, a quotation or a string.
PHRASES = {
    re.compile(rf"(?<![^\W_])(?:{phrase.replace(' ', GAP)})(?![^\W_])", re.IGNORECASE): replacement
    for phrase, replacement in CONFIG["check_language"]["phrases"].items()
}
PHRASES[re.compile(r'^\|r?"""[\s|]*(What|Whether|Where|How|That|Which)\b', re.MULTILINE)] = "a verb at the opening"


def files_to_check(named: list[Path], patterns: tuple[str, ...], exempt: list[str]) -> list[Path]:
    """List the named files, or the tracked and new files of the project, outside the exempt paths."""
    paths = [path.resolve() for path in named]
    if not paths:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
        git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        paths = [ROOT / line for line in git.stdout.splitlines()]
        if git.returncode:  # no repository, as in the Docker image
            paths = [path for pattern in patterns for path in [*ROOT.glob(pattern), *ROOT.glob(f"[!.]*/**/{pattern}")]]
    return sorted({p for p in paths if p.is_file() and not any(p.is_relative_to(ROOT / parent) for parent in exempt)})


def python_prose(source: str) -> tuple[str, dict[int, tuple[int, str]]]:
    """Return names, comments and strings with spaces, a bar before each, and the comments as {line: (column, text)}."""
    lines, comments = [""] * (source.count("\n") + 2), {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind, text, number = tokenize.tok_name[token.type], token.string, token.start[0]
        if kind == "COMMENT":
            comments[number] = (token.start[1], text)
        elif kind != "NAME" and (kind not in ("STRING", "FSTRING_MIDDLE") or " " not in text):
            continue
        for offset, line in enumerate(text.split("\n"), start=number - 1):
            lines[offset] += f"|{line}"
    return "\n".join(lines), comments


def violations(path: Path) -> list[tuple[int, str]]:
    """Return (line, message) for each violation in a file."""
    prose = source = path.read_text()
    lines, result = source.split("\n"), []
    matches = ((n, re.search(r"(?:^|\s)(#.*)", line)) for n, line in enumerate(lines, start=1))
    comments = {n: (match.start(1), match[1]) for n, match in matches if match and path.suffix != ".md"}
    if path.suffix == ".py":
        prose, comments = python_prose(source)
    for number, (column, text) in comments.items():
        match = re.match(r"#+\s*(of|by|nor|as|which)\b", text)
        if match and comments.get(number - 1, (None, ""))[0] != column:  # not the second line of a comment
            result.append((number, f"phrase '{match[1]} ...' opens a comment; use a sentence or a noun phrase"))
    for regex, replacement in PHRASES.items():
        for match in regex.finditer(prose):
            phrase = re.sub(r"[\s#|_]+", " ", match[match.lastindex or 0])
            result.append((prose.count("\n", 0, match.start()) + 1, f"phrase '{phrase}'; use {replacement}"))
    return sorted(item for item in result if "language: ignore" not in lines[item[0] - 1])


def main() -> None:
    """Print the violations in the named files, or in all text files, and exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("files", nargs="*", type=Path, help="default: all text files of the project")
    report = [
        f"{os.path.relpath(path)}:{number}: {message}"
        for path in files_to_check(parser.parse_args().files, TEXT_FILES, CONFIG["check_language"]["exclude"])
        for number, message in violations(path)
    ]
    sys.exit("\n".join(report) or 0)


if __name__ == "__main__":
    main()
