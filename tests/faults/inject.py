"""What goes wrong inside of a process: called there before its command (`tests.faults.nursery.Injection`)."""

from __future__ import annotations

import atexit
import builtins
import errno
import io
import itertools
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers.modeling_utils
import wandb
from safetensors import SafetensorError

import probe.files.trail
import train.loggers.guard as guard
from attnres import AttnResModel
from train.recall.module import RetrievalModule
from train.run.callbacks import CurriculumCallback

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
LOGGER_SECONDS = 1.0
STRUCK = "ATTNRES_FAULT_STRUCK"
"""The environment's name for a file that is there once the fault has come about."""
Act = Callable[[int, str, str], None]
"""Is told the number of a change to the files of this folder, what it is, and the path."""


def strike(where: str = "") -> None:
    """The fault comes about now."""
    descriptor = os.open(os.environ[STRUCK], os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, where.encode())
    os.close(descriptor)


def on_change(act: Act, on_read: Callable[[str], None] | None = None) -> None:
    """Call `act` before each change: a file that is opened to be written, a rename, a removal, a new folder."""
    folder, owner, numbers = os.getcwd() + os.sep, os.getpid(), itertools.count(1)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event != "open" and event not in CHANGES:
            return
        if os.getpid() != owner or not isinstance(args[0], str | os.PathLike):
            return
        path = os.path.abspath(os.fspath(args[0]))
        if not path.startswith(folder):
            return
        if event != "open" or args[2] & WRITING:
            act(next(numbers), event, path.removeprefix(folder))
        elif on_read is not None:
            on_read(path.removeprefix(folder))

    sys.addaudithook(hook)


def record(path: Path) -> None:
    """Write, when the process ends, what it has changed and read, and how much it has written to each file."""
    changes: list[str] = []
    reads: dict[str, None] = {}
    on_change(lambda number, event, changed: changes.append(f"{event} {changed}"), reads.setdefault)
    disk = limited_disk(None)
    atexit.register(
        lambda: path.write_text(json.dumps({"changes": changes, "reads": list(reads), "written": disk.written}))
    )


def signal_at(change: int, number: int) -> None:
    """Send `number` to this process before a change; it may be stopped in the middle of anything."""

    def act(at: int, event: str, path: str) -> None:
        if at == change:
            strike(f"{event} {path}")
            os.kill(os.getpid(), number)

    on_change(act)


def fail_at(change: int, number: int) -> None:
    """A change fails: the system says error `number`."""

    def act(at: int, event: str, path: str) -> None:
        if at == change:
            strike(f"{event} {path}")
            raise OSError(number, os.strerror(number), path)

    on_change(act)


class limited_disk:
    """A disk with `free` bytes for the files of this folder: what has filled it stays, all that comes later fails.

    Of what is written by way of Python; safetensors, which writes by itself, fails as it does on such a disk.
    """

    def __init__(self, free: int | None) -> None:
        self.free, self.used, self.written = free, 0, list[tuple[str, int]]()
        self.folder, self.open = os.getcwd() + os.sep, io.open
        builtins.open = io.open = self._open
        probe.files.trail.save_file = transformers.modeling_utils.safe_save_file = self._save

    def take(self, wanted: int, path: str) -> int:
        """How much of what is `wanted` can be written."""
        given = wanted if self.free is None else min(wanted, self.free - self.used)
        if given <= 0 < wanted:
            strike()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.used += given
        self.written.append((path, given))
        return given

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        path = os.path.abspath(os.fspath(file)) if isinstance(file, str | os.PathLike) else ""
        if not path.startswith(self.folder) or not set(mode) & set("wax+"):
            return self.open(file, mode, buffering, *args, **kwargs)
        raw = _File(path, mode.replace("b", "").replace("t", ""))
        raw.disk = self
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **kwargs)

    def _save(self, tensors: Any, filename: Any, metadata: Any = None) -> None:
        content = safetensors.torch.save(tensors, metadata)
        try:
            with self._open(filename, "wb") as file:
                file.write(content)
        except OSError as error:
            raise SafetensorError(
                f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
            ) from None


class _File(io.FileIO):
    disk: limited_disk

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        return super().write(view[: self.disk.take(len(view), str(self.name))])


def limit_file_size(size: int) -> None:
    """The system lets no file become larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def not_finite(step: int, where: str, value: float, choice: int) -> None:
    """The loss of a step, one number of its gradient, or one of the weights after it becomes NaN or infinite."""

    def spoil(module: Any, gradients: bool) -> None:
        tensors = [p.grad if gradients else p.data for p in module.model.parameters() if p.grad is not None]
        strike()
        values = tensors[choice % len(tensors)].view(-1)
        values[choice % len(values)] = value

    answer, before_step = RetrievalModule.answer, RetrievalModule.on_before_optimizer_step
    on_end = CurriculumCallback.on_train_batch_end

    def spoiled_answer(self: Any, batch: Any) -> Any:
        loss, correct = answer(self, batch)
        if self.trainer.global_step == step and where == "loss":
            strike()
            loss = loss * value
        return loss, correct

    def spoiled_gradient(self: Any, optimizer: Any) -> None:
        if self.trainer.global_step == step and where == "gradient":
            spoil(self, gradients=True)
        before_step(self, optimizer)

    def spoiled_weight(self: Any, trainer: Any, module: Any, *args: Any) -> None:
        on_end(self, trainer, module, *args)
        if trainer.global_step == step + 1 and where == "weight":
            spoil(module, gradients=False)

    RetrievalModule.answer = spoiled_answer
    RetrievalModule.on_before_optimizer_step = spoiled_gradient
    CurriculumCallback.on_train_batch_end = spoiled_weight


def not_finite_output(call: int, value: float) -> None:
    """From its `call`-th pass without gradients on, the model's last hidden states are not finite."""

    def spoil(number: int, outputs: Any) -> Any:
        if number >= call and outputs.last_hidden_state is not None:
            strike()
            outputs.last_hidden_state.fill_(value)
        return outputs

    _on_forward(spoil)


def out_of_memory(call: int, stays: bool) -> None:
    """The `call`-th pass without gradients finds too little memory; all later ones too if it `stays` so."""

    def lack(number: int, outputs: Any) -> Any:
        if number == call or (stays and number > call):
            strike()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return outputs

    _on_forward(lack)


def _on_forward(change: Callable[[int, Any], Any]) -> None:
    forward, numbers = AttnResModel.forward, itertools.count(1)

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        return outputs if torch.is_grad_enabled() else change(next(numbers), outputs)

    AttnResModel.forward = changed


def wandb_fails(call: int | None, how: str, path: Path | None = None) -> None:
    """W&B's `call`-th call raises, hangs, or does nothing; with a path, its calls are written there at the end."""
    calls: list[str] = []
    guard.START_SECONDS = guard.CALL_SECONDS = guard.END_SECONDS = LOGGER_SECONDS if how == "hangs" else 60.0

    def disturbed(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def disturb(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) != call:
                return act(*args, **kwargs)
            strike()
            if how == "raises":
                raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
            if how == "hangs":
                time.sleep(10_000)
            return None

        return disturb

    run, config = wandb.sdk.wandb_run.Run, wandb.sdk.wandb_config.Config
    for owner, names in ((run, ("log", "define_metric", "finish", "log_artifact")), (config, ("update",))):
        for name in names:
            setattr(owner, name, disturbed(name, getattr(owner, name)))
    wandb.init = disturbed("init", wandb.init)
    if path is not None:
        atexit.register(lambda: path.write_text(json.dumps(calls)))


def worker_dies(batch: int, number: int) -> None:
    """After a batch, the process that draws examples is sent a signal."""
    on_end, batches = CurriculumCallback.on_train_batch_end, itertools.count(1)

    def kill(self: Any, *args: Any) -> None:
        if next(batches) == batch:
            strike()
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, number)
        on_end(self, *args)

    CurriculumCallback.on_train_batch_end = kill


def dies_after_step(step: int) -> None:
    """The process is killed when a step has ended: this makes a run to go on with."""
    on_end = CurriculumCallback.on_train_batch_end

    def die(self: Any, trainer: Any, *args: Any) -> None:
        on_end(self, trainer, *args)
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    CurriculumCallback.on_train_batch_end = die
