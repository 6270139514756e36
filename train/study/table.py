"""The tables of a study: a row for each run, and over the seeds of each condition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
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
from probe.vocabulary import MARGIN, READ_SUBLAYERS, harm_sign, primary_rows, whole_depth
from train.study.description import StudyRun
from train.study.runs import FINISHED, damaged, is_probed, is_trained

SOLVED = 0.99
"""Validation accuracy from which the task is solved."""
QUANTITIES = ("mass", "harm", "strength")
CELLS = [f"{what}/{sublayer}/{family}" for sublayer in READ_SUBLAYERS for family in FAMILIES for what in QUANTITIES]
"""Columns of the runs' table, over the whole depth: mass, and harm (nats of margin) and strength of masking."""
ABOUT = ["condition", "seed", "run", "status"]
TRAINING = ["step", "validation_accuracy", "first_solved_step", "largest_harm_step"]
PROBE = ["model", "probe_accuracy", "clean_margin", "task_learned", "largest_strength", "largest_strength_of"]
OVER_SEEDS = ["validation_accuracy", "first_solved_step", "probe_accuracy", "clean_margin", "largest_strength", *CELLS]
SEED_COLUMNS = [
    *("condition", "quantity", "n_seeds", "median", "smallest", "largest"),
    *("mean", "ci_low", "ci_high", "p_value", "p_adjusted"),
]


def runs_table(runs: Sequence[StudyRun], statuses: Mapping[str, str]) -> pd.DataFrame:
    """A row per run; what a run has not reached is missing.

    Args:
        statuses: by the run's name. A run whose files cannot be read gets the reason instead.
    """
    rows = []
    for run in runs:
        row = {"condition": run.condition, "seed": run.seed, "run": run.name, "status": statuses[run.name]}
        try:
            if is_trained(run):
                row |= _training_numbers(run)
                if is_probed(run):
                    row |= _probe_numbers(run)
        except (ValueError, KeyError) as error:
            lacks = f"a JSON file lacks {error}"
            row["status"] = damaged(ValueError(lacks) if isinstance(error, KeyError) else error)
        rows.append(row)
    return pd.DataFrame(rows, columns=[*ABOUT, *TRAINING, *PROBE, *CELLS])


def _training_numbers(run: StudyRun) -> dict[str, Any]:
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
        cells = whole_depth(primary_rows(effects)).dropna(subset="effect")
        if len(cells):
            harm = harm_sign(MARGIN) * cells["effect"].to_numpy()
            row["largest_harm_step"] = int(cells["step"].to_numpy()[harm.argmax()])
    return row


def _probe_numbers(run: StudyRun) -> dict[str, Any]:
    """Numbers of the final probe or, if the study has none, of the last one in training."""
    if run.study.probe is None and not any((run.probed / "probe").rglob("effects.parquet")):
        return {}
    probed = load_run(run.probed)
    clean = probed.summary["clean"]
    row = {"model": probed.summary["condition"], "probe_accuracy": clean["accuracy"], "clean_margin": clean[MARGIN]}
    row |= {"task_learned": clean["task_learned"]}
    cells = whole_depth(primary_rows(probed.effects))
    for cell in cells.assign(harm=harm_sign(MARGIN) * cells["effect"]).to_dict("records"):
        row |= {f"{what}/{cell['sublayer']}/{cell['family']}": cell[what] for what in QUANTITIES}
    if strong := cells.dropna(subset="strength").to_dict("records"):
        largest = max(strong, key=lambda cell: cell["strength"])
        of = f"{largest['sublayer']} {largest['family']}"
        row |= {"largest_strength": largest["strength"], "largest_strength_of": of}
    return row


def over_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per condition and quantity: median and range over the seeds that have it, and their mean with its interval.

    The interval is Student's t over seeds (`stats.across_seeds`). Harm also has the p-value of "the mean over
    seeds is zero", raw and adjusted (Holm) over the families of its condition.
    """
    rows = []
    for condition, members in runs.groupby("condition", sort=False):
        columns = {name: members[name].dropna().to_numpy(float) for name in OVER_SEEDS}
        found = [_summary(name, values) for name, values in columns.items() if len(values)]
        adjusted = stats.holm(np.array([numbers["p_value"] for numbers in found]))
        for numbers, p_adjusted in zip(found, adjusted, strict=True):
            rows.append({"condition": condition, **numbers, "p_adjusted": p_adjusted})
    return pd.DataFrame(rows, columns=SEED_COLUMNS)


def _summary(quantity: str, values: np.ndarray) -> dict[str, Any]:
    """The row of one quantity, from its values (seeds,)."""
    mean, low, high, p_value = (float(number[0]) for number in stats.across_seeds(values[:, None]))
    return {
        "quantity": quantity,
        "n_seeds": len(values),
        "median": float(np.median(values)),
        "smallest": float(values.min()),
        "largest": float(values.max()),
        "mean": mean,
        "ci_low": low,
        "ci_high": high,
        "p_value": p_value if quantity.startswith("harm/") else math.nan,
    }


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
    line = f"{{:<{width}}} {{:>4}} {{:>6}} {{:>8}} {{:>9}} {{:>9}} {{:>7}}  {{:<32}} {{}}"
    heads = ("step", "accuracy", "solved at", "margin", "learned", "largest strength")
    lines = [line.format("condition", "seed", *heads, "status")]
    for row in runs.to_dict("records"):
        numbers = (
            _number(row["step"], ".0f"),
            _number(row["validation_accuracy"], ".4f"),
            _number(row["first_solved_step"], ".0f"),
            _number(row["clean_margin"], ".2f"),
            {True: "yes", False: "no"}.get(row["task_learned"], "—"),
            _number(row["largest_strength"], "+.1%", f" {row['largest_strength_of']}"),
        )
        lines.append(line.format(row["condition"], row["seed"], *numbers, row["status"]))
    return "\n".join(lines)


def format_seeds(runs: pd.DataFrame, seeds: pd.DataFrame) -> str:
    """For each condition what its seeds have in common: median [range], and of strengths, or harm where there is none,
    mean [95 % t interval]."""
    lines: list[str] = []
    for condition, members in runs.groupby("condition", sort=False):
        finished = members[members["status"] == FINISHED]
        probed = members["task_learned"].dropna()
        lines.append(
            f"{condition}: {len(finished)} of {len(members)} runs finished "
            f"(seeds {', '.join(map(str, finished['seed'])) or 'none'}), "
            f"{int(probed.astype(bool).sum())} of {len(probed)} probed models have learned the task"
        )
        found = {row["quantity"]: row for row in seeds[seeds["condition"] == condition].to_dict("records")}
        for name, what, form in (
            ("validation_accuracy", "validation accuracy", ".4f"),
            ("first_solved_step", f"first step of accuracy {SOLVED}", ".0f"),
            ("clean_margin", "clean margin (nats)", ".2f"),
        ):
            if name in found:
                lines.append(f"  {what}: {_spread(found[name], form)} in {found[name]['n_seeds']} seeds")
        lines += _cell_lines(found)
    return "\n".join(lines)


def _cell_lines(found: Mapping[str, Mapping[Any, Any]]) -> list[str]:
    line = "  {:<10} {:<15} {:<22} {:<30} {:<30} {:>7}"
    lines = []
    for sublayer, family in product(READ_SUBLAYERS, FAMILIES):
        mass, harm, strength = (found.get(f"{what}/{sublayer}/{family}") for what in QUANTITIES)
        if mass is None:
            continue
        numbers = ["", "", ""]
        if harm is not None:
            shown, form = (harm, "+.4f") if strength is None else (strength, "+.1%")
            interval = f"{shown['mean']:{form}} [{shown['ci_low']:{form}}, {shown['ci_high']:{form}}]"
            numbers = [_spread(shown, form), interval if shown["n_seeds"] > 1 else "—"]
            numbers.append(_number(harm["p_adjusted"], ".4f"))
        lines.append(line.format(sublayer, family, _spread(mass, ".3f"), *numbers).rstrip())
    heading = line.format("sublayer", "family", "mass", "strength, or nats", "mean [95 % CI]", "p adj.")
    return [heading, *lines] if lines else []


def _spread(row: Mapping[Any, Any], form: str) -> str:
    return f"{row['median']:{form}} [{row['smallest']:{form}}, {row['largest']:{form}}]"


def _number(value: Any, form: str, unit: str = "") -> str:
    return "—" if pd.isna(value) else f"{value:{form}}{unit}"
