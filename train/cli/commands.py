"""`attnres-train`: its commands. Each is imported when it is run, so that this module loads at once.

    attnres-train fit --config configs/demo.yaml --run_dir runs/demo
    attnres-train fit --config configs/demo.yaml --run_dir runs/demo --ckpt_path last   # go on where it was killed
    attnres-train validate --config runs/demo/config.yaml    # its last checkpoint, unless --ckpt_path names another
    attnres-train estimate --config configs/20m.yaml
    attnres-train study --config configs/study.yaml --dir runs/study
    attnres-train panels ENTITY/PROJECT

Bad input gives one line on standard error and exit status 2 before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence

from probe.command_line import lazily, run_program

PROGRAM = "attnres-train"
COMMANDS = {
    "fit": ("Train a model into a run directory.", lazily("train.cli.fit:fit")),
    "validate": ("Measure a checkpoint's accuracy on the full task; writes nothing.", lazily("train.cli.fit:validate")),
    "estimate": (
        "Say what training will cost: parameters, FLOPs, memory, tokens, hours; writes nothing.",
        lazily("train.cli.estimate:estimate"),
    ),
    "study": ("Train and probe several conditions and seeds, and collect one table.", lazily("train.study.cli:study")),
    "panels": ("Lay out a W&B workspace for runs of attnres.", lazily("train.cli.panels:panels")),
}


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of `attnres-train`; `args` defaults to the command line's. Returns the exit status."""
    return run_program(PROGRAM, "Train Block AttnRes and vanilla Qwen3 models on synthetic tasks.", COMMANDS, args)
