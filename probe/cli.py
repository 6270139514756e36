"""`attnres-probe`: causal probes of finished models, and what they found."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
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
from probe.checkpoints import RUN_FILE, TASK_FILE, Checkpoint, load_checkpoint
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
        "--task", type=Path, help="task.json of the task to probe on, where none lies beside the checkpoint"
    )
    parser.add_argument("--num-sequences", type=int, default=defaults.num_sequences, help="default: %(default)s")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument(
        "--sublayers", nargs="+", default=list(ALL_SUBLAYERS), metavar="SUBLAYER", help=", ".join(ALL_SUBLAYERS)
    )
    parser.add_argument(
        "--scopes", nargs="+", metavar="SCOPE", help="early, middle, late, all, layer:I, final (default: every one)"
    )
    parser.add_argument(
        "--positions", nargs="+", default=list(POSITIONS), metavar="POSITIONS", help=" and / or ".join(POSITIONS)
    )
    parser.add_argument(
        "--with-aliases", action="store_true", help="also ablate each family together with the sources it is aliased to"
    )
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help="default: %(default)s")
    parser.add_argument("--num-resamples", type=int, default=defaults.num_resamples, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the resamples (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")


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
        if not args.task.is_file():
            raise ValueError(f"--task {args.task} does not exist: expected a task.json")
        return MQAR.from_dict(json.loads(args.task.read_text(encoding="utf-8")))
    if checkpoint.task is None:
        raise ValueError(f"nothing beside {args.checkpoint} says which task to probe on: give --task FILE")
    return checkpoint.task


def _check_unused(directory: Path) -> None:
    for name in ("effects.parquet", "config.json", "probe"):
        if (directory / name).exists():
            raise ValueError(f"--output {directory} already holds {name}: choose another, nothing is overwritten")


def run_command(args: argparse.Namespace) -> None:
    settings = _settings(args)
    _check_unused(args.output)
    checkpoint = load_checkpoint(args.checkpoint)
    if not isinstance(checkpoint.model, AttnResForCausalLM):
        raise ValueError(f"{args.checkpoint} is a vanilla Qwen3, it has no routing: use attnres-probe baseline")
    _probe(args, settings, checkpoint, checkpoint.model, _task(args, checkpoint), args.output)


def baseline_command(args: argparse.Namespace) -> None:
    settings = _settings(args)
    _check_unused(args.output)
    checkpoint = load_checkpoint(args.checkpoint)
    if not isinstance(checkpoint.model, Qwen3ForCausalLM):
        raise ValueError(f"{args.checkpoint} is an AttnRes model, not a vanilla Qwen3: use attnres-probe run")
    task = _task(args, checkpoint)
    model = wrap_qwen3(checkpoint.model, args.num_blocks, args.recency_bias)
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
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        args.main(args)
    except ValueError as error:
        _fail(f"attnres-probe {args.command}", str(error))
