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

from attnres import FAMILIES, REGIONS, SUBLAYERS
from probe import vocabulary as words

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
    rows, title = words.primary_rows(effects), "effect"
    if rows.empty:
        rows, title = words.primary_rows(effects, kind=words.MASK_FIRST_ORDER), "1st-order effect"
    layers = words.by_layer(rows)
    rows = rows[rows["scope"].isin(REGIONS)] if layers.empty else layers
    scopes = words.sort_scopes(rows["scope"])[::-1]  # from the first at the bottom up, as depth is drawn
    sublayers = words.present(rows["sublayer"], (*SUBLAYERS, words.BOTH))
    if not sublayers:
        return None
    matters = words.matters_from(num_pairs)
    limit = max([matters, *rows.loc[rows["applicable"], "effect"].abs().dropna()])
    panels = [(sublayer, value) for sublayer in sublayers for value in ("mass", "effect")]
    step = len(FAMILIES) * CELL_WIDTH + 12
    size = (MARGIN + len(panels) * step, HEAD + len(scopes) * CELL_HEIGHT + FOOT)
    image = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(image)
    for line, scope in enumerate(scopes):
        _write(draw, (MARGIN / 2, HEAD + (line + 0.5) * CELL_HEIGHT), words.scope_title(scope))
    for column, (sublayer, value) in enumerate(panels):
        left = MARGIN + column * step
        name = "mass" if value == "mass" else f"{title} (nats)"
        _write(draw, (left + 2 * CELL_WIDTH, 9), f"{words.SUBLAYER_TITLES[sublayer]}: {name}")
        _draw_panel(draw, left, rows[rows["sublayer"] == sublayer], scopes, value, limit)
    scale = f"effects: red is harm, full colour ±{limit:.2g} nats; {matters:.2g} matters"
    _write(draw, (size[0] / 2, size[1] - 12), f"{scale}; grey: not applicable; dot: aliased")
    return np.asarray(image)


def _draw_panel(
    draw: ImageDraw.ImageDraw, left: int, rows: pd.DataFrame, scopes: list[str], value: str, limit: float
) -> None:
    low, high, colors = (0.0, 1.0, "cividis") if value == "mass" else (-limit, limit, "RdBu_r")
    colormap = mpl.colormaps[colors]
    cells = rows.set_index(["scope", "family"])[[value, "applicable", "n_unaliased_reads"]].to_dict("index")
    for column, family in enumerate(FAMILIES):
        x = left + column * CELL_WIDTH
        _write(draw, (x + CELL_WIDTH / 2, 25), words.FAMILY_SHORT[family])
        for line, scope in enumerate(scopes):
            y = HEAD + line * CELL_HEIGHT
            box, middle = (x, y, x + CELL_WIDTH - 2, y + CELL_HEIGHT - 2), (x + CELL_WIDTH / 2, y + CELL_HEIGHT / 2)
            cell = cells.get((scope, family))
            if cell is None or not cell["applicable"]:
                draw.rectangle(box, GREY)
                continue
            red, green, blue = (colormap((cell[value] - low) / (high - low), bytes=True))[:3]
            draw.rectangle(box, (int(red), int(green), int(blue)))
            ink = WHITE if 0.299 * red + 0.587 * green + 0.114 * blue < 128 else BLACK
            _write(draw, middle, f"{cell[value]:z.2f}", ink)
            if cell["n_unaliased_reads"] == 0:
                draw.ellipse((x + 2, y + 2, x + 5, y + 5), ink)


def _write(
    draw: ImageDraw.ImageDraw, middle: tuple[float, float], text: str, ink: tuple[int, int, int] = BLACK
) -> None:
    draw.text(middle, text, fill=ink, font=_font(), anchor="mm")


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 11)
