"""From run directories to what a person reads: the table of mass against effect, and the figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from attnres import FAMILIES
from probe import plots, results
from probe.checkpoints import read_json
from probe.motifs import primary_rows


@dataclass(frozen=True)
class ProbedRun:
    """A probed model: `effects` of one (run, step), and the summary of that probe."""

    directory: Path
    effects: pd.DataFrame
    summary: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{self.summary['condition']} (seed {self.summary['seed']}, step {self.summary['step']})"


def load_run(directory: Path) -> ProbedRun:
    """The last probed step of a folder with results; a run directory's `probe/final/` is preferred to its `probe/`.

    Raises:
        ValueError: no results there, or an incomplete set.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory: expected a run directory or a folder with effects.parquet")
    candidates = (directory / "probe" / "final", directory, directory / "probe")
    folder = next((c for c in candidates if (c / "effects.parquet").exists()), directory)
    effects = results.read_effects(folder)
    summary_path = folder / "summary.json"
    if not summary_path.exists():
        raise ValueError(f"{folder} is incomplete: it has effects.parquet but no summary.json; probe it again")
    summary = read_json(summary_path)
    return ProbedRun(directory, effects[effects["step"] == effects["step"].max()], summary)


def mass_effect_table(runs: list[ProbedRun]) -> str:
    """Family x sublayer: mass and effect on NLL with its 95 % interval, a group of columns for each run."""
    lines = []
    header = f"{'':<10} {'':<15}" + "".join(f"  {run.label:^46}" for run in runs)
    columns = f"{'sublayer':<10} {'family':<15}" + f"  {'mass':>6} {'aliased':>8} {'ΔNLL (nats) [95 % CI]':>30}" * len(
        runs
    )
    lines += [header, columns, "-" * len(columns)]
    sublayers = [s for s in ("self_attn", "mlp", "final") if any((run.effects["sublayer"] == s).any() for run in runs)]
    for sublayer in sublayers:
        scope = "final" if sublayer == "final" else "all"
        for family in FAMILIES:
            lines.append(f"{sublayer:<10} {family:<15}" + "".join(_cell(run, sublayer, scope, family) for run in runs))
    return "\n".join(lines)


def _cell(run: ProbedRun, sublayer: str, scope: str, family: str) -> str:
    rows = primary_rows(run.effects)
    rows = rows[(rows["sublayer"] == sublayer) & (rows["scope"] == scope) & (rows["family"] == family)]
    if rows.empty:
        return f"  {'—':>6} {'—':>8} {'not probed':>30}"
    row = rows.iloc[0]
    effect = (
        f"{row['effect']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]" if row["applicable"] else "not applicable"
    )
    return f"  {row['mass']:>6.3f} {row['aliased_mass']:>8.3f} {effect:>30}"


def describe(run: ProbedRun) -> str:
    """A few lines on what the table's column rests on: accuracy first, then sample, dissociation, flip test, motifs."""
    clean, probe, flip = run.summary["clean"], run.summary["probe"], run.summary["flip"]
    lines = [
        f"{run.label}: accuracy {clean['accuracy']:.4f} (plateau {clean['plateau_accuracy']:.4f}), "
        f"NLL {clean['nll']:.4f} nats; {probe['n_sequences']} sequences, {probe['n_queries']} queries"
    ]
    if not clean["task_learned"]:
        lines.append("  NOT LEARNED: clean NLL is not below half of ln K, so no effect here speaks of the task")
    if flip is not None:
        lines.append(
            f"  flip test: follows the queried key {flip['follows_queried']:.4f} (n = {flip['n_queried']}), "
            f"another key {flip['follows_other']:.4f} (n = {flip['n_other']})"
        )
    if "wraps" in run.summary:
        lines.append(
            f"  the vanilla model it wraps: accuracy {run.summary['wraps']['accuracy']:.4f} on the same queries"
        )
    for sublayer, found in run.summary["dissociation"].items():
        verdicts = {True: "they differ", False: "they agree", None: f"below what matters, {found['matters_from']:.3f}"}
        lines.append(
            f"  {sublayer}: most mass {found['heaviest']} ({found['mass'][found['heaviest']]:.3f}), "
            f"most harm {found['most_harmful']} ({found['harm'][found['most_harmful']]:+.3f} nats): "
            f"{verdicts[found['dissociated']]}"
        )
    for motif in run.summary["motifs"]:
        only = "; the only region it exists in" if motif["only_region"] else ""
        lines.append(
            f"  localised: {motif['family']} -> {motif['region']} {motif['sublayer']}, "
            f"{motif['harm_per_read']:+.3f} nats per read ({motif['n_reads']} reads, "
            f"{motif['n_unaliased_reads']} unaliased; unadjusted{only})"
        )
    return "\n".join(lines)


def training_curves(directory: Path) -> pd.DataFrame | None:
    """Validation accuracy and pairs by step, from a run's `metrics.csv`; None where there is none."""
    path = directory / "metrics.csv"
    if not path.exists():
        return None
    metrics = pd.read_csv(path)
    wanted = {"val/accuracy": "accuracy", "train/pairs": "pairs"}
    if missing := [column for column in wanted if column not in metrics.columns]:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}; was it written by attnres-train?")
    metrics = metrics.rename(columns=wanted)
    # Lightning numbers a row by its last batch, from 0: a validation sees the model of the step after.
    accuracy = metrics.assign(step=metrics["step"] + 1).groupby("step")["accuracy"].max().dropna()
    return pd.concat([accuracy, metrics.groupby("step")["pairs"].max().dropna()], axis=1).sort_index()


def write_figures(run: ProbedRun) -> list[Path]:
    """Figures of a run, into its `figures/`.

    Heat maps; and where it was probed while it trained, emergence and the heat maps of the step of the largest effect.
    """
    folder = run.directory / "figures"
    num_pairs = run.summary["num_pairs"]
    written = plots.save(plots.plot_heat_maps(run.effects, num_pairs, run.label), folder / "heat_maps")
    curves = training_curves(run.directory)
    if curves is None or not (run.directory / "probe" / "effects.parquet").exists():
        return written
    through_training = results.read_effects(run.directory / "probe")
    title = f"{run.summary['condition']}, seed {run.summary['seed']}"
    figure = plots.plot_emergence(through_training, curves, num_pairs, title)
    written += plots.save(figure, folder / "emergence")
    peak = largest_effect_step(through_training)
    figure = plots.plot_heat_maps(
        through_training[through_training["step"] == peak], num_pairs, f"{title}: step {peak}, of the largest effect"
    )
    return written + plots.save(figure, folder / "heat_maps_peak")


def largest_effect_step(effects: pd.DataFrame) -> int:
    """The probed step at which masking one family in all layers does the most harm."""
    rows = primary_rows(effects)
    rows = rows[(rows["scope"] == "all") & rows["applicable"]]
    return int(rows["step"].to_numpy()[rows["effect"].to_numpy().argmax()])
