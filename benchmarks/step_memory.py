"""Peak memory of training, measured: a few optimiser steps by `attnres-train`, in a process of its own.

    python benchmarks/step_memory.py --output benchmarks/results/step_memory_0.6b.json \
        --config configs/0.6b.yaml --data.batch_size 1 --data.task.num_pairs 22

All other options go to `attnres-train fit`. No probes, no validation, no checkpoint: the step alone. The exported model
is written to a temporary folder and removed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

STEP_ALONE = [
    "--probe.enabled=false",
    "--data.curriculum.kind=off",
    "--data.num_workers=0",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_checkpointing=false",
    "--trainer.accelerator=cpu",
]
# In the child: the peak of its resident memory when all is done.
MEASURE = """
import resource, sys
from train.cli import main
main(sys.argv[1:])
print("peak_kib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_of_fit(options: list[str], steps: int, **environment: str) -> int:
    """Peak resident memory, in KiB, of a process that trains for so many steps."""
    with tempfile.TemporaryDirectory() as folder:
        options = [*options, *STEP_ALONE, f"--trainer.max_steps={steps}", f"--run_dir={folder}/run"]
        environment = {**os.environ, "WANDB_MODE": "disabled", **environment}
        command = [sys.executable, "-c", MEASURE, "fit", *options]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split("peak_kib")[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1)
    args, options = parser.parse_known_args()
    started = time.perf_counter()
    peak_kib = peak_of_fit(options, args.steps)
    seconds = time.perf_counter() - started
    result = {
        "options": [*options, *STEP_ALONE],
        "steps": args.steps,
        "peak_resident_gib": round(peak_kib / 1024**2, 2),
        "seconds_with_start_and_export": round(seconds, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
