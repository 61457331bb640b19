"""Drawings of letters and symbols, made when they are read: written shapes of many kinds, and no digits."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge

from randlora.bounds import Bounded, Count
from randlora.data.sources import Source, Table
from randlora.errors import SettingsError
from randlora.rng import integer

if TYPE_CHECKING:
    from PIL import Image, ImageFont

CANVAS = 96  # pixels of the square that a glyph is drawn in, before it is warped
SIDE = 64  # pixels of the finest image
LETTERS = (  # first and last code point of runs of Unicode's letters that matplotlib's DejaVu fonts hold
    ("A", "Z"),
    ("a", "z"),
    ("α", "ω"),
    ("Α", "Ω"),
    ("А", "я"),
    ("Ա", "Ֆ"),
    ("ա", "ֆ"),
    ("ა", "ჰ"),
    ("א", "ת"),
    ("ⴰ", "ⵥ"),
    ("ɐ", "ʯ"),
)
SYMBOLS = "!#$%&*+/<=>?@[]^{}~§¶€£¥←↑→↓↔↗↘∀∂∃∅∇∈∏∑√∞∠∧∨∩∪∫≈≠≡≤≥⊂⊕⊗⌂■▲▼◆●★☀☁☎☯☺☾♀♂♠♣♥♦♪✂✉✓✗"
LIKE_DIGITS = "OolIΟοОЗзЭэεɜɝɞʒƷɛОօՕՁჳვⵔⵏⵙԱՅჯ"  # drawn like 0, 1, 3 or another digit: left out
STROKES = ("futural", "futuram", "rowmans", "scripts", "scriptc", "cursive", "timesi")  # of Hershey-Fonts


@dataclass(frozen=True)
class Glyphs(Bounded, Source):
    """Letters of seven scripts and symbols, each a class, in matplotlib's fonts and in Hershey's strokes.

    An image is a glyph in a random font, stroke width, warp, size, contrast and noise, of 8 to 64 pixels; image i of a
    split is the same everywhere that the fonts are. Digits are not drawn, nor letters that are written like one, such
    as O, l and З.

    Args:
        train: how many training images; they take turns through the classes.
        test: how many test images.
    """

    section: ClassVar[str] = "task.source"

    train: Annotated[int, Ge(1)] = 50_000
    test: Count = 2000

    def check(self) -> None:
        """Raises SettingsError where matplotlib or Hershey-Fonts, whose files are drawn from, is not installed."""
        for package in ("matplotlib", "HersheyFonts"):
            if find_spec(package) is None:
                raise SettingsError(f"task.source Glyphs draws fonts of {package}: pip install '.[glyphs]' in a clone")

    def class_names(self) -> list[str]:
        return [unicodedata.name(glyph).lower() for glyph in _glyphs()]

    def open(self, split: str) -> Table:
        self.check()
        return GlyphImages(split, {"train": self.train, "test": self.test}[split])


def _glyphs() -> list[str]:
    """The characters, one a class."""
    runs = [chr(code) for first, last in LETTERS for code in range(ord(first), ord(last) + 1)]
    letters = [letter for letter in runs if letter.isalpha() and not _drawn_before(letter)]
    return [glyph for glyph in dict.fromkeys([*letters, *SYMBOLS]) if glyph not in LIKE_DIGITS]


def _drawn_before(letter: str) -> bool:
    """Whether a Greek or Cyrillic letter has the shape of a Latin one."""
    return letter in "ΑΒΕΖΗΙΚΜΝΡΤΥΧνοςАВЕКМНРСТХаеорсух"


class GlyphImages:
    """Images (RGB) of the glyphs and their classes as a Table.

    Args:
        split: seeds the drawings.
        count: how many.
    """

    def __init__(self, split: str, count: int):
        self.split, self.count, self.glyphs = split, count, _glyphs()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        rng = np.random.Generator(np.random.Philox(integer("glyphs", self.split, int(index))))
        label = int(index) % len(self.glyphs)
        return {"image": self._image(self.glyphs[label], rng), "label": label}

    def column(self, name: str) -> np.ndarray:
        return {"label": np.arange(self.count) % len(self.glyphs)}[name]

    def __getstate__(self) -> dict[str, Any]:
        """Without the open fonts, which do not travel to workers."""
        return {name: value for name, value in vars(self).items() if name != "fonts"}

    @cached_property
    def fonts(self) -> Mapping[str, Sequence[ImageFont.FreeTypeFont | list[np.ndarray]]]:
        """What can draw each glyph: font files and, for Latin letters, lists of strokes."""
        fonts: dict[str, list[Any]] = {glyph: [] for glyph in self.glyphs}
        for font, known in _font_files():
            for glyph in self.glyphs:
                if ord(glyph) in known:
                    fonts[glyph].append(font)
        for glyph, strokes in _strokes():
            if glyph in fonts:
                fonts[glyph].append(strokes)
        return fonts

    def _image(self, glyph: str, rng: np.random.Generator) -> Image.Image:
        from PIL import Image, ImageFilter

        choices = self.fonts[glyph]
        font = choices[int(rng.integers(len(choices)))]
        drawn = _stroked(font, rng) if isinstance(font, list) else _printed(glyph, font, rng)
        warped = drawn.transform((SIDE, SIDE), Image.Transform.MESH, _warp(rng), Image.Resampling.BILINEAR)
        if rng.random() < 0.3:
            warped = warped.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2)))
        if rng.random() < 0.6:
            side = int(rng.integers(8, 33))
            warped = warped.resize((side, side), Image.Resampling.BOX)
        return _coloured(np.asarray(warped, dtype=np.float32) / 255, rng)


def _font_files() -> Iterator[tuple[ImageFont.FreeTypeFont, set[int]]]:
    """matplotlib's fonts, and the code points of each."""
    import matplotlib
    from matplotlib.ft2font import FT2Font
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for path in sorted([*folder.glob("DejaVu*.ttf"), *folder.glob("STIXGeneral*.ttf")]):
        yield ImageFont.truetype(str(path), SIDE), set(FT2Font(str(path)).get_charmap())


def _strokes() -> Iterator[tuple[str, list[np.ndarray]]]:
    """Latin letters as strokes, arrays (N, 2) of points from 0 to 1."""
    from HersheyFonts import HersheyFonts

    for name in STROKES:
        letters = HersheyFonts()
        letters.load_default_font(name)
        for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz":
            strokes = [np.array(list(stroke), dtype=float) for stroke in letters.strokes_for_text(letter)]
            points = np.concatenate(strokes)
            low, extent = points.min(0), max(np.ptp(points, axis=0).max(), 1e-6)
            middle = (extent - np.ptp(points, axis=0)) / 2
            yield letter, [(stroke - low + middle) / extent for stroke in strokes]


def _printed(glyph: str, font: ImageFont.FreeTypeFont, rng: np.random.Generator) -> Image.Image:
    """A glyph in the middle of the canvas, white on black, as the font has it or bolder."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (CANVAS, CANVAS))
    bold = int(rng.integers(0, 4))
    left, top, right, bottom = font.getbbox(glyph, stroke_width=bold)
    place = (CANVAS - right - left) / 2, (CANVAS - bottom - top) / 2
    ImageDraw.Draw(image).text(place, glyph, fill=255, font=font, stroke_width=bold)
    return image


def _stroked(strokes: Sequence[np.ndarray], rng: np.random.Generator) -> Image.Image:
    """Strokes in the middle of the canvas, as a pen of random width and an unsteady hand draws them."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (CANVAS, CANVAS))
    draw, width = ImageDraw.Draw(image), int(rng.integers(2, 13))
    shake, margin = rng.uniform(0, 2), 20
    for stroke in strokes:
        points = margin + stroke * (CANVAS - 2 * margin) + rng.normal(0, shake, stroke.shape)
        draw.line([(x, y) for x, y in points.tolist()], fill=255, width=width, joint="curve")
        for x, y in (points[0], points[-1]):
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    return image


def _warp(rng: np.random.Generator, cells: int = 3) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """A turn, shear, stretch and shift of the canvas and a smooth warp, as a mesh for PIL."""
    turn, shear = rng.normal(0, 0.2), rng.normal(0, 0.2)
    wide, high = np.exp(rng.normal(0, 0.2, 2)) * rng.uniform(0.55, 1.2)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ [[wide, shear], [0, high]]
    steps = np.linspace(-0.5, 0.5, cells + 1)
    grid = np.stack(np.meshgrid(steps, steps), -1) @ matrix.T  # (cells + 1, cells + 1, 2), x and y
    grid = (grid + rng.normal(0, 0.05, 2) + rng.normal(0, rng.uniform(0, 0.05), grid.shape) + 0.5) * CANVAS
    edges = np.linspace(0, SIDE, cells + 1).round().astype(int)
    mesh = []
    for i in range(cells):
        for j in range(cells):
            box = tuple(int(edge) for edge in (edges[j], edges[i], edges[j + 1], edges[i + 1]))
            corners = grid[i, j], grid[i + 1, j], grid[i + 1, j + 1], grid[i, j + 1]
            mesh.append((box, tuple(float(v) for corner in corners for v in corner)))
    return mesh


def _coloured(ink: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Ink from 0 to 1 (N, N) as an image: white on black or the reverse, or two colours, with noise now and then."""
    from PIL import Image

    if rng.random() < 0.6:
        back, front = np.zeros(3), np.full(3, rng.uniform(0.6, 1))
        if rng.random() < 0.3:
            back, front = 1 - back, 1 - front
    else:
        back, front = rng.random(3), rng.random(3)
        if np.abs(back - front).max() < 0.4:
            front = (back + 0.5) % 1
    values = back + ink[..., None] * (front - back)
    if rng.random() < 0.4:
        values = values + rng.normal(0, rng.uniform(0, 0.15), ink.shape)[..., None]
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))
