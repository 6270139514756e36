"""A probe's heat maps as pixels, for loggers: drawn in milliseconds, as training waits for each of them.

The figures of a report are `probe.report.figures`'; drawing one of those takes several tenths of a second.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from probe import vocabulary as words
from probe.report.view import COLORS, NO_STRENGTH, NOT_APPLICABLE, HeatMap, Scale, heat_maps, view_cells

CELL_WIDTH, CELL_HEIGHT, MARGIN, GAP, HEAD, FOOT = 52, 20, 106, 14, 42, 46
GREY, BLACK, WHITE = (222, 222, 222), (0, 0, 0), (255, 255, 255)
FOOTNOTE = (
    "red: harm; white: none; full colour at 100 %; one scale for all steps",
    "grey: n/a not applicable, — no strength (margin not clear of zero); dot: aliased",
)


def heat_image(effects: pd.DataFrame) -> np.ndarray | None:
    """Routing mass beside strength of every family, at each region and, where they were probed, each layer.

    Exact effects where there are any, else estimates.

    Args:
        effects: the table of one (run, step).

    Returns:
        (height, width, 3) uint8, or None where nothing was probed that could be drawn.
    """
    maps, scale = heat_maps(view_cells(effects)), Scale()
    if not maps:
        return None
    lines = sum(len(each.places) for each in maps)
    width = MARGIN + 2 * len(words.FAMILIES) * CELL_WIDTH + GAP
    image = Image.new("RGB", (width, HEAD + lines * CELL_HEIGHT + (len(maps) - 1) * GAP + FOOT), WHITE)
    draw = ImageDraw.Draw(image)
    estimate = "estimated, " if maps[0].integrated else ""
    titles = {"mass": "routing mass", "value": f"strength ({estimate}% of margin)"}
    for panel, (value, title) in enumerate(titles.items()):
        left, top = MARGIN + panel * (len(words.FAMILIES) * CELL_WIDTH + GAP), HEAD
        draw.text((left, 10), title, BLACK, _font(), "lm")
        for column, family in enumerate(words.FAMILIES):
            draw.text((left + (column + 0.5) * CELL_WIDTH, 31), words.FAMILY_SHORT[family], BLACK, _font(), "mm")
        for each in maps:
            if panel == 0:
                for line, place in enumerate(each.titles):
                    draw.text((4, top + (line + 0.5) * CELL_HEIGHT), place, BLACK, _font(), "lm")
            _draw_cells(draw, left, top, each, value, scale)
            top += len(each.places) * CELL_HEIGHT + GAP
    for line, text in enumerate(FOOTNOTE):
        draw.text((4, image.height - 32 + 18 * line), text, BLACK, _font(), "lm")
    return np.asarray(image)


def _draw_cells(draw: ImageDraw.ImageDraw, left: int, top: int, heat_map: HeatMap, value: str, scale: Scale) -> None:
    numbers, statuses, aliased = (heat_map.table(name) for name in (value, "status", "aliased"))
    numbers = numbers.astype(float)
    shares = numbers if value == "mass" else (1 + scale.position(numbers)) / 2
    colors = mpl.colormaps[COLORS[value]](shares.astype(float), bytes=True)[..., :3]
    for line, column in np.ndindex(*numbers.shape):
        x, y, number = left + column * CELL_WIDTH, top + line * CELL_HEIGHT, float(numbers[line, column])
        is_absent = statuses[line, column] == NOT_APPLICABLE or np.isnan(number)
        red, green, blue = GREY if is_absent else map(int, colors[line, column])
        draw.rectangle((x, y, x + CELL_WIDTH - 2, y + CELL_HEIGHT - 2), (red, green, blue))
        ink = WHITE if 0.299 * red + 0.587 * green + 0.114 * blue < 128 else BLACK
        text = f"{number:.2f}" if value == "mass" else scale.text(number)
        if is_absent:
            text = "—" if str(statuses[line, column]).startswith(NO_STRENGTH) else "n/a"
        draw.text((x + CELL_WIDTH / 2, y + CELL_HEIGHT / 2), text, ink, _font(), "mm")
        if aliased[line, column]:
            draw.ellipse((x + 2, y + 2, x + 5, y + 5), ink)


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 11)
