"""One fault: a command is disturbed, and what came of it is judged.

1. It ends in time, with a status that is documented, in one line, or is killed.
2. Every file that was there is there: the same bytes, or, if the command writes it, whole.
3. The same command, given again, goes on, and all files say what they say after a run without faults.
4. No process is left, nor a file that nobody finishes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from attnres.files import checked
from probe.files.failed import read_failed
from probe.files.layout import FAILED
from tests.faults import inject, world
from tests.faults.nursery import Injection, Nursery, Request
from tests.faults.world import COMMANDS, FINISHED, Command

LONGEST, GRACE = 300.0, 20.0
KILLED = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT}
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
LOST_TRAIL = "training has failed to probe the trail"
LINE = re.compile(r"^attnres-(?:train|probe)(?: \w+)?: (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Fault:
    """What is disturbed, and how.

    Attributes:
        command: of `COMMANDS`.
        what: in words, what goes wrong.
        statuses: exit statuses that are right for it, besides that of a run that has gone on.
        says: what the output must have, as a regular expression, unless the process was killed.
        signal: (number, seconds after the start), sent from outside.
        damage: changes a file of the folder before the command; returns its name.
        free: how many bytes the file system of the folder has left, before it is made larger.
        may_lose_probes: whether probes in training may be left out, which `probe/failed.json` says.
        splits: whether it may split a sweep in other batches, whose sums round otherwise.
        strikes: whether it says when it comes about; it may be planned for what is never reached.
        is_outside: whether it comes from outside of the process: a signal, the system's limits, another process.
        extra: options added to the command.
    """

    kind: str
    command: str
    what: str
    statuses: frozenset[int]
    says: str = ""
    injections: Sequence[Injection] = ()
    signal: tuple[int, float] | None = None
    damage: Callable[[Path], str] | None = None
    free: int | None = None
    may_lose_probes: bool = False
    splits: bool = False
    strikes: bool = False
    is_outside: bool = False
    extra: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of a fault: the status and last line of the command, and what was wrong about it, one line each."""

    fault: Fault
    status: int | None
    line: str
    wrong: tuple[str, ...]


class Bench:
    """Finished runs, what each command leaves without faults, and a nursery. To be closed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.finished = folder, folder / "finished"
        self.nursery = Nursery()
        self.finished.mkdir(parents=True)
        world.write_study(self.finished)
        for name, words in FINISHED.items():
            stops = [partial(inject.dies_after_step, 3)] if name == "half" else []
            self._must(words, self.finished, f"{name}.txt", stops, -signal.SIGKILL if stops else 0)
        self._clean: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
        self._count = 0

    def close(self) -> None:
        self.nursery.close()

    def new_folder(self, given: tuple[str, ...], free: int | None = None) -> Path:
        self._count += 1
        folder = self.folder / f"trial-{self._count}"
        if free is not None:
            folder.mkdir()
            _mount(folder, world.size(self.finished, given) + free)
        world.lay_out(self.finished, given, folder)
        return folder

    def clean(self, command: str, extra: tuple[str, ...] = ()) -> dict[str, str]:
        """What is in the folder after a run of a command without faults."""
        if (command, extra) not in self._clean:
            folder = self.new_folder(COMMANDS[command].given)
            self._must([*COMMANDS[command].words, *extra], folder, f"{folder.name}.txt")
            self._clean[command, extra] = world.results(folder)
            folder.rename(self.clean_folder(command, extra))
        return self._clean[command, extra]

    def clean_folder(self, command: str, extra: tuple[str, ...] = ()) -> Path:
        return self.folder / "-".join(["clean", command, *extra])

    def serially(self, order: Sequence[str]) -> dict[str, str]:
        """What is in the folder after some commands, one after another; one may find nothing left to do."""
        key = (" and ".join(order), ())
        if key not in self._clean:
            folder = self.new_folder(tuple(dict.fromkeys(part for name in order for part in COMMANDS[name].given)))
            for name in order:
                self.run(Request(COMMANDS[name].words, folder, self.folder / f"{folder.name}.txt"))
            self._clean[key] = world.results(folder)
            shutil.rmtree(folder)
        return self._clean[key]

    def recorded(self, command: str, injection: Injection, environment: Mapping[str, str] | None = None) -> float:
        """Run a command with a harmless injection; returns how long it took."""
        folder = self.new_folder(COMMANDS[command].given)
        started = time.monotonic()
        self._must(COMMANDS[command].words, folder, f"{folder.name}.txt", [injection], 0, environment or {})
        shutil.rmtree(folder)
        return time.monotonic() - started

    def run(self, request: Request, after: tuple[int, float] | None = None) -> tuple[int | None, str]:
        """Status and output of a command; None if it has not ended in time, and was killed."""
        pid = self.nursery.start(request)
        status = None
        if after is not None:
            number, seconds = after
            status = self.nursery.status(pid, seconds)
            if status is None:
                _send(pid, number)
        if status is None:
            status = self.nursery.status(pid, LONGEST)
        if status is None:
            _send(pid, signal.SIGKILL)
            self.nursery.status(pid, GRACE)
        return status, request.output.read_text(errors="replace") if request.output.exists() else ""

    def leftover(self, seconds: float = GRACE) -> list[int]:
        deadline = time.monotonic() + seconds
        while (living := self.nursery.living()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return living

    def _must(
        self,
        words: Sequence[str],
        folder: Path,
        output: str,
        injections: Sequence[Injection] = (),
        expected: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        request = Request(words, folder, self.folder / output, injections, environment or {})
        status, text = self.run(request)
        assert status == expected, f"{' '.join(words[:3])}: {status}\n{text}"

    def carry_out(self, fault: Fault) -> Outcome | None:
        """Judge a fault; None if it never came about. Keeps the folder if something is wrong."""
        command = COMMANDS[fault.command]
        folder = self.new_folder(command.given, fault.free)
        damaged = folder / fault.damage(folder) if fault.damage else None
        before = world.contents(folder)
        output = self.folder / f"{folder.name}.txt"
        words = [*command.words, *fault.extra]
        struck = output.with_suffix(".struck")
        environment = {**fault.environment, inject.STRUCK: str(struck)}
        status, text = self.run(Request(words, folder, output, fault.injections, environment), fault.signal)
        wrong: list[str] = []
        is_sure = fault.damage is not None or (struck.exists() if fault.strikes else status != 0)
        if struck.exists() and (where := struck.read_text()):  # others may have come before, in threads
            fault = replace(fault, what=f"{fault.what}: {where}")
        struck.unlink(missing_ok=True)
        if is_sure:
            wrong += [*_judge_end(fault, status, text), *_judge_files(command, folder, before)]
            if fault.free is not None:
                _mount(folder, 2**30, again=True)
            if fault.command == "study":  # the run that it was at goes on, and holds its lock
                self.leftover(LONGEST)
            if damaged is None:
                wrong += self.go_on(words, folder, output, fault.environment)
            if status == 0 or damaged is None:
                ignored = "" if damaged is None else str(damaged.relative_to(folder))
                is_ignored = damaged is not None and world.contents(folder).get(ignored) == before[ignored]
                wrong += self._judge_results(fault, folder, ignored if is_ignored else "", text, status)
            if left := self.leftover():
                wrong.append(f"leftover: processes {left}")
                for pid in left:
                    _send(pid, signal.SIGKILL)
        if fault.free is not None and not wrong:
            subprocess.run(["umount", "--lazy", folder], check=True)
        if not wrong:
            shutil.rmtree(folder)
            output.unlink(missing_ok=True)
        lines = LINE.findall(text)
        return Outcome(fault, status, lines[-1] if lines else "", tuple(wrong)) if is_sure else None

    def go_on(self, words: Sequence[str], folder: Path, output: Path, environment: Mapping[str, str]) -> list[str]:
        """Give a command again, which is to end well; what is wrong about it."""
        again = output.with_suffix(".again")
        status, said = self.run(Request(words, folder, again, environment=environment))
        again.unlink(missing_ok=True)
        if status == 0 or (status == 2 and "exist" in said):  # it had ended before: nothing is overwritten
            return []
        return [f"lost: the same command ends with {status}: {said.strip().splitlines()[-1:]}"]

    def _judge_results(self, fault: Fault, folder: Path, ignored: str, text: str, status: int | None) -> list[str]:
        try:
            found = world.results(folder, ignored)
        except ValueError as error:
            return [f"altered: {error}"]
        if status == -signal.SIGKILL:  # nothing was left to write, which would have written over it
            kept = {name for name in found if name.endswith(".part") and name.removesuffix(".part") in found}
            found = {name: said for name, said in found.items() if name not in kept}
        expected = {name: said for name, said in self.clean(fault.command, fault.extra).items() if name != ignored}
        different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        is_recorded = any(read_failed(path.parent) for path in folder.rglob(FAILED))
        if fault.may_lose_probes and (is_recorded or LOST_TRAIL in text):
            different = [name for name in different if "/probe/" not in name]
        if fault.splits:
            clean = self.clean_folder(fault.command, fault.extra)
            different = [name for name in different if not world.is_close(clean / name, folder / name)]
        parts = [name for name in found if name.endswith(".part") or "/parts/" in name]
        return [f"altered: {', '.join(different)}"] * bool(different) + [f"leftover: {', '.join(parts)}"] * bool(parts)


def _mount(folder: Path, size: int, again: bool = False) -> None:
    """A file system of its own, of so many bytes. Needs the rights of root."""
    options = f"size={size},nr_inodes=0" + (",remount" if again else "")
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _judge_end(fault: Fault, status: int | None, text: str) -> list[str]:
    wrong = []
    if status is None:
        return [f"hang: not ended after {LONGEST:.0f} s"]
    if "Traceback" in text or "internal error" in text:
        wrong.append(f"silent: {text.strip().splitlines()[-1][:300]}")
    if status in KILLED:
        return wrong
    if status != 0 and status not in fault.statuses:
        wrong.append(f"status: {status}, not {sorted(fault.statuses)}: {text.strip().splitlines()[-1:]}")
    if status != 0 and not LINE.search(text) and not fault.says:
        wrong.append("silent: no line says why it ended")
    if fault.says and not re.search(fault.says, text):
        wrong.append(f"silent: nothing says {fault.says}")
    return wrong


def _judge_files(command: Command, folder: Path, before: Mapping[str, str]) -> list[str]:
    after, wrong = world.contents(folder), []
    for name, content in before.items():
        may_write = any(name == place or name.startswith(f"{place}/") for place in command.writes)
        if after.get(name) == content:
            continue
        if not may_write:
            wrong.append(f"{'altered' if name in after else 'lost'}: {name}, which the command does not write")
        elif name in after:
            try:
                checked(folder / name)
            except ValueError as error:
                wrong.append(f"altered: {error}")
    return wrong
