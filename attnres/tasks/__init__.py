"""Synthetic tasks. Nothing here imports models, training or probes."""

import reprlib

from attnres.tasks.mqar import IGNORE_INDEX, MQAR, SPLITS, RecallBatch, sequence_length
from attnres.tasks.text_recall import TextExample, TextRecall

TASKS = {"mqar": MQAR, "text_recall": TextRecall}


def task_from_dict(settings: dict[str, str | int]) -> MQAR | TextRecall:
    """The task that plain settings (`to_dict`) describe. Raises ValueError for an unknown task or bad settings."""
    name = settings.get("task")
    if not isinstance(name, str) or name not in TASKS:
        raise ValueError(f"task {reprlib.repr(name)} is not supported; choose from {', '.join(TASKS)}")
    return TASKS[name].from_dict(settings)


__all__ = [
    "IGNORE_INDEX",
    "MQAR",
    "SPLITS",
    "RecallBatch",
    "TextExample",
    "TextRecall",
    "sequence_length",
    "task_from_dict",
]
