"""Cost of a probe: exact sweeps against one full forward per ablation, and estimates against exact, in one run.

    python benchmarks/probe_sweep.py --shape demo --output benchmarks/results/probe_sweep_demo.json
    python benchmarks/probe_sweep.py --shape 28-layers --num_sequences 8 --repeats 1 \\
        --grids per_layer --output benchmarks/results/probe_sweep_28_layers.json
    python benchmarks/probe_sweep.py --checkpoint runs/mine --output …     # a trained model: rank correlations too

The naive loop gives every applicable ablation a full forward of all positions with logits, as any hook-based tool
does, and takes the same metrics at the answers. All contenders alternate; medians of `--repeats`. Only ratios of one
run mean anything.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.tasks import MQAR
from probe.ablation.engine import Engine
from probe.ablation.grid import Cell, Kind, build_grid
from probe.ablation.interventions import MaskRenormalise
from probe.ablation.metrics import CleanRun
from probe.examples.examples import Examples
from probe.files.checkpoints import load_model
from probe.vocabulary import MARGIN, POSITIONS, is_layer

SHAPES: dict[str, dict[str, Any]] = {
    "demo": {
        **{"num_hidden_layers": 8, "attnres_num_blocks": 4, "hidden_size": 64, "intermediate_size": 128},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 256},
    },
    "28-layers": {  # Qwen3-0.6B's depth and vocabulary, a quarter of its width
        **{"num_hidden_layers": 28, "attnres_num_blocks": 8, "hidden_size": 256, "intermediate_size": 768},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 151_936},
    },
}

GRIDS = ("per_layer", "whole_grid")


@torch.no_grad()
def naive_sweep(model: AttnResForCausalLM, inputs: Examples, cells: list[Cell], positions: str) -> dict[int, float]:
    """Mean effect on the margin of each applicable cell, by its index."""
    queries, answers = inputs.queries, inputs.labels[inputs.queries]
    clean = CleanRun.from_logits(model(inputs.input_ids, use_cache=False).logits[queries], answers, inputs.rivals)
    before, effects = clean.metrics()[MARGIN], {}
    for index, cell in enumerate(cells):
        ablation = cell.ablation()
        if not any(ablation.exists_at(model.model.sites[i]) for i in cell.reads):
            continue
        if positions == "query":
            ablation = replace(ablation, context=replace(ablation.context, positions=queries))
        logits = model(inputs.input_ids, use_cache=False, intervention=ablation).logits[queries]
        effects[index] = float((clean.metrics(logits)[MARGIN] - before).mean())
    return effects


def measure(model: AttnResForCausalLM, inputs: Examples, cells: list[Cell], repeats: int) -> dict[str, Any]:
    """Times of the contenders on one grid, and how well their effects agree."""
    estimated_cells = [replace(cell, kind=Kind(cell.intervention, integrated=True)) for cell in cells]
    seconds: dict[str, list[float]] = {}
    results: dict[str, Any] = {}

    def timed(name: str, work) -> None:
        started = time.perf_counter()
        results[name] = work()
        seconds.setdefault(name, []).append(time.perf_counter() - started)

    naive_sweep(model, inputs, cells[:8], "all")  # warm up
    Engine(model, [*cells[:8], *estimated_cells], POSITIONS, len(inputs)).run(inputs)
    for _ in range(repeats):
        for where in POSITIONS:
            timed(f"naive {where}", lambda where=where: naive_sweep(model, inputs, cells, where))
            timed(f"exact {where}", lambda where=where: Engine(model, cells, (where,), len(inputs)).run(inputs))
        timed("exact both", lambda: Engine(model, cells, POSITIONS, len(inputs)).run(inputs))
        timed("integrated both", lambda: Engine(model, estimated_cells, POSITIONS, len(inputs)).run(inputs))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    median["naive both"] = median["naive all"] + median["naive query"]
    found: dict[str, Any] = {"seconds": median, "ablations": len(results["naive all"])}
    queries = int(inputs.queries.sum())
    for where in POSITIONS:
        exact, naive = results[f"exact {where}"], results[f"naive {where}"]
        ours = {index: float(exact.effects[index, where][MARGIN].sum()) / queries for index in naive}
        estimates = [float(results["integrated both"].effects[index, where][MARGIN].sum()) / queries for index in naive]
        found[where] = {
            "speedup_over_naive": median[f"naive {where}"] / median[f"exact {where}"],
            "forward_passes": exact.forward_passes,
            "largest_difference_from_naive": max(abs(ours[index] - naive[index]) for index in naive),
            "integrated_spearman": pd.Series(estimates).corr(pd.Series(list(ours.values())), method="spearman"),
        }
    found["both"] = {
        "speedup_over_naive": median["naive both"] / median["exact both"],
        "integrated_speedup_over_exact": median["exact both"] / median["integrated both"],
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--checkpoint", help="probe this model instead of a random one")
    parser.add_argument("--num_sequences", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.checkpoint:
        loaded = load_model(args.checkpoint)
        model, task = loaded.model, loaded.task or MQAR()
        assert isinstance(model, AttnResForCausalLM)
        assert isinstance(task, MQAR)
    else:
        model = AttnResForCausalLM(AttnResConfig(**SHAPES[args.shape], initializer_range=0.1)).eval()
        task = MQAR(num_pairs=16, vocab_size=SHAPES[args.shape]["vocab_size"])
    inputs = Examples.from_batch(task.batch("probe", range(args.num_sequences)))
    grid = list(build_grid(model.model.sites, Kind(MaskRenormalise)))
    report: dict[str, Any] = {
        "shape": args.checkpoint or args.shape,
        "n_sequences": args.num_sequences,
        "repeats": args.repeats,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    for name in args.grids:
        cells = [cell for cell in grid if is_layer(cell.route.scope) or name == "whole_grid"]
        report[name] = measure(model, inputs, cells, args.repeats)
    text = json.dumps(report, indent=2) + "\n"
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
