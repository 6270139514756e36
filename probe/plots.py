"""Figures: emergence over training steps, and mass beside effect for each layer and family."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from attnres import FAMILIES, SUBLAYERS
from probe.motifs import MATTERS, primary_rows

FAMILY_COLORS = dict(zip(FAMILIES, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))  # Okabe-Ito
FAMILY_MARKERS = dict(zip(FAMILIES, "osD^", strict=True))
FAMILY_LABELS = {
    "embedding": "embedding",
    "current": "current",
    "prev_completed": "prev. completed",
    "older": "older",
}
SUBLAYER_LABELS = {"self_attn": "attention reads", "mlp": "MLP reads"}
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "legend.fontsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.color": "#dddddd",
    "lines.linewidth": 1.3,
    "lines.markersize": 3,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
}


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path` as PNG and PDF (`path` without a suffix); returns both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_name(path.name + suffix) for suffix in (".png", ".pdf")]
    for file in written:
        figure.savefig(file, bbox_inches="tight")
    return written


def plot_emergence(effects: pd.DataFrame, curves: pd.DataFrame, num_pairs: int, title: str = "") -> Figure:
    """Accuracy and pairs(t), and under it mass and effect of each family over training steps.

    Args:
        effects: the table of one run, several steps.
        curves: indexed by step, with `accuracy` (validation, at the full K) and `pairs`; NaN where not logged.
        num_pairs: K.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 6.4), layout="constrained")
        grid = figure.add_gridspec(3, 2, height_ratios=(0.8, 1, 1))
        top = figure.add_subplot(grid[0, :])
        _plot_accuracy(top, effects, curves, num_pairs)
        rows = primary_rows(effects)
        rows = rows[rows["scope"] == "all"]
        share_mass: Axes | None = None
        for line, sublayer in enumerate(SUBLAYERS, start=1):
            cells = rows[rows["sublayer"] == sublayer]
            mass = figure.add_subplot(grid[line, 0], sharex=top, sharey=share_mass)
            share_mass = mass
            effect = figure.add_subplot(grid[line, 1], sharex=top)
            _plot_families(mass, effect, cells, num_pairs)
            mass.set_title(f"{SUBLAYER_LABELS[sublayer]}: routing mass", loc="left")
            effect.set_title(f"{SUBLAYER_LABELS[sublayer]}: effect of masking", loc="left")
            mass.set_ylabel("mean mass")
            effect.set_ylabel("ΔNLL (nats)")
            if line == len(SUBLAYERS):
                mass.set_xlabel("training step")
                effect.set_xlabel("training step")
        handles, labels = effect.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        if title:
            figure.suptitle(title, fontsize=9)
        return figure


def _plot_accuracy(axes: Axes, effects: pd.DataFrame, curves: pd.DataFrame, num_pairs: int) -> None:
    probed = effects[effects["metric"] == "accuracy"].groupby("step")["clean"].first()
    validation = curves["accuracy"].dropna()
    axes.plot(validation.index, validation, color="black", label="validation accuracy")
    axes.plot(probed.index, probed, "|", color="black", markersize=6, label="probes (accuracy on the probe split)")
    axes.axhline(1 / num_pairs, color="#777777", linestyle="--", linewidth=1, label=f"plateau 1/K = 1/{num_pairs}")
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.03, 1.05)
    axes.set_title(f"accuracy at K = {num_pairs} pairs, and pairs in training", loc="left")
    twin = axes.twinx()
    twin.spines["right"].set_visible(True)
    twin.grid(False)
    pairs = curves["pairs"].dropna()
    twin.step(pairs.index, pairs, where="post", color="#E69F00", linewidth=1.1, label="pairs(t)")
    twin.set_ylim(0, num_pairs * 1.08)
    twin.set_ylabel("pairs")
    lines = [*axes.get_lines(), *twin.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="center right", frameon=True, framealpha=0.9)


def _plot_families(mass: Axes, effect: Axes, cells: pd.DataFrame, num_pairs: int) -> None:
    for family in FAMILIES:
        curve = cells[cells["family"] == family].sort_values("step")
        style: dict[str, Any] = {
            "color": FAMILY_COLORS[family],
            "marker": FAMILY_MARKERS[family],
            "label": FAMILY_LABELS[family],
        }
        mass.plot(curve["step"], curve["mass"], **style)
        effect.plot(curve["step"], curve["effect"], **style)
        effect.fill_between(
            curve["step"], curve["ci_low"], curve["ci_high"], color=FAMILY_COLORS[family], alpha=0.2, linewidth=0
        )
    threshold = MATTERS * math.log(num_pairs)
    effect.axhline(0, color="black", linewidth=0.6)
    effect.axhline(threshold, color="#777777", linestyle=":", linewidth=1, label="5 % of ln K: matters")
    mass.set_ylim(bottom=0)


def plot_heat_maps(effects: pd.DataFrame, num_pairs: int, title: str = "") -> Figure:
    """Layer x family: mass beside effect, for attention and MLP reads of one (run, step).

    The colours of effects span at least what matters (5 % of ln K), so that noise does not look like a finding.
    """
    rows = primary_rows(effects)
    rows = rows[rows["scope"].str.startswith("layer:")]
    num_layers = rows["scope"].nunique()
    matters = MATTERS * math.log(num_pairs)
    tables = {
        (sublayer, value): _layer_table(rows[rows["sublayer"] == sublayer], value)
        for sublayer in SUBLAYERS
        for value in ("mass", "effect", "n_unaliased_reads")
    }
    largest = max(float(np.nanmax(np.abs(tables[s, "effect"]), initial=matters)) for s in SUBLAYERS)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(7.2, 1.5 + 0.24 * max(num_layers, 4)), layout="constrained")
        axes = figure.subplots(1, 4, sharey=True)
        images = {}
        for column, (sublayer, value) in enumerate((s, v) for s in SUBLAYERS for v in ("mass", "effect")):
            limits = (0.0, 1.0) if value == "mass" else (-largest, largest)
            colors = "cividis" if value == "mass" else "RdBu_r"
            images[value] = _heat_map(axes[column], tables[sublayer, value], limits, colors)
            _mark_aliases(axes[column], tables[sublayer, "n_unaliased_reads"])
            name = "mass" if value == "mass" else "ΔNLL (nats)"
            axes[column].set_title(f"{SUBLAYER_LABELS[sublayer]}\n{name}")
        axes[0].set_ylabel("layer")
        for value, name, above in (("mass", "mass", axes[:2]), ("effect", "ΔNLL (nats)", axes[2:])):
            figure.colorbar(images[value], ax=above, label=name, location="bottom", aspect=30, shrink=0.8)
        figure.supxlabel(
            "hatched: not applicable      dotted: aliased, the same tensor stays readable as another family",
            fontsize=7,
        )
        if title:
            figure.suptitle(title, fontsize=9)
        return figure


def _layer_table(rows: pd.DataFrame, value: str) -> np.ndarray:
    """(layers, families); NaN where the family cannot be ablated."""
    rows = rows.assign(layer=rows["scope"].str.removeprefix("layer:").astype(int))
    table = rows.pivot(index="layer", columns="family", values=value).reindex(columns=list(FAMILIES))
    applicable = rows.pivot(index="layer", columns="family", values="applicable").reindex(columns=list(FAMILIES))
    return table.where(applicable.fillna(False).astype(bool)).to_numpy(dtype=float)


def _heat_map(axes: Axes, table: np.ndarray, limits: tuple[float, float], colors: str):
    axes.set_facecolor("#f0f0f0")
    image = axes.imshow(table, aspect="auto", cmap=colors, vmin=limits[0], vmax=limits[1], origin="lower")
    for layer, family in np.ndindex(*table.shape):
        number = table[layer, family]
        if np.isnan(number):
            axes.add_patch(
                Rectangle((family - 0.5, layer - 0.5), 1, 1, fill=False, hatch="////", edgecolor="#bbbbbb", linewidth=0)
            )
            continue
        red, green, blue, _ = image.cmap(image.norm(number))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        text = f"{number:.2f}".replace("-0.00", "0.00")
        axes.text(family, layer, text, ha="center", va="center", fontsize=6, color="w" if dark else "k")
    axes.set_xticks(range(len(FAMILIES)), ["emb.", "current", "prev.", "older"], rotation=40, ha="right")
    axes.set_yticks(range(len(table)))
    return image


def _mark_aliases(axes: Axes, unaliased: np.ndarray) -> None:
    """Dot the cells that rest on no unaliased read: what is masked there stays reachable under another name."""
    for layer, family in zip(*np.nonzero(unaliased == 0), strict=True):
        axes.add_patch(
            Rectangle(
                (family - 0.5, layer - 0.5), 1, 1, fill=False, hatch="...", edgecolor="#999999", linewidth=0, alpha=0.5
            )
        )
