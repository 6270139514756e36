"""What every simulation records: shares with their Monte-Carlo standard errors, and what they were made with."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy


def share(hits: Sequence[bool] | np.ndarray) -> dict[str, float]:
    """The share of `hits`, its Monte-Carlo standard error, and of how many; NaN of none."""
    rate = float(np.mean(hits)) if len(hits) else math.nan
    error = math.sqrt(rate * (1 - rate) / len(hits)) if len(hits) else math.nan
    return {"rate": rate, "monte_carlo_error": error, "n": len(hits)}


def add(path: Path | None, part: str, results: Any, seconds: float, **settings: Any) -> None:
    """Set a part of a record (JSON), with what it was made with; its other parts stay. No path: print it."""
    about = settings | {
        "seconds": round(seconds, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, one thread",
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
    }
    if path is None:
        print(json.dumps({part: results}, indent=1))
        return
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record[part] = {"about": about, "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
