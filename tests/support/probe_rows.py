"""What loggers are to be told of a run's probes, read from its tables without the code that tells them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

PREFIXES = {
    "mask_renormalise": ("probe_effect", "probe_effect_low", "probe_effect_high"),
    "mask_renormalise_first_order": ("probe_first_order", "probe_first_order_low", "probe_first_order_high"),
}


def expected_rows(run_dir: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> value."""
    table = pd.read_parquet(run_dir / "probe/effects.parquet")
    rows: dict[tuple[int, str], float] = {}
    for row in table.itertuples():
        if row.metric in ("accuracy", "nll"):
            rows[row.step, f"probe/{row.metric}"] = row.clean
        is_region = not row.scope.startswith("layer:")
        if row.metric != "nll" or row.positions != "all" or row.with_aliases or not is_region:
            continue
        cell = f"{row.sublayer}/{row.scope}/{row.family}"
        rows[row.step, f"probe_mass/{cell}"] = row.mass
        if row.applicable:
            values = (row.effect, row.ci_low, row.ci_high)
            rows |= {(row.step, f"{p}/{cell}"): v for p, v in zip(PREFIXES[row.kind], values, strict=True)}
    return rows
