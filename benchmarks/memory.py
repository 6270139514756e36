"""Models that read memories of 4, 16 and 64 cells: do attention and routing show where the answer comes from?

    attnres-train study --config configs/memory_study.yaml --dir runs/memory
    python -m benchmarks.memory runs/memory/*-seed? --output benchmarks/results/memory.json

Of each run: accuracy and flip test as in `benchmarks.learned`; a trace of 64 contexts that denoises edges and sources;
attention at the addressed cell; and whether weights tell what flows (`probe.trace.flow`). A run is a part of the
record: those of other runs stay.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from attnres import AttnResForCausalLM
from attnres.tasks import Pointer
from benchmarks.learned import learned
from benchmarks.record import add
from probe.analysis.inference import Inference
from probe.files.checkpoints import load_model
from probe.trace import TraceResult, trace
from probe.trace.flow import Flow, flow, reading, weight_of
from probe.trace.of_tasks import flips_of_task
from probe.trace.sites import DENOISE, EDGE, SOURCE

SEQUENCES = 64
ADDRESSED = "value"
"""The place whose value is changed: the addressed cell."""
HOW = Inference()


def memory(run: Path) -> dict[str, Any]:
    """Of one run."""
    loaded = load_model(str(run))
    model, task = loaded.model, loaded.task
    assert isinstance(task, Pointer)
    routed = isinstance(model, AttnResForCausalLM)
    flips, places = flips_of_task(task, SEQUENCES)
    found = trace(model, flips, [EDGE, SOURCE] if routed else [EDGE], [DENOISE], places)
    row = learned(run) | {"architecture": model.config.attnres_source if routed else "vanilla"}
    row |= {"cells": task.num_cells, "contexts": SEQUENCES, "attention_at_the_cell": concentration(found)}
    flows = {name: flow(found, kind, HOW) for kind, name in ((EDGE, "attention"), (SOURCE, "routing"))}
    read, routing = reading(found, HOW), flows["routing"]
    row |= {name: None if each is None else each.to_dict() | extremes(each) for name, each in flows.items()}
    sources = None if read is None or routing is None else sources_at(routing, 2 * read.layer, read.position)
    return row | {"reading": None if read is None else read.to_dict() | {"sources": sources}}


def concentration(found: TraceResult) -> list[dict[str, Any]]:
    """By layer: attention of the query to the addressed cell, mean over heads and of the head that has most there."""
    place, rows = found.positions.index(ADDRESSED), []
    edges = {(site.layer, site.head): i for i, site in enumerate(found.sites) if site.kind == EDGE}
    for layer in sorted({layer for layer, _ in edges}, key=lambda layer: layer or 0):
        heads = [i for (of, head), i in edges.items() if of == layer and head is not None]
        largest = max(heads, key=lambda i: found.weights[i, place].mean())
        weights = (weight_of(found, i, place, HOW).to_dict() for i in (edges[layer, None], largest))
        rows.append({"layer": layer, **dict(zip(("mean_head", "largest_head"), weights, strict=True))})
    return rows


def extremes(numbers: Flow) -> dict[str, Any]:
    """The cell of the largest weight, and that with most flow."""
    where = {"heaviest": numbers.weight.argmax(), "most_flow": abs(numbers.strength).argmax()}
    return {name: _cell(numbers, int(index)) for name, index in where.items()}


def sources_at(numbers: Flow, read: int, position: str | int) -> list[dict[str, Any]]:
    """The sources of one read at one place, the one of the largest mass first."""
    rows = [i for i, (site, at) in enumerate(numbers.cells) if (site.read, at) == (read, position)]
    return [_cell(numbers, i) for i in sorted(rows, key=lambda i: -numbers.weight[i])]


def _cell(numbers: Flow, index: int) -> dict[str, Any]:
    site, position = numbers.cells[index]
    about = {"site": str(site), "family": site.family, "position": position}
    return about | {"weight": float(numbers.weight[index]), "strength": float(numbers.strength[index])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="the record (JSON); parts of other runs stay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for run in args.runs:
        started = time.monotonic()
        row = memory(run)
        add(args.output, run.name, row, time.monotonic() - started, torch=torch.__version__)


if __name__ == "__main__":
    main()
