"""Figures for papers, in one style. In: probed runs and their tables. Out: matplotlib figures, saved as PNG and PDF."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "DepthCells": "cells",
    "depth_cells": "cells",
    "heat_map_grid": "heat_maps",
    "paper_style": "style",
    "plot_comparison": "comparison",
    "plot_dissociation": "dissociation",
    "plot_emergence": "emergence",
    "plot_heat_maps": "heat_maps",
    "plot_motifs": "emergence",
    "save": "style",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
