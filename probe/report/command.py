"""`attnres-probe report`: the printed tables, the figures and the page of some probed runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from probe.files.runs import repeated_seeds
from probe.report import text
from probe.report.figures.write import write_figures
from probe.report.page.build import write_page
from probe.report.page.data import NEEDED, load_page_runs


def write_report(directories: Sequence[Path], page: Path) -> Iterator[str]:
    """Lines to print: what must be known first, tables, and the files as they are written.

    Raises:
        ValueError: a directory without complete results, or a page that cannot be written.
    """
    shown = load_page_runs(list(directories))
    runs = [run.probed for run in shown]
    yield from (line for run in runs for line in text.warnings(run))
    yield from repeated_seeds(runs)
    yield "Mass and causal effect of each source family, all layers (mask and renormalise, all positions;"
    yield "control: as much mass taken from other sources, drawn at random)\n"
    yield text.mass_effect_table(runs) + "\n"
    yield from map(text.describe, runs)
    found = [text.describe_emergence(run.emergence) for run in runs if run.emergence is not None]
    for block in (text.across_seeds(runs), *found, text.emergence_over_seeds(runs)):
        if block:
            yield "\n" + block
    yield "\nwritten:"
    yield from (f"  {line}" for line in write_figures(runs) or ["no figures: no run holds effects of mask_renormalise"])
    if any(run.has_cells for run in shown):
        yield f"  {write_page(shown, page)}"
    else:
        yield f"  no page: no run holds {NEEDED}"
