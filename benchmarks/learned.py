"""What models of a task have learned: accuracy by group of queries, the step from which it holds, and the flip test.

    attnres-train study --config configs/pointer_study.yaml --dir runs/pointer
    python -m benchmarks.learned runs/pointer/*-seed? --output benchmarks/results/learned.json

Accuracies are of validation, at the end of training; minutes are those of a training that was not stopped.
The flip test has 1,024 sequences of the split probe.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.record import add
from probe.analysis.flips import flip_shares
from probe.examples.flip import flip_outcomes
from probe.files.checkpoints import load_model

SEQUENCES = 1024
HELD = 0.95


def learned(run: Path) -> dict[str, Any]:
    """Of one run."""
    metrics = pd.read_csv(run / "metrics.csv")
    names = [name for name in metrics.columns.astype(str) if name.startswith("val/accuracy") and "position" not in name]
    curves = metrics[["step", *names]].dropna().assign(step=lambda rows: rows["step"] + 1).set_index("step")
    below = {name: curves.index[curves[name] < HELD] for name in names}
    held = {name: curves.index[curves.index > (steps[-1] if len(steps) else -1)] for name, steps in below.items()}
    model = load_model(str(run))
    task: Any = model.task
    with torch.no_grad():
        outcomes = flip_outcomes(model.model, task, task.batch("probe", range(SEQUENCES)))
    (started, *others) = json.loads((run / "provenance.json").read_text())["segments"]
    ended = (run / "hf" / "attnres_run.json").stat().st_mtime
    seconds = ended - datetime.fromisoformat(started["started"]).timestamp()
    return {
        "run": run.name,
        "task": task.to_dict(),
        "condition": model.condition,
        "seed": model.seed,
        "steps": model.step,
        "minutes": None if others else round(seconds / 60, 1),
        "accuracy": {name.removeprefix("val/"): float(curves[name].iloc[-1]) for name in names},
        "from_step": {name.removeprefix("val/"): int(steps[0]) if len(steps) else None for name, steps in held.items()},
        "flip": flip_shares(outcomes).to_dict("records"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="the record (JSON); parts of other tasks stay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, rows = time.monotonic(), [learned(run) for run in args.runs]
    for name in dict.fromkeys(row["task"]["task"] for row in rows):
        chosen = [row for row in rows if row["task"]["task"] == name]
        add(args.output, name, chosen, time.monotonic() - started, sequences=SEQUENCES)


if __name__ == "__main__":
    main()
