"""How often onsets are found where they were planted, and where none was.

    python -m benchmarks.emergence --output benchmarks/results/emergence.json

Simulated runs (tests/support/simulated_run.py) of 16 probes, 64 sequences and a grid of 22 cells. Planted: the harm
per read of one cell rises to four times what matters, around a random step, within about one interval between probes;
the onset is found if it is at most one probe away from the first at which the true harm matters. Null: no cell has an
effect; a sequence's noise is 0.5 nats, or 4 nats ("loud"), with which estimates often matter and only tests can hold
them back.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from probe.analysis.emergence import find_emergence
from probe.vocabulary import ROUTE
from tests.support.simulated_run import NUM_PAIRS, ROUTES, Planted, simulate

STEPS = np.arange(16) * 20
RESAMPLES = 500
NOISE = {"normal": 0.0, "lognormal (sigma 0.5)": 0.5, "lognormal (sigma 1)": 1.0}


def planted_case(seed: int, sigma: float) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    route = ROUTES[rng.integers(len(ROUTES))]
    planted = Planted(route, time=float(rng.uniform(STEPS[2], STEPS[-4])))
    run = simulate(planted, STEPS, seed, sigma=sigma, num_resamples=RESAMPLES)
    assert run.first_step is not None
    emergence = find_emergence(run.effects, run.clusters, NUM_PAIRS, num_resamples=RESAMPLES)
    assert emergence is not None
    table = emergence.table
    row = table.set_index(ROUTE).loc[[route.key]].iloc[0]
    others = table["onset"].notna().sum() - (not math.isnan(row["onset"]))
    error = (row["onset"] - run.first_step) / (STEPS[1] - STEPS[0])
    return {
        "found": float(not math.isnan(error)),
        "within_one_interval": float(abs(error) <= 1),
        "exact": float(error == 0),
        "interval_covers": float(row["onset_low"] <= run.first_step <= row["onset_high"]),
        "another_cell_has_an_onset": float(others > 0),
    }


def null_case(seed: int, sigma: float, noise: float = 0.5) -> dict[str, float]:
    run = simulate(None, STEPS, seed, noise=noise, sigma=sigma, num_resamples=RESAMPLES)
    emergence = find_emergence(run.effects, run.clusters, NUM_PAIRS, num_resamples=RESAMPLES)
    assert emergence is not None
    table = emergence.table
    return {
        "no_onset": float(table["onset"].isna().all()),
        "nothing_held_anywhere": float((table["status"] == "never").all()),
    }


def share(cases: list[dict[str, float]]) -> dict[str, Any]:
    """Of each outcome, with its Monte-Carlo standard error."""
    found = {}
    for name in cases[0]:
        p = float(np.mean([case[name] for case in cases]))
        found[name] = {"share": p, "monte_carlo_error": math.sqrt(p * (1 - p) / len(cases))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400, help="simulated runs of each kind (default: %(default)s)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    started = time.perf_counter()
    results = {
        f"{name}, {noise} noise": share([case(seed, sigma) for seed in range(args.runs)])
        for name, case in (("planted", planted_case), ("null", null_case), ("loud null", partial(null_case, noise=4.0)))
        for noise, sigma in NOISE.items()
    }
    about = {"runs": args.runs, "seeds": f"0 to {args.runs - 1}", "probes": len(STEPS), "num_resamples": RESAMPLES}
    about |= {"seconds": time.perf_counter() - started, "python": platform.python_version(), "numpy": np.__version__}
    text = json.dumps({"about": about, "results": results}, indent=2) + "\n"
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
