"""The page's tables and its text: runs, motifs, seeds, and how the numbers were made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import pandas as pd

from attnres import FAMILIES
from probe.analysis.emergence import after_accuracy, over_seeds
from probe.files.runs import groups_of_seeds
from probe.report.page.curves import RUN_COLORS, RUN_DASHES, SUBLAYER_NAMES
from probe.report.page.data import FINAL, PageRun, Shown
from probe.report.page.layout import COLORS, DARK_COLORS, NAMES
from probe.vocabulary import ENOUGH_SEQUENCES

DASHES = {"solid": "", "dash": "6 3", "dot": "2 2", "dashdot": "6 2 2 2", "longdash": "9 3", "longdashdot": "9 2 2 2"}
MARKERS = {
    "embedding": '<circle cx="6" cy="6" r="4.5"/>',
    "current": '<rect x="2" y="2" width="8" height="8"/>',
    "prev_completed": '<path d="M6 0.5 11.5 6 6 11.5 0.5 6Z"/>',
    "older": '<path d="M6 1 11 10.5H1Z"/>',
}
TIMES = {
    "onset": "onset",
    "mass_half": "half of mass",
    "effect_half": "half of effect",
    "accuracy_half": "half of accuracy",
}


@dataclass
class Texts:
    """Texts of the page that follow the slider: by name, the steps from which they hold and the texts."""

    made: dict[str, dict[str, list[Any]]] = field(default_factory=dict)

    def add(self, name: str, by_step: dict[int, str]) -> str:
        """The HTML attribute of the element that shows it."""
        self.made[name] = {"steps": list(by_step), "values": list(by_step.values())}
        return f'data-text="{escape(name)}"'

    def of_probes(self, name: str, run: PageRun, say: Callable[[Shown], str]) -> str:
        return self.add(name, {shown.step: say(shown) for shown in run.shown})


def legend() -> str:
    items = []
    for family in FAMILIES:
        fill = f"fill: light-dark({COLORS[family]}, {DARK_COLORS[family]})"
        mark = f'<svg width="12" height="12" aria-hidden="true" style="{fill}">{MARKERS[family]}</svg>'
        items.append(f"<li>{mark}{NAMES[family]}</li>")
    return "\n".join(items)


def html_table(caption: str, columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself. `columns`: heading and whether it holds numbers; cells are `td`s' insides or,
    where they begin with `<td` or `<th`, whole."""
    kinds = [' class="number"' if is_number else "" for _, is_number in columns]
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for (name, _), kind in zip(columns, kinds, strict=True))
    body = []
    for row in rows:
        cells = [
            cell if cell.startswith(("<td", "<th")) else f"<td{kind}>{cell}</td>"
            for cell, kind in zip(row, kinds, strict=False)  # a heading of a group of rows is one cell
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    lines = "\n".join(body)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption.split(".")[0])}"><table>'
        f"<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>"
    )


def runs_table(runs: Sequence[PageRun], texts: Texts) -> str:
    columns = [("run", False), ("shown probe", False), ("accuracy", True), ("NLL (nats)", True), ("plateau 1/K", True)]
    columns += [("task", False), ("sequences", True), ("queries", True), ("flip test", False), ("code", False)]
    rows = []
    for number, run in enumerate(runs):

        def live(name: str, say: Callable[[Shown], str], run=run, number=number, kind: str = ' class="number"') -> str:
            attribute = texts.of_probes(f"run-{number}-{name}", run, say)
            return f"<td{kind} {attribute}></td>"

        rows.append(
            [
                f'<th scope="row">{_swatch(number)}{escape(run.name)}</th>',
                live("probe", lambda shown: shown.when, kind=""),
                live("accuracy", lambda shown, run=run: accuracy_text(run, shown)),
                live("nll", lambda shown: f"{shown.rows['clean'].iloc[0]:.4f}"),
                f"{1 / run.num_pairs:.4f}",
                live("learned", lambda shown: "learned" if shown.task_learned else "NOT LEARNED", kind=""),
                live("sequences", lambda shown: str(shown.rows["n_sequences"].iloc[0])),
                live("queries", lambda shown: str(shown.rows["n_queries"].iloc[0])),
                _flip(run),
                escape(code_of(run)),
            ]
        )
    caption = (
        "Runs at the shown step: of each the latest probe at or before it, or its first where all are later. Accuracy "
        "is of the probe split. The flip test is of the last probe: the output follows the queried key's new value, "
        "and not another key's."
    )
    return html_table(caption, columns, rows)


def _swatch(number: int) -> str:
    color, dash = RUN_COLORS[number % len(RUN_COLORS)], DASHES[RUN_DASHES[number % len(RUN_DASHES)]]
    return (
        f'<svg width="26" height="10" aria-hidden="true"><path d="M0 5H26" stroke="{color}" stroke-width="2.5" '
        f'stroke-dasharray="{dash}"/></svg>'
    )


def _flip(run: PageRun) -> str:
    flip = run.probed.summary["flip"]
    return "—" if flip is None else f"{flip['follows_queried']:.4f}, {flip['follows_other']:.4f}"


def accuracy_text(run: PageRun, shown: Shown) -> str:
    """Accuracy with its interval where sequences were kept."""
    if math.isnan(shown.accuracy):
        return "not measured"
    text = f"{shown.accuracy:.4f}"
    if run.emergence is None or shown.probe == FINAL:
        return text
    rows = run.emergence.accuracy
    row = rows[rows["step"] == shown.step]
    return text if row.empty else f"{text} [{row['low'].iloc[0]:.4f}, {row['high'].iloc[0]:.4f}]"


def code_of(run: PageRun) -> str:
    """Version and commit of the code that probed."""
    version = run.probed.summary["versions"].get("attnres", "unknown")
    code = run.probed.summary.get("code") or {}
    if code.get("commit"):
        return f"attnres {version}, commit {code['commit'][:10]}{', changed' if code.get('dirty') else ''}"
    sources = code.get("sources_sha256")
    return f"attnres {version}, " + (f"sources {sources[:10]}, no commit" if sources else "commit not recorded")


def motif_rows(runs: Sequence[PageRun]) -> pd.DataFrame | None:
    """The table behind the motif table: every (sublayer, family, region) of every run that was probed in training."""
    parts = [run.emergence.table.assign(run=run.name) for run in runs if run.emergence is not None]
    return pd.concat(parts, ignore_index=True) if parts else None


def motif_table(runs: Sequence[PageRun], texts: Texts) -> str:
    """Motifs that held at some probe, and the study's: when each emerged, and whether it holds at the shown step."""
    columns = [("motif", False), ("status", False), ("holds at the shown step", False)]
    columns += [(name, True) for name in TIMES.values()]
    columns += [("after accuracy", True), ("mass after effect", True), ("pairs", True), ("held at", True)]
    rows = []
    for number, run in enumerate(runs):
        if run.emergence is None:
            continue
        shown = run.emergence.table
        rows.append([f'<th scope="rowgroup" colspan="{len(columns)}">{_swatch(number)}{escape(run.name)}</th>'])
        for place, row in enumerate(shown[(shown["motif"] != "") | (shown["status"] != "never")].to_dict("records")):
            holds = texts.add(f"holds-{number}-{place}", _holds(run, row))
            rows.append(
                [
                    f'<th scope="row">{escape(_motif_name(row))}</th>',
                    row["status"] + (f" (in {row['p_onset']:.0%} of resamples)" if row["status"] == "emerged" else ""),
                    f"<td {holds}></td>",
                    *(_interval(row, name) for name in TIMES),
                    _after_accuracy(row),
                    _lag(row["lag_mass_effect_low"], row["lag_mass_effect_high"]),
                    _plain(row["effect_half_pairs" if row["status"] == "never" else "pairs"]),
                    _held(row),
                ]
            )
    if not rows:
        return "<p>No run was probed at two steps or more while it trained: when motifs emerged cannot be told.</p>"
    caption = (
        "When motifs emerged, in training steps with 95 % intervals (bootstrap of sequences, in each resample the same "
        "criterion). Onset: the first probe from which the motif holds to the end. Half: where the curve has done half "
        "of its rise. Transient: it held at some probe, not to the end. Pairs: in training, at the onset, where it "
        "first held, or else at half of the effect. After: steps by which the one is later than the other, an interval "
        "that is as wide as probes are apart; after accuracy is of what is named. —: has none. *: of the study, shown "
        "whether found or not."
    )
    return html_table(caption, columns, rows)


def _motif_name(row: dict[Any, Any]) -> str:
    name = row["motif"] or f"{row['family']} -> {row['region']} {SUBLAYER_NAMES[row['sublayer']]}"
    return name.replace("->", "→").replace("mlp", "MLP") + (" *" if row["motif"] else "")


def _holds(run: PageRun, row: dict[Any, Any]) -> dict[int, str]:
    assert run.emergence is not None
    curves = run.emergence.curves
    here = (curves["sublayer"] == row["sublayer"]) & (curves["family"] == row["family"])
    found = curves[here & (curves["scope"] == row["scope"])].sort_values("step")
    return {int(step): "yes" if holds else "no" for step, holds in zip(found["step"], found["holds"], strict=True)}


def _interval(row: dict[Any, Any], name: str) -> str:
    if math.isnan(row[name]):
        return "—"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return _plain(row[name]) + ("" if math.isnan(low) else f" [{_plain(low)}, {_plain(high)}]")


def _after_accuracy(row: dict[Any, Any]) -> str:
    what, low, high = after_accuracy(row)
    return "—" if math.isnan(low) else f"{what}: {_lag(low, high)}"


def _lag(low: float, high: float) -> str:
    return "—" if math.isnan(low) else f"{_plain(low)} to {_plain(high)}"


def _held(row: dict[Any, Any]) -> str:
    where = f" ({_plain(row['first_held'])} to {_plain(row['last_held'])})" if row["n_held"] else ""
    return f"{row['n_held']} of {row['n_probes']}{where}"


def _plain(number: float) -> str:
    return "—" if math.isnan(number) else f"{number:.4g}"


def seeds_table(runs: Sequence[PageRun]) -> str:
    """Motifs over the seeds of each experiment that has several, or an empty string."""
    found = [(run.probed, run.emergence.table) for run in runs if run.emergence is not None]
    groups = groups_of_seeds([(run.experiment, run.summary["seed"]) for run, _ in found])
    several = [over_seeds([found[place][1] for place in group]) for group in groups if len(group) > 1]
    if not several:
        return ""
    table = pd.concat(several)
    columns = [("condition", False), ("motif", False), ("emerged", True), *((name, True) for name in TIMES.values())]
    rows = [
        [
            f'<th scope="row">{escape(row["condition"])}</th>',
            escape(_motif_name(row)),
            f"{row['n_emerged']} of {row['n_seeds']} seeds",
            *(_spread(row, name) for name in TIMES),
        ]
        for row in table.to_dict("records")
    ]
    caption = "Motifs over seeds: the median of the seeds' times, smallest and largest in brackets. *: the study's."
    return html_table(caption, columns, rows)


def _spread(row: dict[Any, Any], name: str) -> str:
    middle, low, high = (row[f"{name}_{part}"] for part in ("median", "smallest", "largest"))
    return "—" if math.isnan(middle) else f"{_plain(middle)} [{_plain(low)}, {_plain(high)}]"


def warnings_of(run: PageRun) -> list[str]:
    """What must be known before the numbers of a run are read, besides what follows the slider."""
    lines = []
    fewest = int(run.cells["n_sequences"].min())
    if fewest < ENOUGH_SEQUENCES:
        lines.append(
            f"Few sequences: some probes rest on {fewest}; under {ENOUGH_SEQUENCES}, intervals and p-values of skewed "
            "effects cannot be relied on."
        )
    if run.emergence is not None and run.emergence.left_out:
        steps = ", ".join(map(str, run.emergence.left_out))
        lines.append(
            "Probed on other sequences than at the end, or not in all regions, and so without part in the motif table: "
            f"steps {steps}."
        )
    return lines


def methods(runs: Sequence[PageRun]) -> str:
    """How the numbers were made."""
    resamples = ", ".join(sorted({f"{run.probed.summary['probe']['num_resamples']:,}" for run in runs}))
    thresholds = ", ".join(sorted({f"{run.matters_from:.3f} nats at K = {run.num_pairs}" for run in runs}))
    terms = {
        "Effect": "ΔNLL: negative log-likelihood of the answer with a family masked (mask and renormalise: its weights "
        "to zero, the rest scaled back to sum to one) at all positions of the reads of a cell, less the clean run's; "
        "per query, in nats. Positive is harm. First-order estimates linearise all that is downstream of the masked "
        "read; they are named wherever they are shown, and no curve mixes the two.",
        "Mass": "Mean routing weight of the family over all reads of the cell, absent reads counting 0; nothing is "
        "said of effect by it.",
        "Intervals": f"95 %, cluster bootstrap-t over sequences ({resamples} resamples; the queries of a sequence are "
        "one cluster). p adj.: two-sided, adjusted by max-t over the grid of regions or of layers.",
        "Thresholds": f"An effect matters from 5 % of ln K: {thresholds}. The plateau 1/K is the accuracy of guessing "
        "a value of the context. A task counts as learned with a clean NLL under half of ln K; the effects of a model "
        "that has not learned it say nothing of the task.",
        "Motif": "A family whose harm in one region is significant after adjustment, at least 5 % of ln K per read, "
        "and larger per read than in every other region in which it can be masked.",
        "Examples": "All probes draw from a split of their own, at the final K, the same for every model and step.",
    }
    lines = "\n".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in terms.items())
    made = "".join(f"<dt>{escape(run.name)}</dt><dd>{_about(run)}</dd>" for run in runs)
    return f"<dl>\n{lines}\n</dl>\n<h3>Runs</h3>\n<dl>{made}</dl>"


def _about(run: PageRun) -> str:
    summary = run.probed.summary
    model, probe = summary["model"], summary["probe"]
    blocks = (
        f"{model['num_hidden_layers']} layers, {model['attnres_num_blocks']} blocks, {model['attnres_source']} sources"
    )
    wrapped = ""
    if "wraps" in summary:
        wrapped = f" Wraps a vanilla model whose accuracy is {summary['wraps']['accuracy']:.4f} on the same queries."
    return escape(
        f"{blocks}, {model['parameters']:,} parameters; seed {summary['seed']}, K = {run.num_pairs}; last probe "
        f"at step {summary['step']} with {probe['n_sequences']} sequences, {probe['n_queries']} queries, probe seed "
        f"{probe['seed']}, data {summary['data_id']}; {code_of(run)}.{wrapped}"
    )
