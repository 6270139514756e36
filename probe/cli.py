"""`attnres-probe`: causal probes of finished models, and what they found."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from transformers import Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from attnres import FAMILIES, AttnResForCausalLM, wrap_qwen3
from attnres.tasks import MQAR
from probe import report, results
from probe.checkpoints import RUN_FILE, TASK_FILE, Checkpoint, load_checkpoint, read_json
from probe.families import ALL_SUBLAYERS, POSITIONS
from probe.flip import recall_accuracy
from probe.runner import ProbeSettings, probe_model

CHECKPOINT_HELP = "a run directory, a .ckpt file, an exported folder or a hub id"


class _OneLineParser(argparse.ArgumentParser):
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
    parser = _OneLineParser(prog="attnres-probe", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parser.commands = commands.choices

    run = commands.add_parser(
        "run", help="probe an AttnRes model", description="Probe the routing of an AttnRes model."
    )
    run.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    run.add_argument(
        "--output", required=True, type=Path, help="folder for effects.parquet, clusters.parquet, summary.json"
    )
    _add_probe_options(run)
    run.set_defaults(main=run_command)

    baseline = commands.add_parser(
        "baseline",
        help="wrap a vanilla Qwen3 with a recency bias and probe it",
        description="See a vanilla Qwen3 through the recency-bias wrapper and probe that.",
    )
    baseline.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT_HELP + ", of a vanilla Qwen3")
    baseline.add_argument("--output", required=True, type=Path, help="run directory to make for the wrapped model")
    baseline.add_argument("--num-blocks", type=int, default=8, help="blocks N of the wrapper (default: %(default)s)")
    baseline.add_argument("--recency-bias", type=float, default=3.0, help="bias b of every read (default: %(default)s)")
    _add_probe_options(baseline)
    baseline.set_defaults(main=baseline_command)

    rep = commands.add_parser(
        "report",
        help="print the table of mass against effect and draw the figures",
        description="Print one table for all runs, and write each run's figures into its figures/ folder.",
    )
    rep.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a probed run directory")
    rep.set_defaults(main=report_command)
    return parser


def _add_probe_options(parser: argparse.ArgumentParser) -> None:
    defaults = ProbeSettings()
    parser.add_argument(
        "--task",
        type=Path,
        metavar="FILE",
        help='task to probe on, where none lies beside the checkpoint: {"task": "mqar", "num_pairs": 16, '
        '"vocab_size": 256, "seed": 0}',
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
        "--with-aliases", action="store_true", help="also ablate each family together with the sources it is aliased to"
    )
    for name, what in (
        ("batch_size", "sequences per forward pass"),
        ("num_resamples", "bootstrap resamples and sign flips"),
        ("seed", "of resamples, flips and the flip test"),
    ):
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=getattr(defaults, name), help=f"{what} (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="torch device (default: %(default)s)")


def _settings(args: argparse.Namespace) -> ProbeSettings:
    return ProbeSettings(
        num_sequences=args.num_sequences,
        families=args.families,
        sublayers=args.sublayers,
        scopes=args.scopes,
        positions=args.positions,
        with_aliases=(False, True) if args.with_aliases else (False,),
        batch_size=args.batch_size,
        num_resamples=args.num_resamples,
        seed=args.seed,
    )


def _task(args: argparse.Namespace, checkpoint: Checkpoint) -> MQAR:
    if args.task is not None:
        return MQAR.from_dict(read_json(args.task))
    if checkpoint.task is None:
        raise ValueError(f"nothing beside {args.checkpoint} says which task to probe on: give --task FILE")
    return checkpoint.task


def _prepare(args: argparse.Namespace) -> ProbeSettings:
    """Check whatever can be checked before work starts: settings, device, and that --output is free and can be made."""
    settings = _settings(args)
    try:
        torch.zeros((), device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} cannot be used here ({str(error).splitlines()[0]})") from error
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(
            f"--output {args.output} exists and is not an empty folder: choose another, nothing is overwritten"
        )
    parent = next(folder for folder in args.output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--output {args.output} cannot be made: {parent} is not a folder that can be written to")
    return settings


def run_command(args: argparse.Namespace) -> None:
    settings = _prepare(args)
    checkpoint = load_checkpoint(args.checkpoint)
    if not isinstance(checkpoint.model, AttnResForCausalLM):
        raise ValueError(f"{args.checkpoint} is a vanilla Qwen3, it has no routing: use attnres-probe baseline")
    _probe(args, settings, checkpoint, checkpoint.model, _task(args, checkpoint), args.output)


def baseline_command(args: argparse.Namespace) -> None:
    settings = _prepare(args)
    checkpoint = load_checkpoint(args.checkpoint)
    if not isinstance(checkpoint.model, Qwen3ForCausalLM):
        raise ValueError(f"{args.checkpoint} is an AttnRes model, not a vanilla Qwen3: use attnres-probe run")
    task = _task(args, checkpoint)
    model = wrap_qwen3(checkpoint.model, args.num_blocks, args.recency_bias)
    settings.grid(model)  # scopes that do not exist are refused before anything is written
    wrapped = Checkpoint(model, task, args.output.resolve().name, "wrapped", checkpoint.seed, checkpoint.step)
    export = args.output / "hf"
    model.save_pretrained(export)
    (export / TASK_FILE).write_text(json.dumps(task.to_dict(), indent=2) + "\n", encoding="utf-8")
    about = {"condition": "wrapped", "seed": checkpoint.seed, "step": checkpoint.step}
    (export / RUN_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    how = {"condition": "wrapped", "wraps": args.checkpoint, "step": checkpoint.step}
    how |= {"num_blocks": args.num_blocks, "recency_bias": args.recency_bias}
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in how.items())
    (args.output / "config.yaml").write_text(lines, encoding="utf-8")
    _probe(args, settings, wrapped, model, task, args.output / "probe")
    _record_vanilla(args, checkpoint.model, task, settings)


def _record_vanilla(args: argparse.Namespace, vanilla: Qwen3ForCausalLM, task: MQAR, settings: ProbeSettings) -> None:
    """Say in the wrapped model's summary how well the model it wraps does, on the same examples."""
    accuracy = recall_accuracy(vanilla, task.batch("probe", range(settings.num_sequences)), settings.batch_size)
    directory = args.output / "probe"
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    results.write_summary(directory, summary | {"wraps": {"source": args.checkpoint, "accuracy": accuracy}})


def _probe(
    args: argparse.Namespace,
    settings: ProbeSettings,
    checkpoint: Checkpoint,
    model: AttnResForCausalLM,
    task: MQAR,
    output: Path,
) -> None:
    probe = probe_model(
        model.to(args.device),
        task,
        settings,
        output,
        run=checkpoint.run,
        condition=checkpoint.condition,
        seed=checkpoint.seed,
        step=checkpoint.step,
        on_progress=_progress(),
    )
    print(
        f"probed {checkpoint.run} at step {checkpoint.step}: accuracy {probe.accuracy:.4f}, "
        f"{probe.summary['probe']['n_ablations']} ablations in {probe.seconds:.1f} s -> {output}",
        file=sys.stderr,
    )


def _progress() -> Callable[[int, int], None]:
    """Progress with an ETA: rewritten in place on a terminal, a line every 10 s in a log file."""
    on_terminal = sys.stderr.isatty()
    started = last = time.perf_counter()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last < (0.2 if on_terminal else 10) and done < total:
            return
        last = now
        eta = (now - started) / done * (total - done)
        text = f"{done}/{total} ablations, {eta:.0f} s left"
        end = "\n" if not on_terminal or done == total else "\r"
        print(text, end=end, file=sys.stderr, flush=True)

    return show


def report_command(args: argparse.Namespace) -> None:
    runs = [report.load_run(directory) for directory in args.runs]
    print("Mass and causal effect of each source family, all layers (mask and renormalise, all positions)\n")
    print(report.mass_effect_table(runs))
    print()
    for run in runs:
        print(report.describe(run))
    print("\nwritten:")
    for run in runs:
        for path in report.write_figures(run):
            print(f"  {path}")


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        args.main(args)
    except ValueError as error:
        _fail(f"attnres-probe {args.command}", str(error))
