"""What the commands of `attnres-probe` do, once their options are parsed (`probe.cli`)."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import torch
from jsonargparse import Namespace
from tqdm import tqdm
from transformers import PreTrainedModel, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from attnres import AttnResForCausalLM, wrap_qwen3
from attnres.files import replacing, replacing_folder
from attnres.inputs import check_number
from attnres.tasks import TextRecall, task_from_dict
from attnres.text import printable
from probe.analysis.compare import compare as compare_runs
from probe.analysis.compare import comparison_table
from probe.analysis.inference import Inference
from probe.examples.flip import recall_accuracy
from probe.examples.prompt_file import PromptTask
from probe.examples.tasks import ProbeTask, SyntheticTask, TokenTask
from probe.examples.text_recall import TextPrompts
from probe.files.checkpoints import Checkpoint, load_model, load_tokenizer, read_json
from probe.files.layout import CONFIG, EXPORT, PAGE, PARTS, PROBE, RUN_FILE, SUMMARY, SWEEP, TASK_FILE
from probe.files.locks import held
from probe.files.runs import load_run, unlisted
from probe.runner import Effects, check_probe, probe_model, sweep_share
from probe.settings import ProbeSettings

if TYPE_CHECKING:
    import pandas as pd
    from lightning.fabric import Fabric

Model = TypeVar("Model", bound=PreTrainedModel)

MOST_BIAS = 80.0
"""Of a read: exp(-88) is about the smallest normal number in float32."""
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


def say(text: str, file: TextIO | None = None) -> None:
    """Print `text`, in which names are from files and folders."""
    print(printable(text), file=file, flush=True)


def silence() -> None:
    """Leave out what transformers says of models that load as they should."""
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()


def run(options: Namespace) -> None:
    settings = _prepare(options, options.output)
    _probe(options, settings, _load_attnres)


def baseline(options: Namespace) -> None:
    settings = _prepare(options, options.output / PROBE)
    _probe(options, settings, _load_wrapped, finish=partial(_export_wrapped, options, settings))


def _export_wrapped(options: Namespace, settings: ProbeSettings, subject: Subject) -> dict[str, Any]:
    """Write the wrapped model and how it was made. Returns what the summary is to say of the model inside."""
    about = {"condition": "wrapped", "seed": subject.seed, "step": subject.step}
    with replacing_folder(options.output / EXPORT) as export:
        subject.model.save_pretrained(export)
        if isinstance(subject.task, TextPrompts | PromptTask):
            subject.task.tokenizer.save_pretrained(export)
        for name, content in ((TASK_FILE, subject.task.settings), (RUN_FILE, about)):
            if content is not None:
                (export / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    how = {"condition": "wrapped", "wraps": options.checkpoint, "step": subject.step}
    how |= {"num_blocks": options.num_blocks, "recency_bias": options.recency_bias}
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in how.items())
    with replacing(options.output / CONFIG, recorded=True) as part:
        part.write_text(lines, encoding="utf-8")
    # How well the model that it wraps does, on the same examples, device and dtype.
    vanilla = _placed(load_model(options.checkpoint).model, options, _device(options))
    accuracy = recall_accuracy(vanilla, check_probe(subject.model, subject.task, settings), settings.batch_size)
    return {"wraps": {"source": options.checkpoint, "accuracy": accuracy}}


def compare(options: Namespace) -> None:
    check_table_can_be_made(options.output)
    how = Inference(num_resamples=options.num_resamples, seed=options.seed)
    with unlisted((options.a, options.b)):
        rows = compare_runs(load_run(options.a), load_run(options.b), how)
        table = comparison_table(rows, (str(options.a), str(options.b)), options.metric)
    say(table)
    write_table(options.output, rows)


def check_table_can_be_made(path: Path | None) -> None:
    """Raise a ValueError unless `write_table` can write there, and overwrites nothing."""
    if path is None:
        return
    if path.suffix not in WRITERS:
        raise ValueError(f"--output {path} must end in {', '.join(WRITERS)}")
    if os.path.lexists(path):
        raise ValueError(f"--output {path} exists: choose another, nothing is overwritten")
    check_can_be_made("--output", path)


def write_table(path: Path | None, rows: pd.DataFrame) -> None:
    """Write what a command was asked to, and say so."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            WRITERS[path.suffix](rows, part)
        say(f"\nwritten: {path}")


def report(options: Namespace) -> None:
    from probe.report.command import write_report
    from probe.report.page.build import is_page

    page = options.runs[0] / PAGE if options.page is None else options.page
    if os.path.lexists(page) and not is_page(page):
        what = "is a folder: name a file" if page.is_dir() else "exists and is no page of attnres-probe report"
        raise ValueError(f"--page {page} {what}: choose another, nothing else is overwritten")
    check_can_be_made("--page", page)
    with unlisted(options.runs):
        for line in write_report(options.runs, page, options.metric):
            say(line)


def probe_settings(options: Namespace) -> ProbeSettings:
    """The settings that the options name. Raises ValueError for a name or number that is none."""
    settings = ProbeSettings(**{field.name: options[field.name] for field in fields(ProbeSettings)})
    per_device = -(-(settings.num_sequences or settings.batch_size) // options.devices)  # a batch for each device
    return replace(settings, batch_size=min(settings.batch_size, per_device))


def _device(options: Namespace) -> str:
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_device(options: Namespace) -> str:
    """The device that the options name. Raises ValueError if it cannot be used."""
    device = _device(options)
    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here ({str(error).splitlines()[0]})") from error
    return device


def _prepare(options: Namespace, results: Path) -> ProbeSettings:
    """Check whatever can be checked before work starts: settings, devices, and that --output can be made or resumed."""
    if options.task is not None and options.prompts is not None:
        raise ValueError("--task and --prompts each say what to probe on: give one of them")
    if options.devices < 1:
        raise ValueError(f"--devices must be at least 1, got {options.devices}")
    settings, device = probe_settings(options), check_device(options)
    available = torch.cuda.device_count() if device.startswith("cuda") else os.cpu_count() or 1
    if options.devices > available:
        raise ValueError(f"--devices {options.devices} is more than the {available} of {device} here")
    if not _is_begun(results) and (results / SUMMARY).exists():  # it was stopped when all was written
        shutil.rmtree(results / PARTS, ignore_errors=True)
    _is_unfinished(options.output, results)
    check_can_be_made("--output", options.output)
    return settings


def _is_begun(results: Path) -> bool:
    return (results / PARTS / SWEEP).exists()


def _is_unfinished(output: Path, results: Path) -> bool:
    """Whether a probe that was begun there can be gone on with.

    Raises:
        ValueError: there is something else. (A probe that is stopped at its very start leaves nothing to go on with.)
    """
    if _is_begun(results):
        return True
    left = (path for path in output.rglob("*") if path.suffix not in (".lock", ".part") and not path.is_dir())
    if os.path.lexists(output) and (not output.is_dir() or any(left)):
        raise ValueError(f"--output {output} exists and is not an empty folder: choose another, nothing is overwritten")
    return False


def check_new_folder(path: Path | None) -> None:
    """Raise a ValueError unless the folder that --output names, if it names one, is new and can be made."""
    if path is not None:
        if os.path.lexists(path):
            raise ValueError(f"--output {path} exists: choose another folder, nothing is overwritten")
        check_can_be_made("--output", path)


def check_can_be_made(option: str, path: Path) -> None:
    """Raise a ValueError unless the nearest folder above `path` can be written to."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{option} {path} cannot be made: {parent} is not a folder that can be written to")


def _load_attnres(options: Namespace) -> Subject:
    checkpoint = load_model(options.checkpoint)
    if not isinstance(checkpoint.model, AttnResForCausalLM):
        raise ValueError(f"{options.checkpoint} is a vanilla Qwen3, it has no routing: use attnres-probe baseline")
    about = (checkpoint.run, checkpoint.condition, checkpoint.seed, checkpoint.step)
    return Subject(checkpoint.model, _task(options, checkpoint), *about, options.output)


def _load_wrapped(options: Namespace) -> Subject:
    why = "beyond, float32 has no weight left for some source, and there is nothing to measure"
    check_number("--recency_bias", options.recency_bias, -MOST_BIAS, MOST_BIAS, why)
    checkpoint = load_model(options.checkpoint)
    if not isinstance(checkpoint.model, Qwen3ForCausalLM):
        raise ValueError(f"{options.checkpoint} is an AttnRes model, not a vanilla Qwen3: use attnres-probe run")
    model = wrap_qwen3(checkpoint.model, options.num_blocks, options.recency_bias)
    about = (options.output.resolve().name, "wrapped", checkpoint.seed, checkpoint.step)
    return Subject(model.eval(), _task(options, checkpoint), *about, options.output / PROBE)


def _task(options: Namespace, checkpoint: Checkpoint) -> ProbeTask:
    if options.prompts is None:
        return task_of(options, checkpoint)
    source = options.tokenizer or options.checkpoint
    return PromptTask.read(options.prompts, load_tokenizer(source), source)


def task_of(options: Namespace, checkpoint: Checkpoint) -> SyntheticTask:
    """The task that --task names, or that lies beside the checkpoint. Raises ValueError where none does."""
    task = checkpoint.task if options.task is None else task_from_dict(read_json(options.task))
    if task is None:
        raise ValueError(
            f"nothing beside {options.checkpoint} says which task to probe on: give --task FILE or --prompts FILE"
        )
    if isinstance(task, TextRecall):
        source = options.tokenizer or options.checkpoint
        return TextPrompts(task, load_tokenizer(source), source)
    if options.tokenizer is not None:
        raise ValueError(f"--tokenizer is for text_recall and --prompts; the task {task.name} has token ids of its own")
    return TokenTask(task)


def _probe(
    options: Namespace,
    settings: ProbeSettings,
    load: Callable[[Namespace], Subject],
    finish: Callable[[Subject], dict[str, Any]] | None = None,
) -> None:
    """Load, check and probe, in one process or in `--devices` of them.

    Args:
        finish: called when all is measured; what it returns is put into the summary.
    """
    subject, device = load(options), _device(options)
    if isinstance(subject.task, PromptTask):
        count, given = subject.task.count(settings.num_sequences), len(subject.task.prompts)
        if count < given:
            print(f"probing the first {count} of {given} prompts: --num_sequences null takes all", file=sys.stderr)
    check_probe(subject.model, subject.task, settings)  # nothing is written before, nor is a process spawned
    with held(options.output, "probe"):
        if _is_unfinished(options.output, subject.results):
            say(f"going on with the unfinished probe in {options.output}", sys.stderr)
        found = _sweep(options, settings, load, subject, device, finish)
    say(_finished(subject, found), sys.stderr)


def _sweep(
    options: Namespace,
    settings: ProbeSettings,
    load: Callable[[Namespace], Subject],
    subject: Subject,
    device: str,
    finish: Callable[[Subject], dict[str, Any]] | None,
) -> Effects:
    if options.devices > 1:
        from lightning.fabric import Fabric  # takes a second to import

        accelerator = "cuda" if device.startswith("cuda") else "cpu"
        fabric = Fabric(accelerator=accelerator, devices=options.devices, strategy="ddp_spawn")
        # As one partial: Fabric takes arguments apart to find modules in them, and settings are frozen.
        fabric.launch(partial(_sweep_share, options=options, settings=settings, load=load))
    with progress() as on_progress:
        return probe_model(
            _placed(subject.model, options, device),
            subject.task,
            settings,
            subject.results,
            run=subject.run,
            condition=subject.condition,
            seed=subject.seed,
            step=subject.step,
            resumable=True,
            finish=None if finish is None else partial(finish, subject),
            on_progress=on_progress,
        )


def _sweep_share(
    fabric: Fabric, options: Namespace, settings: ProbeSettings, load: Callable[[Namespace], Subject]
) -> None:
    """What each process does, with a copy of the model of its own."""
    subject = load(options)
    with progress() as on_progress:
        sweep_share(
            fabric.global_rank,
            fabric.world_size,
            _placed(subject.model, options, fabric.device),
            subject.task,
            settings,
            subject.results,
            run=subject.run,
            step=subject.step,
            on_progress=on_progress if fabric.is_global_zero else None,
        )


def _placed(model: Model, options: Namespace, device: torch.device | str) -> Model:
    """The model itself, on `device` and in the dtype that `--dtype` names."""
    torch.nn.Module.to(model, device, getattr(torch, options.dtype) if options.dtype else model.dtype)
    return model


def _finished(subject: Subject, found: Effects) -> str:
    about = found.summary["probe"]
    learned = "" if found.summary["clean"]["task_learned"] else " (NOT LEARNED)"
    return (
        f"probed {subject.run} at step {subject.step}: accuracy {found.accuracy:.4f}{learned}, "
        f"{about['n_ablations']} ablations in {found.seconds:.1f} s and {about['forward_passes']:.0f} forward passes "
        f"-> {subject.results}"
    )


@contextmanager
def progress(what: str = "probing", unit: str = " ablations") -> Iterator[Callable[[int, int], None]]:
    """A progress bar with an ETA; a line every ten seconds where nobody watches. It ends with its line."""
    with ExitStack() as bars:
        bar: tqdm | None = None

        def show(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                seconds, width = (0.1, None) if sys.stderr.isatty() else (10, 80)
                bar = tqdm(total=total, unit=unit, desc=what, mininterval=seconds, ncols=width)
                bars.callback(bar.close)
            bar.update(done - bar.n)

        yield show
