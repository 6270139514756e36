"""What an ablation that merely redraws noise does to the two margins: regression to the mean, and what escapes it.

    OMP_NUM_THREADS=1 python -m benchmarks.noise_logits --output benchmarks/results/noise_logits.json

Logits of the 16 values in the context are exchangeable noise (normal, standard deviation 1), and the answer's has a
signal added that gives the accuracy wanted. The ablated run has the same signal, or 80 % of it, and noise that is
drawn anew, all of it or half of its variance. The distractor of `logit_diff` is the strongest of the clean run, so that
it was lucky, and what is drawn anew is weaker on average: the ablation seems to help. Nothing is selected for
`logit_diff_mean`. Through `CleanRun` and `Grid`, as the probe has it: 64 sequences of 16 queries, one cell.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from benchmarks.record import add, share
from probe.ablation.metrics import CleanRun
from probe.analysis.inference import OF_EFFECT, Grid, Inference
from probe.vocabulary import LEVEL, MARGINS

VALUES, SEQUENCES, QUERIES = 16, 64, 16
ACCURACIES = (0.2, 0.5, 0.8)


def signal_for(accuracy: float) -> float:
    """What is added to the answer's logit so that it is the largest with this probability."""

    def reached(signal: float) -> float:
        return float(quad(lambda x: norm.pdf(x - signal) * norm.cdf(x) ** (VALUES - 1), -12, 20)[0])

    return float(brentq(lambda signal: reached(signal) - accuracy, 0, 12))  # type: ignore[arg-type]


def sample(signal: float, kept: float, redrawn: float, rng: np.random.Generator) -> dict[str, tuple[np.ndarray, ...]]:
    """Per sequence, of each margin: (clean, ablated - clean), each (SEQUENCES,) sums over queries."""
    shape = (SEQUENCES * QUERIES, VALUES)
    noise, other = torch.from_numpy(rng.standard_normal((2, *shape)))
    answers = torch.from_numpy(rng.integers(VALUES, size=len(noise)))
    answered = torch.nn.functional.one_hot(answers, VALUES)
    clean = CleanRun.from_logits(noise + signal * answered, answers, torch.arange(VALUES).expand(shape))
    ablated = math.sqrt(1 - redrawn) * noise + math.sqrt(redrawn) * other + kept * signal * answered
    before, after = clean.metrics(), clean.metrics(ablated)
    return {
        name: tuple(v.reshape(SEQUENCES, QUERIES).sum(1).numpy() for v in (before[name], after[name] - before[name]))
        for name in MARGINS
    }


def case(accuracy: float, kept: float, redrawn: float, args: argparse.Namespace, rng: np.random.Generator):
    """Mean harm of each margin in standard deviations of the noise, and how often the test calls it harm or help."""
    signal, counts = signal_for(accuracy), np.full(SEQUENCES, float(QUERIES))
    how = Inference(num_resamples=args.resamples)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in MARGINS}
    for _ in range(args.samples):
        for name, (margins, effects) in sample(signal, kept, redrawn, rng).items():
            statistics = dict(
                zip(OF_EFFECT, Grid(effects[:, None], counts, name, margins, how=how).of_effect(), strict=True)
            )
            harm, finds = -statistics["effect"][0], statistics["p_adjusted"][0] <= LEVEL
            found[name].append((margins.sum() / counts.sum(), harm, finds and harm > 0, finds and harm < 0))
    row: dict[str, Any] = {"accuracy": accuracy, "signal": signal, "signal_kept": kept, "noise_redrawn": redrawn}
    for name, numbers in found.items():
        margins, harms, harmful, helpful = np.array(numbers).T
        error = float(harms.std(ddof=1) / math.sqrt(len(harms)))
        row[name] = {
            "clean_margin": float(margins.mean()),
            "true_harm": (1 - kept) * signal,
            "harm": float(harms.mean()),
            "monte_carlo_error": error,
            "called_harm": share(harmful),
            "called_help": share(helpful),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rng, started = np.random.default_rng(args.seed), time.perf_counter()
    rows = [case(a, kept, redrawn, args, rng) for a in ACCURACIES for kept in (1.0, 0.8) for redrawn in (1.0, 0.5)]
    settings = {"samples": args.samples, "resamples": args.resamples, "seed": args.seed, "values": VALUES}
    settings |= {"sequences": SEQUENCES, "queries_per_sequence": QUERIES}
    add(args.output, "redrawn_noise", rows, time.perf_counter() - started, **settings)


if __name__ == "__main__":
    main()
