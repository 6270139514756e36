"""How well estimates by integrated gradients rank cells as exact effects do, by the number of points on the path.

    python -m benchmarks.integrated runs/demo/cumulative runs/demo/cumulative/trail/step_104 …

Exact effects of masking a family at a layer, or a region, are set against estimates (`probe.ablation.integrated`) with
1, 2, 4 and 8 points, and against the gradient of the clean run alone (attribution patching), which is called 0 points.
Recorded: Spearman's rank correlation over cells above the rounding floor, and the work in forward passes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from attnres import FAMILIES, SUBLAYERS
from attnres.tasks import MQAR
from benchmarks import record
from probe import ProbeSettings, measure
from probe.ablation.grid import Cell, Kind, build_grid, reads_of
from probe.ablation.integrated import METRICS, Integrated
from probe.ablation.interventions import MaskRenormalise
from probe.ablation.metrics import CleanRun
from probe.examples.tasks import as_probe_task
from probe.files.checkpoints import load_model
from probe.vocabulary import is_layer, primary_rows, routes_of

POINTS = (0, 1, 2, 4, 8)
NUM_SEQUENCES = 64


def parts_of_reads(estimates: Integrated, cell: Cell, points: int) -> dict[int, dict[str, float]]:
    """[read] -> [metric] -> its part, summed over sequences; all reads of the cell are on the path."""
    shares = [(point + 0.5) / points for point in range(points)] or [0.0]
    found: dict[int, dict[str, float]] = {}
    for share in shares:
        for index, part in estimates.point(cell.ablation(), share).items():
            before = found.setdefault(index, dict.fromkeys(METRICS, 0.0))
            found[index] = {m: before[m] + float(values.sum()) / len(shares) for m, values in part.items()}
    return found


def agreement(source: str) -> Iterator[dict[str, Any]]:
    checkpoint = load_model(source)
    model: Any = checkpoint.model
    assert isinstance(checkpoint.task, MQAR)
    examples = as_probe_task(checkpoint.task).examples(NUM_SEQUENCES)
    exact = measure(model, examples, ProbeSettings(sublayers=SUBLAYERS, num_sequences=NUM_SEQUENCES))
    with torch.no_grad():
        logits = model(examples.input_ids, use_cache=False).logits[examples.queries]
        clean = CleanRun.from_logits(logits, examples.labels[examples.queries], examples.rivals)
    about = {"model": checkpoint.condition, "seed": checkpoint.seed, "step": checkpoint.step}
    about |= {"accuracy": exact.accuracy, "exact_passes": exact.summary["probe"]["forward_passes"]}
    everywhere = frozenset(reads_of(model.model.sites, "both", "all"))
    cells = build_grid(model.model.sites, Kind(MaskRenormalise, True), FAMILIES, ["both"], ["all"])
    paths = {cell.route.family: replace(cell, acts_on=tuple(everywhere)) for cell in cells}
    for points in POINTS:
        estimates = Integrated(model, examples, clean)
        parts = {family: parts_of_reads(estimates, cell, points) for family, cell in paths.items()}
        passes = estimates.spent / len(examples)
        for metric in METRICS:
            rows = primary_rows(exact.effects, metric)
            rows = rows[rows["applicable"] & ~rows["below_floor"] & rows["sublayer"].isin(SUBLAYERS)]
            for grid, of_layers in (("layers", True), ("regions", False)):
                same = rows[rows["scope"].map(is_layer) == of_layers]
                sums = [
                    sum(
                        parts[route.family].get(index, {metric: 0.0})[metric]
                        for index in reads_of(model.model.sites, route.sublayer, route.scope)
                    )
                    for route in routes_of(same)
                ]
                rank = same["effect"].corr(pd.Series(sums, index=same.index), method="spearman")
                what = {"metric": metric, "grid": grid, "points": points, "spearman": rank, "cells": len(same)}
                yield about | what | {"passes": passes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="Run directories, or steps of their trails.")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    rows = [row for source in options.models for row in agreement(source)]
    record.add(options.output, "agreement", rows, time.perf_counter() - started, sequences=NUM_SEQUENCES)


if __name__ == "__main__":
    main()
