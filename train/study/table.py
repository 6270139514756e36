"""The tables of a study: a row for each run, and over the seeds of each condition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attnres import FAMILIES
from attnres.files import replacing
from probe.analysis import stats
from probe.files import tables as storage
from probe.files.checkpoints import RUN_FILE, read_json
from probe.files.runs import load_run, training_curves
from probe.report.figures.write import largest_effect_step
from probe.vocabulary import primary_rows
from train.study.description import Run
from train.study.runs import FINISHED, is_probed, is_trained

SOLVED = 0.99
"""Validation accuracy from which the task is solved."""
SUBLAYERS = ("self_attn", "mlp", "final")
QUANTITIES = ("mass", "effect")
CELLS = [f"{what}/{sublayer}/{family}" for sublayer in SUBLAYERS for family in FAMILIES for what in QUANTITIES]
"""Columns of the runs' table: over the whole depth, the primary intervention's mass and effect on NLL (nats)."""
ABOUT = ["condition", "seed", "run", "status"]
TRAINING = ["step", "validation_accuracy", "first_solved_step", "largest_effect_step"]
PROBE = ["model", "probe_accuracy", "clean_nll", "task_learned", "largest_effect", "largest_effect_of"]
OVER_SEEDS = ["validation_accuracy", "first_solved_step", "probe_accuracy", "clean_nll", "largest_effect", *CELLS]
SEED_COLUMNS = [
    *("condition", "quantity", "n_seeds", "median", "smallest", "largest"),
    *("mean", "ci_low", "ci_high", "p_value", "p_adjusted"),
]


def runs_table(runs: Sequence[Run], statuses: Mapping[str, str]) -> pd.DataFrame:
    """A row per run, in their order; what a run has not come to is missing.

    Args:
        statuses: of the runs by name. Where a run's files cannot be read, the table says so in place of it.
    """
    rows = []
    for run in runs:
        row: dict[str, Any] = {"condition": run.condition, "seed": run.seed, "run": run.name}
        row["status"] = statuses[run.name]
        try:
            if is_trained(run):
                row |= _training_numbers(run)
                if is_probed(run):
                    row |= _probe_numbers(run)
        except (ValueError, KeyError) as error:
            reason = f"a JSON file lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            row["status"] = f"damaged: {reason}"
        rows.append(row)
    return pd.DataFrame(rows, columns=[*ABOUT, *TRAINING, *PROBE, *CELLS])


def _training_numbers(run: Run) -> dict[str, Any]:
    row: dict[str, Any] = {"step": read_json(run.directory / "hf" / RUN_FILE)["step"]}
    curves = training_curves(run.directory)
    if curves is not None:
        accuracy = curves["accuracy"].dropna()
        solved = accuracy.index[accuracy >= SOLVED]
        row |= {"validation_accuracy": accuracy.iloc[-1]} if len(accuracy) else {}
        row |= {"first_solved_step": solved[0]} if len(solved) else {}
    folder = run.directory / "probe"
    if (folder / "effects.parquet").exists():
        effects = storage.read_effects(folder)
        if (primary_rows(effects)["scope"] == "all").any():
            row["largest_effect_step"] = largest_effect_step(effects)
    return row


def _probe_numbers(run: Run) -> dict[str, Any]:
    """Of the final probe, or where the study has none, of the last one in training."""
    if run.study.probe is None and not any((run.probed / "probe").rglob("effects.parquet")):
        return {}
    probed = load_run(run.probed)
    clean = probed.summary["clean"]
    row = {"model": probed.summary["condition"], "probe_accuracy": clean["accuracy"], "clean_nll": clean["nll"]}
    row["task_learned"] = clean["task_learned"]
    cells = primary_rows(probed.effects)
    cells = cells[cells["scope"].isin(["all", "final"]) & cells["sublayer"].isin(SUBLAYERS)]
    for cell in cells.to_dict("records"):
        row |= {f"{what}/{cell['sublayer']}/{cell['family']}": cell[what] for what in QUANTITIES}
    if applicable := cells[cells["applicable"]].to_dict("records"):
        largest = max(applicable, key=lambda cell: cell["effect"])
        row |= {"largest_effect": largest["effect"], "largest_effect_of": f"{largest['sublayer']} {largest['family']}"}
    return row


def over_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per condition and number: median and range over the seeds that have it, and their mean with its interval.

    The seed is the top level: a Student t interval over the seeds' numbers (`stats.across_seeds`). Effects have a
    p-value of "the mean is zero" over seeds, and one adjusted (Holm) over the effects of their condition.
    """
    rows = []
    for condition, members in runs.groupby("condition", sort=False):
        found = {n: _over(members[n].dropna().to_numpy(float), n.startswith("effect/")) for n in OVER_SEEDS}
        adjusted = stats.holm(np.array([numbers["p_value"] for numbers in found.values()]))
        for (name, numbers), p_adjusted in zip(found.items(), adjusted, strict=True):
            if numbers["n_seeds"]:
                rows.append({"condition": condition, "quantity": name, **numbers, "p_adjusted": p_adjusted})
    return pd.DataFrame(rows, columns=SEED_COLUMNS)


def _over(values: np.ndarray, is_effect: bool) -> dict[str, Any]:
    """The numbers of one quantity from those of its seeds, (seeds,)."""
    if not len(values):
        return {"n_seeds": 0, "p_value": math.nan}
    mean, low, high, p_value = (float(number[0]) for number in stats.across_seeds(values[:, None]))
    spread = {"median": float(np.median(values)), "smallest": float(values.min()), "largest": float(values.max())}
    numbers = {"n_seeds": len(values), **spread, "mean": mean, "ci_low": low, "ci_high": high}
    return {**numbers, "p_value": p_value if is_effect else math.nan}


def write_tables(directory: Path, runs: pd.DataFrame, seeds: pd.DataFrame) -> list[Path]:
    """`study` (a row per run) and `study_seeds` (over seeds), as .parquet and .csv; each file is replaced at once."""
    written = []
    for name, table in (("study", runs), ("study_seeds", seeds)):
        for suffix, write in ((".parquet", table.to_parquet), (".csv", table.to_csv)):
            path = directory / f"{name}{suffix}"
            with replacing(path, shared=True) as part:
                write(part, index=False)
            written.append(path)
    return written


def format_runs(runs: pd.DataFrame) -> str:
    """The runs' table for people."""
    width = max(map(len, ["condition", *runs["condition"]]))
    lines = [
        f"{'condition':<{width}} {'seed':>4} {'step':>6} {'accuracy':>8} {'solved at':>9} "
        f"{'clean NLL':>9} {'learned':>7}  {'largest effect (nats)':<32} status"
    ]
    for row in runs.to_dict("records"):
        learned = {True: "yes", False: "no"}.get(row["task_learned"], "—")
        largest = "—" if _missing(row["largest_effect"]) else f"{row['largest_effect']:+.4f} {row['largest_effect_of']}"
        lines.append(
            f"{row['condition']:<{width}} {row['seed']:>4} {_number(row['step'], '.0f'):>6} "
            f"{_number(row['validation_accuracy'], '.4f'):>8} {_number(row['first_solved_step'], '.0f'):>9} "
            f"{_number(row['clean_nll'], '.4f'):>9} {learned:>7}  {largest:<32} {row['status']}"
        )
    return "\n".join(lines)


def format_seeds(runs: pd.DataFrame, seeds: pd.DataFrame) -> str:
    """For each condition what its seeds have in common: median [range], and of effects mean [95 % t interval]."""
    lines: list[str] = []
    for condition, members in runs.groupby("condition", sort=False):
        finished = members[members["status"] == FINISHED]
        probed = members["task_learned"].dropna()
        lines.append(
            f"{condition}: {len(finished)} of {len(members)} runs finished "
            f"(seeds {', '.join(map(str, finished['seed'])) or 'none'}), "
            f"{int(probed.astype(bool).sum())} of {len(probed)} probed models have learned the task"
        )
        if seeds.empty:
            continue
        rows = seeds[seeds["condition"] == condition].to_dict("records")
        found = {row["quantity"]: row for row in rows}
        for name, what, form in (
            ("validation_accuracy", "validation accuracy", ".4f"),
            ("first_solved_step", f"first step of accuracy {SOLVED}", ".0f"),
            ("clean_nll", "clean NLL (nats)", ".4f"),
        ):
            if name in found:
                lines.append(f"  {what}: {_spread(found[name], form)} in {found[name]['n_seeds']} seeds")
        lines += _cell_lines(found)
    return "\n".join(lines)


def _cell_lines(found: Mapping[str, Mapping[Any, Any]]) -> list[str]:
    lines = []
    for sublayer in SUBLAYERS:
        for family in FAMILIES:
            mass, effect = (f"{what}/{sublayer}/{family}" for what in QUANTITIES)
            if mass not in found:
                continue
            line = f"  {sublayer:<10} {family:<15} {_spread(found[mass], '.3f'):<22}"
            if effect in found:
                row = found[effect]
                interval = f"{row['mean']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
                line += f" {_spread(row, '+.4f'):<30} {interval if row['n_seeds'] > 1 else '—':<30}"
                line += f" {_number(row['p_adjusted'], '.4f'):>7}"
            lines.append(line.rstrip())
    heading = f"  {'sublayer':<10} {'family':<15} {'mass':<22} {'ΔNLL (nats)':<30} {'mean [95 % CI]':<30} {'p adj.':>7}"
    return [heading, *lines] if lines else []


def _spread(row: Mapping[Any, Any], form: str) -> str:
    return f"{row['median']:{form}} [{row['smallest']:{form}}, {row['largest']:{form}}]"


def _number(value: Any, form: str) -> str:
    return "—" if _missing(value) else format(value, form)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


__all__ = ["format_runs", "format_seeds", "over_seeds", "runs_table", "write_tables"]
