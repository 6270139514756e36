"""Processes that start at once: a server that has imported everything forks one for each command.

A command runs as it does from a shell, in a session of its own, with the default signal handlers. It ends as an
interpreter does, but that its modules are not taken apart, which takes seconds. What it leaves behind becomes a child
of the server, which can be seen.

    python -m tests.faults.nursery DESCRIPTOR
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from tests.support.paths import ROOT

PR_SET_CHILD_SUBREAPER = 36
HEAVY = (
    "probe.commands",
    "probe.trail_commands",
    "probe.verify",
    "probe.report.command",
    "lightning.fabric",
    "torch.distributed.fsdp",
    "train.cli.fit",
    "train.study.cli",
    "wandb",
    "wandb.sdk.wandb_run",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_pdf",
    "transformers.models.qwen3.modeling_qwen3",
    "datasets",
    "plotly.graph_objs.layout",
    "plotly.io",
    "plotly.validator_cache",
    "PIL.PpmImagePlugin",
    "PIL.JpegImagePlugin",
    "fontTools.subset",
    "pyarrow.dataset",
    "scipy.io",
)
PROGRAMS = {"attnres-train": "train.cli:main", "attnres-probe": "probe.cli:main"}
ENVIRONMENT = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ENVIRONMENT |= {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # jemalloc has a thread, beside which a fork may hang
Injection = Callable[[], None]
"""Called in the process, before its command: sees to it that something goes wrong. To be pickled."""


@dataclass(frozen=True)
class Request:
    """A command, and what is to go wrong in it. Everything it prints goes to `output`."""

    command: Sequence[str]
    folder: Path
    output: Path
    injections: Sequence[Injection] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class Nursery:
    """The server, as seen by who asks for processes. To be closed."""

    def __init__(self) -> None:
        ours, its = socket.socketpair()
        with its:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.nursery", str(its.fileno())],
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT},
                pass_fds=[its.fileno()],
            )
        self._connection = Connection(ours.detach())
        self._ended: dict[int, int] = {}

    def start(self, request: Request) -> int:
        """The process id."""
        self._connection.send(request)
        while True:
            what, pid, status = self._connection.recv()
            if what == "started":
                return pid
            self._ended[pid] = status

    def status(self, pid: int, seconds: float) -> int | None:
        """The exit status of a process, negative for a signal; None if it has not ended in `seconds`."""
        deadline = time.monotonic() + seconds
        while pid not in self._ended:
            left = deadline - time.monotonic()
            if left <= 0 or not self._connection.poll(left):
                return None
            _, ended, status = self._connection.recv()
            self._ended[ended] = status
        return self._ended.pop(pid)

    def living(self) -> list[int]:
        """All processes of the server that have not ended, those included that lost their parents."""
        pid = self._server.pid
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in listed if _is_running(int(child))]

    def close(self) -> None:
        for pid in self.living():
            os.kill(pid, signal.SIGKILL)
        self._connection.close()
        self._server.wait()


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def serve(connection: Connection) -> None:
    """Fork a process for each request, until nobody asks any more."""
    while True:
        if connection.poll(0.005):
            try:
                request = connection.recv()
            except EOFError:
                return
            if (pid := os.fork()) == 0:
                connection.close()
                carry_out(request)
            connection.send(("started", pid, 0))
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            continue
        if pid:
            connection.send(("ended", pid, os.waitstatus_to_exitcode(status)))


def carry_out(request: Request) -> NoReturn:
    """Be the process of a request."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    descriptor = os.open(request.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    status = 1
    try:
        status = _run(request)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(request: Request) -> int:
    os.environ.update(request.environment)
    os.chdir(request.folder)
    program, *arguments = request.command
    sys.argv = [program, *arguments]
    if os.environ["WANDB_MODE"] != "disabled":  # it removes a folder for images at its end, which all would share
        sys.modules["wandb.sdk.data_types._private"].MEDIA_TMP.name = tempfile.mkdtemp("wandb-media")
    for inject in request.injections:
        inject()
    main: Any = pkgutil.resolve_name(PROGRAMS[program])
    return main(arguments)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    import torch

    torch.set_num_threads(1)
    for module in HEAVY:
        __import__(module)
    gc.freeze()  # what is shared with the processes stays so
    serve(Connection(int(sys.argv[1])))
