"""Running the runs of a study, one after another, and knowing from what they left which are done.

Each is trained and probed by the commands that a person would give, in processes of their own. Each process holds the
lock of its run until it ends. So two studies never work on one run at a time, even if one of them is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from probe.failures import Stopped
from probe.files.checkpoints import RUN_FILE, read_json
from probe.files.layout import PARTS, SUMMARY, SWEEP
from train.run.checkpoints import newest_checkpoint
from train.study.description import StudyRun

FINISHED, BUSY, UNFINISHED, NOT_BEGUN = "finished", "busy elsewhere", "unfinished", "not begun"


def is_trained(run: StudyRun) -> bool:
    """Whether training has written what it writes last, the run's description, and the checkpoint is of its step."""
    about = _read_written(run.directory / "hf" / RUN_FILE)
    if about is None:
        return False
    path, checkpoint, torn = newest_checkpoint(run.directory)
    if path is None:  # of a run without checkpoints
        return not torn
    return checkpoint["global_step"] == about.get("step")


def is_probed(run: StudyRun) -> bool:
    """Whether the final probe has written its summary, which it does last."""
    if run.study.probe is None:
        return True
    results = _results(run)
    summary = _read_written(results / SUMMARY)
    if summary is None or _can_go_on(results):
        return False
    return not run.is_vanilla or "wraps" in summary


def status(run: StudyRun) -> str:
    """How far a run has come, from what it left."""
    try:
        if not all_commands(run):
            return FINISHED
    except ValueError as error:
        return damaged(error)
    return UNFINISHED if run.directory.exists() else NOT_BEGUN


def damaged(error: ValueError) -> str:
    """The status of a run with a file that says, in `error`, what is wrong with it."""
    return f"damaged: {' '.join(str(error).split())}"


def all_commands(run: StudyRun) -> list[list[str]]:
    """What is left to do for a run. Raises ValueError for a file of it that was altered or cannot be read."""
    commands, trained = [], is_trained(run)
    if not trained:
        begun = run.directory.is_dir() and any(run.directory.iterdir())
        commands.append([*run.train_command(), *(["--ckpt_path", "last"] if begun else [])])
    if run.study.probe is not None and not (trained and is_probed(run)):
        commands.append(run.probe_command())
    return commands


def run_all(run: StudyRun, label: str) -> str:
    """Do what is left to do for a run; returns its status, or which command failed."""
    with _lock(run) as lock:
        if lock is None:
            return BUSY
        try:
            commands = all_commands(run)
        except ValueError as error:
            return damaged(error)
        for command in commands:
            if command[0] == "attnres-probe" and (len(commands) > 1 or _is_torn(_results(run) / SUMMARY)):
                _discard_probe(run)
            print(f"{label}: {shlex.join(command)}", flush=True)
            if code := _execute(command, lock):
                return f"failed: {' '.join(command[:2])} (exit status {code})"
        return "failed: it ended early" if all_commands(run) else FINISHED


def program(name: str) -> str:
    """The path of a console script: that beside this Python, or else on PATH. Raises ValueError if there is none."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    path = shutil.which(name, path=folders)
    if path is None:
        raise ValueError(f"{name} is not installed beside {Path(sys.executable).name} nor on PATH; install attnres")
    return path


def _execute(command: Sequence[str], lock: IO[str]) -> int:
    """The exit status. If this process is interrupted, it passes that on to the command and waits for its end."""
    arguments = [program(command[0]), *command[1:]]
    held: list[int] = []  # signals that come while the command starts, when it cannot be told yet
    stops = (signal.SIGINT, signal.SIGTERM)
    handlers = {stop: signal.signal(stop, lambda number, _: held.append(number)) for stop in stops}
    with subprocess.Popen(arguments, pass_fds=(lock.fileno(),)) as process:
        try:
            for stop, handler in handlers.items():
                signal.signal(stop, handler)
            for number in held:
                signal.raise_signal(number)
            return process.wait()
        except BaseException as error:
            process.send_signal(error.number if isinstance(error, Stopped) else signal.SIGTERM)
            process.wait()
            raise


@contextlib.contextmanager
def _lock(run: StudyRun) -> Iterator[IO[str] | None]:
    """The lock of a run, for its commands to inherit; `None` if it is taken."""
    path = run.directory.parent / "locks" / run.name
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file


def _read_written(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; `None` where there is none, or an empty file, which a crash of the machine leaves."""
    return None if _is_torn(path) else read_json(path)


def _is_torn(path: Path) -> bool:
    return not path.exists() or path.stat().st_size == 0


def _results(run: StudyRun) -> Path:
    return run.probed / "probe" if run.is_vanilla else run.probe_output


def _can_go_on(results: Path) -> bool:
    return (results / PARTS / SWEEP).exists()


def _discard_probe(run: StudyRun) -> None:
    """Remove a probe of a model that is trained on since, or that lost its summary, unless it can be gone on with."""
    if (_results(run) / SUMMARY).exists() and not _can_go_on(_results(run)):
        print(f"{run.probe_output} is not whole and is made again", flush=True)
        shutil.rmtree(run.probe_output)
