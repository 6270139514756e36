"""What the page's tables hold: runs, motifs and seeds.

A row is cells by heading, or else the heading of a group. A cell is a text, or texts that follow the slider by the
step from which they hold, or the number of a run, for its name and line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from probe.analysis.emergence import after_accuracy, over_seeds
from probe.files.runs import groups_of_seeds
from probe.report.page.curves import interval_text, unlearned
from probe.report.page.data import PageRun, Shown, where
from probe.vocabulary import ROUTE, Route

TIMES = {
    "onset": "onset",
    "mass_half": "half of mass",
    "effect_half": "half of effect",
    "accuracy_half": "half of accuracy",
}


Row = dict[str, Any] | int


def run_rows(runs: Sequence[PageRun]) -> list[Row]:
    return [_run_row(number, run) for number, run in enumerate(runs)]


def _run_row(number: int, run: PageRun) -> Row:
    def at_step(say: Callable[[Shown], Any]) -> dict[int, str]:
        return {shown.step: str(say(shown)) for shown in run.shown}

    flip = run.probed.summary["flip"]
    return {
        "run": number,
        "shown probe": at_step(lambda shown: shown.when),
        "accuracy": at_step(lambda shown: accuracy_text(run.accuracy(shown))),
        "NLL (nats)": at_step(lambda shown: f"{shown.rows['clean'].iloc[0]:.4f}"),
        "plateau 1/K": f"{1 / run.probed.num_pairs:.4f}",
        "task": at_step(lambda shown: "NOT LEARNED" if unlearned(shown.rows) else "learned"),
        "sequences": at_step(lambda shown: shown.rows["n_sequences"].iloc[0]),
        "queries": at_step(lambda shown: shown.rows["n_queries"].iloc[0]),
        "flip test": "—" if flip is None else f"{flip['follows_queried']:.4f}, {flip['follows_other']:.4f}",
        "code": code_of(run),
    }


def accuracy_text(row: pd.Series) -> str:
    return "not measured" if math.isnan(row["accuracy"]) else f"{row['accuracy']:.4f}{interval_text(row)}"


def code_of(run: PageRun) -> str:
    """Version and commit of the code that probed."""
    version = run.probed.summary["versions"].get("attnres", "unknown")
    code = run.probed.summary.get("code") or {}
    if code.get("commit"):
        return f"attnres {version}, commit {code['commit'][:10]}{', changed' if code.get('dirty') else ''}"
    sources = code.get("sources_sha256")
    return f"attnres {version}, " + (f"sources {sources[:10]}, no commit" if sources else "commit not recorded")


def motif_rows(runs: Sequence[PageRun]) -> list[Row]:
    """Motifs that held at some probe, and the study's: when each emerged, and whether it holds at the shown step."""
    rows: list[Row] = []
    for number, run in enumerate(runs):
        if run.probed.emergence is not None:
            found = run.probed.emergence.shown.to_dict("records")
            rows += [number, *(_motif_row(row, run.probed.emergence.curves) for row in found)]
    return rows


def _motif_row(row: dict[Any, Any], curves: pd.DataFrame) -> Row:
    here = where(curves, **{name: row[name] for name in ROUTE}).set_index("step").sort_index()
    named, low, high = after_accuracy(row)
    held = f" ({_plain(row['first_held'])} to {_plain(row['last_held'])})" if row["n_held"] else ""
    share = f" (in {row['p_onset']:.0%} of resamples)" if row["status"] == "emerged" else ""
    return {
        "motif": _motif_name(row),
        "status": row["status"] + share,
        "holds at the shown step": here["holds"].map({True: "yes", False: "no"}).to_dict(),
        **_times(row, "", "_low", "_high"),
        "after accuracy": "—" if math.isnan(low) else f"{named}: {_lag(low, high)}",
        "mass after effect": _lag(row["lag_mass_effect_low"], row["lag_mass_effect_high"]),
        "pairs": _plain(row["effect_half_pairs" if row["status"] == "never" else "pairs"]),
        "held at": f"{row['n_held']} of {row['n_probes']}{held}",
    }


def seed_rows(runs: Sequence[PageRun]) -> list[Row]:
    """Motifs over the seeds of each experiment that has several."""
    found = [(run.probed, run.probed.emergence.table) for run in runs if run.probed.emergence is not None]
    groups = groups_of_seeds([(run.experiment, run.summary["seed"]) for run, _ in found])
    several = [over_seeds([found[place][1] for place in group]) for group in groups if len(group) > 1]
    return [
        {
            "condition": row["condition"],
            "motif": _motif_name(row),
            "emerged": f"{row['n_emerged']} of {row['n_seeds']} seeds",
            **_times(row, "_median", "_smallest", "_largest"),
        }
        for table in several
        for row in table.to_dict("records")
    ]


def _motif_name(row: Mapping[Any, Any]) -> str:
    name = str(Route.of(row)) + (" *" if row["motif"] else "")
    return name.replace("->", "→").replace("mlp", "MLP")


def _times(row: Mapping[Any, Any], middle: str, low: str, high: str) -> dict[str, str]:
    """The times of a row by heading, with the range between those columns whose names end so."""
    times = {title: [row[name + end] for end in (middle, low, high)] for name, title in TIMES.items()}
    return {
        title: _plain(time) + ("" if math.isnan(first) else f" [{_plain(first)}, {_plain(last)}]")
        for title, (time, first, last) in times.items()
    }


def _lag(low: float, high: float) -> str:
    return "—" if math.isnan(low) else f"{_plain(low)} to {_plain(high)}"


def _plain(number: float) -> str:
    return "—" if math.isnan(number) else f"{number:.4g}"
