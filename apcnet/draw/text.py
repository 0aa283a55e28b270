"""Writes names into pictures: finds a font that has their letters, or shows the number of their class.

Pillow's built-in font has little more than ASCII. For other names the fonts of the system are searched; only if none
has all letters of a name, it loses its accents, or becomes its class's number.
"""

import functools
import math
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from apcnet.draw.colors import Color
from apcnet.files import replacing

Font = ImageFont.FreeTypeFont
NAMES = "legend.txt"
FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    *("/Library/Fonts", "/System/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts"),
)
# Plain fonts with letters of many scripts come first, then others without serifs.
FIRST = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc")
PLAIN = str.maketrans(dict(zip("ßæœøØłŁđı–", ("ss", "ae", "oe", "o", "O", "l", "L", "d", "i", "-"), strict=True)))


class Written(NamedTuple):
    """Holds a text and a font that has its letters."""

    text: str
    font: Font

    @property
    def width(self) -> int:
        """Returns the width in pixels."""
        return math.ceil(self.font.getlength(self.text))


def written(name: str, index: int, size: int, width: float = math.inf) -> Written:
    """Returns how to write a class's name, at most `width` pixels wide: as it is, without accents, or as its number."""
    for text in (name, _without_accents(name)):
        for font in (built_in(size), system_font(text, size)):
            if font is not None and has_letters(font, text):
                return Written(_shortened(text, font, width), font)
    return Written(str(index), built_in(size))


def numbered(names: Sequence[str]) -> list[int]:
    """Returns the classes that pictures show as numbers, because no font has the letters of their names."""
    return [i for i, name in enumerate(names) if written(name, i, 14).text == str(i) != name]


def save_names(folder: Path, names: Sequence[str]) -> None:
    """Writes legend.txt, the numbers and names of all classes, if pictures in a folder show some as numbers."""
    if numbered(names):
        with replacing(folder / NAMES) as temporary:
            lines = (f"{i} {name}\n" for i, name in enumerate(names))
            temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def upright(page: Image.Image, middle: int, foot: int, name: Written, ink: Color) -> None:
    """Writes from bottom to top: the text starts at the y of `foot` and is centred at the x of `middle`."""
    length, height = name.width, 2 * math.ceil(name.font.size)
    letters = Image.new("L", (length, height))
    ImageDraw.Draw(letters).text((0, height // 2), name.text, 255, name.font, anchor="lm")
    letters = letters.transpose(Image.Transpose.ROTATE_90)
    page.paste(ink, (middle - height // 2, foot - length), letters)


def text_size(width: int) -> int:
    """Returns the size of letters for a picture of this width."""
    return max(14, width // 70)


@functools.lru_cache
def built_in(size: int) -> Font:
    """Returns Pillow's own font."""
    font = ImageFont.load_default(size)
    assert isinstance(font, Font)  # Pillow has FreeType
    return font


@functools.lru_cache(maxsize=1024)
def system_font(text: str, size: int) -> Font | None:
    """Returns the first font of the system that has every letter, or None."""
    for path in _font_files(FOLDERS):
        try:
            font = ImageFont.truetype(path, size)
        except OSError:  # damaged, or of a kind that FreeType does not read
            continue
        if has_letters(font, text):
            return font
    return None


def has_letters(font: Font, text: str) -> bool:
    """Tells whether a font has every letter of a text; for others it draws the box of a missing one."""
    box = bytes(font.getmask("\uffff"))
    return bool(text) and all(letter.isprintable() and bytes(font.getmask(letter)) != box for letter in text)


@functools.lru_cache
def _font_files(folders: tuple[str, ...]) -> list[str]:
    """Lists the files of fonts in some folders, the best ones for labels first."""
    found = [
        os.path.join(folder, name)
        for root in folders
        for folder, _, names in os.walk(os.path.expanduser(root))
        for name in names
        if name.lower().endswith((".ttf", ".ttc", ".otf"))
    ]

    def place(path: str) -> tuple[int, bool, str]:
        name = os.path.basename(path)
        styled = any(style in name for style in ("Bold", "Italic", "Oblique", "Mono", "Serif", "Light", "Condensed"))
        return FIRST.index(name) if name in FIRST else len(FIRST), styled, name

    return sorted(found, key=place)


def _without_accents(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name).translate(PLAIN)
    return "".join(letter for letter in plain if not unicodedata.combining(letter))


def _shortened(text: str, font: Font, width: float) -> str:
    """Cuts off a text at a width in pixels."""
    if font.getlength(text) <= width:
        return text
    dots = "…" if has_letters(font, "…") else "..."
    while text and font.getlength(f"{text}{dots}") > width:
        text = text[:-1]
    return f"{text.rstrip()}{dots}"
