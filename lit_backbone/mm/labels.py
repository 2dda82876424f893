"""Class names that can be drawn: fonts that have their characters, and names that Matplotlib does not parse."""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.font_manager import FontEntry, fontManager
from matplotlib.ft2font import FT2Font
from mmengine.logging import print_log

from ..safe_reader import preview, printable

DEFAULT_FONT = "DejaVu Sans"  # comes with Matplotlib


class Labels(NamedTuple):
    """Names to draw, and a font that has their characters."""

    names: list[str]
    font: FontEntry


def drawable_labels(classes: Sequence[str]) -> Labels:
    """Choose a font for class names. Without one, name the classes that are not ASCII by their index."""
    names = [printable(name, 100) for name in classes]
    if font := _find_font("".join(names)):
        return Labels(names, font)
    missing = preview([name for name in names if not name.isascii()])
    print_log(f"No font has the characters of {missing}. Drawing class indices. Install fonts, such as Noto.", level=30)
    font = _find_font("A")
    assert font, "Matplotlib has no font"
    return Labels(ascii_labels(names), font)


def ascii_labels(names: Sequence[str]) -> list[str]:
    """Replace names that are not ASCII by the index of the class."""
    return [name if name.isascii() else f"class {i}" for i, name in enumerate(names)]


def matplotlib_labels(classes: Sequence[str]) -> list[str]:
    """Return class names for Matplotlib, which parses text between dollar signs, and set its font."""
    names, font = drawable_labels(classes)
    if font.name != DEFAULT_FONT:
        matplotlib.rcParams["font.sans-serif"] = [font.name, *matplotlib.rcParams["font.sans-serif"]]
    return [name.replace("$", r"\$") for name in names]


def _find_font(text: str) -> FontEntry | None:
    """Find an installed font with all characters of a text, the default one if possible."""
    characters = {ord(character) for character in text if not character.isspace()}
    fonts = [font for font in fontManager.ttflist if "LastResort" not in font.name]  # has placeholders only
    for font in sorted(fonts, key=lambda font: (font.name != DEFAULT_FONT, font.style != "normal", font.weight != 400)):
        if characters <= FT2Font(font.fname).get_charmap().keys():
            return font
    return None
