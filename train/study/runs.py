"""Running the runs of a study, one after another, and knowing from what they left which are done.

Each is trained and probed by the commands that a person would give, in processes of their own. A process holds the lock
of its run, which ends with it: whatever becomes of the study's own process, no run is ever worked on twice at a time.
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

from probe.files.checkpoints import RUN_FILE, read_json
from probe.files.layout import PARTS, SWEEP
from train.run.checkpoints import newest_checkpoint
from train.study.description import Run

FINISHED, BUSY, UNFINISHED, NOT_BEGUN = "finished", "busy elsewhere", "unfinished", "not begun"


def is_trained(run: Run) -> bool:
    """Whether the last thing that training writes is there, what run it was, and the checkpoint is of that step."""
    about = _read_written(run.directory / "hf" / RUN_FILE)
    if about is None:
        return False
    path, checkpoint, torn = newest_checkpoint(run.directory)
    if path is None:  # of a run without checkpoints
        return not torn
    return checkpoint["global_step"] == about.get("step")


def is_probed(run: Run) -> bool:
    """Whether the final probe has written its summary, which it does last."""
    if run.study.probe is None:
        return True
    results = _results(run)
    summary = _read_written(results / "summary.json")
    if summary is None or _can_go_on(results):
        return False
    return not run.is_vanilla or "wraps" in summary


def status(run: Run) -> str:
    """How far a run has come, from what it left."""
    if is_trained(run) and is_probed(run):
        return FINISHED
    return UNFINISHED if run.directory.exists() else NOT_BEGUN


def next_command(run: Run) -> list[str] | None:
    """What takes a run on from where it is; `None` when it is finished."""
    if not is_trained(run):
        begun = run.directory.is_dir() and any(run.directory.iterdir())
        return [*run.train_command(), *(["--ckpt_path", "last"] if begun else [])]
    return None if is_probed(run) else run.probe_command()


def all_commands(run: Run) -> list[list[str]]:
    """What is left to do for a run."""
    commands = [command for command in [next_command(run)] if command is not None]
    if commands and not is_trained(run) and run.study.probe is not None:
        commands.append(run.probe_command())
    return commands


def run_all(run: Run, label: str) -> str:
    """Train and probe a run as far as that is left to do; returns its status, with what failed where something did."""
    with _lock(run) as lock:
        if lock is None:
            return BUSY
        for command in all_commands(run):
            if command[0] == "attnres-probe":
                _discard_torn_probe(run)
            print(f"{label}: {shlex.join(command)}", flush=True)
            if code := _execute(command, lock):
                return f"failed: {' '.join(command[:2])} (exit status {code})"
        return FINISHED if next_command(run) is None else "failed: it ended early"


def program(name: str) -> str:
    """The path of a console script: that beside this Python, or else on PATH. Raises ValueError if there is none."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    path = shutil.which(name, path=folders)
    if path is None:
        raise ValueError(f"{name} is not installed beside {Path(sys.executable).name} nor on PATH; install attnres")
    return path


def _execute(command: Sequence[str], lock: IO[str]) -> int:
    """The exit status. What interrupts this process interrupts that one, and is waited for."""
    with subprocess.Popen([program(command[0]), *command[1:]], pass_fds=(lock.fileno(),)) as process:
        try:
            return process.wait()
        except BaseException as error:
            process.send_signal(signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
            process.wait()
            raise


@contextlib.contextmanager
def _lock(run: Run) -> Iterator[IO[str] | None]:
    """The lock of a run, which processes that are given it hold too; `None` if it is taken."""
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
    """The JSON object in `path`; `None` where there is none, as when what writes it was killed."""
    try:
        return read_json(path)
    except ValueError:
        return None


def _results(run: Run) -> Path:
    return run.probed / "probe" if run.is_vanilla else run.probe_output


def _can_go_on(results: Path) -> bool:
    return (results / PARTS / SWEEP).exists()


def _discard_torn_probe(run: Run) -> None:
    """Killed while it began or ended, a probe leaves what `attnres-probe` neither goes on with nor overwrites."""
    if run.probe_output.exists() and not _can_go_on(_results(run)):
        print(f"{run.probe_output} is not whole and is made again", flush=True)
        shutil.rmtree(run.probe_output)


__all__ = ["BUSY", "FINISHED", "all_commands", "is_probed", "is_trained", "program", "run_all", "status"]
