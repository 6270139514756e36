"""What digests, manifests and checks for numbers that are not finite cost of a demo: its first model, from end to end.

    OMP_NUM_THREADS=1 python -m benchmarks.integrity --output benchmarks/results/integrity.json

CPU time of one process with one thread, so that other work on the machine matters little: all of it, and that inside of
the functions that exist for the sake of integrity alone. Those that call each other are counted once.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import attnres.files
import probe.cli
import probe.files.parts
import probe.runner
import train.cli
import train.run.finite
from benchmarks.record import add
from probe.ablation.engine import Engine

FUNCTIONS = {
    "digests": [attnres.files.digest, probe.files.parts._digest],
    "manifests": [attnres.files.read_manifest, attnres.files._write_manifest],
    "finite numbers": [
        train.run.finite.check_step,
        train.run.finite.check_weights,
        train.run.finite.check_validation,
        probe.runner.check_finite,
    ],
}
PROBE = ["--kinds=[mask_renormalise,matched_mass,keep_only,keep_random,increment]", "--coalitions=[all]"]
PROBE += ["--positions=[all]", "--sublayers=[self_attn,mlp]", "--num_sequences=64", "--scopes=[early,middle,late,all]"]


class Clock:
    """CPU seconds inside of some functions of one thread, by what they are for; calls inside of calls count once."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(FUNCTIONS, 0.0)
        self.calls = dict.fromkeys(FUNCTIONS, 0)
        self._is_inside = False
        for what, functions in FUNCTIONS.items():
            for function in functions:
                self._replace(function, self._timed(function, what))
        Engine._check_finite = self._timed(Engine._check_finite, "finite numbers")

    def _timed(self, function: Callable[..., Any], what: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return function(*args, **kwargs)
            self._is_inside, began = True, time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._is_inside = False
                self.seconds[what] += time.thread_time() - began
                self.calls[what] += 1

        return run

    @staticmethod
    def _replace(old: Callable[..., Any], new: Callable[..., Any]) -> None:
        """Wherever it was imported; modules that are imported later take it from its own."""
        for module in [m for name, m in sys.modules.items() if name.split(".")[0] in ("attnres", "probe", "train")]:
            for name in [name for name, value in vars(module).items() if value is old]:
                setattr(module, name, new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the record (JSON)")
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--steps", type=int, help="of the training; default: the configuration's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clock, began, cpu = Clock(), time.monotonic(), time.process_time()
    steps = [] if args.steps is None else [f"--trainer.max_steps={args.steps}"]
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        for main_of, command in (
            (train.cli.main, ["fit", f"--config={args.config}", f"--run_dir={run}", *steps]),
            (probe.cli.main, ["run", run, f"--output={run}/probe/final", *PROBE]),
            (probe.cli.main, ["report", run]),
        ):
            if main_of(command):
                raise RuntimeError(f"{command[0]} failed")
    total = time.process_time() - cpu
    found = {
        "config": args.config,
        "cpu_seconds": round(total, 1),
        "of_it": {
            what: {"seconds": round(clock.seconds[what], 3), "calls": clock.calls[what], "share": seconds / total}
            for what, seconds in clock.seconds.items()
        },
        "share": sum(clock.seconds.values()) / total,
    }
    add(args.output, "demo", found, time.monotonic() - began)


if __name__ == "__main__":
    main()
