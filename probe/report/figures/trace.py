"""A trace as heat maps: how much of the answer each site carries, place by place and source by source."""

from __future__ import annotations

from collections.abc import Sequence

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


@style.paper_style()
def plot_trace(table: pd.DataFrame, direction: str, title: str = "") -> Figure:
    """A panel for each kind of site, reads in depth on the vertical axis: places in the sequence on the horizontal one;
    of `source` the sources, at the value and at the query.

    Args:
        table: of `TraceResult.table`, with named positions, "value" and "query" among them.
    """
    rows = table[table["direction"] == direction]
    shown = {TITLES[kind]: (rows[rows["site"] == kind], "position") for kind in TITLES if kind != "source"}
    sources = rows[rows["site"] == "source"]
    shown |= {f"{TITLES['source']},\nat the {at}": (sources[sources["position"] == at], "source") for at in SOURCES_AT}
    shown = {name: (part, across) for name, (part, across) in shown.items() if len(part)}
    figure = Figure(figsize=(style.PAGE, 0.9 + 0.13 * rows["read"].nunique()), layout="constrained")
    panels: Sequence[Axes] = np.atleast_1d(figure.subplots(1, len(shown)))  # type: ignore[assignment]
    for axes, (name, (part, across)) in zip(panels, shown.items(), strict=True):
        values = part.pivot_table(index="read", columns=across, values="strength", sort=False, dropna=False)
        values = values.sort_index(axis=1) if across == "source" else values
        image = _draw(axes, values, [_name(part, read) for read in values.index], name, across)
    figure.colorbar(image, ax=list(panels), label="share", shrink=0.7)
    figure.suptitle(f"{title}{': ' if title else ''}{DIRECTION_TITLES[direction]}", fontsize="medium")
    return figure


def _draw(axes: Axes, values: pd.DataFrame, names: Sequence[str], title: str, across: str) -> AxesImage:
    image = axes.imshow(values.to_numpy(float), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_title(title, fontsize="small")
    axes.set_xticks(range(values.shape[1]), [str(name) for name in values.columns], rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("source, oldest first" if across == "source" else "place", fontsize="small")
    axes.tick_params(labelsize="xx-small")
    axes.grid(False)
    return image


def _name(rows: pd.DataFrame, read: int) -> str:
    row = rows[rows["read"] == read].iloc[0]
    layer = "" if pd.isna(row["layer"]) else f"{int(row['layer'])} "
    return f"{layer}{SHORT[row['sublayer']]}"
