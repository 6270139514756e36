"""What `attnres-probe flip` does: a test of behaviour, for any causal language model."""

from __future__ import annotations

from jsonargparse import Namespace

from attnres.inputs import LARGEST_INTEGER, check_number
from probe.analysis.flips import flip_shares, flip_text
from probe.commands import check_device, check_table_can_be_made, say, task_of, write_table
from probe.files.checkpoints import load_model
from probe.runner import check_finite


def flip(options: Namespace) -> None:
    check_table_can_be_made(options.output)
    check_number("--seed", options.seed, 0, LARGEST_INTEGER)
    device = check_device(options)
    checkpoint = load_model(options.checkpoint, any_causal_lm=True)
    model, task = checkpoint.model, task_of(options, checkpoint)
    if not task.num_flips:
        raise ValueError("the flip test needs a value that is not in the context, and this task has none left")
    task.check_sizes(model.config)
    check_finite(model)
    count = task.count(options.num_sequences)
    task.check_count(count)
    task.check(model.config, [task.examples(count), *task.flipped(count, options.seed)])
    outcomes = task.flip_outcomes(model.to(device), count, options.seed, options.batch_size)  # type: ignore[arg-type]
    assert outcomes is not None
    settings = ", ".join(f"{name} {value}" for name, value in (task.settings or {}).items())
    say(f"flip test of {checkpoint.title}, on {count:,} sequences of {settings}\n")
    say(flip_text(flip_shares(outcomes)))
    write_table(options.output, outcomes)
