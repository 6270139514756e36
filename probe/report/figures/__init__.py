"""Figures for papers, in one style: data frames in, matplotlib figures out."""

from probe.report.figures.cells import DepthCells, depth_cells
from probe.report.figures.comparison import plot_comparison
from probe.report.figures.dissociation import plot_dissociation
from probe.report.figures.emergence import first_order_rows, plot_emergence, plot_motifs
from probe.report.figures.heat_maps import heat_map_grid, plot_heat_maps
from probe.report.figures.style import (
    FAMILY_COLORS,
    FAMILY_LABELS,
    FAMILY_MARKERS,
    SUBLAYER_LABELS,
    paper_style,
    save,
)

__all__ = [
    "FAMILY_COLORS",
    "FAMILY_LABELS",
    "FAMILY_MARKERS",
    "SUBLAYER_LABELS",
    "DepthCells",
    "depth_cells",
    "first_order_rows",
    "heat_map_grid",
    "paper_style",
    "plot_comparison",
    "plot_dissociation",
    "plot_emergence",
    "plot_heat_maps",
    "plot_motifs",
    "save",
]
