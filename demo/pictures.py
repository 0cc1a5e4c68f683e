"""Rendered digits and short words, and the exact patches that a Gemma 4 vision tower reads.

Text size is measured in pixels *after* the resize to the image budget: that decides whether it can be read. A picture
whose text is 10 pixels high at 70 soft tokens has it 20 pixels high at 280, so small text needs the larger budget.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo.tasks import Item, held_out

PATCH = 16  # pixels
POOL = 3  # patches per side of a soft token
SIDE = PATCH * POOL
GROUND, INK = 64, 192  # grey levels; the room outside them keeps what the bicubic resize overshoots

_WORD_QUESTIONS = ("Which word is in the picture?", "Read the word.", "What does it say?", "Read the picture.")
QUESTIONS = {
    "digits": ("Which digits are in the picture?", "Read the digits.", "What number is this?", "Read the picture."),
    "word": _WORD_QUESTIONS,
    "letters": _WORD_QUESTIONS,
}
SHORT_WORDS = """
fish bird tree moon star boat road door milk salt hill lake wind snow rain gold king ship wolf bear frog crab duck goat
apple bread chair clock cloud dream earth field flame glass grape green horse house knife lemon light mouse music night
ocean onion paper piano plant queen river sheep smile snake spoon stone storm sugar table tiger train voice water wheel
cat dog sun sea cup hat pen key map box bag car bus ant bee cow pig fox owl egg ice oil tea jam nut pie leg arm eye ear
""".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CONSONANTS = "".join(sorted({*LETTERS} - {*"aeiou"}))

_FONTS = """
DejaVuSans-Bold DejaVuSans DejaVuSansCondensed DejaVuSansMono DejaVuSerif
LiberationMono-Regular LiberationSans-Bold LiberationSans-Regular LiberationSerif-Regular
""".split()


@cache
def font_files() -> tuple[Path, ...]:
    """The fonts to draw with, from demo/.work/fonts or the system; Pillow's own is used beside them, without a file."""
    folders = (Path(__file__).parent / ".work" / "fonts", *Path("/usr/share/fonts/truetype").glob("*"))
    found = ([folder / f"{name}.ttf" for folder in folders if (folder / f"{name}.ttf").exists()] for name in _FONTS)
    return tuple(files[0] for files in found if files)


@cache
def _font(index: int, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    files = font_files()
    # the last choice is Pillow's built-in font, which needs no file
    return ImageFont.truetype(files[index], size) if index < len(files) else ImageFont.load_default(size)


def draw_text(rng: random.Random, kind: str) -> str:
    """Two to five digits (one now and then), a short word, or letters that may or may not be pronounced.

    Letters teach reading where a list of words would only be recognised.
    """
    if kind == "digits":
        return "".join(rng.choice("0123456789") for _ in range(rng.choice((1, 2, 2, 3, 3, 4, 4, 5))))
    if kind == "word":
        return rng.choice(SHORT_WORDS)
    length = rng.randint(2, 6)
    if rng.random() < 0.4:
        return "".join(rng.choice(LETTERS) for _ in range(length))
    turn = rng.randint(0, 1)  # vowels and consonants by turns, a pair of them now and then
    text = ""
    while len(text) < length:
        text += "".join(rng.choice(("aeiou", _CONSONANTS)[turn]) for _ in range(rng.choice((1, 1, 2))))
        turn = 1 - turn
    return text[:length]


@dataclass(frozen=True)
class Drawing:
    """A rendered text before it has colours: grey levels of which GROUND is the background and INK the text."""

    levels: Image.Image
    ground: tuple[int, int, int]
    ink: tuple[int, int, int]

    def colored(self) -> Image.Image:
        """The picture in RGB."""
        return Image.fromarray(colors(np.asarray(self.levels), self.ground, self.ink))


def colors(levels: np.ndarray, ground: Sequence[int], ink: Sequence[int]) -> np.ndarray:
    """Grey levels [...] -> RGB [..., 3]: background and text colour, and what lies between and beyond them."""
    share = (np.arange(256)[:, None] - GROUND) / (INK - GROUND)
    table = np.asarray(ground) + share * (np.asarray(ink) - np.asarray(ground))
    return np.clip(np.round(table), 0, 255).astype(np.uint8)[levels]


def picture(rng: random.Random, text: str, *, budget: int, text_pixels: tuple[float, float]) -> Drawing:
    """Draw ``text`` somewhere on a canvas of random shape and colours.

    Args:
        budget: soft tokens at which ``text_pixels`` holds.
        text_pixels: smallest and largest font size after the resize to that budget, drawn log-uniformly.
    """
    aspect = math.exp(rng.uniform(math.log(0.4), math.log(3.5)))
    # what the resize multiplies lengths by is root / sqrt(width * height)
    root = SIDE * math.sqrt(budget)
    side = root * rng.uniform(0.6, 1.25)
    width, height = round(side * math.sqrt(aspect)), round(side / math.sqrt(aspect))
    wanted = math.exp(rng.uniform(*map(math.log, text_pixels)))
    size = max(6, round(wanted * side / root))
    font_index = rng.randint(0, len(font_files()))
    font = _font(font_index, size)
    left, top, right, bottom = font.getbbox(text)
    if right - left > 0.94 * width or bottom - top > 0.94 * height:
        font = _font(font_index, max(6, int(size * min(0.94 * width / (right - left), 0.94 * height / (bottom - top)))))
        left, top, right, bottom = font.getbbox(text)
    ground = tuple(rng.randint(0, 255) for _ in range(3))
    ink = tuple(rng.randint(0, 255) for _ in range(3))
    while abs(_luminance(ground) - _luminance(ink)) < 90:
        ink = tuple(rng.randint(0, 255) for _ in range(3))
    levels = Image.new("L", (width, height), GROUND)
    pen = ImageDraw.Draw(levels)
    for _ in range(rng.choice((0, 0, 0, 1, 2))):  # faint rectangles behind the text
        x, y = rng.randint(0, width), rng.randint(0, height)
        corner = (x + rng.randint(5, width), y + rng.randint(5, height))
        pen.rectangle((x, y, *corner), fill=GROUND + rng.randint(-16, 16))
    x = rng.randint(0, max(0, int(width - (right - left)))) - left
    y = rng.randint(0, max(0, int(height - (bottom - top)))) - top
    pen.text((x, y), text, font=font, fill=INK)
    return Drawing(levels, ground, ink)


def _luminance(color: Sequence[int]) -> float:
    return 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2]


def resized(width: int, height: int, budget: int) -> tuple[int, int]:
    """Width and height after the aspect-preserving resize: multiples of 48 with at most ``budget`` soft tokens."""
    factor = math.sqrt(budget * SIDE * SIDE / (width * height))
    w, h = int(factor * width / SIDE) * SIDE, int(factor * height / SIDE) * SIDE
    if w == 0 and h == 0:
        raise ValueError(f"an image of {width}x{height} has no size at a budget of {budget}")
    if h == 0:
        return min(width // height, budget) * SIDE, SIDE
    if w == 0:
        return SIDE, min(height // width, budget) * SIDE
    return w, h


def patches(image: Image.Image, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches [P, 256 * channels] uint8 (row, column, channel) and their (x, y) positions [P, 2], without padding.

    An RGB image gives what the model reads. The grey levels of a ``Drawing`` give the same up to rounding once they are
    coloured, at a third of the work: that is what training does.
    """
    w, h = resized(*image.size, budget)
    pixels = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))
    columns, rows = w // PATCH, h // PATCH
    flat = pixels.reshape(rows, PATCH, columns, -1).swapaxes(1, 2).reshape(rows * columns, -1)
    x, y = np.meshgrid(np.arange(columns), np.arange(rows))
    return flat, np.stack([x.ravel(), y.ravel()], axis=-1)


def make_picture(
    rng: random.Random,
    *,
    budget: int,
    text_pixels: tuple[float, float],
    kind: str | None = None,
    test: bool = False,
    known: bool = False,
) -> tuple[Item, Drawing]:
    """A question about a rendered text, and its picture.

    Args:
        test: draw for the test sets: a held-out text, no thinking.
        known: a test picture of a text that training has seen in other pictures.
    """
    kind = kind or rng.choices(("digits", "word", "letters"), (0.5, 0.1, 0.4))[0]
    text = draw_text(rng, kind)
    while held_out("picture", text) != (test and not known):
        text = draw_text(rng, kind)
    thinking = not test and rng.random() < 0.1
    content = [{"type": "image"}, {"type": "text", "text": rng.choice(QUESTIONS[kind])}]
    item = Item(
        task=f"picture_{kind}",
        key=text,
        messages=[{"role": "user", "content": content}],
        enable_thinking=thinking,
        thought="I read the picture." if thinking else None,
        text=text,
    )
    return item, picture(rng, text, budget=budget, text_pixels=text_pixels)
