"""What probed runs say, as text: the claims, and for a file the tables that they rest on.

Effects are strengths: the harm of an ablation, which is the fall of the margin, as a share of the clean margin.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from attnres.text import printable
from probe import vocabulary as words
from probe.ablation.interventions import MatchedMass
from probe.ablation.observer import GEOMETRY
from probe.analysis import stats
from probe.analysis.emergence import OVER_SEEDS, SPREAD, Emergence, after_accuracy, over_seeds
from probe.files.runs import ProbedRun, groups_of_seeds
from probe.report.view import fill
from probe.vocabulary import Route, primary_rows, whole_depth

Row = Mapping[Any, Any]

WIDTH = 120
"""Of the lines of the claims."""
LINES = {"C2": 2}
"""Of claims that take more than one."""
KEY = (
    "Percentages: harm, how much of the margin (nats) it costs to mask a route, with 95 % intervals; (0.39, 10 %): "
    "mass, harm; since, at: steps of training. Redundancy: what two families cost more together than one by one. "
    "*: a motif of the study."
)
"""To what the claims say."""
HEADING = textwrap.fill(
    f"What depth routing does. {KEY} +2: two more statements, in report.txt with all the rest.", WIDTH
)
EFFECT_ROW = "  {:>6} {:>7} {:>8} {:>30} {:>7} {:>8}".format
MOTIF_ROW = "{:<30} {:<10} {:>20} {:>7} {:>5} {:>23}  {:>20} {:>20} {:>17}".format
CLEAN = "{}: accuracy {accuracy:.3f}, margin {logit_diff:.2f}"
RESTS_ON = (
    "{}: accuracy {accuracy:.4f} (plateau {plateau_accuracy:.4f}), margin {logit_diff:.2f} nats; {n_sequences} "
    "sequences, {n_queries} queries"
)
NOT_LEARNED = (
    "NOT LEARNED: {} has accuracy {accuracy:.4f} (plateau {plateau_accuracy:.4f}) (at least {accuracy_low:.4f}): none "
    "of its effects, dissociations or motifs speaks of the task"
)
FLIP = (
    "  flip test: follows what is asked for {follows_queried:.4f} (n = {n_queried}), another value {follows_other:.4f} "
    "(n = {n_other})"
)
READS = (
    "  {sublayer} reads: {n_sources:.1f} sources, effectively {effective_sources:.1f}, of different direction "
    "{effective_distinct_sources:.1f}; routing entropy {entropy:.2f} nats"
)
MOTIF = (
    "  motif: {route}, {motif[strength]:.1%} of the margin [{motif[strength_low]:.1%}, {motif[strength_high]:.1%}] "
    "({motif[n_reads]} reads, {motif[n_unaliased_reads]} unaliased; p adj. = {motif[p_matters]:.4f}{only})"
)
IDLE = (
    "    not necessary: {family}, mass {mass:.3f} ({aliased:.0%} of it aliased), harm equivalent to zero "
    "(p = {p_equivalent_adjusted:.4f})"
)
ESTIMATED = "  estimated against exact ({grid}, {positions} positions): Spearman {spearman:.2f} over {n_cells} cells"


def share_with_interval(row: pd.Series) -> str:
    """The strength of a row, as in "83 % [79, 86]"."""
    numbers = (100 * row[name] for name in ("strength", "strength_low", "strength_high"))
    return "{:z.0f} % [{:z.0f}, {:z.0f}]".format(*numbers)


def claims(run: ProbedRun) -> list[str]:
    """What is known of a model, in at most seven lines: one for the model and what was tested, and the claims."""
    coverage = [statement for claim in run.claims if claim.claim == "coverage" for statement in claim.statements]
    lines = _filled(f"{_about(run)};", coverage, 1) if coverage else [_about(run)]
    for claim in run.claims:
        if claim.claim != "coverage":
            lines += _filled(f"  {claim.name}: {claim.verdict}.", claim.statements, LINES.get(claim.claim, 1))
    return lines


def claims_in_full(run: ProbedRun) -> str:
    """All that the claims say of a model."""
    return "\n".join([_about(run), *(f"  {claim}" for claim in run.claims)]) + "\n"


def _about(run: ProbedRun) -> str:
    return fill(CLEAN, run.label, **run.summary["clean"])


def _filled(head: str, statements: Sequence[str], most_lines: int) -> list[str]:
    """`head` and as many of the statements as fit into lines of `WIDTH`; "+2" stands for two more. One always stays."""
    for shown in range(len(statements), 0, -1):
        left = [f"+{len(statements) - shown}"] if shown < len(statements) else []
        text = f"{head} {'; '.join([*statements[:shown], *left])}"
        lines = textwrap.wrap(text, WIDTH, subsequent_indent="     ", break_long_words=False, break_on_hyphens=False)
        if len(lines) <= most_lines:
            return lines
    return lines


def mass_effect_table(runs: Sequence[ProbedRun]) -> str:
    """Family x sublayer: mass (and what it would be with equal weights), strength with its 95 % interval and adjusted
    p-value of the harm, and that of taking the same mass from other sources; a group of columns for each run."""
    group = EFFECT_ROW("mass", "(even)", "aliased", "strength [95 % CI]", "p adj.", "control")
    columns = f"{'sublayer':<10} {'family':<15}" + group * len(runs)
    header = f"{'':<10} {'':<15}" + "".join(f"  {run.label:^{len(group) - 2}}" for run in runs)
    numbers, absent = [_depth_numbers(run) for run in runs], EFFECT_ROW("—", "—", "—", "not probed", "—", "—")
    lines = [header, columns, "-" * len(columns)]
    sublayers = words.present(pd.concat([run.effects["sublayer"] for run in runs]), words.READ_SUBLAYERS)
    lines += [
        f"{sublayer:<10} {family:<15}" + "".join(of_run.get((sublayer, family), absent) for of_run in numbers)
        for sublayer, family in product(sublayers, words.FAMILIES)
    ]
    return "\n".join(lines)


def _depth_numbers(run: ProbedRun) -> dict[tuple[str, str], str]:
    """(sublayer, family) -> a run's columns in the table."""
    control = whole_depth(primary_rows(run.effects, kind=MatchedMass.kind))
    control = control[control["no_strength"] == ""].set_index(["sublayer", "family"])["strength"].map("{:+.1%}".format)
    numbers = {}
    for row in whole_depth(primary_rows(run.effects)).to_dict("records"):
        place = row["sublayer"], row["family"]
        masses = [fill("{:.3f}", row[name]) for name in ("mass", "mass_uniform", "aliased_mass")]
        effect, p_adjusted = "not applicable", "—"
        if row["applicable"]:
            effect = fill("{strength:+.1%} [{strength_low:+.1%}, {strength_high:+.1%}]", **row)  # type: ignore[arg-type]
            if row["no_strength"]:  # in nats of the margin's fall
                effect = fill(
                    "{:+.3f} nats [{:+.3f}, {:+.3f}]", *(-row[name] for name in ("effect", "ci_high", "ci_low"))
                )
            p_adjusted = fill("{:.4f}", row["p_adjusted"])
        numbers[place] = EFFECT_ROW(*masses, effect, p_adjusted, control.get(place, "—"))
    return numbers


def warnings(run: ProbedRun) -> list[str]:
    """What must be known before the numbers are read."""
    clean, few = run.summary["clean"], run.summary["probe"]["n_sequences"]
    lines = []
    if not clean["task_learned"]:
        lines.append(fill(NOT_LEARNED, run.label, **clean))
    if not_finite(clean):
        lines.append(
            f"NOT FINITE: the outputs of {run.label} are not numbers (its weights are NaN or infinite, or it overflows "
            f"in {run.summary['model']['dtype']}): nothing was measured"
        )
    if few < words.ENOUGH_SEQUENCES:
        lines.append(
            f"FEW SEQUENCES: {run.label} rests on {few}; under {words.ENOUGH_SEQUENCES}, intervals and p-values of "
            "skewed effects cannot be relied on"
        )
    return lines


def not_finite(clean: Row) -> bool:
    """Whether a clean model's outputs were no numbers, which a summary has as null."""
    return any(clean[metric] is None or not math.isfinite(clean[metric]) for metric in (*words.MARGINS, "nll"))


def describe(run: ProbedRun) -> str:
    """A few lines on what the table's column rests on: accuracy first, then flip test, dissociation, motifs."""
    summary = run.summary
    clean, probe, flip = summary["clean"], summary["probe"], summary["flip"]
    lines = [fill(RESTS_ON, run.label, **clean, **{name: probe[name] for name in ("n_sequences", "n_queries")})]
    if flip is not None:
        lines.append(fill(FLIP, **flip))
    if "wraps" in summary:
        lines.append(
            fill("  the vanilla model it wraps: accuracy {accuracy:.4f} on the same queries", **summary["wraps"])
        )
    unlearned = "" if clean["task_learned"] else " (NOT LEARNED)"
    for sublayer, found in summary["dissociation"].items():
        lines += [line + unlearned for line in _describe_dissociation(sublayer, found)]
    means = run.geometry.groupby("sublayer", sort=False)[["n_sources", *GEOMETRY[:3]]].mean()  # over reads
    lines += [fill(READS, **row) for row in means.reset_index().to_dict("records")]  # type: ignore[arg-type]
    for motif in summary["motifs"]:
        only = "; the only region it exists in" if motif["only_region"] else ""
        lines.append(fill(MOTIF, motif=motif, route=Route.of(motif), only=only) + unlearned)
    lines += [line + unlearned for line in _describe_coalitions(run)]
    primary = words.MASK, words.PRIMARY_METRIC
    lines += [fill(ESTIMATED, **r) for r in summary["integrated"] if (r["kind"], r["metric"]) == primary]
    return "\n".join(lines)


def _describe_dissociation(sublayer: str, found: Row) -> list[str]:
    verdicts = {True: "dissociated", False: "they agree", None: "no family matters"}
    heaviest, most_harmful = found["heaviest"], found["most_harmful"]
    strength, effect = (found[name][most_harmful] for name in ("strength", "effect"))
    has_strength = strength is not None and not math.isnan(strength)
    harm = f"{strength:.1%} of the margin" if has_strength else f"{_harm(effect)} of a margin not clear of zero"
    line = (
        "  {}: most mass {} ({:.3f}), most harm {} ({}): {}; P(one family has both) = {p_heaviest_is_most_harmful:.2f}"
    )
    about = (sublayer, heaviest, found["mass"][heaviest], most_harmful, harm, verdicts[found["dissociated"]])
    idle = found["not_necessary"]
    return [
        fill(line, *about, **found),
        *(fill(IDLE, **{**row, "aliased": row["aliased_mass"] / row["mass"]}) for row in idle),
    ]


def _harm(effect: float | None) -> str:
    """Of an effect on the margin."""
    return fill("{:.3f} nats", None if effect is None else -effect)


def _describe_coalitions(run: ProbedRun) -> list[str]:
    """Shapley values and the largest interaction of each game, as strengths, at all positions."""
    if run.coalitions is None:
        return []
    rows = run.coalitions[(run.coalitions["metric"] == words.PRIMARY_METRIC) & (run.coalitions["positions"] == "all")]
    rows = rows.join(rows["term"].str.extract(r"(?P<what>.*):(?P<families>.*)"))
    lines = []
    for (sublayer, scope), terms in rows.groupby(["sublayer", "scope"], sort=False):
        values = terms[terms["what"] == "shapley"].set_index("families")["strength"]
        shares = ", ".join(fill("{} {:+.1%}", family, value) for family, value in values.items())
        pairs = terms[terms["what"] == "interaction"]
        largest = pairs.iloc[pairs["effect"].abs().to_numpy().argmax()]
        lines.append(
            f"  Shapley values, {sublayer} at {scope}: {shares}; largest interaction "
            + fill("{families} {strength:+.1%} (p adj. = {p_adjusted:.4f})", **largest)
        )
    return lines


def describe_emergence(emergence: Emergence) -> str:
    """The motif table: when each motif holds, and when effect, mass and accuracy made half their change."""
    steps, first = emergence.accuracy["step"], emergence.table.iloc[0].to_dict()
    lines = [
        f"When motifs emerge: {printable(str(first['condition']))} (seed {first['seed']}), {len(steps)} exact probes "
        f"at steps {steps.iloc[0]} to {steps.iloc[-1]}; accuracy rose by half at step {_time(first, 'accuracy_half')}",
        MOTIF_ROW(
            *("motif (* of the study)", "status", "holds from [95 % CI]", "held", "size", "after accuracy"),
            *("half-rise of effect", "of mass", "mass after effect"),
        ),
    ]
    lines += [MOTIF_ROW(*_motif_cells(row)) for row in emergence.shown.to_dict("records")]
    if emergence.left_out:
        why = "as they were probed on other sequences than the last or not in all regions"
        lines.append(f"left out, {why}: steps {', '.join(map(str, emergence.left_out))}")
    return "\n".join(lines)


def _motif_cells(row: Row) -> list[str]:
    size = row["effect_half_size" if row["status"] == "never" else "size"]
    what, *ends = after_accuracy(row)
    return [
        f"{Route.of(row)}{' *' if row['motif'] else ''}",
        row["status"],
        _time(row, "onset" if row["status"] == "emerged" else "first_held"),
        f"{row['n_held']}/{row['n_probes']}",
        "—" if np.isnan(size) else f"{size:.0f}",
        "—" if np.isnan(ends[0]) else f"{what} {_lag(*ends)}",
        _time(row, "effect_half"),
        _time(row, "mass_half"),
        _lag(row["lag_mass_effect_low"], row["lag_mass_effect_high"]),
    ]


def _time(row: Row, name: str) -> str:
    return _spread(row[name], row[f"{name}_low"], row[f"{name}_high"])


def _spread(middle: float, low: float, high: float) -> str:
    return "—" if np.isnan(middle) else f"{middle:.0f} [{low:.0f}, {high:.0f}]"


def _lag(low: float, high: float) -> str:
    """Steps; the interval is also as wide as the distance between probes."""
    return "—" if np.isnan(low) else f"[{low:+.0f}, {high:+.0f}]"


def emergence_over_seeds(runs: Sequence[ProbedRun]) -> str:
    """Onsets and half-rises over the seeds of each experiment that has several, or an empty string."""
    lines: list[str] = []
    for seeds in _experiments([run for run in runs if run.emergence is not None]):
        table = over_seeds([run.emergence.table for run in seeds if run.emergence is not None])
        if table.empty:
            continue
        lines.append(f"When motifs emerge, {seeds[0].condition} over {len(seeds)} seeds: median [smallest, largest]")
        for row in table.to_dict("records"):
            onset, *halves = (_spread(*(row[f"{name}_{what}"] for what in SPREAD)) for name in OVER_SEEDS)
            lines.append(
                f"  {Route.of(row)!s:<28} emerged in {row['n_emerged']}, transient in {row['n_transient']}; onset "
                f"{onset}, half-rise of effect {halves[0]}, of mass {halves[1]}, of accuracy {halves[2]}"
            )
    return "\n".join(lines)


def across_seeds(runs: Sequence[ProbedRun]) -> str:
    """Effects over the seeds of each experiment that was run with several, or an empty string.

    The seed is the top level: a Student t interval over the seeds' effects, whatever the sequences say.
    """
    lines: list[str] = []
    for seeds in _experiments(runs):
        rows = pd.concat([whole_depth(primary_rows(run.effects)) for run in seeds])
        table = rows.pivot(index="seed", columns=["sublayer", "family"], values="strength").dropna(axis=1)
        if table.empty:  # the whole depth was not probed
            continue
        names = ", ".join(map(str, sorted(run.seed for run in seeds)))
        lines.append(f"{seeds[0].condition}, over {len(seeds)} seeds ({names}): strength, t interval")
        for place, numbers in zip(table.columns, np.transpose(stats.across_seeds(table.to_numpy())), strict=True):
            lines.append(fill("  {:<10} {:<15} {:+.1%} [{:+.1%}, {:+.1%}]  p = {:.4f}", *place, *numbers))
    return "\n".join(lines)


def _experiments(runs: Sequence[ProbedRun]) -> list[list[ProbedRun]]:
    """Runs that differ by their seed alone, of each experiment that has several."""
    groups = groups_of_seeds([(run.experiment, run.seed) for run in runs])
    return [[runs[place] for place in group] for group in groups if len(group) > 1]
