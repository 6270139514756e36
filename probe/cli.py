"""`attnres-probe`: causal probes of finished models, and what they found."""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from transformers.utils.logging import disable_progress_bar

from attnres import FAMILIES
from probe import commands
from probe.ablation.grid import ALL_SUBLAYERS, POSITIONS
from probe.ablation.interventions import KINDS
from probe.ablation.metrics import METRICS, PRIMARY
from probe.runner import ProbeSettings

CHECKPOINT_HELP = "a run directory, a .ckpt file, an exported folder or a hub id"


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line; options must be spelled out, and a misspelt one is answered with its nearest."""

    commands: Mapping[str, argparse.ArgumentParser] = MappingProxyType({})

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        _, is_unknown, unknown = message.partition("unrecognized arguments: ")
        if is_unknown:
            known = [option for parser in (self, *self.commands.values()) for option in parser._option_string_actions]
            nearest = difflib.get_close_matches(unknown.split()[0], known, n=1)
            message += f" (did you mean {nearest[0]}?)" if nearest else " (see --help)"
        _fail(self.prog, message)


def _fail(prog: str, message: str) -> NoReturn:
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="attnres-probe", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parser.commands = subparsers.choices

    run = subparsers.add_parser(
        "run", help="probe an AttnRes model", description="Probe the routing of an AttnRes model."
    )
    run.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    run.add_argument(
        "--output", required=True, type=Path, help="folder for effects.parquet, clusters.parquet, summary.json"
    )
    _add_probe_options(run)
    run.set_defaults(main=commands.run)

    baseline = subparsers.add_parser(
        "baseline",
        help="wrap a vanilla Qwen3 with a recency bias and probe it",
        description="See a vanilla Qwen3 through the recency-bias wrapper and probe that.",
    )
    baseline.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT_HELP + ", of a vanilla Qwen3")
    baseline.add_argument("--output", required=True, type=Path, help="run directory to make for the wrapped model")
    baseline.add_argument("--num-blocks", type=int, default=8, help="blocks N of the wrapper (default: %(default)s)")
    baseline.add_argument("--recency-bias", type=float, default=3.0, help="bias b of every read (default: %(default)s)")
    _add_probe_options(baseline)
    baseline.set_defaults(main=commands.baseline)

    com = subparsers.add_parser(
        "compare",
        help="the difference of two probes, paired on the same examples",
        description="B - A for every cell that both probes hold, paired by sequence.",
    )
    com.add_argument("a", metavar="A", type=Path, help="a probed run directory, or a folder with effects.parquet")
    com.add_argument("b", metavar="B", type=Path, help="another, probed on the same examples")
    com.add_argument(
        "--output", type=Path, metavar="FILE", help="write all rows here: .json, .csv or .parquet (default: print only)"
    )
    com.add_argument(
        "--metric", default=PRIMARY, choices=METRICS, help="metric of the printed table (default: %(default)s)"
    )
    for name in ("num_resamples", "seed"):
        option = "--" + name.replace("_", "-")
        com.add_argument(option, type=int, default=getattr(ProbeSettings(), name), help="default: %(default)s")
    com.set_defaults(main=commands.compare)

    rep = subparsers.add_parser(
        "report",
        help="print the table of mass against effect, draw the figures and write the page",
        description="Print one table for all runs, write each run's figures into its figures/ folder (those that show "
        "several runs into the first one's), and one HTML page of all runs, whose panels follow a slider over the "
        "probed steps.",
    )
    rep.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a probed run directory")
    rep.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="the HTML page to write; one that is there is replaced (default: report.html in the first RUN)",
    )
    rep.set_defaults(main=commands.report)
    return parser


def _add_probe_options(parser: argparse.ArgumentParser) -> None:
    defaults = ProbeSettings()
    parser.add_argument(
        "--task",
        type=Path,
        metavar="FILE",
        help='task to probe on, where none lies beside the checkpoint: {"task": "mqar", "num_pairs": 16, '
        '"vocab_size": 256, "seed": 0}, or one in words, as configs/text_recall.json',
    )
    parser.add_argument(
        "--tokenizer",
        metavar="SOURCE",
        help="for a task in words: a folder or a hub id with tokenizer files (default: the checkpoint's own)",
    )
    parser.add_argument(
        "--num-sequences", type=int, default=defaults.num_sequences, help="sequences of K pairs (default: %(default)s)"
    )
    parser.add_argument(
        "--families", nargs="+", default=list(FAMILIES), metavar="FAMILY", help=f"default: {', '.join(FAMILIES)}"
    )
    parser.add_argument(
        "--sublayers",
        nargs="+",
        default=list(ALL_SUBLAYERS),
        metavar="SUBLAYER",
        help=f"default: {', '.join(ALL_SUBLAYERS)}",
    )
    parser.add_argument(
        "--scopes", nargs="+", metavar="SCOPE", help="early, middle, late, all, layer:I, final (default: every one)"
    )
    parser.add_argument(
        "--positions",
        nargs="+",
        default=list(POSITIONS),
        metavar="POSITIONS",
        help="where to mask: all positions, query positions, or each in turn (default)",
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=list(defaults.kinds),
        metavar="KIND",
        help=f"interventions: {', '.join(KINDS)} (default: {', '.join(defaults.kinds)})",
    )
    parser.add_argument("--first-order", action="store_true", help="also estimate the grid to first order, to compare")
    parser.add_argument(
        "--first-order-only", action="store_true", help="estimate the grid to first order instead of ablating: cheap"
    )
    parser.add_argument(
        "--coalitions",
        nargs="+",
        default=[],
        metavar="SCOPE",
        help="scopes at which every subset of the families is masked, for Shapley values and interactions",
    )
    parser.add_argument(
        "--with-aliases", action="store_true", help="also ablate each family together with the sources it is aliased to"
    )
    for name, what in (
        ("batch_size", "sequences per clean run"),
        ("tokens_per_pass", "most tokens of an ablated forward pass: bounds memory"),
        ("num_resamples", "bootstrap resamples and sign flips"),
        ("seed", "of resamples, flips, partners, draws and the flip test"),
    ):
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=getattr(defaults, name), help=f"{what} (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="torch device (default: %(default)s)")
    parser.add_argument(
        "--devices", type=int, default=1, help="processes that share the sequences, one device each (default: 1)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="to run the model in (default: the checkpoint's)"
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        args.main(args)
    except ValueError as error:
        _fail(f"attnres-probe {args.command}", str(error))
