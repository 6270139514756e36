"""What the commands of `attnres-probe` do, once their arguments are parsed."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, Qwen3ForCausalLM

from attnres import AttnResForCausalLM, wrap_qwen3
from attnres.tasks import TextRecall, task_from_dict
from probe.analysis import compare as comparison
from probe.examples.flip import recall_accuracy
from probe.examples.prompts import TextPrompts
from probe.examples.tasks import ProbeTask, probe_inputs
from probe.files import tables as storage
from probe.files.checkpoints import RUN_FILE, TASK_FILE, Checkpoint, load_checkpoint, load_tokenizer, read_json
from probe.files.parts import IDENTITY
from probe.files.runs import load_run, repeated_seeds
from probe.report import text as reporting
from probe.report.figures.write import write_figures
from probe.report.page.build import write_page
from probe.report.page.data import NEEDED, load_page_runs
from probe.runner import PARTS, Probe, ProbeSettings, check_probe, probe_model, sweep_share

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Model = TypeVar("Model", bound=PreTrainedModel)

PAGE = "report.html"
WRITERS = {
    ".json": lambda rows, path: rows.to_json(path, orient="records", indent=2),
    ".csv": lambda rows, path: rows.to_csv(path, index=False),
    ".parquet": lambda rows, path: rows.to_parquet(path, index=False),
}


@dataclass(frozen=True)
class Subject:
    """A model to probe, the task to probe it on, and where its results go."""

    model: AttnResForCausalLM
    task: ProbeTask
    run: str
    condition: str
    seed: int
    step: int
    results: Path


def run(args: argparse.Namespace) -> None:
    settings = _prepare(args, args.output)
    _probe(args, settings, _load_attnres)


def baseline(args: argparse.Namespace) -> None:
    settings = _prepare(args, args.output / "probe")
    subject = _probe(args, settings, _load_wrapped)
    export = args.output / "hf"
    subject.model.save_pretrained(export)
    if isinstance(subject.task, TextPrompts):
        subject.task.tokenizer.save_pretrained(export)
    (export / TASK_FILE).write_text(json.dumps(subject.task.to_dict(), indent=2) + "\n", encoding="utf-8")
    about = {"condition": "wrapped", "seed": subject.seed, "step": subject.step}
    (export / RUN_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    how = {"condition": "wrapped", "wraps": args.checkpoint, "step": subject.step}
    how |= {"num_blocks": args.num_blocks, "recency_bias": args.recency_bias}
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in how.items())
    (args.output / "config.yaml").write_text(lines, encoding="utf-8")
    # How well the model that it wraps does, on the same examples, device and dtype.
    vanilla = _placed(load_checkpoint(args.checkpoint).model, args, args.device)
    accuracy = recall_accuracy(vanilla, probe_inputs(subject.task, settings.num_sequences), settings.batch_size)
    summary = read_json(subject.results / "summary.json")
    storage.write_summary(subject.results, summary | {"wraps": {"source": args.checkpoint, "accuracy": accuracy}})


def compare(args: argparse.Namespace) -> None:
    if args.output is not None and args.output.suffix not in WRITERS:
        raise ValueError(f"--output {args.output} must end in {', '.join(WRITERS)}")
    if args.num_resamples < 1 or args.seed < 0:
        raise ValueError("--num-resamples must be at least 1, and --seed must not be negative")
    rows = comparison.compare(load_run(args.a), load_run(args.b), args.num_resamples, args.seed)
    print(comparison.comparison_table(rows, (str(args.a), str(args.b)), args.metric))
    if args.output is not None:
        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            WRITERS[args.output.suffix](rows, args.output)
        except OSError as error:
            raise ValueError(f"--output {args.output} cannot be written ({error.strerror})") from error
        print(f"\nwritten: {args.output}")


def report(args: argparse.Namespace) -> None:
    page = args.runs[0] / PAGE if args.page is None else args.page
    if page.is_dir():
        raise ValueError(f"--page {page} is a folder: name a file")
    shown = load_page_runs(args.runs)
    runs = [run.probed for run in shown]
    for line in [*(line for run in runs for line in reporting.warnings(run)), *repeated_seeds(runs)]:
        print(line)
    print("Mass and causal effect of each source family, all layers (mask and renormalise, all positions;")
    print("control: as much mass taken from other sources, drawn at random)\n")
    print(reporting.mass_effect_table(runs))
    print()
    for probed in runs:
        print(reporting.describe(probed))
    if over_seeds := reporting.across_seeds(runs):
        print("\n" + over_seeds)
    found = [run.emergence for run in runs if run.emergence is not None]
    for text in [*map(reporting.describe_emergence, found), reporting.emergence_over_seeds(runs)]:
        if text:
            print("\n" + text)
    print("\nwritten:")
    for line in write_figures(runs) or ["no figures: no run holds effects of mask_renormalise"]:
        print(f"  {line}")
    if any(run.has_cells for run in shown):
        print(f"  {write_page(shown, page)}")
    else:
        print(f"  no page: no run holds {NEEDED}")


def probe_settings(args: argparse.Namespace) -> ProbeSettings:
    """The settings that the options name. Raises ValueError for a name or number that is none."""
    return ProbeSettings(
        num_sequences=args.num_sequences,
        kinds=args.kinds,
        families=args.families,
        sublayers=args.sublayers,
        scopes=args.scopes,
        positions=args.positions,
        with_aliases=(False, True) if args.with_aliases else (False,),
        exact=not args.first_order_only,
        first_order=args.first_order or args.first_order_only,
        coalitions=args.coalitions,
        batch_size=min(args.batch_size, -(-args.num_sequences // args.devices)),  # a batch for each device
        tokens_per_pass=args.tokens_per_pass,
        num_resamples=args.num_resamples,
        seed=args.seed,
    )


def _prepare(args: argparse.Namespace, results: Path) -> ProbeSettings:
    """Check whatever can be checked before work starts: settings, devices, and that --output can be made or resumed."""
    if args.devices < 1:
        raise ValueError(f"--devices must be at least 1, got {args.devices}")
    settings = probe_settings(args)
    try:
        torch.zeros((), device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} cannot be used here ({str(error).splitlines()[0]})") from error
    available = torch.cuda.device_count() if args.device.startswith("cuda") else os.cpu_count() or 1
    if args.devices > available:
        raise ValueError(f"--devices {args.devices} is more than the {available} of {args.device} here")
    is_unfinished = (results / PARTS / IDENTITY).exists()
    if args.output.exists() and not is_unfinished and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(
            f"--output {args.output} exists and is not an empty folder: choose another, nothing is overwritten"
        )
    parent = next(folder for folder in args.output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"--output {args.output} cannot be made: {parent} is not a folder that can be written to")
    if is_unfinished:
        print(f"going on with the unfinished probe in {args.output}", file=sys.stderr)
    return settings


def _load_attnres(args: argparse.Namespace) -> Subject:
    checkpoint = load_checkpoint(args.checkpoint)
    if not isinstance(checkpoint.model, AttnResForCausalLM):
        raise ValueError(f"{args.checkpoint} is a vanilla Qwen3, it has no routing: use attnres-probe baseline")
    about = (checkpoint.run, checkpoint.condition, checkpoint.seed, checkpoint.step)
    return Subject(checkpoint.model, _task(args, checkpoint), *about, args.output)


def _load_wrapped(args: argparse.Namespace) -> Subject:
    checkpoint = load_checkpoint(args.checkpoint)
    if not isinstance(checkpoint.model, Qwen3ForCausalLM):
        raise ValueError(f"{args.checkpoint} is an AttnRes model, not a vanilla Qwen3: use attnres-probe run")
    model = wrap_qwen3(checkpoint.model, args.num_blocks, args.recency_bias)
    about = (args.output.resolve().name, "wrapped", checkpoint.seed, checkpoint.step)
    return Subject(model.eval(), _task(args, checkpoint), *about, args.output / "probe")


def _task(args: argparse.Namespace, checkpoint: Checkpoint) -> ProbeTask:
    task = checkpoint.task if args.task is None else task_from_dict(read_json(args.task))
    if task is None:
        raise ValueError(f"nothing beside {args.checkpoint} says which task to probe on: give --task FILE")
    if isinstance(task, TextRecall):
        source = args.tokenizer or args.checkpoint
        return TextPrompts(task, load_tokenizer(source), source)
    if args.tokenizer is not None:
        raise ValueError("--tokenizer is for text_recall; the task mqar has token ids of its own")
    return task


def _probe(args: argparse.Namespace, settings: ProbeSettings, load: Callable[[argparse.Namespace], Subject]) -> Subject:
    """Load, check and probe, in one process or in `--devices` of them."""
    subject = load(args)
    if args.devices > 1:
        check_probe(subject.model, subject.task, settings)  # an error in a spawned process would be a traceback
        from lightning.fabric import Fabric  # takes a second to import

        accelerator = "cuda" if args.device.startswith("cuda") else "cpu"
        fabric = Fabric(accelerator=accelerator, devices=args.devices, strategy="ddp_spawn")
        # As one partial: Fabric takes arguments apart to find modules in them, and settings are frozen.
        fabric.launch(partial(_sweep_share, args=args, settings=settings, load=load))
    probe = probe_model(
        _placed(subject.model, args, args.device),
        subject.task,
        settings,
        subject.results,
        run=subject.run,
        condition=subject.condition,
        seed=subject.seed,
        step=subject.step,
        resumable=True,
        on_progress=_progress(),
    )
    print(_finished(subject, probe), file=sys.stderr)
    return subject


def _sweep_share(
    fabric: Fabric, args: argparse.Namespace, settings: ProbeSettings, load: Callable[[argparse.Namespace], Subject]
) -> None:
    """What each process does, with a copy of the model of its own."""
    subject = load(args)
    sweep_share(
        fabric.global_rank,
        fabric.world_size,
        _placed(subject.model, args, fabric.device),
        subject.task,
        settings,
        subject.results,
        run=subject.run,
        step=subject.step,
        on_progress=_progress() if fabric.is_global_zero else None,
    )


def _placed(model: Model, args: argparse.Namespace, device: torch.device | str) -> Model:
    """The model itself, on `device` and in the dtype that `--dtype` names."""
    torch.nn.Module.to(model, device, getattr(torch, args.dtype) if args.dtype else model.dtype)
    return model


def _finished(subject: Subject, probe: Probe) -> str:
    about = probe.summary["probe"]
    learned = "" if probe.summary["clean"]["task_learned"] else " (NOT LEARNED)"
    return (
        f"probed {subject.run} at step {subject.step}: accuracy {probe.accuracy:.4f}{learned}, "
        f"{about['n_ablations']} ablations in {probe.seconds:.1f} s and {about['forward_passes']:.0f} forward passes "
        f"-> {subject.results}"
    )


def _progress() -> Callable[[int, int], None]:
    """A progress bar with an ETA; a line every ten seconds where nobody watches."""
    bar: tqdm | None = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            seconds, width = (0.1, None) if sys.stderr.isatty() else (10, 80)
            bar = tqdm(total=total, unit=" ablations", desc="probing", mininterval=seconds, ncols=width)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show
