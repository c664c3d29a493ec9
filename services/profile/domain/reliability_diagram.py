"""Reliability diagrams as PNG: what was predicted across, what came true upwards (M. DeGroot & S. Fienberg, 1983).

Drawn by hand: a serving image carries no plotting library. Shapes: H rows from the top, W columns, 3 colours.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.profile.domain.classification_quality import ReliabilityBin

SIDE, MARGIN = 480, 56
BLUE, ORANGE, GREY, BLACK = (31, 119, 180), (255, 127, 14), (190, 190, 190), (40, 40, 40)
_MOST_RADIUS, _LEAST_RADIUS = 11.0, 3.0
_GLYPHS = {
    "0": "111101101101111", "1": "010110010010111", "2": "111001111100111", "3": "111001111001111",
    "4": "101101111001001", "5": "111100111001111", "6": "111100111101111", "7": "111001010010010",
    "8": "111101111101111", "9": "111101111001111", ".": "000000000000010",
}  # fmt: skip
_GLYPH_SCALE = 3

Pixels = npt.NDArray[np.uint8]


def reliability_diagram(series: Sequence[tuple[Sequence[ReliabilityBin], tuple[int, int, int]]]) -> bytes:
    """Returns a PNG: for each series its bins as dots, their area by the count of examples, joined by a line.

    The grey diagonal is where what is predicted comes true.
    """
    pixels = np.full((SIDE, SIDE, 3), 255, np.uint8)
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        row, column = _at(tick, tick)
        _line(pixels, _at(0.0, tick), _at(1.0, tick), (235, 235, 235))
        _line(pixels, _at(tick, 0.0), _at(tick, 1.0), (235, 235, 235))
        label = f"{tick:.1f}"
        _text(pixels, label, row - 7, MARGIN - 42)
        _text(pixels, label, SIDE - MARGIN + 12, column - 16)
    _line(pixels, _at(0.0, 0.0), _at(1.0, 0.0), BLACK)
    _line(pixels, _at(0.0, 0.0), _at(0.0, 1.0), BLACK)
    _line(pixels, _at(0.0, 0.0), _at(1.0, 1.0), GREY)
    most = max((one.count for bins, _ in series for one in bins), default=1)
    for bins, colour in series:
        places = [_at(one.mean_predicted, one.observed_share) for one in bins]
        for begin, end in itertools.pairwise(places):
            _line(pixels, begin, end, colour)
        for one, place in zip(bins, places, strict=True):
            _dot(pixels, place, max(_LEAST_RADIUS, _MOST_RADIUS * (one.count / max(most, 1)) ** 0.5), colour)
    return png(pixels)


def png(pixels_HW3: Pixels) -> bytes:
    """Returns a picture in the PNG format (ISO/IEC 15948), 8 bits a colour."""
    height, width, _ = pixels_HW3.shape
    # Each row begins with the kind of its filter: none.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels_HW3.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _at(predicted: float, observed: float) -> tuple[int, int]:
    """Returns the row and column of a point of the unit square."""
    length = SIDE - 2 * MARGIN
    return round(SIDE - MARGIN - observed * length), round(MARGIN + predicted * length)


def _line(pixels: Pixels, begin: tuple[int, int], end: tuple[int, int], colour: tuple[int, int, int]) -> None:
    steps = max(abs(end[0] - begin[0]), abs(end[1] - begin[1]), 1)
    rows = np.linspace(begin[0], end[0], steps + 1).round().astype(int)
    columns = np.linspace(begin[1], end[1], steps + 1).round().astype(int)
    pixels[rows, columns] = colour


def _dot(pixels: Pixels, centre: tuple[int, int], radius: float, colour: tuple[int, int, int]) -> None:
    rows, columns = np.ogrid[:SIDE, :SIDE]
    pixels[(rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2] = colour


def _text(pixels: Pixels, text: str, row: int, column: int) -> None:
    for place, letter in enumerate(text):
        glyph = np.array([bit == "1" for bit in _GLYPHS[letter]]).reshape(5, 3)
        large = glyph.repeat(_GLYPH_SCALE, axis=0).repeat(_GLYPH_SCALE, axis=1)
        left = column + place * 4 * _GLYPH_SCALE
        pixels[row : row + large.shape[0], left : left + large.shape[1]][large] = BLACK
