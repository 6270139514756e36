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

import sys
from collections.abc import Sequence
from importlib import import_module

from train.cli.errors import UsageError, nearest_option

PROGRAM = "attnres-train"
COMMANDS = {
    "fit": ("Train a model into a run directory.", "train.cli.fit:fit"),
    "validate": ("Measure a checkpoint's accuracy at all K pairs; writes nothing.", "train.cli.fit:validate"),
    "estimate": (
        "Say what training will cost: parameters, FLOPs, memory, tokens, hours; writes nothing.",
        "train.cli.estimate:estimate",
    ),
    "study": ("Train and probe several conditions and seeds, and collect one table.", "train.study.cli:study"),
    "panels": ("Lay out a W&B workspace for runs of attnres.", "train.cli.panels:panels"),
}
"""Name -> what it does, and the function that does it: it takes the other arguments and returns the exit status."""


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of `attnres-train`; `args` defaults to the command line's. Returns the exit status."""
    command, *options = (sys.argv[1:] if args is None else args) or [""]
    if command in ("-h", "--help"):
        print(help_text())
        return 0
    try:
        if command not in COMMANDS:
            raise UsageError(_no_command(command))
        module, _, function = COMMANDS[command][1].partition(":")
        return getattr(import_module(module), function)(options)
    except UsageError as error:
        program = f"{PROGRAM} {command}" if command in COMMANDS else PROGRAM
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def help_text() -> str:
    lines = [f"usage: {PROGRAM} COMMAND ...", "", "Train Block AttnRes and vanilla Qwen3 models on recall.", ""]
    lines += [f"  {name:<10} {what}" for name, (what, _) in COMMANDS.items()]
    return "\n".join([*lines, "", f"`{PROGRAM} COMMAND --help` lists the options of a command."])


def _no_command(given: str) -> str:
    nearest = nearest_option(given, COMMANDS)
    hint = f"did you mean {nearest}?" if nearest else f"choose from {', '.join(COMMANDS)}"
    return f"command {given} does not exist; {hint}" if given else f"a command is required; {hint}"


__all__ = ["COMMANDS", "main"]
