"""One self-contained HTML page of probed runs: panels that a step slider moves, tables, and how numbers were made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from attnres.files import replacing
from probe.files.runs import repeated_seeds
from probe.report.page import style, tables
from probe.report.page.cells import comparison_panel, comparison_table, heat_maps_panel, largest_effect, scatter_panel
from probe.report.page.curves import accuracy_panel, accuracy_table, all_steps, curves_panel
from probe.report.page.data import KEPT, NEEDED, PageRun
from probe.report.page.layout import Panel
from probe.vocabulary import ENOUGH_SEQUENCES, FAMILY_COLORS, FAMILY_TITLES, wide

ASSETS = Environment(
    loader=PackageLoader("probe.report.page", "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
DIGITS = 7
"""Significant digits of embedded numbers."""


def write_page(runs: Sequence[PageRun], path: Path) -> Path:
    """Write the page, which appears at once or not at all. Raises ValueError if `path` cannot be written."""
    page = build_page(runs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--page {path} cannot be written ({error.strerror})") from error
    return path


def build_page(runs: Sequence[PageRun]) -> str:
    """The HTML of the page. Plotly, data, style and script are in it; nothing is fetched.

    Runs without effects of the primary intervention are named and not shown. At least one run must have some.
    """
    notes = [f"{run.name} is not shown: it holds no {NEEDED}." for run in runs if not run.has_cells]
    runs = [run for run in runs if run.has_cells]
    notes += [f"{line}." for line in repeated_seeds([run.probed for run in runs])]
    accuracies, compared = accuracy_table(runs), comparison_table(runs)
    shared = [accuracy_panel(runs, accuracies)] + ([] if compared.empty else [comparison_panel(runs, compared)])
    limit = largest_effect(runs)
    of_runs = [_panels(run, number, limit) for number, run in enumerate(runs)]
    data = {f"cells-{number}": _cells(run) for number, run in enumerate(runs)}
    data |= {"accuracy": accuracies, "comparison": compared[["run", "stage", *KEPT]]}
    if motifs := [run.probed.emergence.table.assign(run=run.name) for run in runs if run.probed.emergence is not None]:
        data["motifs"] = pd.concat(motifs, ignore_index=True)
    embedded = {
        "steps": all_steps(runs),
        "panels": {panel.name: panel.to_dict() for panel in sum(of_runs, shared)},
        "tables": {name: _columns(table) for name, table in data.items()},
        "templates": style.templates(),
        "darkened": style.darkened(),
    }
    return ASSETS.get_template("page.html").render(
        runs=runs,
        notes=notes,
        steps=embedded["steps"],
        tables=tables,
        style=style,
        enough=ENOUGH_SEQUENCES,
        motifs=tables.motif_rows(runs),
        seeds=tables.seed_rows(runs),
        shared=shared,
        sections=zip(runs, of_runs, strict=True),
        families=zip(
            "●■◆▲", *(names.values() for names in (FAMILY_COLORS, style.DARK_COLORS, FAMILY_TITLES)), strict=True
        ),
        resamples=_listed(f"{run.probed.summary['probe']['num_resamples']:,}" for run in runs),
        thresholds=_listed(f"{run.matters_from:.3f} nats at K = {run.probed.num_pairs}" for run in runs),
        data=_json(embedded),
        plotly=get_plotlyjs(),
    )


def _listed(texts: Iterable[str]) -> str:
    return ", ".join(sorted(set(texts)))


def _panels(run: PageRun, number: int, limit: float) -> list[Panel]:
    curves = [curves_panel(run, number, value) for value in ("effect", "mass")] if run.has_course else []
    scatter = [] if wide(run.cells).empty else [scatter_panel(run, number)]
    return [*curves, heat_maps_panel(run, number, limit), *scatter]


def _cells(run: PageRun) -> pd.DataFrame:
    about = {"run": run.name, "condition": run.probed.summary["condition"], "seed": run.probed.summary["seed"]}
    return run.cells.assign(**about)[[*about, "stage", *KEPT]]


def _columns(table: pd.DataFrame) -> dict[str, Any]:
    """A table as its length and columns: each a list, or one value where all rows have the same."""
    varies: dict[Any, bool] = dict(table.nunique(dropna=False) != 1)
    columns = {
        name: values if varies[name] or name in ("effect", "step") or len(values) == 1 else values[0]
        for name, values in table.to_dict("list").items()
    }
    return {"length": len(table), "columns": columns}


def _json(data: Any) -> str:
    """For a script element: no tag can begin in it. Floats have `DIGITS` digits; null stands for those not finite."""
    exact = json.dumps(data, default=lambda array: array.tolist())
    short = json.loads(
        exact, parse_float=lambda text: float(f"{float(text):.{DIGITS}g}"), parse_constant=lambda _: None
    )
    return json.dumps(short, separators=(",", ":")).replace("<", "\\u003c")
