"""What loggers are to be told of a run's probes, read from its tables without the code that tells them."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

PREFIXES = {
    "mask_renormalise": ("probe_strength", "probe_harm"),
    "mask_renormalise_integrated": ("probe_integrated_strength", "probe_integrated_harm"),
}
CLEAN = {"accuracy": "probe/accuracy", "logit_diff": "probe/margin", "nll": "probe/nll"}


def expected_rows(run_dir: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> value."""
    table = pd.read_parquet(run_dir / "probe/effects.parquet")
    rows: dict[tuple[int, str], float] = {}
    for row in table.itertuples():
        if row.metric in CLEAN:
            rows[row.step, CLEAN[row.metric]] = row.clean
        is_region = not row.scope.startswith("layer:")
        if row.metric != "logit_diff" or row.positions != "all" or row.with_aliases or not is_region:
            continue
        cell = f"{row.sublayer}/{row.scope}/{row.family}"
        rows[row.step, f"probe_mass/{cell}"] = row.mass
        strength, harm = PREFIXES[row.kind]
        numbers = {f"{strength}/{cell}": row.strength, f"{harm}/{cell}": -row.effect}  # the margin falls
        numbers |= {f"{strength}_low/{cell}": row.strength_low, f"{strength}_high/{cell}": row.strength_high}
        numbers |= {f"{harm}_low/{cell}": -row.ci_high, f"{harm}_high/{cell}": -row.ci_low}
        rows |= {(row.step, name): value for name, value in numbers.items() if math.isfinite(value)}
    return rows
