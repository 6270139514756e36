"""The page's tables: rows of texts by heading."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from probe.analysis.emergence import after_accuracy, over_seeds
from probe.files.runs import groups_of_seeds
from probe.report.page.data import PageRun
from probe.report.view import fill
from probe.vocabulary import Route

Row = dict[str, str]


def run_rows(runs: Sequence[PageRun]) -> list[Row]:
    """What each run's last probe found of the clean model, and what the run is."""
    return [_run_row(run) for run in runs]


def _run_row(run: PageRun) -> Row:
    summary = run.probed.summary
    clean, flip, model, probe = (summary[name] for name in ("clean", "flip", "model", "probe"))
    code, shape = summary.get("code") or {}, "{num_hidden_layers} layers, {attnres_num_blocks} blocks, {attnres_source}"
    wraps = fill("; the vanilla model it wraps: {accuracy:.4f}", **summary["wraps"]) if "wraps" in summary else ""
    return {
        "run": run.name,
        "last probe": f"step {summary['step']}" if summary["step"] >= 0 else "step not known",
        "accuracy": fill("{accuracy:.4f}, {}", "learned" if clean["task_learned"] else "NOT LEARNED", **clean) + wraps,
        "margin, NLL (nats)": fill("{logit_diff:.3f}, {nll:.4f}", **clean),
        "flip test": "—" if flip is None else fill("{follows_queried:.4f}, {follows_other:.4f}", **flip),
        "model": f"{shape.format_map(model)}; {model['parameters']:,} parameters",
        "data": f"K = {run.probed.num_pairs}; {probe['n_sequences']} sequences of {summary['data_id']}",
        "code": f"attnres {summary['versions'].get('attnres', 'unknown')} {(code.get('commit') or '')[:10]}",
    }


def motif_rows(runs: Sequence[PageRun]) -> list[Row]:
    """Motifs that held at some probe, and the study's: when each emerged, how strong it was."""
    found = [(run.name, run.probed.emergence.shown.to_dict("records")) for run in runs if run.probed.emergence]
    return [{"run": name} | _motif_row(row) for name, rows in found for row in rows]


def _motif_row(row: Mapping[Any, Any]) -> Row:
    named, low, high = after_accuracy(row)
    held = f" ({_plain(row['first_held'])} to {_plain(row['last_held'])})" if row["n_held"] else ""
    return {
        "motif": _motif_name(row),
        "status": row["status"],
        "holds from step": _time(row, "onset", "_low", "_high"),
        "held at": f"{row['n_held']} of {row['n_probes']}{held}",
        "peak": fill("{peak:.1%} at {peak_step}", **row),
        "end": fill("{final:.1%}", **row),
        "half of effect": _time(row, "effect_half", "_low", "_high"),
        "half of mass": _time(row, "mass_half", "_low", "_high"),
        "after accuracy": "—" if math.isnan(low) else f"{named}: {_plain(low)} to {_plain(high)}",
        "size": _plain(row["effect_half_size" if row["status"] == "never" else "size"]),
        "to the mean": "the same" if row["margins_agree"] else _plain(row["onset_to_mean"]),
    }


def seed_rows(runs: Sequence[PageRun]) -> list[Row]:
    """Motifs over the seeds of each experiment that has several."""
    found = [(run.probed, run.probed.emergence.table) for run in runs if run.probed.emergence is not None]
    groups = groups_of_seeds([(run.experiment, run.seed) for run, _ in found])
    times = {"onset": "onset", "half of effect": "effect_half", "half of mass": "mass_half"}
    return [
        {"condition": row["condition"], "motif": _motif_name(row)}
        | {"emerged": f"{row['n_emerged']} of {row['n_seeds']} seeds"}
        | {title: _time(row, name, "_smallest", "_largest", "_median") for title, name in times.items()}
        for group in groups
        if len(group) > 1
        for row in over_seeds([found[place][1] for place in group]).to_dict("records")
    ]


def _motif_name(row: Mapping[Any, Any]) -> str:
    return (str(Route.of(row)) + (" *" if row["motif"] else "")).replace("->", "→").replace("mlp", "MLP")


def _time(row: Mapping[Any, Any], name: str, low: str, high: str, middle: str = "") -> str:
    """A time of a row with a range, from the columns that end so."""
    ends = row[name + low], row[name + high]
    return _plain(row[name + middle]) + ("" if math.isnan(ends[0]) else f" [{_plain(ends[0])}, {_plain(ends[1])}]")


def _plain(number: float) -> str:
    return "—" if math.isnan(number) else f"{number:.4g}"
