"""`attnres-probe`: causal probes of finished models, and what they found.

    attnres-probe run runs/mine --output runs/mine/probe/final
    attnres-probe run some/model --prompts prompts.jsonl --output runs/some/probe
    attnres-probe baseline runs/vanilla --num_blocks 4 --output runs/wrapped
    attnres-probe compare runs/mine runs/wrapped
    attnres-probe report runs/mine runs/wrapped
    attnres-probe flip runs/mine                      # whether its output follows a changed value
    attnres-probe trace runs/mine --output runs/mine/trace   # by which sites and sources of depth it does
    attnres-probe heads runs/mine --output runs/mine/heads   # which attention heads it relies on
    attnres-probe verify runs/mine                    # whether it holds what was measured
    attnres-probe trail runs/mine --num_probes 40     # steps of the training, where most happens
    attnres-probe curves runs/mine                    # since when its output follows changes, and by which way
    attnres-probe prune runs/mine
    attnres-probe export runs/mine 120 runs/mine-120

Options are made from the dataclasses of `probe.settings`. How a command ends, and the exit statuses:
`probe.command_line.run_program`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from probe.command_line import OneLineParser, run_program
from probe.settings import ProbeSettings

PROGRAM = "attnres-probe"
Metric = Literal["logit_diff", "logit_diff_mean", "nll", "kl", "accuracy"]
HeadKind = Literal["zero", "mean", "resample"]
CHECKPOINT_HELP = "A run directory, a .ckpt file, an exported folder or a hub id"
DEVICE_HELP = "Torch device. null for cuda where there is one, else cpu."
TASK_HELP = (
    'Task to probe on, where none lies beside the checkpoint: a JSON file such as {"task": "mqar", "num_pairs": 16, '
    '"vocab_size": 256, "seed": 0}, or one in words, as configs/text_recall.json.'
)
TOKENIZER_HELP = (
    "For prompts and tasks in words: a folder or a hub id with tokenizer files. null for the checkpoint's own."
)
GROUP_HELP = (
    "Only queries of this group: of hops, hops_1, hops_2 and so on; of other tasks position_0 and so on, as in "
    "val/accuracy_hops_1. null for all."
)
PROMPTS_HELP = (
    'Prompts to probe on, in place of a task: a file with a JSON object a line, such as {"prompt": "The capital of '
    'Peru is", "answer": " Lima", "distractors": [" Quito", " Oslo"], "cluster": "Peru"}; cluster can be left out. The '
    "first num_sequences of them are taken."
)


class ProbeParser(OneLineParser, ArgumentParser):
    """jsonargparse's parser, whose errors are one line."""


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
    parser.add_argument("--metric", type=Metric, default="logit_diff", help="Metric of the printed table.")
    parser.add_argument("--num_resamples", type=int, default=2000, help="Bootstrap resamples and sign flips.")
    parser.add_argument("--seed", type=int, default=0, help="Of the resamples and flips.")


def add_report(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", help="A probed run directory.")
    parser.add_argument(
        "--page",
        type=Path | None,
        help="The HTML page to write; one that is there is replaced. null for report.html in the first run.",
    )
    what = "Effects in figures and page are on this metric: strengths on the margins, else harm in its own unit."
    parser.add_argument("--metric", type=Metric, default="logit_diff", help=what)


def add_verify(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="A run directory, or a folder of results or of a model.")
    number = "Cells of the last probe to be measured again, in the exported model."
    parser.add_argument("--cells", type=int, default=3, help=number)


def add_flip(parser: ArgumentParser) -> None:
    any_model = ", or any causal language model of transformers (with --task in words, and a tokenizer)."
    parser.add_argument("checkpoint", type=str, help=CHECKPOINT_HELP + any_model)
    parser.add_argument("--task", type=Path | None, help=TASK_HELP)
    parser.add_argument("--tokenizer", type=str | None, help=TOKENIZER_HELP)
    parser.add_argument("--num_sequences", type=PositiveInt, default=256, help="Sequences; each is changed in turn.")
    parser.add_argument("--batch_size", type=PositiveInt, default=64, help="Sequences of a forward pass.")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="Of the changes.")
    parser.add_argument("--output", type=Path | None, help="Write every outcome to this file: .json, .csv or .parquet.")
    parser.add_argument("--device", type=str | None, help=DEVICE_HELP)


def add_trace(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=str, help=CHECKPOINT_HELP + ", with depth routing or without.")
    parser.add_argument("--task", type=Path | None, help=TASK_HELP)
    parser.add_argument("--tokenizer", type=str | None, help=TOKENIZER_HELP)
    parser.add_argument("--group", type=str | None, help=GROUP_HELP)
    parser.add_argument("--num_sequences", type=PositiveInt, default=64, help="Contexts; a value of each is changed.")
    kinds = "Kinds of sites: stream, output, input, source, edge. null for all that the model has."
    parser.add_argument("--sites", type=list[Literal["stream", "output", "input", "source", "edge"]] | None, help=kinds)
    parser.add_argument(
        "--output", type=Path | None, help="New folder for trace.parquet, trace.json and three figures."
    )
    parser.add_argument("--batch_size", type=PositiveInt, default=16, help="Contexts whose runs are kept at a time.")
    parser.add_argument("--num_resamples", type=int, default=2000, help="Bootstrap resamples and sign flips.")
    parser.add_argument("--seed", type=int, default=0, help="Of the changes, resamples and flips.")
    parser.add_argument("--device", type=str | None, help=DEVICE_HELP)


def add_heads(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=str, help=CHECKPOINT_HELP + ", with depth routing or without.")
    parser.add_argument("--task", type=Path | None, help=TASK_HELP)
    parser.add_argument("--tokenizer", type=str | None, help=TOKENIZER_HELP)
    parser.add_argument("--num_sequences", type=PositiveInt, default=256, help="Sequences of the probe split.")
    kinds = "What stands in for a head's output: zero, its mean, that of another sequence (resample)."
    parser.add_argument("--kinds", type=list[HeadKind], default=["zero", "mean", "resample"], help=kinds)
    among = (
        "Test all pairs among so many heads, those that harm most by themselves on half of the sequences, on the other "
        "half. 0 for no pairs; the number of all heads, or more, for every pair, on all sequences."
    )
    parser.add_argument("--pairs_among", type=NonNegativeInt, default=8, help=among)
    parser.add_argument("--output", type=Path | None, help="New folder for heads.parquet, pairs.parquet and figures.")
    parser.add_argument("--batch_size", type=PositiveInt, default=32, help="Sequences whose runs are kept at a time.")
    parser.add_argument("--num_resamples", type=int, default=2000, help="Bootstrap resamples and sign flips.")
    parser.add_argument("--seed", type=int, default=0, help="Of partners, halves, resamples and flips.")
    parser.add_argument("--device", type=str | None, help=DEVICE_HELP)


def add_trail(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="A run directory with a trail; its config.yaml says how it is probed.")
    number = "Steps to have been probed in all. null for probe.trail_probes of the run."
    parser.add_argument("--num_probes", type=int | None, help=number)
    watch = "Begin while training goes on: spread steps as they come, the rest when it has ended."
    parser.add_argument("--watch", action="store_true", help=watch)
    parser.add_argument("--device", type=str | None, help=DEVICE_HELP)


def add_curves(parser: ArgumentParser) -> None:
    about = "A run directory with a trail, of any architecture; its config.yaml says with which seed and batches."
    parser.add_argument("run", type=Path, help=about)
    kinds = "What is measured: flip (does the output follow a changed value?), trace (by which sites?), heads."
    parser.add_argument("--kinds", type=list[Literal["flip", "trace", "heads"]], default=["flip", "trace"], help=kinds)
    number = "Steps to have been measured in all: those that were probed, and others where most happens."
    parser.add_argument("--num_steps", type=PositiveInt, default=24, help=number)
    parser.add_argument("--num_sequences", type=PositiveInt, default=64, help="Contexts; values of each are changed.")
    parser.add_argument("--device", type=str | None, help=DEVICE_HELP)


def add_prune(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="A run directory with a trail whose training has ended.")


def add_export(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="A run directory with a trail.")
    parser.add_argument("step", type=int, help="Of the trail.")
    parser.add_argument("folder", type=Path, help="New folder, which from_pretrained and attnres-probe run take.")


def add_probe_options(parser: ArgumentParser) -> None:
    parser.add_argument("--task", type=Path | None, help=TASK_HELP)
    parser.add_argument("--group", type=str | None, help=GROUP_HELP)
    parser.add_argument("--prompts", type=Path | None, help=PROMPTS_HELP)
    parser.add_argument("--tokenizer", type=str | None, help=TOKENIZER_HELP)
    parser.add_class_arguments(ProbeSettings, None)
    parser.add_argument("--device", type=str | None, help=DEVICE_HELP)
    parser.add_argument("--devices", type=int, default=1, help="Processes that share the sequences, a device each.")
    dtype = Literal["float32", "bfloat16", "float16"] | None
    parser.add_argument("--dtype", type=dtype, help="Run the model in this dtype. null for the checkpoint's.")


OPTIONS = {
    "run": ("Probe the routing of an AttnRes model.", add_run),
    "baseline": ("See a vanilla Qwen3 through the recency-bias wrapper and probe that.", add_baseline),
    "compare": ("B - A for every cell that two probes hold, paired by sequence.", add_compare),
    "report": ("Print one table for all runs, write each run's figures and one HTML page of all runs.", add_report),
    "flip": ("Change a value of each context: does the output follow where it is asked for, and only there?", add_flip),
    "trace": ("Change a value, put single activations back, and see where the answer comes back from.", add_trace),
    "heads": ("Ablate attention heads, one by one and in pairs: which it relies on, and which cover up.", add_heads),
    "verify": ("Say of every file and result of a run whether it is what was written and measured.", add_verify),
    "trail": ("Probe steps of a run's trail, the weights kept while it trained, where most happens.", add_trail),
    "curves": ("Measure on a run's trail since when its output follows changes, and by which way.", add_curves),
    "prune": ("Remove the steps of a run's trail that were not probed.", add_prune),
    "export": ("Copy a step of a run's trail into a folder of its own.", add_export),
}
"""Command -> what it does, and what adds its options."""
MODULES: dict[str, str] = dict.fromkeys(("trail", "prune", "export"), "probe.trail_commands") | {
    "verify": "probe.verify",
    "flip": "probe.flip_commands",
    "trace": "probe.trace_commands",
    "heads": "probe.heads_commands",
    "curves": "probe.curve_commands",
}
"""Where the function of a command is, if not in `probe.commands`. It may return an exit status."""


def parse(command: str, args: Sequence[str]) -> Namespace:
    """The options of a command. Raises UsageError for what it does not take."""
    about, add_options = OPTIONS[command]
    parser = ProbeParser(prog=f"{PROGRAM} {command}", description=about)
    add_options(parser)
    return parser.parse_args(list(args))


def run(command: str, args: Sequence[str]) -> int:
    """What a command does is in one of `MODULES`, which is imported when it is run."""
    options = parse(command, args)
    importlib.import_module("probe.commands").silence()
    commands = importlib.import_module(MODULES.get(command, "probe.commands"))
    return getattr(commands, command)(options) or 0


COMMANDS = {command: (about, partial(run, command)) for command, (about, _) in OPTIONS.items()}


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of `attnres-probe`; `args` defaults to the command line's. Returns the exit status."""
    return run_program(PROGRAM, "Causal probes of finished models, and what they found.", COMMANDS, args)
