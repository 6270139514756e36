"""A trace as heat maps: how much of the answer each site carries, place by place and source by source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from probe.report.figures import style
from probe.vocabulary import FINAL

TITLES = {
    "stream": "running stream",
    "output": "output of a sublayer",
    "input": "routed input of a read",
    "source": "one source of a read",
}
DIRECTION_TITLES = {"denoise": "restored: share of the answer that comes back", "noise": "spoiled: share that is lost"}
SOURCES_AT = ("value", "query")
SHORT = {"self_attn": "attn", "mlp": "MLP", FINAL: "final"}


@dataclass(frozen=True)
class Map:
    """One heat map: `values` has a row for each of `lines`, reads in depth, and a column for each of `places`."""

    title: str
    values: pd.DataFrame
    lines: list[str]
    places: list[str]
    across: str


def trace_maps(table: pd.DataFrame, direction: str) -> list[Map]:
    """A map for each kind of site: reads in depth by places in the sequence; of `source`, by sources, at the value and
    at the query.

    Args:
        table: of `TraceResult.table`, with named positions, "value" and "query" among them; a column `token` says what
            stands there.
    """
    rows = table[table["direction"] == direction]
    shown = {TITLES[kind]: (rows[rows["site"] == kind], "position") for kind in TITLES if kind != "source"}
    sources = rows[rows["site"] == "source"]
    shown |= {f"{TITLES['source']},\nat the {at}": (sources[sources["position"] == at], "source") for at in SOURCES_AT}
    found = []
    for name, (part, across) in shown.items():
        if len(part):
            values = part.pivot_table(index="read", columns=across, values="strength", sort=False, dropna=False)
            values = values.sort_index(axis=1) if across == "source" else values
            lines, places = [_name(part, read) for read in values.index], [_place(name) for name in values.columns]
            if across == "position" and "token" in part:
                tokens = part.groupby("position")["token"].first()
                places = [
                    f"{place} ({tokens[place]})" if tokens[place] not in ("", place) else place for place in places
                ]
            found.append(Map(name, values, lines, places, "source, oldest first" if across == "source" else "place"))
    return found


@style.paper_style()
def plot_trace(table: pd.DataFrame, direction: str, title: str = "") -> Figure:
    """The maps of `trace_maps`, of one direction."""
    maps = trace_maps(table, direction)
    figure = Figure(figsize=(style.PAGE, 0.9 + 0.13 * max(len(each.lines) for each in maps)), layout="constrained")
    panels: Sequence[Axes] = np.atleast_1d(figure.subplots(1, len(maps)))  # type: ignore[assignment]
    for axes, each in zip(panels, maps, strict=True):
        image = _draw(axes, each)
    figure.colorbar(image, ax=list(panels), label="share", shrink=0.7)
    figure.suptitle(f"{title}{': ' if title else ''}{DIRECTION_TITLES[direction]}", fontsize="medium")
    return figure


def _draw(axes: Axes, each: Map) -> AxesImage:
    values = each.values.to_numpy(float)
    image = axes.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_title(each.title, fontsize="small")
    axes.set_xticks(range(len(each.places)), each.places, rotation=90)
    axes.set_yticks(range(len(each.lines)), each.lines)
    axes.set_xlabel(each.across, fontsize="small")
    axes.tick_params(labelsize="xx-small")
    axes.grid(False)
    return image


def _place(name: object) -> str:
    """A source's number is read as a float where some reads lack it."""
    return f"{name:.0f}" if isinstance(name, float) else str(name)


def _name(rows: pd.DataFrame, read: int) -> str:
    row = rows[rows["read"] == read].iloc[0]
    layer = "" if pd.isna(row["layer"]) else f"{int(row['layer'])} "
    return f"{layer}{SHORT[row['sublayer']]}"
