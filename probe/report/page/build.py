"""One self-contained HTML page of probed runs: panels that a step slider moves, tables, and how numbers were made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
from plotly.offline import get_plotlyjs

from attnres.files import replacing
from probe.files.runs import repeated_seeds
from probe.report.page import tables
from probe.report.page.cells import comparison_panel, comparison_table, heat_maps_panel, largest_effect, scatter_panel
from probe.report.page.curves import accuracy_panel, accuracy_table, all_steps, curves_panel
from probe.report.page.data import KEPT, NEEDED, PageRun
from probe.report.page.layout import Panel
from probe.report.page.style import darkened, templates
from probe.vocabulary import wide

DIGITS = 7
"""Significant digits of embedded numbers."""
ASSETS = files("probe.report.page") / "assets"
MOTIFS_DOWNLOAD = (
    '<p><button type="button" data-table="motifs" data-file="motifs.csv" '
    'aria-label="Download the data of motifs as CSV">CSV</button></p>'
)


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
    steps, limit = all_steps(runs), largest_effect(runs)
    data = {f"cells-{number}": _cells(run) for number, run in enumerate(runs)}
    data["accuracy"], compared = accuracy_table(runs), comparison_table(runs)
    data["comparison"] = compared[["run", "stage", *KEPT]]
    if (motifs := tables.motif_rows(runs)) is not None:
        data["motifs"] = motifs
    shared = [accuracy_panel(runs, data["accuracy"])] + ([] if compared.empty else [comparison_panel(runs, compared)])
    of_runs = [_panels(run, number, limit) for number, run in enumerate(runs)]
    body = [
        _section("Runs", tables.runs_table(runs), *map(_warning, notes)),
        _section("Accuracy and comparison", *map(_panel_html, shared)),
        _section("Motifs", tables.motif_table(runs), "" if motifs is None else MOTIFS_DOWNLOAD),
        *(_section("Motifs over seeds", seeds) for seeds in [tables.seeds_table(runs)] if seeds),
        *(_run_section(run, panels) for run, panels in zip(runs, of_runs, strict=True)),
        _section("How these numbers were made", tables.methods(runs)),
    ]
    embedded = {
        "steps": steps,
        "panels": {panel.name: panel.to_dict() for panel in sum(of_runs, shared)},
        "tables": {name: _columns(table) for name, table in data.items()},
        "templates": templates(),
        "darkened": darkened(),
    }
    return Template(_asset("page.html")).substitute(
        title=escape(f"Routing probe of {runs[0].name}" if len(runs) == 1 else f"Routing probes of {len(runs)} runs"),
        names="this run" if len(runs) == 1 else f"these {len(runs)} runs",
        style=_asset("page.css"),
        last=len(steps) - 1,
        step=steps[-1] if steps[-1] >= 0 else "not known",
        disabled="" if len(steps) > 1 else " disabled",
        legend=tables.legend(),
        body="\n".join(body),
        data=_json(embedded),
        plotly=get_plotlyjs(),
        script=_asset("page.js"),
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _panels(run: PageRun, number: int, limit: float) -> list[Panel]:
    curves = [curves_panel(run, number, value) for value in ("effect", "mass")] if run.has_course else []
    scatter = [] if wide(run.cells).empty else [scatter_panel(run, number)]
    return [*curves, heat_maps_panel(run, number, limit), *scatter]


def _section(heading: str, *content: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(filter(None, content)) + "\n</section>"


def _warning(line: str) -> str:
    return f'<p class="warning">{escape(line)}</p>'


def _run_section(run: PageRun, panels: Sequence[Panel]) -> str:
    no_course = (
        '<p class="status">This run was not probed at several steps while it trained. It has no curves over training, '
        "and shows the same probe at every step of the slider.</p>"
    )
    lines = [*map(_warning, tables.warnings_of(run)), "" if run.has_course else no_course]
    return _section(run.name, *lines, *map(_panel_html, panels))


def _panel_html(panel: Panel) -> str:
    file = f'data-table="{panel.table}" data-panel="{panel.name}" data-file="{panel.name}.csv"'
    return f"""<section class="panel" id="{panel.name}" aria-labelledby="{panel.name}-title">
<header><h3 id="{panel.name}-title">{escape(panel.heading)}: <span class="state"></span></h3>
<button type="button" {file} aria-label="Download the data of {escape(panel.heading)} as CSV">CSV</button></header>
<div class="plot" id="{panel.name}-plot" role="img" aria-label="{escape(panel.label)}"></div>
<p class="note">{panel.note}</p>
<details data-panel="{panel.name}"><summary>Numbers at this step</summary>
<div class="scroll" tabindex="0"></div></details>
</section>"""


def _cells(run: PageRun) -> pd.DataFrame:
    about = {"run": run.name, "condition": run.probed.summary["condition"], "seed": run.probed.summary["seed"]}
    return run.cells.assign(**about)[[*about, "stage", *KEPT]]


def _columns(table: pd.DataFrame) -> dict[str, Any]:
    """A table as its length and columns: each a list, or one value where all rows have the same."""
    columns = {}
    for name in table.columns:
        values = table[name].tolist()
        is_constant = name not in ("effect", "step") and len(values) > 1 and table[name].nunique(dropna=False) == 1
        columns[name] = values[0] if is_constant else values
    return {"length": len(table), "columns": columns}


def _json(data: Any) -> str:
    """For a script element: no tag can begin in it. Floats have `DIGITS` digits; null stands for those not finite."""
    exact = json.dumps(data, default=lambda array: array.tolist())
    short = json.loads(
        exact, parse_float=lambda text: float(f"{float(text):.{DIGITS}g}"), parse_constant=lambda _: None
    )
    text = json.dumps(short, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
