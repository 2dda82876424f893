"""Text from files, made safe to print and log."""


def printable(text: object, limit: int = 2000) -> str:
    """The text on one line, control characters escaped; of more than `limit` characters, the middle is left out."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in _bounded(str(text), limit))
    return _bounded(line, limit)


def _bounded(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
