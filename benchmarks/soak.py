"""The main job again and again in one process: does anything grow, stay behind, or come out otherwise?

    OMP_NUM_THREADS=1 python -m benchmarks.soak --minutes 60 --output benchmarks/results/soak.json

Each round trains and probes a small model in a new folder. A process of its own begins both and is stopped by a random
signal at a random moment; this process goes on with them, and reports and verifies. Every file must then say what it
says after a run without stops. Memory, threads, descriptors, processes and temporary files are counted after each.
Exit status 1 if a round differs, if memory grows by over a twentieth after the warm-up, or if anything else grows.
"""

from __future__ import annotations

import argparse
import gc
import os
import pkgutil
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import add
from tests.faults import world
from tests.faults.nursery import ENVIRONMENT, PROGRAMS, Nursery, Request

STOPS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TRAIN = world.COMMANDS["fit"].words
PROBE = ("attnres-probe", "run", "new", "--output", "out", *world.PROBE)
AFTER = (("attnres-probe", "report", "out"), ("attnres-probe", "verify", "out"))
LONGEST = 300.0
WARM_UP = 0.2
"""Of the rounds: what is imported, compiled and cached when it is first used."""
MEMORY, MOST_GROWTH = "memory", 0.05
FIXED = ("threads", "system_threads", "descriptors", "temporary", "processes")


class Soak:
    """Rounds in folders of their own, and what is left after each. To be closed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random, self.rounds = folder, random.Random(seed), 0
        self.nursery, self.stops = Nursery(), {stop.name: 0 for stop in STOPS}
        self.hangs: list[str] = []
        clean = self._new("clean")
        self.seconds = {command: self._begun(command, clean, None) for command in (TRAIN, PROBE)}
        for command in AFTER:
            self._begun(command, clean, None)
        self.expected = world.results(clean)

    def close(self) -> None:
        self.nursery.close()

    def round(self) -> dict[str, Any]:
        """What is there after one more round, and which files differ from those of the run without stops."""
        self.rounds += 1
        folder = self._new(f"round-{self.rounds}")
        for command in (TRAIN, PROBE):
            stop = self.random.choice(STOPS)
            self._begun(command, folder, (stop, self.random.uniform(0.03, 0.9 * self.seconds[command])))
            self.run(command, folder, may_have_ended=True)
        for command in AFTER:
            self.run(command, folder)
        found = world.results(folder)
        differ = [name for name in found.keys() | self.expected.keys() if found.get(name) != self.expected.get(name)]
        shutil.rmtree(folder)
        gc.collect()
        return {"differ": sorted(differ), **counts(), "processes": len(self.nursery.living())}

    def run(self, command: Sequence[str], folder: Path, may_have_ended: bool = False) -> None:
        """In this process, as its program would. Raises RuntimeError, with what it printed, if it fails."""
        program, *arguments = command
        log = self.folder / "log.txt"
        with chdir(folder), _output_to(log):
            try:
                status = pkgutil.resolve_name(PROGRAMS[program])(arguments)
            except SystemExit as end:
                status = end.code
        said = log.read_text()
        if status and not (may_have_ended and status == 2 and "exist" in said):
            raise RuntimeError(f"{' '.join(command[:2])} ended with {status}: {said[-2000:]}")

    def _new(self, name: str) -> Path:
        (self.folder / name).mkdir()
        return self.folder / name

    def _begun(self, command: Sequence[str], folder: Path, stop: tuple[signal.Signals, float] | None) -> float:
        """Start a command in a process of its own, stop it, and wait for its end; returns how long it took."""
        started = time.monotonic()
        pid = self.nursery.start(Request(command, folder, self.folder / "begun.txt"))
        status = None if stop is None else self.nursery.status(pid, stop[1])
        if stop is not None and status is None:
            with suppress(ProcessLookupError):  # it may just have ended
                os.kill(pid, stop[0])
                self.stops[stop[0].name] += 1
        if status is None:
            status = self.nursery.status(pid, LONGEST)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            self.nursery.status(pid, LONGEST)
            self.hangs.append(f"{' '.join(command[:2])}, {stop}")
        if stop is None and status:
            raise RuntimeError(f"{' '.join(command[:2])}: {status}, {(self.folder / 'begun.txt').read_text()[-2000:]}")
        return time.monotonic() - started


@contextmanager
def _output_to(path: Path):
    """Whatever this process prints goes into a new file."""
    kept = os.dup(1), os.dup(2)
    sys.stdout.flush()
    with path.open("w", buffering=1) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            with redirect_stdout(file), redirect_stderr(file):
                yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, stream)
                os.close(descriptor)


def counts() -> dict[str, int]:
    """Of this process: resident memory in KiB, live objects, threads, descriptors, and its temporary files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "memory": int(status["VmRSS"].split()[0]),
        "objects": len(gc.get_objects()),
        "threads": threading.active_count(),
        "system_threads": int(status["Threads"]),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "temporary": len(os.listdir(tempfile.gettempdir())),
    }


def growth(values: Sequence[float]) -> float:
    """By how much the line through some counts grows from end to end, as a share of their mean."""
    if min(values) == max(values):
        return 0.0
    slope = np.polyfit(np.arange(len(values)), values, 1)[0]
    return float(slope * (len(values) - 1) / np.mean(values))


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many rounds differ, and of each count its least, its most and its growth, after the warm-up."""
    after = rounds[int(WARM_UP * len(rounds)) :]
    found: dict[str, Any] = {
        "rounds": len(rounds),
        "differ": sorted({file for row in rounds for file in row["differ"]}),
    }
    for name in (key for key in rounds[0] if key != "differ"):
        values = [row[name] for row in after]
        found[name] = {"least": min(values), "most": max(values), "growth": growth(values)}
    return found


def is_flat(found: dict[str, Any]) -> bool:
    """Whether nothing in a `summary` grows, and no process is left."""
    fixed = all(found[name]["least"] == found[name]["most"] for name in FIXED)
    return fixed and not found["processes"]["most"] and found[MEMORY]["growth"] <= MOST_GROWTH


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the record (JSON)")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    started, rounds = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, tempfile.TemporaryDirectory() as temporary:
        tempfile.tempdir = os.environ["TMPDIR"] = temporary
        soak = Soak(Path(folder), args.seed)
        try:
            while time.monotonic() - started < 60 * args.minutes:
                rounds.append(soak.round())
                print(f"round {len(rounds)}: {rounds[-1]}", flush=True)
        finally:
            soak.close()
    found = summary(rounds) | {"stopped by": soak.stops, "hangs": soak.hangs}
    add(args.output, "soak", found, time.monotonic() - started, seed=args.seed)
    return int(bool(found["differ"] or soak.hangs) or not is_flat(found))


if __name__ == "__main__":
    sys.exit(main())
