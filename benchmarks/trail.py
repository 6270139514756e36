"""What a trail costs: steps of one training after which weights are kept, beside those between them.

    python benchmarks/trail.py --config configs/demo.yaml

Trains at full size (no curriculum) with a trail of every second step and a checkpoint every ten. A write is made durable
during the step after it, so that this step is compared with the other one, which nothing goes beside. Medians, as other
work on the machine disturbs single steps; only ratios of one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from probe.files.trail import Trail
from train.cli import main as attnres_train
from train.recall.module import RetrievalModule
from train.run.trail import TrailCallback

EVERY, CHECKPOINT, WARM_UP = 2, 10, 10


def timed(owner: type, name: str, seconds: list[float]) -> None:
    """Keep the duration of every call of a method."""
    method: Callable[..., Any] = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - began)

    setattr(owner, name, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--steps", type=int, default=100, help="that are timed, after ten that are not")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    steps: list[float] = []
    writes: list[float] = []
    syncs: list[float] = []
    timed(RetrievalModule, "optimizer_step", steps)  # forward and backward pass among it
    timed(TrailCallback, "_write", writes)
    timed(Trail, "sync", syncs)
    count = args.steps + WARM_UP
    options = [f"--trainer.max_steps={count}", f"--trainer.val_check_interval={CHECKPOINT}", "--trail.until_step=null"]
    options += [f"--trail.every_n_steps={EVERY}", "--data.curriculum.kind=off", "--probe.enabled=false"]
    with tempfile.TemporaryDirectory() as folder:
        attnres_train(["fit", f"--config={args.config}", f"--run_dir={folder}/run", *options])
        size = (Trail(Path(folder, "run")).folder_of(0) / "model.safetensors").stat().st_size
    after, other = (statistics.median(steps[WARM_UP + first :: EVERY]) for first in (0, 1))
    write, sync = statistics.median(writes[WARM_UP // EVERY :]), statistics.median(syncs[1:])
    medians = {"write": write, "step after a write": after, "other step": other, "wait before a checkpoint": sync}
    found = {
        "config": args.config,
        "every_n_steps": EVERY,
        "steps": args.steps,
        "bytes_of_a_step": size,
        "median_ms": {name: round(1000 * seconds, 2) for name, seconds in medians.items()},
        "share_of_training": round(((write + after - other) / EVERY + sync / CHECKPOINT) / other, 4),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    print(json.dumps(found, indent=2))
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
