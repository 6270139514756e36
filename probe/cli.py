"""`attnres-probe`: causal probes of finished models, and what they found.

Options are made from the dataclasses of `probe.settings`. Nothing heavy is imported before a command runs, so that
`--help` is quick.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import ArgumentParser, Namespace

from probe.settings import ProbeSettings

CHECKPOINT_HELP = "A run directory, a .ckpt file, an exported folder or a hub id"
TASK_HELP = (
    'Task to probe on, where none lies beside the checkpoint: a JSON file such as {"task": "mqar", "num_pairs": 16, '
    '"vocab_size": 256, "seed": 0}, or one in words, as configs/text_recall.json.'
)
PROG = "attnres-probe"


class OneLineParser(ArgumentParser):
    """Errors are one line. Options must be spelled out, and a misspelt one is answered with its nearest."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message, re.IGNORECASE)
        if unknown:
            action = self._subcommands_action
            commands = [] if action is None else action._name_parser_map.values()
            known = [option for parser in (self, *commands) for option in parser._option_string_actions]
            nearest = difflib.get_close_matches(unknown[1], known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see --help"
            message = f"option {unknown[1]} does not exist; {hint}"
        fail(self.prog.replace(" [options]", ""), in_plain_words(message))


def in_plain_words(message: str) -> str:
    """A parser's message with options as they are written, and types without Python's names for them."""
    message = re.sub(rf'Parser key "?(?:(?:{"|".join(COMMANDS)})\.)?(\w+)"?:', r"--\1:", message)
    message = re.sub(rf"\b(?:{'|'.join(COMMANDS)})\.(\w+)", r"--\1", message)
    message = re.sub(r"--(checkpoint|runs|a|b)\b", lambda name: name[1].upper(), message)
    several = r"Does not validate against any of the Union subtypes\s+Subtypes: [\[(](.*)[\])]\s+Errors:.*value: (.*)"
    message = re.sub(several, r"expected \1, got \2", message, flags=re.DOTALL)
    message = re.sub(r"typing\.Literal\[(.*?)\]", lambda names: "one of " + names[1].replace("'", ""), message)
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).replace("Expected a ", "expected ")
    return message.replace("tuple[str, ...]", "a list such as [a,b]").replace(", NoneType", ", or null")


def fail(prog: str, message: str) -> NoReturn:
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def build_parser() -> ArgumentParser:
    parser = OneLineParser(prog=PROG, description="Causal probes of finished models, and what they found.")
    commands = parser.add_subcommands(required=True, dest="command", metavar="COMMAND")
    for name, (summary, add_options) in COMMANDS.items():
        command = OneLineParser(prog=f"{PROG} {name}", description=summary)
        add_options(command)
        commands.add_subcommand(name, command, help=summary)
    return parser


def add_run(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=str, help=CHECKPOINT_HELP + ".")
    parser.add_argument("--output", required=True, type=Path, help="Folder for the tables and summary.json.")
    add_probe_options(parser)


def add_baseline(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=str, help=CHECKPOINT_HELP + ", of a vanilla Qwen3.")
    parser.add_argument("--output", required=True, type=Path, help="Run directory to make for the wrapped model.")
    parser.add_argument("--num_blocks", type=int, default=8, help="Blocks N of the wrapper.")
    parser.add_argument("--recency_bias", type=float, default=3.0, help="Bias b of every read.")
    add_probe_options(parser)


def add_compare(parser: ArgumentParser) -> None:
    parser.add_argument("a", type=Path, help="A probed run directory, or a folder with effects.parquet.")
    parser.add_argument("b", type=Path, help="Another, probed on the same examples.")
    parser.add_argument("--output", type=Path | None, help="Write all rows to this file: .json, .csv or .parquet.")
    metric = Literal["nll", "logit_diff", "kl", "accuracy"]
    parser.add_argument("--metric", type=metric, default="nll", help="Metric of the printed table.")
    parser.add_argument("--num_resamples", type=int, default=2000, help="Bootstrap resamples and sign flips.")
    parser.add_argument("--seed", type=int, default=0, help="Of the resamples and flips.")


def add_report(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", help="A probed run directory.")
    parser.add_argument(
        "--page",
        type=Path | None,
        help="The HTML page to write; one that is there is replaced. null for report.html in the first run.",
    )


def add_probe_options(parser: ArgumentParser) -> None:
    parser.add_argument("--task", type=Path | None, help=TASK_HELP)
    tokenizer = "For a task in words: a folder or a hub id with tokenizer files. null for the checkpoint's own."
    parser.add_argument("--tokenizer", type=str | None, help=tokenizer)
    parser.add_class_arguments(ProbeSettings, None)
    parser.add_argument("--device", type=str | None, help="Torch device. null for cuda where there is one, else cpu.")
    parser.add_argument("--devices", type=int, default=1, help="Processes that share the sequences, a device each.")
    dtype = Literal["float32", "bfloat16", "float16"] | None
    parser.add_argument("--dtype", type=dtype, help="Run the model in this dtype. null for the checkpoint's.")


COMMANDS = {
    "run": ("Probe the routing of an AttnRes model.", add_run),
    "baseline": ("See a vanilla Qwen3 through the recency-bias wrapper and probe that.", add_baseline),
    "compare": ("B - A for every cell that two probes hold, paired by sequence.", add_compare),
    "report": ("Print one table for all runs, write each run's figures and one HTML page of all runs.", add_report),
}


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    options: Namespace = args[args.command]
    commands = importlib.import_module("probe.commands")
    try:
        getattr(commands, args.command)(options)
    except ValueError as error:
        fail(f"{PROG} {args.command}", str(error))
