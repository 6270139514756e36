"""Figures for papers, in one style. In: probed runs and their tables. Out: matplotlib figures, saved as PNG and PDF."""
