"""What `attnres-probe trace` does: where in depth and sequence a flipped value becomes another answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
from jsonargparse import Namespace

from attnres.files import replacing_folder
from attnres.tasks import Task
from probe.analysis.inference import Inference
from probe.commands import check_device, check_new_folder, progress, say, task_of
from probe.examples.tasks import TokenTask
from probe.files.checkpoints import Checkpoint, load_model
from probe.files.layout import TRACE_ABOUT, TRACE_TABLE
from probe.report.figures import style
from probe.report.figures.trace import plot_trace
from probe.runner import check_finite
from probe.settings import check_resampling
from probe.trace import DIRECTIONS, Flips, TraceResult, plan
from probe.trace import trace as run_trace
from probe.trace.of_tasks import flips_of_task, token_kinds

MOST_LINES = 12
"""Sites of a kind that are printed, the strongest."""
SHOWN = 0.05
"""The least share of the answer, either way, of what is printed."""


def trace(options: Namespace) -> None:
    device = _check(options)
    checkpoint = load_model(options.checkpoint)
    task = task_of(options, checkpoint)
    if not isinstance(task, TokenTask):  # prompts in words differ in length when a value is changed
        raise ValueError("a trace takes a task in token ids, not one in words")
    task.check_sizes(checkpoint.model.config)
    task.check_count(options.num_sequences)
    check_finite(checkpoint.model)
    flips, places = flips_of_task(task.task, options.num_sequences, options.seed)
    checkpoint.model.to(device)  # type: ignore[arg-type]
    how = {"sites": options.sites, "batch_size": options.batch_size, "positions": places}
    cost = plan(checkpoint.model, flips, **how)
    saved = f"{cost.forward_passes:,.0f} forward passes where a naive loop takes {cost.naive:,}"
    say(f"{saved}, of {len(flips):,} contexts each", sys.stderr)
    with progress("patching", " passes") as on_progress:
        found = run_trace(checkpoint.model, flips, **how, on_progress=on_progress)
    table = found.table(Inference(num_resamples=options.num_resamples, seed=options.seed))
    say(describe(checkpoint, task.task, flips, found, table))
    if options.output is not None:
        tokens = table["position"].map(token_kinds(task.task, flips, places))
        _write(options.output, checkpoint, task.task, found, table.assign(token=tokens))
        say(f"\nwritten: {options.output}")


def _check(options: Namespace) -> str:
    """Of what can be known before work starts; returns the device."""
    check_resampling(options.num_resamples, options.seed)
    check_new_folder(options.output)
    return check_device(options)


def describe(checkpoint: Checkpoint, task: Task, flips: Flips, found: TraceResult, table: pd.DataFrame) -> str:
    """The gap, and of each kind of site the strongest, with what they lose when they are spoiled beside it."""
    clean, corrupted = float(found.clean.mean()), float(found.corrupted.mean())
    lines = [
        f"trace of {checkpoint.title}, task {task.name}: {len(flips):,} contexts, a value of "
        f"each changed; margin {clean:+.2f} nats before, {corrupted:+.2f} after"
    ]
    if reason := table["no_strength"].iloc[0]:
        return "\n".join([*lines, f"no shares: {reason}"])
    keys = ["site", "read", "layer", "sublayer", "source", "family", "position"]
    denoise, noise = (table[table["direction"] == name].set_index(keys) for name in DIRECTIONS)
    for kind in dict.fromkeys(table["site"]):
        strongest = denoise.loc[[kind]].sort_values("strength", ascending=False)
        shown = strongest[strongest["strength"] >= SHOWN].head(MOST_LINES)
        lines += ["", f"{kind:<38}{'at':<12}{'comes back [95 % CI]':<28}lost when it is spoiled"]
        for key, row in shown.iterrows():
            assert isinstance(key, tuple)
            back, lost = (_share(each) for each in (row, noise.loc[key]))
            lines.append(f"  {_site(dict(zip(keys, key, strict=True))):<36}{key[-1]:<12}{back:<28}{lost}")
        if shown.empty:
            lines.append(f"  none carries {SHOWN:.0%} of the answer".replace("%", " %"))
    return "\n".join(lines)


def _site(key: dict[str, object]) -> str:
    layer = "" if pd.isna(key["layer"]) else f"layer {int(key['layer'])} "  # type: ignore[call-overload]
    source = "" if pd.isna(key["source"]) else f", {key['family']} ({int(key['source'])})"  # type: ignore[call-overload]
    return f"{layer}{key['sublayer']}{source}"


def _share(row: pd.Series) -> str:
    numbers = (100 * row[name] for name in ("strength", "strength_low", "strength_high"))
    return "{:.0f} % [{:.0f}, {:.0f}]".format(*numbers)


def _write(folder: Path, checkpoint: Checkpoint, task: Task, found: TraceResult, table: pd.DataFrame) -> None:
    about = {"run": checkpoint.run, "condition": checkpoint.condition, "seed": checkpoint.seed, "step": checkpoint.step}
    numbers = {"forward_passes": found.forward_passes, "seconds": found.seconds}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder) as part:
        table.assign(**about).to_parquet(part / TRACE_TABLE, index=False)
        content = about | {"task": task.to_dict(), "sites": sorted(set(table["site"])), **numbers}
        (part / TRACE_ABOUT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if not table["no_strength"].iloc[0]:
            for direction in DIRECTIONS:
                title = checkpoint.title
                style.save(plot_trace(table, direction, title), part / f"trace_{direction}")
