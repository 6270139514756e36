"""How training ends early: all of its processes, and errors of others in our words."""

from __future__ import annotations

import re
import signal
import time
from typing import Any

from probe.failures import CannotGoOn, one_line

GRACE_SECONDS = 10.0
"""Processes that have not ended by then hang in a collective call, and are killed."""
OF_WORKER = re.compile(r"^DataLoader (worker|timed out)")
RAISED = re.compile(r"^train\.run\.finite\.NotFinite: (.*)$", re.MULTILINE)


def end_processes(launcher: Any) -> None:
    """End the processes that this one has launched, if it has."""
    processes = list(getattr(launcher, "procs", ()))
    if not processes:
        return
    launcher.kill(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while any(map(_is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.kill(signal.SIGKILL)


def _is_alive(process: Any) -> bool:
    return process.poll() is None if hasattr(process, "poll") else process.is_alive()


def explain(error: BaseException) -> BaseException:
    """`error`, or what to tell the user in its place."""
    text = str(error)
    if isinstance(error, RuntimeError) and OF_WORKER.search(text):
        why = one_line(text.partition(". ")[0])
        return CannotGoOn(
            f"a process that draws examples has died ({why}): little memory, or little /dev/shm, are the usual "
            "reasons, and --data.num_workers 0 does without; --ckpt_path last goes on"
        )
    if found := RAISED.search(text):  # from a process that was forked, as text
        return CannotGoOn(found[1])
    return error
