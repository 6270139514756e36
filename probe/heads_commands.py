"""What `attnres-probe heads` does: which attention heads a model relies on, and which cover for each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from jsonargparse import Namespace

from attnres.files import replacing_folder
from attnres.inputs import LARGEST_INTEGER, check_number
from probe.analysis.inference import Inference
from probe.commands import check_device, check_new_folder, progress, say, task_of
from probe.examples.tasks import SyntheticTask
from probe.files.checkpoints import Checkpoint, load_model
from probe.files.layout import HEADS_TABLE, PAIRS_TABLE
from probe.heads import Head, HeadsResult, measure_heads, plan
from probe.report.figures import style
from probe.report.figures.heads import plot_heads
from probe.report.text import share_with_interval
from probe.runner import check_finite
from probe.settings import check_resampling
from probe.vocabulary import LEVEL, MARGIN, MATTERS

LOOKS = 0.25
"""From this share of its weight on the answer's value, a head is said to look at it."""
MOST_LINES = 10
"""Heads that are printed, and pairs of each kind: the strongest."""


def heads(options: Namespace) -> None:
    device = _check(options)
    checkpoint = load_model(options.checkpoint)
    model, task = checkpoint.model, task_of(options, checkpoint)
    task.check_sizes(model.config)
    task.check_count(options.num_sequences)
    check_finite(model)
    examples = task.examples(options.num_sequences)
    task.check(model.config, [examples])
    model.to(device)  # type: ignore[arg-type]
    how: dict[str, Any] = {"kinds": options.kinds, "pairs": options.pairs_among}
    how |= {"batch_size": options.batch_size, "seed": options.seed}
    cost = plan(model, examples, **how)
    at_most = "at most " if _chooses(options.pairs_among, model.config) else ""
    saved = f"{at_most}{cost.forward_passes:,.0f} forward passes where a naive loop takes {cost.naive:,.0f}"
    say(f"{saved}, of {len(examples):,} sequences each", sys.stderr)
    with progress("ablating", " ablations") as on_progress:
        found = measure_heads(model, examples, **how, on_progress=on_progress)
    inference = Inference(num_resamples=options.num_resamples, seed=options.seed)
    table, pairs = found.table(inference), found.pair_table(inference)
    say(describe(checkpoint, task, found, table, pairs))
    if options.output is not None:
        _write(options.output, checkpoint, task, found, table, pairs)
        say(f"\nwritten: {options.output}")


def _check(options: Namespace) -> str:
    """Of what can be known before work starts; returns the device."""
    check_resampling(options.num_resamples, options.seed)
    check_number("--seed", options.seed, 0, LARGEST_INTEGER)
    check_new_folder(options.output)
    return check_device(options)


def _chooses(pairs_among: int, config: Any) -> bool:
    """Whether the pairs that are tested are not known before single heads are."""
    return 0 < pairs_among < config.num_hidden_layers * config.num_attention_heads


def describe(
    checkpoint: Checkpoint, task: SyntheticTask, found: HeadsResult, table: pd.DataFrame, pairs: pd.DataFrame
) -> str:
    """The answer, in a sentence for all kinds and a line for each; the strongest heads, and the strongest pairs."""
    table, pairs = (part[part["metric"] == MARGIN] for part in (table, pairs))
    margin = table["margin"].iloc[0]
    about = (
        f"heads of {checkpoint.title}, task {task.task.name}: {len(found.counts):,} sequences, "
        f"{found.counts.sum():,} answers, margin {margin:+.2f} nats"
    )
    if reason := table["no_strength"].iloc[0]:
        return f"{about}\nno shares: {reason}"
    lines = [answer(table), "", about]
    lines += [f"  {kind:<10}{_counts(found, kind, table, pairs)}" for kind in found.kinds]
    lines += ["", *_strongest_heads(found, table)]
    lines += [line for kind in found.kinds for line in _strongest_pairs(kind, pairs[pairs["kind"] == kind])]
    if len(pairs) and not found.tested.all():
        lines += [
            "",
            f"Pairs are of heads that harm most alone. Heads that cover for each other wholly do no harm alone: "
            f"--pairs_among {len(found.heads)} tests every pair.",
        ]
    return "\n".join(lines)


def answer(table: pd.DataFrame) -> str:
    """Which head the model relies on most, by each kind of ablation. `table`: rows of one metric that has strengths."""
    kinds = list(dict.fromkeys(table["kind"]))
    strongest = [table[table["kind"] == kind].sort_values("strength", kind="stable").iloc[-1] for kind in kinds]
    if all(row["p_matters"] > LEVEL for row in strongest):
        return f"No head by itself was shown to be worth more than {_percent(MATTERS)} of the margin."
    looks = _looks_up(table)
    if len({_head(row) for row in strongest}) > 1:
        named = "; ".join(f"{_head(row)} ({row['kind']}: {share_with_interval(row)})" for row in strongest)
        return f"Which head the model relies on most depends on what stands in for it: {named}.{looks}"
    shares = ", ".join(f"{share_with_interval(row)} ({row['kind']})" for row in strongest)
    most = f"{_head(strongest[0]).capitalize()} is the head that the model relies on most"
    return f"{most}: without it the margin falls by {shares}.{looks}"


def _looks_up(table: pd.DataFrame) -> str:
    """Which of the heads that matter looks most at the answer's value, if its place is known; else, which head does."""
    known = table[table["attention_to_value"].notna()].sort_values("attention_to_value", kind="stable")
    if known.empty:
        return ""
    matter = known[(known["strength"] > 0) & (known["p_matters"] <= LEVEL)]
    if len(matter) and (row := matter.iloc[-1])["attention_to_value"] >= LOOKS:
        weight = f"{_percent(row['attention_to_value'])} of its weight where the answer is asked for"
        return f" Of the heads that matter, {_head(row)} looks most at the answer's value in the context: {weight}."
    row = known.iloc[-1]
    weight = f"{_percent(row['attention_to_value'])} of its weight"
    none = " No head that matters looks much at the answer's value in the context"
    return f"{none}; {_head(row)} does most ({weight}), and costs {share_with_interval(row)} ({row['kind']})."


def _counts(found: HeadsResult, kind: str, table: pd.DataFrame, pairs: pd.DataFrame) -> str:
    """How many heads of a kind matter, and how many pairs interact."""
    heads, pairs = (part[part["kind"] == kind] for part in (table, pairs))
    matter = int(((heads["strength"] > 0) & (heads["p_matters"] <= LEVEL)).sum())
    text = f"{matter} of {len(heads)} heads matter (more than {_percent(MATTERS)} of the margin)"
    if pairs.empty:
        return text
    if reason := pairs["no_strength"].iloc[0]:
        return f"{text}; no shares of pairs, tested on {pairs['n_sequences'].iloc[0]:,} sequences: {reason}"
    clear = pairs.loc[pairs["p_matters"] <= LEVEL, "strength"]
    covers, needs = int((clear > 0).sum()), int((clear < 0).sum())
    among = "" if found.tested.all() else " among those that harm most"
    return (
        f"{text}; of {len(pairs)} pairs{among}: {covers} covering for each other, {needs} worth less without each other"
    )


def _strongest_heads(found: HeadsResult, table: pd.DataFrame) -> list[str]:
    """A line for each head, with a column for each kind."""
    largest = table.assign(size=table["strength"].abs()).groupby(["layer", "head"])["size"].max()
    header = "".join(f"{'margin lost, ' + kind if kind == found.kinds[0] else kind:<26}" for kind in found.kinds)
    has_weights = table["attention_to_value"].notna().any()
    lines = [f"{'head':<20}{header}{'weight on the value' if has_weights else ''}".rstrip()]
    for head in largest.sort_values(ascending=False, kind="stable").index[:MOST_LINES]:
        of_kinds = table[(table["layer"] == head[0]) & (table["head"] == head[1])]
        rows = [row for _, row in of_kinds.iterrows()]  # in the order of kinds
        shares = "".join(
            f"{share_with_interval(row) + (' *' if row['p_matters'] <= LEVEL else ''):<26}" for row in rows
        )
        weight = f"{rows[0]['attention_to_value']:.2f}" if has_weights else ""
        lines.append(f"  {_head(rows[0]):<18}{shares}{weight}".rstrip())
    return [*lines, f"  * more than {_percent(MATTERS)}, adjusted p ≤ {LEVEL}"]


def _strongest_pairs(kind: str, pairs: pd.DataFrame) -> list[str]:
    """A line for each pair of a kind whose interaction is clear."""
    if pairs.empty or pairs["no_strength"].iloc[0]:
        return []
    clear = pairs[pairs["p_matters"] <= LEVEL]
    clear = clear.sort_values("strength", key=abs, ascending=False, kind="stable")
    lines = ["", f"{'pairs, ' + kind:<36}{'alone':<16}{'both':<8}both less alone [95 % CI]"]
    for _, row in clear.head(MOST_LINES).iterrows():
        pair = f"layer {row['layer_a']} head {row['head_a']} + layer {row['layer_b']} head {row['head_b']}"
        alone = f"{_percent(row['strength_a'])} + {_percent(row['strength_b'])}"
        what = "cover for each other" if row["strength"] > 0 else "worth less without each other"
        lines.append(f"  {pair:<34}{alone:<16}{_percent(row['strength_both']):<8}{share_with_interval(row):<22}{what}")
    if clear.empty:
        lines.append(f"  none is shown to be more than {_percent(MATTERS)} of the margin")
    return lines


def _head(row: pd.Series) -> str:
    return str(Head(row["layer"], row["head"]))


def _percent(share: float) -> str:
    return f"{100 * share:z.0f} %"


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    task: SyntheticTask,
    found: HeadsResult,
    table: pd.DataFrame,
    pairs: pd.DataFrame,
) -> None:
    about = {"run": checkpoint.run, "condition": checkpoint.condition, "seed": checkpoint.seed, "step": checkpoint.step}
    of_margin = table[table["metric"] == MARGIN]
    reason = of_margin["no_strength"].iloc[0]
    content = about | {"task": task.settings, "answer": reason or answer(of_margin), "kinds": list(found.kinds)}
    content |= {"n_sequences": len(found.counts), "n_sequences_of_pairs": int(found.tested.sum())}
    content |= {"forward_passes": found.forward_passes, "seconds": found.seconds}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder) as part:
        table.assign(**about).to_parquet(part / HEADS_TABLE, index=False)
        pairs.assign(**about).to_parquet(part / PAIRS_TABLE, index=False)
        (part / "heads.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for kind in () if reason else found.kinds:
            style.save(plot_heads(table, pairs, kind, MARGIN, checkpoint.title), part / f"heads_{kind}")
