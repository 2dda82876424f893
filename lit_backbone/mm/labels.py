"""Class names that can be drawn: fonts that have their characters, and names that Matplotlib does not parse."""

from collections.abc import Sequence

import matplotlib
from matplotlib.font_manager import FontEntry, fontManager
from matplotlib.ft2font import FT2Font
from mmengine.logging import print_log

from ..safe_reader import printable

DEFAULT_FONT = "DejaVu Sans"  # comes with Matplotlib


def drawable_labels(classes: Sequence[str]) -> tuple[list[str], FontEntry]:
    """Return class names and a font for them. Without one, name the classes that are not ASCII by their index."""
    names = [printable(name, 100) for name in classes]
    fonts = [font for font in fontManager.ttflist if "LastResort" not in font.name]  # has placeholders only
    fonts.sort(key=lambda font: (font.name != DEFAULT_FONT, font.style != "normal", font.weight != 400))
    characters = {ord(character) for character in "".join(names) if not character.isspace()}
    for font in fonts:
        if characters <= FT2Font(font.fname).get_charmap().keys():
            return names, font
    print_log("No font has all characters of the class names. Drawing indices. Install one, such as Noto.", level=30)
    return ascii_labels(names), fonts[0]


def ascii_labels(names: Sequence[str]) -> list[str]:
    """Replace names that are not ASCII by the index of the class."""
    return [name if name.isascii() else f"class {i}" for i, name in enumerate(names)]


def matplotlib_labels(classes: Sequence[str]) -> list[str]:
    """Return class names for Matplotlib, which parses text between dollar signs, and set its font."""
    names, font = drawable_labels(classes)
    if font.name != DEFAULT_FONT:
        matplotlib.rcParams["font.sans-serif"] = [font.name, *matplotlib.rcParams["font.sans-serif"]]
    return [name.replace("$", r"\$") for name in names]
