"""Draws scenes as images: glyphs of the DejaVu font (shipped with matplotlib) on backgrounds computed by numpy.

Backgrounds are computed for many images at once, and each glyph is rendered once per size and angle, so that
thousands of images take seconds on one core.
"""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scenes import KINDS, Scene


FONT_FILE = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
OUTLINE_GLYPHS = dict(zip(KINDS, "♔♕♖♗♘♙", strict=True))  # "white" in Unicode: lines only
SOLID_GLYPHS = dict(zip(KINDS, "♚♛♜♝♞♟", strict=True))  # "black" in Unicode: filled
LARGE = 120  # pixels; glyphs are rendered at this size, then rotated and scaled down
FILLED = 0.78  # height of a glyph, as a share of its square
ANGLE_STEP = 2.5  # degrees


def _glyph(character: str, box: int) -> Image.Image:
    """A glyph centred in a square of `box` pixels, `FILLED` times as high as the square."""
    font = ImageFont.truetype(FONT_FILE, box)
    left, top, right, bottom = font.getmask(character).getbbox()
    font = ImageFont.truetype(FONT_FILE, round(box * FILLED * box / (bottom - top)))
    image = Image.new("L", (box, box), 0)
    ImageDraw.Draw(image).text((box / 2, box / 2), character, font=font, fill=255, anchor="mm")
    left, top, right, bottom = image.getbbox()
    shift = (round((left + right - box) / 2), round((top + bottom - box) / 2))
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, shift[0], 0, 1, shift[1]))


def _filled(mask: Image.Image) -> Image.Image:
    """The silhouette of a glyph: all pixels that a flood fill from the corner does not reach."""
    outside = mask.point(lambda value: 255 if value > 96 else 0)
    ImageDraw.floodfill(outside, (0, 0), 128)
    return outside.point(lambda value: 0 if value == 128 else 255)


@cache
def _large_layers(piece: str) -> list[Image.Image]:
    """The three masks of a piece at full resolution: a halo around it, its body, and the ink on the body."""
    colour, kind = piece.split()
    solid, outline = _glyph(SOLID_GLYPHS[kind], LARGE), _glyph(OUTLINE_GLYPHS[kind], LARGE)
    body = _filled(solid)
    halo = body.filter(ImageFilter.MaxFilter(9))
    # A black piece is a dark body with light holes, a white piece a light body with dark lines.
    return [halo, body, solid if colour == "black" else outline]


@cache
def _sprite(piece: str, size: int, angle_index: int) -> np.ndarray:
    """A piece `size` pixels high, (3, side, side) in 0..1: halo, body and ink."""
    side = round(size / FILLED)
    layers = [
        layer.rotate(angle_index * ANGLE_STEP, Image.Resampling.BILINEAR).resize((side, side), Image.Resampling.BOX)
        for layer in _large_layers(piece)
    ]
    return np.stack([np.asarray(layer, dtype=np.float32) / 255.0 for layer in layers])


def _blend_up(grids: np.ndarray, size: int) -> np.ndarray:
    """Bilinear upscaling of `(n, g, g, 3)` to `(n, size, size, 3)` by two matrix products."""
    g = grids.shape[1]
    position = np.linspace(0, g - 1, size)
    low = np.minimum(position.astype(int), g - 2)
    matrix = np.zeros((size, g), dtype=np.float32)
    matrix[np.arange(size), low] = 1 - (position - low)
    matrix[np.arange(size), low + 1] = position - low
    return np.einsum("yg,nghc,xh->nyxc", matrix, grids, matrix, optimize=True)


def draw_backgrounds(rng: np.random.Generator, number: int, size: int) -> np.ndarray:
    """Gradients, chequered boards, wood and coloured clouds, `(number, size, size, 3)`, float32 in 0..255."""
    kinds = rng.integers(4, size=number)
    colours = rng.uniform(50, 215, (number, 2, 1, 1, 3)).astype(np.float32)
    y, x = np.meshgrid(np.arange(size, dtype=np.float32), np.arange(size, dtype=np.float32), indexing="ij")
    images = np.empty((number, size, size, 3), dtype=np.float32)

    chosen = np.flatnonzero(kinds == 0)  # gradients
    direction = rng.uniform(0, 2 * np.pi, (len(chosen), 1, 1)).astype(np.float32)
    slope = (np.cos(direction) * (x / size - 0.5) + np.sin(direction) * (y / size - 0.5))[..., None] + 0.5
    images[chosen] = colours[chosen, 0] * (0.75 + 0.25 * slope) + 0.25 * (colours[chosen, 1] - 128) * (1 - slope)

    chosen = np.flatnonzero(kinds == 1)  # boards
    cell = rng.uniform(14, 36, (len(chosen), 1, 1))
    start = rng.uniform(0, 72, (2, len(chosen), 1, 1))
    odd = ((np.floor((x + start[0]) / cell) + np.floor((y + start[1]) / cell)) % 2)[..., None].astype(np.float32)
    images[chosen] = colours[chosen, 0] * odd + colours[chosen, 1] * (1 - odd)

    chosen = np.flatnonzero(kinds == 2)  # wood
    tone = np.array([190, 130, 75], dtype=np.float32) * rng.uniform(0.7, 1.2, (len(chosen), 1, 1, 1))
    wave = rng.uniform(0.5, 1.1, (len(chosen), 1, 1)), rng.uniform(-0.25, 0.25, (len(chosen), 1, 1))
    phase = rng.uniform(0, 6.28, (2, len(chosen), 1, 1))
    grain = np.sin(wave[0] * y + wave[1] * x + phase[0] + 0.8 * np.sin(0.08 * x + phase[1]))
    images[chosen] = tone * (1 + 0.12 * grain[..., None])

    chosen = np.flatnonzero(kinds == 3)  # clouds
    images[chosen] = _blend_up(rng.uniform(60, 220, (len(chosen), 5, 5, 3)).astype(np.float32), size)

    images += rng.standard_normal(images.shape, dtype=np.float32) * rng.uniform(2, 9, (number, 1, 1, 1)).astype(
        np.float32
    )
    return images


def _paste(image: np.ndarray, sprite: np.ndarray, x: float, y: float, tones: list[np.ndarray]) -> None:
    """Blend the layers of a sprite into an image, in place; clipped at the border."""
    height, width = image.shape[:2]
    side = sprite.shape[1]
    top, left = round(y - side / 2), round(x - side / 2)
    rows = slice(max(top, 0), min(top + side, height))
    columns = slice(max(left, 0), min(left + side, width))
    masks = sprite[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, None]
    area = image[rows, columns]
    for mask, tone in zip(masks, tones, strict=True):
        area += mask * (tone - area)


def draw_images(rng: np.random.Generator, scenes: list[Scene], size: int) -> np.ndarray:
    """Draw scenes.

    Args:
        rng (`np.random.Generator`): Chooses backgrounds and shades.
        scenes (`list[Scene]`): The scenes.
        size (`int`): Side of an image, in pixels.

    Returns:
        `np.ndarray` of shape `(len(scenes), size, size, 3)`, uint8.
    """
    images = draw_backgrounds(rng, len(scenes), size)
    for image, scene in zip(images, scenes, strict=True):
        for placed in scene:
            dark, light = rng.uniform(10, 50) + rng.uniform(-6, 6, 3), rng.uniform(215, 250) + rng.uniform(-8, 4, 3)
            black = placed.piece.startswith("black")
            tones = [light, light, dark] if black else [dark, light, dark]
            sprite = _sprite(placed.piece, round(placed.size), round(placed.angle / ANGLE_STEP))
            _paste(image, sprite, placed.x, placed.y, tones)
    return images.clip(0, 255).astype(np.uint8)
