"""Check that the relative links and anchors of Markdown files exist. Links with a scheme are not followed.

`tool.check_links` in pyproject.toml lists exempt paths.
"""

import re
from itertools import count
from pathlib import Path

from tools.check_language import main

FENCE = re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(FENCE.pattern + r"|(`+).+?\2", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|^\s*\[[^\]]+\]:\s*(\S+)|\b(?:href|src)=\"([^\"]+)", re.MULTILINE)


def anchors(markdown: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a text."""
    result: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", markdown)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        result.add(next(name for n in count() if (name := f"{slug}-{n}" if n else slug) not in result))
    return result


def broken_links(path: Path) -> list[tuple[int, str]]:
    """Return (line, message) for each broken link of a file."""
    prose = CODE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), path.read_text())
    result = []
    for match in LINK.finditer(prose):
        link = match[match.lastindex or 0]
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        valid = target.exists() and (not anchor or target.suffix != ".md" or anchor in anchors(target.read_text()))
        if not valid and not re.match(r"[a-z]+:", link):
            line = prose.count("\n", 0, match.end()) + 1
            result.append((line, f"link '{link}'; no such file or heading"))
    return result


if __name__ == "__main__":
    main(__doc__, "check_links", ("*.md",), broken_links)
