"""Synthetic tasks. Nothing here imports models, training or probes."""

import pkgutil
import reprlib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from attnres.tasks.hops import Hops
from attnres.tasks.mqar import MQAR, RecallBatch, sequence_length
from attnres.tasks.pointer import Pointer
from attnres.tasks.task import IGNORE_INDEX, SPLITS, TASKS, Flip, Task, TaskBatch
from attnres.tasks.text_recall import TextExample, TextRecall

for _module in pkgutil.iter_modules(__path__):  # a task whose file is put here is known, and named nowhere else
    import_module(f"{__name__}.{_module.name}")


def task_from_dict(settings: Mapping[str, Any]) -> Task | TextRecall:
    """The task that plain settings (`to_dict`) describe. Raises ValueError for an unknown task or bad settings."""
    name, known = settings.get("task"), {**TASKS, TextRecall.name: TextRecall}
    if not isinstance(name, str) or name not in known:
        here = sorted(task for task, kind in known.items() if kind.__module__.startswith(__name__))
        raise ValueError(f"task {reprlib.repr(name)} is not supported; choose from {', '.join(here)}")
    return known[name].from_dict(settings)


__all__ = [
    "IGNORE_INDEX",
    "MQAR",
    "SPLITS",
    "TASKS",
    "Flip",
    "Hops",
    "Pointer",
    "RecallBatch",
    "Task",
    "TaskBatch",
    "TextExample",
    "TextRecall",
    "sequence_length",
    "task_from_dict",
]
