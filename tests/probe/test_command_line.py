"""How a command ends: one line and a status for each class of failure, whatever the failure is."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
import torch

from attnres.files import replacing
from probe.command_line import TRACEBACK, run_program
from probe.failures import CannotGoOn, Stopped, disk_error, is_out_of_memory, raising_signals
from probe.settings import ProbeSettings
from tests.support.paths import ROOT

FULL = "/dev/full"  # Linux's disk that is full


def ended(capsys, act, *options: str) -> tuple[int, str]:
    """The status and the one line with which a command that does `act` ends."""
    with pytest.raises(SystemExit) as end:
        run_program("prog", "", {"do": ("", lambda _: act())}, ["do", *options])
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("prog do: ")
    return end.value.code, shown.err


def fail(error: BaseException):
    raise error


def write_checkpoint() -> None:
    with open(FULL, "wb") as file:
        torch.save({"weights": torch.zeros(2**18)}, file)


def write_weights() -> None:
    """safetensors would move its file over a device: here it meets a limit on the size of files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with tempfile.TemporaryDirectory() as folder:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**10, before[1]))
        try:
            safetensors.torch.save_file({"weights": torch.zeros(2**18)}, f"{folder}/model.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_its_status_and_the_command_that_goes_on(number, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    try:
        status, line = ended(capsys, lambda: signal.raise_signal(number), "--at", "a b")
        assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 128 + number
    assert line == f"prog do: stopped by {number.name}; go on with: prog do --at 'a b'\n"


def test_no_guard_against_failures_keeps_a_signal():
    def guarded() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("it was taken for a failure")

    with raising_signals(), pytest.raises(Stopped):
        guarded()


STOPPED_WHILE_A_THREAD_STARTS = """
import signal, threading, time
from concurrent.futures import ThreadPoolExecutor
from probe.failures import Stopped, raising_signals

def waits(event, timeout=None):  # for the thread to have started
    threading.Event.wait = wait
    signal.raise_signal(signal.SIGTERM)
    return wait(event, timeout)

wait, threading.Event.wait = threading.Event.wait, waits
pool, began = ThreadPoolExecutor(1), time.monotonic()
try:
    with raising_signals():
        done = pool.submit(int)
        while time.monotonic() < began + 20:
            time.sleep(0.01)
except Stopped as stop:
    print(stop, done.result(), signal.getsignal(signal.SIGALRM))
"""


def test_a_signal_while_a_thread_starts_leaves_none_behind_that_is_waited_for():
    """An executor that is stopped there has not noted its thread, and the interpreter waits for it without end."""
    words = [sys.executable, "-c", STOPPED_WHILE_A_THREAD_STARTS]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert ended.stdout == "stopped by SIGTERM 0 0\n"
    assert ended.returncode == 0


def test_what_threads_lose_by_a_stop_is_not_printed(capsys):
    """multiprocessing's print what they were told by workers that are gone, by `sys.excepthook`."""

    def stop() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            thread = threading.Thread(target=lambda: sys.excepthook(OSError, OSError("a connection is gone"), None))
            thread.start()
            thread.join()

    hook = sys.excepthook
    status, line = ended(capsys, stop)
    assert status == 130
    assert "stopped by SIGINT; go on with: " in line
    assert sys.excepthook is hook


def test_a_forked_process_dies_of_a_signal_as_ever():
    """Workers that draw examples are forked: what ends them is no business of the command line."""
    with raising_signals():
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os._exit(3)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM


def test_what_our_code_refuses_is_bad_input(capsys):
    status, line = ended(capsys, lambda: ProbeSettings(batch_size=-1))
    assert status == 2
    assert line.startswith("prog do: error: batch_size must be")


def test_a_value_error_of_others_is_a_bug_of_ours(capsys, monkeypatch):
    status, line = ended(capsys, lambda: int("three"))
    assert status == 1
    assert "internal error: ValueError: invalid literal for int()" in line
    assert "(probe/command_line.py:" in line  # the innermost place in our code
    assert TRACEBACK in line
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(SystemExit):
        run_program("prog", "", {"do": ("", lambda _: int("three"))}, ["do"])
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists(FULL), reason="Linux only")
@pytest.mark.parametrize(
    "write",
    [
        write_checkpoint,
        write_weights,
        lambda: pd.DataFrame({"a": range(9)}).to_parquet(FULL),
        lambda: pd.DataFrame({"a": range(9)}).to_csv(FULL),
    ],
    ids=["torch", "safetensors", "parquet", "csv"],
)
def test_a_full_disk_is_told_from_all_else_whoever_writes(write, capsys):
    with pytest.raises(Exception) as failure:  # noqa: PT011 (each writer has its own)
        write()
    found = disk_error(failure.value)
    assert found is not None
    assert found.errno == (errno.EFBIG if write is write_weights else errno.ENOSPC)
    status, line = ended(capsys, write)
    assert status == 74
    assert os.strerror(found.errno) in line
    assert "go on with: prog do" in line


def test_a_full_disk_is_found_in_what_fails_after_it_and_nothing_else_is():
    """matplotlib's PDF writer, among others, fails once more while it closes what it could not write."""

    def fails_after(number: int) -> None:
        try:
            raise OSError(number, os.strerror(number))
        except OSError:
            raise AttributeError("has no attribute 'pos'")  # noqa: B904 (as they do)

    found = {}
    for number in (errno.ENOSPC, errno.ENOENT):
        with pytest.raises(AttributeError) as failure:
            fails_after(number)
        found[number] = disk_error(failure.value)
    assert found[errno.ENOSPC].errno == errno.ENOSPC
    assert found[errno.ENOENT] is None  # that there is no such file is no excuse for a bug


def test_the_file_that_could_not_be_written_is_named(capsys, tmp_path):
    def write() -> None:
        with replacing(tmp_path / "table.csv"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert ended(capsys, write)[1].startswith(f"prog do: error: '{tmp_path / 'table.csv'}': No space left on device;")


def test_an_error_while_a_missing_file_is_dealt_with_is_not_the_disk_s(capsys):
    def act() -> None:
        try:
            Path("/nowhere").read_bytes()
        except FileNotFoundError:
            [].append()  # type: ignore[call-arg]

    assert "internal error: TypeError" in ended(capsys, act)[1]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_no_bug(error, capsys):
    assert is_out_of_memory(error)
    status, line = ended(capsys, lambda: fail(error))
    assert status == 1
    assert "error: not enough memory" in line
    assert "internal" not in line


def test_work_that_cannot_go_on_says_so_and_nothing_of_the_terminal_s(capsys):
    status, line = ended(capsys, lambda: fail(CannotGoOn("no more of\n\x1b[31mthis")))
    assert (status, line) == (1, "prog do: error: no more of \\x1b[31mthis\n")
