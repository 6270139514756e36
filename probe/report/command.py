"""`attnres-probe report`: what some probed runs say, printed; their tables, figures, claims and page, written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from attnres.files import replacing
from probe.files.failed import describe_failed
from probe.files.layout import PROBE, TEXT
from probe.files.locks import held
from probe.files.runs import ProbedRun, repeated_seeds
from probe.files.tables import write_claims
from probe.report import text
from probe.report.curves import describe_curves
from probe.report.figures.write import write_figures
from probe.report.page.build import write_page
from probe.report.page.data import NEEDED, load_page_runs


def write_report(directories: Sequence[Path], page: Path, metric: str) -> Iterator[str]:
    """Lines to print: what must be known first, the claims, and the files as they are written.

    Figures and page show effects on `metric`; the printed statements are on the margin.

    Raises:
        ValueError: a directory without complete results, a page that cannot be written, or another process reports.
    """
    missing = [f"MISSING PROBES: {run}: {found}" for run in directories if (found := describe_failed(run / PROBE))]
    try:
        shown = load_page_runs(list(directories))
        for run in shown:  # nothing is written before all is read
            _ = run.probed.claims, run.probed.curves
    except ValueError as error:
        raise ValueError("; ".join([str(error), *missing])) from error
    runs = [run.probed for run in shown]
    yield from missing
    yield from (line for run in runs for line in text.warnings(run))
    yield from repeated_seeds(runs)
    yield text.HEADING + "\n"
    for run in runs:
        yield from text.claims(run)
    yield "\nwritten:"
    with ExitStack() as locks:
        for directory in dict.fromkeys(directories):
            locks.enter_context(held(directory, "report"))
        for run in runs:
            yield f"  {write_claims(run.results, [claim.to_dict() for claim in run.claims])}"
        yield f"  {_write_tables(runs, directories[0] / TEXT)}"
        figures = write_figures(runs, metric) or ["no figures: no run holds effects of mask_renormalise"]
        yield from (f"  {line}" for line in figures)
        if any(run.has_cells for run in shown):
            yield f"  {write_page(shown, page, metric)}"
        else:
            yield f"  no page: no run holds {NEEDED}"


def _write_tables(runs: Sequence[ProbedRun], path: Path) -> Path:
    """The long tables, as text."""
    blocks = [
        *map(text.claims_in_full, runs),
        "Mass and strength of each source family, all layers (mask and renormalise, all positions; control: as much\n"
        "mass taken from other sources, drawn at random)\n",
        text.mass_effect_table(runs) + "\n",
        *map(text.describe, runs),
        text.across_seeds(runs),
        *(text.describe_emergence(run.emergence) for run in runs if run.emergence is not None),
        text.emergence_over_seeds(runs),
        *(describe_curves(run.behaviour, run.label, run.emergence) for run in runs if run.behaviour is not None),
    ]
    with replacing(path) as part:
        part.write_text("\n".join(filter(None, blocks)) + "\n", encoding="utf-8")
    return path
