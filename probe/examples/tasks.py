"""What the probe needs of a task, whichever it is: sequences with answers, and a flip test."""

from __future__ import annotations

from transformers import PreTrainedModel

from attnres.tasks import MQAR
from probe.examples.flip import FlipResult, flip_test, flip_test_text
from probe.examples.inputs import ProbeInputs
from probe.examples.prompts import TextPrompts

ProbeTask = MQAR | TextPrompts
"""Both have `num_pairs`, `vocab_size`, `chance_accuracy`, `plateau_accuracy` and `to_dict`."""


def probe_inputs(task: ProbeTask, num_sequences: int) -> ProbeInputs:
    """The first sequences that a probe on `task` runs on, the same for every model (and, of text, its tokenizer)."""
    if isinstance(task, TextPrompts):
        return task.inputs(num_sequences)
    return ProbeInputs.from_recall(task.batch("probe", range(num_sequences)))


def num_flips(task: ProbeTask) -> int:
    """Changes of the flip test, each a forward pass; 0 where there is no new value to change one to."""
    if isinstance(task, TextPrompts):
        return 2 if task.task.has_spare else 0
    return min(4, task.num_pairs) if task.num_values > task.num_pairs else 0


def flip_inputs(task: ProbeTask, num_sequences: int, seed: int) -> tuple[ProbeInputs, ...]:
    """What the flip test of a task in words runs on, to be checked before work starts; nothing for other tasks.

    Raises:
        ValueError: as `probe_inputs`: a code that is new to the context can be one that the tokenizer cannot write.
    """
    return tuple(task.flipped(num_sequences, seed)) if isinstance(task, TextPrompts) and num_flips(task) else ()


def flip_result(
    task: ProbeTask, model: PreTrainedModel, num_sequences: int, seed: int, batch_size: int
) -> FlipResult | None:
    """The flip test on the same sequences; `None` where there is no new value to change one to."""
    if not num_flips(task):
        return None
    if isinstance(task, TextPrompts):
        return flip_test_text(model, task, num_sequences, seed, batch_size)
    return flip_test(model, task, task.batch("probe", range(num_sequences)), num_flips(task), seed, batch_size)


__all__ = ["ProbeTask", "flip_inputs", "flip_result", "num_flips", "probe_inputs"]
