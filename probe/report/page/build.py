"""One self-contained HTML page of probed runs: panels that a step slider moves, tables, and how numbers were made."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pandas as pd
from plotly.offline import get_plotlyjs

from attnres.files import replacing
from probe.files.runs import repeated_seeds
from probe.report.page.cells import comparison_panel, comparison_table, heat_maps_panel, largest_effect, scatter_panel
from probe.report.page.curves import accuracy_panel, accuracy_table, all_steps, curves_panel
from probe.report.page.data import KEPT, NEEDED, PageRun
from probe.report.page.layout import Panel, darkened, templates
from probe.report.page.tables import (
    Texts,
    legend,
    methods,
    motif_rows,
    motif_table,
    runs_table,
    seeds_table,
    warnings_of,
)

DIGITS = 7
"""Significant digits of embedded numbers."""
ASSETS = files("probe.report.page") / "assets"


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
    """The HTML of the page: plotly, data, style and script are in it, and nothing is fetched.

    Runs without effects of the primary intervention are named and not shown; at least one must have some.
    """
    left_out = [run for run in runs if not run.has_cells]
    runs = [run for run in runs if run.has_cells]
    notes = [f"{run.name} is not shown: it holds no {NEEDED}." for run in left_out]
    notes += [f"{line}." for line in repeated_seeds([run.probed for run in runs])]
    texts, steps = Texts(), all_steps(runs)
    accuracies, compared, motifs = accuracy_table(runs), comparison_table(runs), motif_rows(runs)
    tables = {f"cells-{number}": _cells(run) for number, run in enumerate(runs)}
    tables |= {"accuracy": accuracies, "comparison": compared[["run", "probe", *KEPT]]}
    if motifs is not None:
        tables["motifs"] = motifs
    shared = [accuracy_panel(runs, accuracies)] + ([] if compared.empty else [comparison_panel(runs, compared)])
    limit = largest_effect(runs)
    of_runs = [_panels(run, number, limit) for number, run in enumerate(runs)]
    body = [
        _section("Runs", runs_table(runs, texts), *(_warning(line) for line in notes)),
        _section("Accuracy and comparison", *(_panel_html(panel, texts) for panel in shared)),
        _section("Motifs", motif_table(runs, texts), *(_csv_button(name) for name in tables if name == "motifs")),
        *(_section("Motifs over seeds", seeds) for seeds in [seeds_table(runs)] if seeds),
        *(_run_section(run, panels, texts) for run, panels in zip(runs, of_runs, strict=True)),
        _section("How these numbers were made", methods(runs)),
    ]
    panels = [*shared, *(panel for panels in of_runs for panel in panels)]
    data = {
        "steps": steps,
        "panels": {panel.name: panel.to_dict() for panel in panels},
        "texts": texts.made,
        "tables": {name: _columns(table) for name, table in tables.items()},
        "templates": templates(),
        "darkened": darkened(),
    }
    last = len(steps) - 1
    return Template((ASSETS / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"Routing probe of {runs[0].name}" if len(runs) == 1 else f"Routing probes of {len(runs)} runs"),
        intro=_intro(runs),
        style=(ASSETS / "page.css").read_text(encoding="utf-8"),
        last=last,
        step=steps[-1] if steps[-1] >= 0 else "not known",
        disabled="" if last else " disabled",
        legend=legend(),
        body="\n".join(body),
        data=_json(data),
        plotly=get_plotlyjs(),
        script=(ASSETS / "page.js").read_text(encoding="utf-8"),
    )


def _panels(run: PageRun, number: int, limit: float) -> list[Panel]:
    curves = [curves_panel(run, number, value) for value in ("effect", "mass")] if run.has_course else []
    scatter = [scatter_panel(run, number)] if run.has_regions else []
    return [*curves, heat_maps_panel(run, number, limit), *scatter]


def _intro(runs: Sequence[PageRun]) -> str:
    names = "this run" if len(runs) == 1 else f"these {len(runs)} runs"
    return (
        f"<p>What each depth source carries (routing mass) and what it does (effect of masking it) in {names}. The "
        "slider picks a training step for all panels: of each run the latest probe at or before it, which the panel's "
        "title names. Numbers show under the pointer, as a table below each panel, and download as CSV.</p>"
    )


def _section(heading: str, *content: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(filter(None, content)) + "\n</section>"


def _warning(line: str) -> str:
    return f'<p class="warning">{escape(line)}</p>'


def _run_section(run: PageRun, panels: Sequence[Panel], texts: Texts) -> str:
    lines = [_warning(line) for line in warnings_of(run)]
    if not run.has_course:
        lines.append(
            '<p class="status">It was not probed at several steps while it trained: it has no curves over training, '
            "and one probe at every step of the slider.</p>"
        )
    return _section(run.name, *lines, *(_panel_html(panel, texts) for panel in panels))


def _panel_html(panel: Panel, texts: Texts) -> str:
    title = texts.add(f"{panel.name}-title", {step: state.title for step, state in panel.states.items()})
    file = f'data-table="{panel.table}" data-panel="{panel.name}" data-file="{panel.name}.csv"'
    return f"""<section class="panel" id="{panel.name}" aria-labelledby="{panel.name}-title">
<header><h3 id="{panel.name}-title">{escape(panel.heading)}: <span class="state" {title}></span></h3>
<button type="button" {file} aria-label="Download the data of {escape(panel.heading)} as CSV">CSV</button></header>
<div class="plot" id="{panel.name}-plot" role="img" aria-label="{escape(panel.label)}"></div>
<p class="note">{panel.note}</p>
<details data-panel="{panel.name}"><summary>Numbers at this step</summary>
<div class="scroll" tabindex="0"></div></details>
</section>"""


def _csv_button(table: str) -> str:
    return (
        f'<p><button type="button" data-table="{table}" data-file="{table}.csv" '
        f'aria-label="Download the data of {table} as CSV">CSV</button></p>'
    )


def _cells(run: PageRun) -> pd.DataFrame:
    about = {"run": run.name, "condition": run.probed.summary["condition"], "seed": run.probed.summary["seed"]}
    return run.cells.assign(**about)[[*about, "probe", *KEPT]]


def _columns(table: pd.DataFrame) -> dict[str, Any]:
    """A table as its length and columns: each a list, or one value where all rows have the same."""
    columns = {}
    for name in table.columns:
        values = table[name].tolist()
        is_constant = name not in ("effect", "step") and len(values) > 1 and table[name].nunique(dropna=False) == 1
        columns[name] = values[0] if is_constant else values
    return {"length": len(table), "columns": columns}


def _json(data: Any) -> str:
    """For a script element: no tag can begin in it."""
    text = json.dumps(_compact(data), separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _compact(value: Any) -> Any:
    """Plain values; floats of `DIGITS` significant digits, and null for those that are not finite."""
    if isinstance(value, dict):
        return {str(key): _compact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray, pd.Series)):
        return [_compact(item) for item in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
