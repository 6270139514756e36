"""The page's tables and its text: runs, motifs, seeds, and how the numbers were made."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd

from attnres import FAMILIES
from probe.analysis.emergence import after_accuracy, over_seeds
from probe.files.runs import groups_of_seeds
from probe.report.page.curves import interval_text, unlearned
from probe.report.page.data import PageRun, Shown, where
from probe.report.page.style import DARK_COLORS, RUN_COLORS, RUN_DASHES
from probe.vocabulary import ENOUGH_SEQUENCES, FAMILY_COLORS, FAMILY_TITLES, ROUTE, Route

MARKERS = dict(zip(FAMILIES, "●■◆▲", strict=True))
TIMES = {
    "onset": "onset",
    "mass_half": "half of mass",
    "effect_half": "half of effect",
    "accuracy_half": "half of accuracy",
}
NUMBERS = {
    *("accuracy", "NLL (nats)", "plateau 1/K", "sequences", "queries"),
    *(*TIMES.values(), "after accuracy", "mass after effect", "pairs", "held at", "emerged"),
}
"""Headings of columns that hold numbers."""


def following(by_step: Mapping[Any, str]) -> str:
    """The HTML of a text that follows the slider, from the texts and the steps from which they hold."""
    return f'<span data-texts="{escape(json.dumps(list(by_step.items())))}"></span>'


def legend() -> str:
    return "\n".join(
        f'<li><span aria-hidden="true" style="color: light-dark({FAMILY_COLORS[family]}, {DARK_COLORS[family]})">'
        f"{MARKERS[family]}</span>{FAMILY_TITLES[family]}</li>"
        for family in FAMILIES
    )


def html_table(caption: str, rows: Sequence[dict[str, str] | str]) -> str:
    """A table that scrolls by itself. Rows are cells by heading, the first the row's own; or the heading of a group."""
    columns = next(list(row) for row in rows if isinstance(row, dict))
    kinds = {name: ' class="number"' if name in NUMBERS else "" for name in columns}
    body = []
    for row in rows:
        if isinstance(row, str):
            body.append(f'<tr><th scope="rowgroup" colspan="{len(columns)}">{row}</th></tr>')
        else:
            first, *others = columns
            cells = "".join(f"<td{kinds[name]}>{row[name]}</td>" for name in others)
            body.append(f'<tr><th scope="row">{row[first]}</th>{cells}</tr>')
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in kinds.items())
    lines = "\n".join(body)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption.split(".")[0])}"><table>'
        f"<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>"
    )


def runs_table(runs: Sequence[PageRun]) -> str:
    caption = (
        "Runs at the shown step: the latest probe at or before it, or the run's first probe if all are later. Accuracy "
        "is measured on the probe split. The flip test belongs to the last probe: how often the output is the new "
        "value of a changed key, where that key is queried and where another one is."
    )
    return html_table(caption, [_run_row(number, run) for number, run in enumerate(runs)])


def _run_row(number: int, run: PageRun) -> dict[str, str]:
    def at_step(say: Callable[[Shown], Any]) -> str:
        return following({shown.step: str(say(shown)) for shown in run.shown})

    flip = run.probed.summary["flip"]
    return {
        "run": f"{_swatch(number)}{escape(run.name)}",
        "shown probe": at_step(lambda shown: shown.when),
        "accuracy": at_step(lambda shown: accuracy_text(run.accuracy(shown))),
        "NLL (nats)": at_step(lambda shown: f"{shown.rows['clean'].iloc[0]:.4f}"),
        "plateau 1/K": f"{1 / run.probed.num_pairs:.4f}",
        "task": at_step(lambda shown: "NOT LEARNED" if unlearned(shown.rows) else "learned"),
        "sequences": at_step(lambda shown: shown.rows["n_sequences"].iloc[0]),
        "queries": at_step(lambda shown: shown.rows["n_queries"].iloc[0]),
        "flip test": "—" if flip is None else f"{flip['follows_queried']:.4f}, {flip['follows_other']:.4f}",
        "code": escape(code_of(run)),
    }


def _swatch(number: int) -> str:
    color, dash = RUN_COLORS[number % len(RUN_COLORS)], RUN_DASHES[number % len(RUN_DASHES)]
    return (
        f'<svg width="26" height="10" aria-hidden="true"><path d="M0 5H26" stroke="{color}" stroke-width="2.5" '
        f'stroke-dasharray="{dash}"/></svg>'
    )


def accuracy_text(row: pd.Series) -> str:
    """An accuracy with its interval, where there are such."""
    return "not measured" if math.isnan(row["accuracy"]) else f"{row['accuracy']:.4f}{interval_text(row)}"


def code_of(run: PageRun) -> str:
    """Version and commit of the code that probed."""
    version = run.probed.summary["versions"].get("attnres", "unknown")
    code = run.probed.summary.get("code") or {}
    if code.get("commit"):
        return f"attnres {version}, commit {code['commit'][:10]}{', changed' if code.get('dirty') else ''}"
    sources = code.get("sources_sha256")
    return f"attnres {version}, " + (f"sources {sources[:10]}, no commit" if sources else "commit not recorded")


def motif_rows(runs: Sequence[PageRun]) -> pd.DataFrame | None:
    """The table behind the motif table: every route of every run that was probed in training."""
    parts = [run.emergence.table.assign(run=run.name) for run in runs if run.emergence is not None]
    return pd.concat(parts, ignore_index=True) if parts else None


def motif_table(runs: Sequence[PageRun]) -> str:
    """Motifs that held at some probe, and the study's: when each emerged, and whether it holds at the shown step."""
    rows: list[dict[str, str] | str] = []
    for number, run in enumerate(runs):
        if run.emergence is not None:
            rows.append(f"{_swatch(number)}{escape(run.name)}")
            rows += [_motif_row(row, run.emergence.curves) for row in run.emergence.shown.to_dict("records")]
    if not any(isinstance(row, dict) for row in rows):
        return "<p>No run was probed at two steps or more while it trained: when motifs emerged cannot be told.</p>"
    caption = (
        "When motifs emerged, in training steps with 95 % intervals (bootstrap of sequences, the same criterion in "
        "each resample). Onset: the first probe from which the motif holds to the end. Half: where the curve has made "
        "half of its rise. Transient: the motif held at some probe, but not to the end. Pairs: in training, at the "
        "onset, or where the motif first held, or else at half of the effect. 'After accuracy' is the lag of the named "
        "event behind half of accuracy, 'mass after effect' that of mass behind effect; each is an interval as wide as "
        "the distance between probes. — means none. *: a motif of the study, shown whether it was found or not."
    )
    return html_table(caption, rows)


def _motif_row(row: dict[Any, Any], curves: pd.DataFrame) -> dict[str, str]:
    here = where(curves, **{name: row[name] for name in ROUTE}).set_index("step").sort_index()
    named, low, high = after_accuracy(row)
    held = f" ({_plain(row['first_held'])} to {_plain(row['last_held'])})" if row["n_held"] else ""
    share = f" (in {row['p_onset']:.0%} of resamples)" if row["status"] == "emerged" else ""
    return {
        "motif": _motif_name(row),
        "status": row["status"] + share,
        "holds at the shown step": following(here["holds"].map({True: "yes", False: "no"}).to_dict()),
        **{title: _estimate(row[name], row[f"{name}_low"], row[f"{name}_high"]) for name, title in TIMES.items()},
        "after accuracy": "—" if math.isnan(low) else f"{named}: {_lag(low, high)}",
        "mass after effect": _lag(row["lag_mass_effect_low"], row["lag_mass_effect_high"]),
        "pairs": _plain(row["effect_half_pairs" if row["status"] == "never" else "pairs"]),
        "held at": f"{row['n_held']} of {row['n_probes']}{held}",
    }


def _motif_name(row: dict[Any, Any]) -> str:
    name = str(Route.of(row)) + (" *" if row["motif"] else "")
    return name.replace("->", "→").replace("mlp", "MLP")


def _estimate(value: float, low: float, high: float) -> str:
    return _plain(value) + ("" if math.isnan(low) else f" [{_plain(low)}, {_plain(high)}]")


def _lag(low: float, high: float) -> str:
    return "—" if math.isnan(low) else f"{_plain(low)} to {_plain(high)}"


def _plain(number: float) -> str:
    return "—" if math.isnan(number) else f"{number:.4g}"


def seeds_table(runs: Sequence[PageRun]) -> str:
    """Motifs over the seeds of each experiment that has several, or an empty string."""
    found = [(run.probed, run.emergence.table) for run in runs if run.emergence is not None]
    groups = groups_of_seeds([(run.experiment, run.summary["seed"]) for run, _ in found])
    several = [over_seeds([found[place][1] for place in group]) for group in groups if len(group) > 1]
    if not several:
        return ""
    caption = "Motifs over seeds: the median of the seeds' times, smallest and largest in brackets. *: the study's."
    return html_table(caption, [_seeds_row(row) for row in pd.concat(several).to_dict("records")])


def _seeds_row(row: dict[Any, Any]) -> dict[str, str]:
    return {
        "condition": escape(row["condition"]),
        "motif": _motif_name(row),
        "emerged": f"{row['n_emerged']} of {row['n_seeds']} seeds",
        **{
            title: _estimate(row[f"{name}_median"], row[f"{name}_smallest"], row[f"{name}_largest"])
            for name, title in TIMES.items()
        },
    }


def warnings_of(run: PageRun) -> list[str]:
    """What to know before reading the numbers of a run, besides what follows the slider."""
    lines = []
    fewest = int(run.cells["n_sequences"].min())
    if fewest < ENOUGH_SEQUENCES:
        lines.append(
            f"Few sequences: some probes rest on {fewest}. With fewer than {ENOUGH_SEQUENCES}, do not rely on "
            "intervals and p-values of skewed effects."
        )
    if run.emergence is not None and run.emergence.left_out:
        steps = ", ".join(map(str, run.emergence.left_out))
        lines.append(
            f"Steps {steps} are not in the motif table: they were probed on other sequences than the last one, or not "
            "in all regions."
        )
    return lines


def methods(runs: Sequence[PageRun]) -> str:
    """How the numbers were made."""
    resamples = ", ".join(sorted({f"{run.probed.summary['probe']['num_resamples']:,}" for run in runs}))
    thresholds = ", ".join(sorted({f"{run.matters_from:.3f} nats at K = {run.probed.num_pairs}" for run in runs}))
    terms = {
        "Effect": "ΔNLL: negative log-likelihood of the answer with a family masked (mask and renormalise: its weights "
        "to zero, the rest scaled back to sum to one) at all positions of the reads of a cell, minus that of the clean "
        "run; per query, in nats. Positive is harm. First-order estimates linearise all that is downstream of the "
        "masked read. They are named wherever they are shown, and no curve mixes them with exact effects.",
        "Mass": "Mean routing weight of the family over all reads of the cell, absent reads counting 0. "
        "Mass says nothing about effect.",
        "Intervals": f"95 %, cluster bootstrap-t over sequences ({resamples} resamples; the queries of a sequence are "
        "one cluster). p adj.: two-sided, adjusted by max-t over the grid of regions or of layers.",
        "Thresholds": f"An effect matters from 5 % of ln K: {thresholds}. The plateau 1/K is the accuracy of guessing "
        "a value of the context. A task counts as learned with a clean NLL under half of ln K; the effects of a model "
        "that has not learned it say nothing about the task.",
        "Motif": "A family whose harm in one region is significant after adjustment, at least 5 % of ln K per read, "
        "and larger per read than in every other region in which it can be masked.",
        "Examples": "All probes draw from a split of their own, at the final K, the same for every model and step.",
    }
    lines = "\n".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in terms.items())
    made = "".join(f"<dt>{escape(run.name)}</dt><dd>{_about(run)}</dd>" for run in runs)
    return f"<dl>\n{lines}\n</dl>\n<h3>Runs</h3>\n<dl>{made}</dl>"


def _about(run: PageRun) -> str:
    summary, num_pairs = run.probed.summary, run.probed.num_pairs
    model, probe = summary["model"], summary["probe"]
    wrapped = ""
    if "wraps" in summary:
        wrapped = f" Wraps a vanilla model whose accuracy is {summary['wraps']['accuracy']:.4f} on the same queries."
    return escape(
        f"{model['num_hidden_layers']} layers, {model['attnres_num_blocks']} blocks, {model['attnres_source']} "
        f"sources, {model['parameters']:,} parameters; seed {summary['seed']}, K = {num_pairs}; last probe at step "
        f"{summary['step']} with {probe['n_sequences']} sequences, {probe['n_queries']} queries, probe seed "
        f"{probe['seed']}, data {summary['data_id']}; {code_of(run)}.{wrapped}"
    )
