"""What probed runs say, as text: the table of mass against effect, and what it rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from attnres import FAMILIES
from probe.ablation.interventions import MatchedMass
from probe.ablation.observer import GEOMETRY
from probe.analysis import stats
from probe.analysis.emergence import SPREAD, Emergence, after_accuracy, over_seeds
from probe.analysis.motifs import motif_name, primary_rows
from probe.files.runs import ProbedRun, groups_of_seeds
from probe.vocabulary import ENOUGH_SEQUENCES

NO_FIGURES = "no figures: no run holds effects of mask_renormalise"


def mass_effect_table(runs: list[ProbedRun]) -> str:
    """Family x sublayer: mass (and what it would be with equal weights), effect on NLL with its 95 % interval and
    adjusted p-value, and that of taking the same mass from other sources; a group of columns for each run."""
    group = f"  {'mass':>6} {'(even)':>7} {'aliased':>8} {'ΔNLL (nats) [95 % CI]':>30} {'p adj.':>7} {'control':>8}"
    header = f"{'':<10} {'':<15}" + "".join(f"  {run.label:^{len(group) - 2}}" for run in runs)
    columns = f"{'sublayer':<10} {'family':<15}" + group * len(runs)
    lines = [header, columns, "-" * len(columns)]
    sublayers = [s for s in ("self_attn", "mlp", "final") if any((run.effects["sublayer"] == s).any() for run in runs)]
    for sublayer in sublayers:
        scope = "final" if sublayer == "final" else "all"
        lines += [
            f"{sublayer:<10} {family:<15}" + "".join(_cell(run, sublayer, scope, family) for run in runs)
            for family in FAMILIES
        ]
    return "\n".join(lines)


def _cell(run: ProbedRun, sublayer: str, scope: str, family: str) -> str:
    rows, control = (
        rows[(rows["sublayer"] == sublayer) & (rows["scope"] == scope) & (rows["family"] == family)]
        for rows in (primary_rows(run.effects), primary_rows(run.effects, kind=MatchedMass.kind))
    )
    if rows.empty:
        return f"  {'—':>6} {'—':>7} {'—':>8} {'not probed':>30} {'—':>7} {'—':>8}"
    row = rows.iloc[0]
    other = f"{control['effect'].iloc[0]:+.4f}" if control["applicable"].any() else "—"
    masses = f"  {row['mass']:>6.3f} {row['mass_uniform']:>7.3f} {row['aliased_mass']:>8.3f}"
    if not row["applicable"]:
        return f"{masses} {'not applicable':>30} {'—':>7} {other:>8}"
    effect = f"{row['effect']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
    return f"{masses} {effect:>30} {row['p_adjusted']:>7.4f} {other:>8}"


def warnings(run: ProbedRun) -> list[str]:
    """What must be known before the numbers are read."""
    clean, probe = run.summary["clean"], run.summary["probe"]
    lines = []
    if not clean["task_learned"]:
        lines.append(
            f"NOT LEARNED: {run.label} has accuracy {clean['accuracy']:.4f} (plateau {clean['plateau_accuracy']:.4f}) "
            "and clean NLL not below half of ln K: none of its effects, dissociations or motifs speaks of the task"
        )
    if probe["n_sequences"] < ENOUGH_SEQUENCES:
        lines.append(
            f"FEW SEQUENCES: {run.label} rests on {probe['n_sequences']}; under {ENOUGH_SEQUENCES}, intervals and "
            "p-values of skewed effects cannot be relied on"
        )
    return lines


def describe(run: ProbedRun) -> str:
    """A few lines on what the table's column rests on: accuracy first, then flip test, dissociation, motifs."""
    clean, probe, flip = run.summary["clean"], run.summary["probe"], run.summary["flip"]
    lines = [
        f"{run.label}: accuracy {clean['accuracy']:.4f} (plateau {clean['plateau_accuracy']:.4f}), "
        f"NLL {clean['nll']:.4f} nats; {probe['n_sequences']} sequences, {probe['n_queries']} queries"
    ]
    if flip is not None:
        lines.append(
            f"  flip test: follows the queried key {flip['follows_queried']:.4f} (n = {flip['n_queried']}), "
            f"another key {flip['follows_other']:.4f} (n = {flip['n_other']})"
        )
    if "wraps" in run.summary:
        lines.append(
            f"  the vanilla model it wraps: accuracy {run.summary['wraps']['accuracy']:.4f} on the same queries"
        )
    unlearned = "" if clean["task_learned"] else " (NOT LEARNED)"
    for sublayer, found in run.summary["dissociation"].items():
        lines += [line + unlearned for line in _describe_dissociation(sublayer, found)]
    lines += _describe_geometry(run)
    lines += [f"  {_describe_motif(motif)}{unlearned}" for motif in run.summary["motifs"]]
    lines += [f"  {line}{unlearned}" for line in _describe_coalitions(run)]
    for found in run.summary["first_order"]:
        if (found["kind"], found["metric"]) == ("mask_renormalise", "nll"):
            lines.append(
                f"  first order against exact ({found['grid']}, {found['positions']} positions): "
                f"Spearman {found['spearman']:.2f} over {found['n_cells']} cells"
            )
    return "\n".join(lines)


def _describe_dissociation(sublayer: str, found: dict[str, Any]) -> list[str]:
    verdicts = {True: "dissociated", False: "they agree", None: f"no harm that matters ({found['matters_from']:.3f})"}
    lines = [
        f"  {sublayer}: most mass {found['heaviest']} ({found['mass'][found['heaviest']]:.3f}), "
        f"most harm {found['most_harmful']} ({found['effect'][found['most_harmful']]:+.3f} nats): "
        f"{verdicts[found['dissociated']]}; P(one family has both) = {found['p_heaviest_is_most_harmful']:.2f}"
    ]
    for idle in found["mass_without_role"]:
        aliased = idle["aliased_mass"] / idle["mass"]
        lines.append(
            f"    mass without role: {idle['family']}, mass {idle['mass']:.3f} ({aliased:.0%} of it aliased), effect "
            f"equivalent to zero (p = {idle['p_equivalent_adjusted']:.4f})"
        )
    return lines


def _describe_geometry(run: ProbedRun) -> list[str]:
    """How many sources reads have, use, and use that differ; mean over reads."""
    means = run.geometry.groupby("sublayer", sort=False)[["n_sources", *GEOMETRY[:3]]].mean()
    return [
        f"  {sublayer} reads: {row['n_sources']:.1f} sources, effectively {row['effective_sources']:.1f}, of different "
        f"direction {row['effective_distinct_sources']:.1f}; routing entropy {row['entropy']:.2f} nats"
        for sublayer, row in means.iterrows()
    ]


def _describe_motif(motif: dict[str, Any]) -> str:
    only = "; the only region it exists in" if motif["only_region"] else ""
    return (
        f"motif: {motif_name(motif['sublayer'], motif['family'], motif['region'])}, "
        f"{motif['per_read']:+.3f} nats per read "
        f"({motif['n_reads']} reads, {motif['n_unaliased_reads']} unaliased; p adj. = {motif['p_adjusted']:.4f}{only})"
    )


def _describe_coalitions(run: ProbedRun) -> list[str]:
    """Shapley values and the largest interaction of each game, in NLL at all positions."""
    if run.coalitions is None:
        return []
    rows = run.coalitions[(run.coalitions["metric"] == "nll") & (run.coalitions["positions"] == "all")]
    lines = []
    for (sublayer, scope), terms in rows.groupby(["sublayer", "scope"], sort=False):
        shares = ", ".join(
            f"{row['term'].removeprefix('shapley:')} {row['effect']:+.3f}"
            for row in terms.to_dict("records")
            if row["term"].startswith("shapley:")
        )
        pairs = terms[terms["term"].str.startswith("interaction:")]
        largest = max(pairs.to_dict("records"), key=lambda row: abs(row["effect"]))
        pair = largest["term"].removeprefix("interaction:")
        lines.append(
            f"Shapley values, {sublayer} at {scope}: {shares}; largest interaction {pair} {largest['effect']:+.3f} "
            f"(p adj. = {largest['p_adjusted']:.4f})"
        )
    return lines


def describe_emergence(emergence: Emergence) -> str:
    """The motif table: when each motif holds, and when effect, mass and accuracy made half their change."""
    table, steps = emergence.shown, emergence.accuracy["step"]
    first = emergence.table.iloc[0].to_dict()
    lines = [
        f"When motifs emerge: {first['condition']} (seed {first['seed']}), {len(steps)} exact probes at steps "
        f"{steps.iloc[0]} to {steps.iloc[-1]}; accuracy rose by half at step {_time(first, 'accuracy_half')}",
        f"{'motif (* of the study)':<30} {'status':<10} {'holds from [95 % CI]':>20} {'held':>7} {'pairs':>5} "
        f"{'after accuracy':>23}  {'half-rise of effect':>20} {'of mass':>20} {'mass after effect':>17}",
    ]
    for row in table.to_dict("records"):
        name = motif_name(row["sublayer"], row["family"], row["region"]) + (" *" if row["motif"] else "")
        begin = "onset" if row["status"] == "emerged" else "first_held"
        pairs = row["effect_half_pairs" if row["status"] == "never" else "pairs"]
        pairs = "—" if np.isnan(pairs) else f"{pairs:.0f}"
        held = f"{row['n_held']}/{row['n_probes']}"
        lines.append(
            f"{name:<30} {row['status']:<10} {_time(row, begin):>20} {held:>7} {pairs:>5} "
            f"{_after_accuracy(row):>23}  {_time(row, 'effect_half'):>20} {_time(row, 'mass_half'):>20} "
            f"{_lag(row['lag_mass_effect_low'], row['lag_mass_effect_high']):>17}"
        )
    if emergence.left_out:
        steps = ", ".join(map(str, emergence.left_out))
        lines.append(
            f"left out, as they were probed on other sequences than the last or not in all regions: steps {steps}"
        )
    return "\n".join(lines)


def _time(row: Mapping[Any, Any], name: str) -> str:
    if np.isnan(row[name]):
        return "—"
    return f"{row[name]:.0f} [{row[f'{name}_low']:.0f}, {row[f'{name}_high']:.0f}]"


def _after_accuracy(row: Mapping[Any, Any]) -> str:
    what, low, high = after_accuracy(row)
    return "—" if np.isnan(low) else f"{what} {_lag(low, high)}"


def _lag(low: float, high: float) -> str:
    """Steps; the interval is also as wide as the distance between probes."""
    return "—" if np.isnan(low) else f"[{low:+.0f}, {high:+.0f}]"


def emergence_over_seeds(runs: Sequence[ProbedRun], emergences: Sequence[Emergence | None]) -> str:
    """Onsets and half-rises over the seeds of each experiment that has several, or an empty string."""
    found = [(run, each) for run, each in zip(runs, emergences, strict=True) if each is not None]
    lines: list[str] = []
    for group in groups_of_seeds([(run.experiment, run.summary["seed"]) for run, _ in found]):
        if len(group) == 1:
            continue
        table = over_seeds([found[place][1].table for place in group])
        if table.empty:
            continue
        condition = found[group[0]][0].summary["condition"]
        lines.append(f"When motifs emerge, {condition} over {len(group)} seeds: median [smallest, largest]")
        for row in table.to_dict("records"):
            spreads = [
                "—"
                if np.isnan(row[f"{name}_median"])
                else "{:.0f} [{:.0f}, {:.0f}]".format(*(row[f"{name}_{what}"] for what in SPREAD))
                for name in ("onset", "effect_half", "mass_half", "accuracy_half")
            ]
            name = motif_name(row["sublayer"], row["family"], row["region"])
            lines.append(
                f"  {name:<28} emerged in {row['n_emerged']}, transient in {row['n_transient']}; onset {spreads[0]}, "
                f"half-rise of effect {spreads[1]}, of mass {spreads[2]}, of accuracy {spreads[3]}"
            )
    return "\n".join(lines)


def across_seeds(runs: list[ProbedRun]) -> str:
    """Effects over the seeds of each experiment that was run with several, or an empty string.

    The seed is the top level: a Student t interval over the seeds' effects, whatever the sequences say.
    """
    lines: list[str] = []
    for group in groups_of_seeds([(run.experiment, run.summary["seed"]) for run in runs]):
        if len(group) < 2:
            continue
        members = {runs[place].summary["seed"]: runs[place] for place in group}
        condition = runs[group[0]].summary["condition"]
        rows = pd.concat([primary_rows(run.effects) for run in members.values()])
        rows = rows[rows["scope"].isin(["all", "final"]) & rows["sublayer"].isin(["self_attn", "mlp", "final"])]
        table = rows.pivot(index="seed", columns=["sublayer", "family"], values="effect").dropna(axis=1)
        mean, low, high, p_value = stats.across_seeds(table.to_numpy())
        lines.append(
            f"{condition}, over {len(members)} seeds ({', '.join(map(str, sorted(members)))}): ΔNLL, t interval"
        )
        lines += [
            f"  {sublayer:<10} {family:<15} {m:+.4f} [{lo:+.4f}, {hi:+.4f}]  p = {p:.4f}"
            for (sublayer, family), m, lo, hi, p in zip(table.columns, mean, low, high, p_value, strict=True)
        ]
    return "\n".join(lines)
