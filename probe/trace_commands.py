"""What `attnres-probe trace` does: where in depth and sequence a flipped value becomes another answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from probe.report.figures.trace_flow import plot_flow
from probe.report.text import share_with_interval
from probe.runner import check_finite
from probe.settings import check_resampling
from probe.trace import DIRECTIONS, Flips, TraceResult, plan, trace_sites
from probe.trace import trace as run_trace
from probe.trace.flow import FLOW_KINDS, HEAVY, Estimate, Flow, Reading, flow, reading
from probe.trace.of_tasks import flips_of_task, token_kinds
from probe.trace.sites import EDGE, SOURCE

MOST_LINES = 12
"""Sites of a kind that are printed, the strongest."""
SHOWN = 0.05
"""The least share of the answer, either way, of what is printed."""
WORDS = {
    EDGE: ("attention", "edges (heads x places)", "heads"),
    SOURCE: ("routing", "sources (reads x places)", "reads"),
}


def trace(options: Namespace) -> None:
    device = _check(options)
    checkpoint = load_model(options.checkpoint)
    task = task_of(options, checkpoint)
    if not isinstance(task, TokenTask):  # prompts in words differ in length when a value is changed
        raise ValueError("a trace takes a task in token ids, not one in words")
    task.check_sizes(checkpoint.model.config)
    task.check_count(options.num_sequences)
    check_finite(checkpoint.model)
    flips, places = flips_of_task(task.task, options.num_sequences, options.seed, task.group)
    checkpoint.model.to(device)  # type: ignore[arg-type]
    sites = options.sites or [*dict.fromkeys(site.kind for site in trace_sites(checkpoint.model)), EDGE]
    how = {"sites": sites, "batch_size": options.batch_size, "positions": places}
    cost = plan(checkpoint.model, flips, **how)
    saved = f"{cost.forward_passes:,.0f} forward passes where a naive loop takes {cost.naive:,}"
    say(f"{saved}, of {len(flips):,} contexts each", sys.stderr)
    with progress("patching", " passes") as on_progress:
        found = run_trace(checkpoint.model, flips, **how, on_progress=on_progress)
    inference = Inference(num_resamples=options.num_resamples, seed=options.seed)
    table = found.table(inference)
    flows = [each for kind in FLOW_KINDS if (each := flow(found, kind, inference)) is not None]
    read = reading(found, inference)
    say(describe(checkpoint, task.task, flips, found, table))
    for each in flows:
        say("\n".join(["", *flow_lines(each)]))
        if each.kind == EDGE and read is not None:
            say(reading_line(read))
    if options.output is not None:
        tokens = table["position"].map(token_kinds(task.task, flips, places))
        _write(options.output, checkpoint, task.task, found, table.assign(token=tokens), flows, read)
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
    keys = ["site", "read", "layer", "sublayer", "source", "family", "head", "position"]
    denoise, noise = (table[table["direction"] == name].set_index(keys) for name in DIRECTIONS)
    for kind in dict.fromkeys(table["site"]):
        strongest = denoise.loc[[kind]].sort_values("strength", ascending=False)
        shown = strongest[strongest["strength"] >= SHOWN].head(MOST_LINES)
        weighs = kind in FLOW_KINDS
        head = f"{kind:<38}{'at':<12}{'comes back [95 % CI]':<28}{'lost when it is spoiled':<28}"
        lines += ["", f"{head}{'weight' if weighs else ''}".rstrip()]
        for key, row in shown.iterrows():
            assert isinstance(key, tuple)
            back, lost = (share_with_interval(each) for each in (row, noise.loc[key]))
            weight = f"{row['weight']:.2f}" if weighs else ""
            site = _site(dict(zip(keys, key, strict=True)))
            lines.append(f"  {site:<36}{key[-1]:<12}{back:<28}{lost:<28}{weight}".rstrip())
        if shown.empty:
            lines.append(f"  none carries {SHOWN:.0%} of the answer".replace("%", " %"))
    return "\n".join(lines)


def _site(key: Mapping[str, Any]) -> str:
    layer = "" if pd.isna(key["layer"]) else f"layer {int(key['layer'])} "
    source = "" if pd.isna(key["source"]) else f", {key['family']} ({int(key['source'])})"
    head = "" if pd.isna(key["head"]) else f", head {int(key['head'])}"
    return f"{layer}{key['sublayer']}{source}{head}"


def flow_lines(found: Flow) -> list[str]:
    """Whether weights tell what flows: over all cells, of those that carry, and the two that say most."""
    what, cells, softmaxes = WORDS[found.kind]
    count, matters = int(found.carries.sum()), _percent(found.matters)
    lines = [f"{what} and flow: rank agreement {_interval(found.agreement)} over {len(found.cells):,} {cells}"]
    if found.heavy_cells:
        heavy = found.heavy.value * found.heavy_cells
        lines.append(
            f"  {found.heavy_cells} have a weight of {HEAVY} or more: {heavy:.0f} of them carry {matters} of the "
            f"answer or more, {_interval(found.heavy, True)}"
        )
    else:
        lines.append(f"  none has a weight of {HEAVY} or more")
    if count:
        share, told = found.found.value * count, found.told.value * found.carrying_softmaxes
        lines.append(
            f"  {count} carry {matters} of the answer or more: {share:.0f} of them are among the {count} of largest "
            f"weight, {_interval(found.found, True)}"
        )
        lines.append(
            f"  {softmaxes} that carry: in {told:.0f} of {found.carrying_softmaxes} the largest weight is where most "
            f"flows, {_interval(found.told, True)}; by chance {_percent(found.told_by_chance)}"
        )
    else:
        lines.append(f"  none carries {matters} of the answer")
    for name, index in (("largest weight", found.weight.argmax()), ("most flow", abs(found.strength).argmax())):
        site, position = found.cells[index]
        key = {"layer": site.layer, "sublayer": site.sublayer, "source": site.source, "family": site.family}
        where = f"{_site(key | {'head': site.head})} at {position}"
        lines.append(f"  {name}: {where}, {found.weight[index]:.2f}; carries {_percent(found.strength[index])}")
    return lines


def reading_line(found: Reading) -> str:
    """How much of attention is where the flipped value is read."""
    most = f"most of it in head {found.head}, {_interval(found.largest_head)}"
    return (
        f"  read most in layer {found.layer} at {found.position} ({_percent(found.strength)} by all heads together), "
        f"with {_interval(found.mean_head)} of its attention; {most}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _interval(estimate: Estimate, percent: bool = False) -> str:
    numbers = (estimate.value, estimate.low, estimate.high)
    if percent:
        return "{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * number for number in numbers))
    return "{:.2f} [{:.2f}, {:.2f}]".format(*numbers)


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    task: Task,
    found: TraceResult,
    table: pd.DataFrame,
    flows: Sequence[Flow],
    read: Reading | None,
) -> None:
    about = {"run": checkpoint.run, "condition": checkpoint.condition, "seed": checkpoint.seed, "step": checkpoint.step}
    numbers = {"forward_passes": found.forward_passes, "seconds": found.seconds}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder) as part:
        table.assign(**about).to_parquet(part / TRACE_TABLE, index=False)
        content = about | {"task": task.to_dict(), "sites": sorted(set(table["site"])), **numbers}
        content |= {"flow": {WORDS[each.kind][0]: each.to_dict() for each in flows}}
        content |= {"reading": None if read is None else read.to_dict()}
        (part / TRACE_ABOUT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        title = checkpoint.title
        if flows:
            style.save(plot_flow(flows, table, title), part / "trace_flow")
        if not table["no_strength"].iloc[0] and set(table["site"]) != {EDGE}:
            for direction in DIRECTIONS:
                style.save(plot_trace(table, direction, title), part / f"trace_{direction}")
