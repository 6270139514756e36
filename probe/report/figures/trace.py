"""A trace as heat maps: how much of the answer each site carries, place by place and source by source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probe.report.figures import style
from probe.vocabulary import FINAL

TITLES = {
    "stream": "running stream",
    "output": "a sublayer's output",
    "input": "a read's routed input",
    "source": "one source at one read",
}
DIRECTION_TITLES = {"denoise": "restored: share of the answer that comes back", "noise": "spoiled: share that is lost"}
SHORT = {"self_attn": "attn", "mlp": "MLP", FINAL: "final"}


@style.paper_style()
def plot_trace(table: pd.DataFrame, direction: str, title: str = "") -> Figure:
    """A panel for each kind of site, reads in depth on the vertical axis: places in the sequence on the horizontal one;
    of `source`, the sources, at the query.

    Args:
        table: of `TraceResult.table`, with named positions, "query" among them.
    """
    rows = table[table["direction"] == direction]
    kinds = [kind for kind in TITLES if kind in set(rows["site"])]
    figure = Figure(figsize=(style.PAGE, 0.9 + 0.13 * rows["read"].nunique()), layout="constrained")
    panels: Sequence[Axes] = np.atleast_1d(figure.subplots(1, len(kinds)))  # type: ignore[assignment]
    for axes, kind in zip(panels, kinds, strict=True):
        shown = rows[rows["site"] == kind]
        across = "position"
        if kind == "source":
            shown, across = shown[shown["position"] == "query"], "source"
        values = shown.pivot_table(index="read", columns=across, values="strength", sort=False, dropna=False)
        if kind == "source":
            values = values.sort_index(axis=1)
        image = _draw(axes, values, [_name(shown, read) for read in values.index], kind)
    figure.colorbar(image, ax=list(panels), label="share", shrink=0.7)
    figure.suptitle(f"{title}{': ' if title else ''}{DIRECTION_TITLES[direction]}", fontsize="medium")
    return figure


def _draw(axes: Axes, values: pd.DataFrame, names: Sequence[str], kind: str):
    image = axes.imshow(values.to_numpy(float), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_title(TITLES[kind] + (", at the query" if kind == "source" else ""))
    axes.set_xticks(range(values.shape[1]), [str(name) for name in values.columns], rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("source, the oldest first" if kind == "source" else "place in the sequence")
    axes.tick_params(labelsize="xx-small")
    axes.grid(False)
    return image


def _name(rows: pd.DataFrame, read: int) -> str:
    row = rows[rows["read"] == read].iloc[0]
    layer = "" if pd.isna(row["layer"]) else f"{int(row['layer'])} "
    return f"{layer}{SHORT[row['sublayer']]}"
