"""One self-contained HTML page of probed runs: the claims, then panels that a step slider moves, and tables."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from attnres.files import replacing
from probe.files.runs import repeated_seeds
from probe.report import text
from probe.report.page import curves, panels, sites, style, tables
from probe.report.page.data import NEEDED, PageRun, metrics_of
from probe.report.view import View
from probe.vocabulary import FAMILY_COLORS, FAMILY_TITLES, METRIC_TITLES, PRIMARY_METRIC

ASSETS = Environment(
    loader=PackageLoader("probe.report.page", "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
GENERATOR = '<meta name="generator" content="attnres-probe report">'
HEAD = 1000
"""Bytes of a page that hold it."""
DIGITS = 6
"""Significant digits of embedded numbers."""


def write_page(runs: Sequence[PageRun], path: Path, metric: str = PRIMARY_METRIC) -> Path:
    """Write the page, which appears at once or not at all, and opens on `metric`.

    Raises:
        ValueError: a run was not probed on the metric.
    """
    page = build_page(runs, metric)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def is_page(path: Path) -> bool:
    """Whether a file is a page that this program wrote, which it may replace."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(HEAD)


def build_page(runs: Sequence[PageRun], metric: str = PRIMARY_METRIC) -> str:
    """The HTML of the page. Plotly, data, style and script are in it; nothing is fetched.

    Runs without effects of the primary intervention are named and not shown. At least one run must have some.
    """
    notes = [f"{run.name} is not shown: it holds no {NEEDED}." for run in runs if not run.has_cells]
    runs = [run for run in runs if run.has_cells]
    notes += [f"{line}." for line in repeated_seeds([run.probed for run in runs])]
    notes += [line for run in runs for line in text.warnings(run.probed)]
    metrics = metrics_of(runs)
    if metric not in metrics:
        raise ValueError(f"--metric {metric}: not all runs were probed on it; choose from {', '.join(metrics)}")
    drawn = {name: _panels(runs, name) for name in metrics}
    motifs = [run.probed.emergence.table.assign(run=run.name) for run in runs if run.probed.emergence is not None]
    data = {
        f"numbers-{i}": pd.concat([run.view(name).cells for name in metrics]).drop(columns="hover")
        for i, run in enumerate(runs)
    }
    data |= {"motifs": pd.concat(motifs)} if motifs else {}
    steps = sorted({probe.step for run in runs for probe in run.view().probes})
    embedded = {
        "steps": steps,
        "panels": {m: {p.name: p.to_dict() for found in drawn[m].values() for p in found} for m in metrics},
        "tables": {name: {"columns": list(rows), "rows": rows.to_numpy(object)} for name, rows in data.items()},
        "saturated": {name: _saturated([run.view(name) for run in runs]) for name in metrics},
        "templates": style.templates(),
        "darkened": [(FAMILY_COLORS[f], dark) for f, dark in style.DARK_COLORS.items() if FAMILY_COLORS[f] != dark],
    }
    summary = runs[0].probed.summary["probe"]
    return ASSETS.get_template("page.html").render(
        generator=GENERATOR,
        runs=runs,
        notes=notes,
        steps=steps,
        key=text.KEY,
        claims=[(run.probed.label, list(run.probed.claims)) for run in runs],
        evidence=drawn[metric],
        tables={"Motifs": tables.motif_rows(runs), "Seeds": tables.seed_rows(runs), "Runs": tables.run_rows(runs)},
        data=list(data),
        metrics={name: METRIC_TITLES[name] for name in metrics},
        metric=metric,
        probe=summary,
        families=[
            (mark, FAMILY_COLORS[family], style.DARK_COLORS[family], FAMILY_TITLES[family])
            for mark, family in zip("●■◆▲", FAMILY_TITLES, strict=True)
        ],
        embedded=_packed(embedded),
        plotly=get_plotlyjs(),
    )


def _panels(runs: Sequence[PageRun], metric: str) -> dict[str, list[panels.Panel]]:
    """The panels of each kind of evidence, on one metric; what they show is in the template."""
    views = [(number, run.view(metric)) for number, run in enumerate(runs)]
    courses = [(number, view) for number, view in views if view.curves["step"].nunique() > 1]
    return {
        "emergence": [panels.emergence(view, number, "value") for number, view in courses],
        "curves": [curves.curves(view, number) for number, view in views if view.run.behaviour is not None],
        "trace": [panel for number, view in views for panel in sites.traces(view, number)],
        "heads": [panel for number, view in views for panel in sites.heads(view, number)],
        "maps": [panels.maps(view, number) for number, view in views],
        "scatter": [panels.scatter([view for _, view in views])],
        "mass": [panels.emergence(view, number, "mass") for number, view in courses],
    }


def _saturated(views: Sequence[View]) -> str:
    """What is said of runs in which a metric hardly moves."""
    names = ", ".join(view.name for view in views if view.is_saturated)
    return (
        names and f"saturated: in {names} it hardly moves until an ablation costs the whole margin; small is not zero"
    )


def _packed(data: Any) -> str:
    """JSON, compressed, in base64: floats have `DIGITS` digits; null stands for those not finite."""
    exact = json.dumps(data, default=lambda array: array.tolist())
    short = json.loads(
        exact, parse_float=lambda digits: float(f"{float(digits):.{DIGITS}g}"), parse_constant=lambda _: None
    )
    packed = gzip.compress(json.dumps(short, separators=(",", ":")).encode(), mtime=0)
    return base64.b64encode(packed).decode()
