"""What a file says, made fit for a terminal and a log."""


def printable(text: object, limit: int = 2000) -> str:
    """A text on one line, in which what a terminal would obey, or cannot show, is escaped; its middle may be left out.

    Args:
        text: of any origin.
        limit: of characters.
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in _bounded(str(text), limit))
    return _bounded(line, limit)


def _bounded(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
