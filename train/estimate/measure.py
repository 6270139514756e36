"""Seconds of a training step and of a forward pass on this machine, from a few real ones."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnres.tasks import MQAR, RecallBatch
from train.estimate.simulate import Workload, training_step
from train.recall.module import RetrievalModule

NUM_STEPS = 3


@dataclass(frozen=True)
class Timing:
    """Medians on this machine.

    Attributes:
        device: what was timed.
        step: seconds of an optimiser step.
        forward: seconds of a batch's forward pass in the precision of training, without gradients.
        probe_forward: the same outside of autocast, as probes run.
    """

    device: str
    step: float
    forward: float
    probe_forward: float


def local_device(accelerator: str) -> torch.device:
    """The device of this machine that `trainer.accelerator` means. Raises ValueError if it has none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator == "cpu" or (accelerator == "auto" and found is None):
        return torch.device("cpu")
    if found is None or accelerator not in ("auto", "gpu", found.type):
        raise ValueError(f"trainer.accelerator {accelerator} is not on this machine; set it to cpu to measure that")
    return found


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory of `device`; `None` where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not on every system
        return None


def time_steps(module: RetrievalModule, task: MQAR, workload: Workload, device: torch.device) -> Timing:
    """Time `module`, which is moved to `device` and trained for a few steps, on `task` at the final K."""
    module.to(device, workload.dtype).train()
    optimizer = module.build_optimizer()

    def draw() -> RecallBatch:
        return task.batch("train", range(workload.batch_size)).to(device)

    def forward() -> None:
        module(draw())

    def forward_in_precision() -> None:
        with workload.precision(device.type):
            forward()

    step = _median(lambda: training_step(module, optimizer, draw(), workload), device)
    module.eval()
    with torch.no_grad():
        return Timing(str(device), step, _median(forward_in_precision, device), _median(forward, device))


def _median(function: Callable[[], None], device: torch.device) -> float:
    """Median seconds of a few calls, after one that is not counted."""
    seconds = []
    for _ in range(1 + NUM_STEPS):
        started = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


__all__ = ["Timing", "local_device", "memory_of", "time_steps"]
