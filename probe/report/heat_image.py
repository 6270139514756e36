"""A probe's heat maps as pixels, for loggers: drawn in milliseconds, as training waits for each of them.

The figures of a report are `probe.report.figures`'; drawing one of those takes several tenths of a second.
"""

from __future__ import annotations

from functools import cache, partial
from itertools import product
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from probe import vocabulary as words
from probe.report.grid import find_grid

CELL_WIDTH, CELL_HEIGHT, MARGIN, HEAD, FOOT = 46, 20, 48, 34, 34
GREY, BLACK, WHITE = (238, 238, 238), (0, 0, 0), (255, 255, 255)


def heat_image(effects: pd.DataFrame, num_pairs: int) -> np.ndarray | None:
    """Layer (where layers were probed, else region) x family: mass beside effect on NLL, for each sublayer.

    Exact effects where there are any, else those to first order. The colours of effects span at least what matters
    (5 % of ln K). Grey: not applicable; a dot: all reads are aliased.

    Args:
        effects: the table of one (run, step).
        num_pairs: K.

    Returns:
        (height, width, 3) uint8, or None where nothing was probed that could be drawn.
    """
    grid = find_grid(effects, words.ABLATED_SUBLAYERS)
    if grid is None:
        return None
    limit, lines = grid.limit(num_pairs), len(grid.scopes)
    sublayers = words.present(grid.rows["sublayer"], words.ABLATED_SUBLAYERS)
    effect = "1st-order effect (nats)" if grid.first_order else "effect (nats)"
    maps = {"mass": ("mass", "cividis", 0.0, 1.0), "effect": (effect, "RdBu_r", -limit, limit)}
    step = len(words.FAMILIES) * CELL_WIDTH + 12
    width, height = MARGIN + 2 * len(sublayers) * step, HEAD + lines * CELL_HEIGHT + FOOT
    image = Image.new("RGB", (width, height), WHITE)
    draw = ImageDraw.Draw(image)
    write = partial(draw.text, font=_font(), fill=BLACK, anchor="mm")
    for line, scope in enumerate(reversed(grid.scopes)):  # from the first at the bottom up, as depth is drawn
        write((MARGIN / 2, HEAD + (line + 0.5) * CELL_HEIGHT), words.scope_title(scope))
    for panel, (sublayer, value) in enumerate(product(sublayers, maps)):
        left, (title, colors, low, high) = MARGIN + panel * step, maps[value]
        write((left + 2 * CELL_WIDTH, 9), f"{words.SUBLAYER_TITLES[sublayer]}: {title}")
        for column, family in enumerate(words.FAMILIES):
            write((left + (column + 0.5) * CELL_WIDTH, 25), words.FAMILY_SHORT[family])
        numbers = grid.table(sublayer, value)[::-1]
        colors = mpl.colormaps[colors]((numbers - low) / (high - low), bytes=True)[..., :3]
        _draw_cells(draw, left, numbers, colors, grid.table(sublayer, "n_unaliased_reads")[::-1] == 0)
    scale = f"effects: red is harm, full colour ±{limit:.2g} nats; {words.matters_from(num_pairs):.2g} matters"
    write((width / 2, height - 12), f"{scale}; grey: not applicable; dot: aliased")
    return np.asarray(image)


def _draw_cells(
    draw: ImageDraw.ImageDraw, left: int, numbers: np.ndarray, colors: np.ndarray, aliased: np.ndarray
) -> None:
    for line, column in np.ndindex(*numbers.shape):
        x, y, number = left + column * CELL_WIDTH, HEAD + line * CELL_HEIGHT, numbers[line, column]
        red, green, blue = GREY if np.isnan(number) else map(int, colors[line, column])
        draw.rectangle((x, y, x + CELL_WIDTH - 2, y + CELL_HEIGHT - 2), (red, green, blue))
        if np.isnan(number):
            continue
        ink = WHITE if 0.299 * red + 0.587 * green + 0.114 * blue < 128 else BLACK
        middle = x + CELL_WIDTH / 2, y + CELL_HEIGHT / 2
        draw.text(middle, f"{number:z.2f}", font=_font(), fill=ink, anchor="mm")
        if aliased[line, column]:
            draw.ellipse((x + 2, y + 2, x + 5, y + 5), ink)


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 11)
