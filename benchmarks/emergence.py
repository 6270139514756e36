"""How often onsets are found where they were planted, and where none was, with adaptive probes of a trail.

    OMP_NUM_THREADS=1 python -m benchmarks.emergence --output benchmarks/results/emergence.json

Simulated runs (benchmarks/simulated_trail.py): a trail of 151 steps, 2 apart, of which 20 are probed, where placement
on other sequences wants them; 64 sequences, a grid of 22 cells. Planted: the strength of one route rises to 20 or 40 %
(tau is 5 %), at once or over 24 steps, while accuracy rises or 20 to 80 steps later. The onset is right if it is at
most one step of the trail from the first at which the route truly matters; its interval is (onset_low, onset_high].
Null: no route has an effect, or one has tau exactly; a sequence's noise is 0.5 nats, or 4 nats ("loud").
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.record import add, share
from benchmarks.simulated_trail import (
    NUM_PAIRS,
    NUM_PROBES,
    READS,
    ROUTES,
    SEQUENCES,
    TRAIL,
    Learning,
    Planted,
    first_true_step,
    simulate,
    tables,
)
from probe.analysis import onsets, stats
from probe.analysis.emergence import find_emergence
from probe.analysis.inference import Inference
from probe.analysis.motifs import Harm
from probe.vocabulary import MATTERS

HOW = Inference(num_resamples=500)
N_READS = np.array([READS[route.scope] for route in ROUTES], dtype=float)
COUNTS = np.full(SEQUENCES, float(NUM_PAIRS))
ABRUPT, GRADUAL = 0.4, 4.0
IN_RISE, AFTER = (-4.0, 16.0), (40.0, 100.0)
"""Steps after accuracy's half-rise; accuracy is above 95 % from 20 on."""


@dataclass(frozen=True)
class Kind:
    """A kind of simulated run; `height` in multiples of tau, 0 for none."""

    name: str
    height: float = 0.0
    width: float = ABRUPT
    when: tuple[float, float] = IN_RISE
    noise: float = 0.5
    sigma: float = 0.0
    even: bool = False  # evenly spaced probes instead of adaptive ones


NOISES = {"normal": 0.0, "lognormal (sigma 0.5)": 0.5, "lognormal (sigma 1)": 1.0}
PLANTED = [
    Kind(f"{100 * strength:.0f} % in the rise, {name} noise", strength / MATTERS, sigma=sigma)
    for strength in (0.4, 0.2)
    for name, sigma in NOISES.items()
] + [
    Kind("40 % in the rise, gradual", 8.0, GRADUAL),
    Kind("20 % after the rise", 4.0, when=AFTER),
    Kind("40 % in the rise, evenly spaced probes", 8.0, even=True),
]
NULLS = [
    Kind(f"{what}, {name} noise", noise=noise, sigma=sigma)
    for what, noise in (("null", 0.5), ("loud null", 4.0))
    for name, sigma in NOISES.items()
] + [Kind("one route at tau", 1.0)]


@dataclass(frozen=True)
class Run:
    """A simulated run and what is found in it: `onset`, `low` and `high` as steps, (C,); `held`: a motif anywhere."""

    steps: np.ndarray
    true: int
    place: int  # of the planted route
    onset: np.ndarray
    low: np.ndarray
    high: np.ndarray
    held: bool


def run(kind: Kind, seed: int, compare: bool) -> Run:
    """`compare`: with what `find_emergence` makes of the tables. It takes ten times as long."""
    rng = np.random.default_rng(seed)
    learning = Learning(float(rng.uniform(60, 200)))
    evenly = TRAIL[np.linspace(0, len(TRAIL) - 1, NUM_PROBES).round().astype(int)]
    steps = evenly if kind.even else learning.place(rng)
    place, time_ = int(rng.integers(len(ROUTES))), learning.middle + float(rng.uniform(*kind.when))
    planted = Planted(ROUTES[place], time_, kind.height, kind.width) if kind.height else None
    margins, harm = simulate(planted, learning, steps, rng, kind.noise, kind.sigma)
    true = first_true_step(planted, learning) if kind.height > 1 and planted else -1
    onset, low, high, holds = find(steps, margins, harm)
    if compare:
        emergence = find_emergence(*tables(steps, margins, harm), how=HOW)
        assert emergence is not None
        columns = emergence.table[["onset", "onset_low", "onset_high"]].to_numpy(float).T
        np.testing.assert_array_equal(columns, [onset, low, high])
    return Run(steps, true, place, onset, low, high, bool(holds.any()))


def find(steps: np.ndarray, margins: np.ndarray, harm: np.ndarray) -> tuple[np.ndarray, ...]:
    """onset, onset_low, onset_high (C,) and whether the motif holds (C, S): `find_emergence` without tables."""
    weights = np.concatenate([np.ones((1, SEQUENCES)), stats.resample_weights(SEQUENCES, *HOW.resampling)])
    found = []
    for place in range(len(steps)):
        sums = np.ascontiguousarray(NUM_PAIRS * harm[..., place])
        at = Harm(ROUTES, sums, NUM_PAIRS * margins[:, place], COUNTS, N_READS)
        found.append((at.holds(weights, HOW), at.matters(weights, HOW), at.shown_not_to_matter(HOW)))
    holds, matters, refuted = (np.stack(parts, axis=-1) for parts in zip(*found, strict=True))
    times = onsets.onset(holds, matters)
    onset, resampled = onsets.at_steps(times[0], steps), onsets.at_steps(times[1:], steps)
    high = np.where(np.isnan(onset), np.nan, np.fmax(onset, onsets.percentiles(resampled)[1]))
    return onset, onsets.at_steps(onsets.last_before(times[0], refuted), steps), high, holds[0]


def of_planted(kind: Kind, seed: int) -> dict[str, float]:
    found = run(kind, seed, compare=seed == 0)
    spacing, onset = TRAIL[1] - TRAIL[0], found.onset[found.place]
    error = (onset - found.true) / spacing
    next_probe = found.steps[np.searchsorted(found.steps, found.true)]
    others = np.delete(found.onset, found.place)
    return {
        "found": float(not math.isnan(onset)),
        "within_one_step": float(abs(error) <= 1),
        "too_early": float(error < -1),
        "best_possible": float((next_probe - found.true) / spacing <= 1),
        "interval_covers": float(found.low[found.place] < found.true <= found.high[found.place]),
        "another_cell_has_an_onset": float(not np.isnan(others).all()),
        "interval_steps_of_trail": float((found.high - found.low)[found.place] / spacing),
    }


def of_null(kind: Kind, seed: int) -> dict[str, float]:
    found = run(kind, seed, compare=seed == 0)
    return {"false_onset_anywhere": float(not np.isnan(found.onset).all()), "held_anywhere": float(found.held)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300, help="simulated runs of each kind (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", default=["planted", "null"])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    for what, kinds, case in (("planted", PLANTED, of_planted), ("null", NULLS, of_null)):
        if what not in args.kinds:
            continue
        started, rows = time.perf_counter(), {}
        for kind in kinds:
            cases = [case(kind, seed) for seed in range(args.runs)]
            columns = {name: np.array([row[name] for row in cases]) for name in cases[0]}
            widths = columns.pop("interval_steps_of_trail", None)
            rows[kind.name] = {name: share(values) for name, values in columns.items()}
            if widths is not None:
                rows[kind.name]["interval_steps_of_trail"] = dict(
                    zip(("median", "95 %"), np.nanquantile(widths, (0.5, 0.95)).tolist(), strict=True)
                )
            print(
                kind.name, {k: round(v.get("rate", v.get("median")), 3) for k, v in rows[kind.name].items()}, flush=True
            )
        settings = {"runs": args.runs, "seeds": f"0 to {args.runs - 1}", "probes": NUM_PROBES, "trail": len(TRAIL)}
        settings |= {"sequences": SEQUENCES, "resamples": HOW.num_resamples}
        add(args.output, what, rows, time.perf_counter() - started, **settings)


if __name__ == "__main__":
    main()
