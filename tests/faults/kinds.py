"""Faults of every kind, drawn at random from a seed. What is drawn from is what a run without faults has done."""

from __future__ import annotations

import errno
import json
import math
import random
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tests.faults import inject
from tests.faults.trial import STATUS, Bench, Fault
from tests.faults.world import COMMANDS

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
DISK = frozenset({74})
GOES_ON = "go on with: "
WRITERS = ("fit", "resume", "run", "baseline", "trail", "report", "compare", "export", "prune")
READERS = ("resume", "run", "baseline", "trail", "report", "compare", "export", "verify")
SMALLEST_LIMIT = 4096
ARTEFACTS = (".parquet", ".json", ".ckpt", ".safetensors", ".csv", ".yaml")
OFFLINE = {"WANDB_MODE": "offline"}


@dataclass
class Drawer:
    """Draws faults from what commands do when nothing is wrong."""

    bench: Bench
    random: random.Random
    _recorded: dict[str, dict[str, Any]] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)

    def recorded(self, command: str) -> dict[str, Any]:
        """What a command does to files: `changes`, `reads`, and how much is `written` to which."""
        if command not in self._recorded:
            path = self.bench.folder / f"{command}.json"
            self._seconds[command] = self.bench.recorded(command, partial(inject.record, path))
            self._recorded[command] = json.loads(path.read_text())
        return self._recorded[command]

    def seconds(self, command: str) -> float:
        """How long a command takes."""
        self.recorded(command)
        return self._seconds[command]

    @cached_property
    def wandb_calls(self) -> list[str]:
        path = self.bench.folder / "wandb.json"
        self.bench.recorded("fit", partial(inject.wandb_fails, None, "", path), OFFLINE)
        return json.loads(path.read_text())

    def sample(self, items: list[Any], count: int | None) -> list[Any]:
        """All of them, in random order, or some."""
        return self.random.sample(items, len(items) if count is None else min(count, len(items)))


Kind = Callable[[Drawer, str, int | None], Iterator[Fault]]
"""Faults of a command: so many, or, for None, of each place where there can be one."""


def signals(draw: Drawer, command: str, count: int | None) -> Iterator[Fault]:
    """From outside, at random moments, the three in turn."""
    for index in range(count or 0):
        number = SIGNALS[index % 3]
        seconds = draw.random.uniform(0.03, draw.seconds(command) * 0.9)
        says = "" if number == signal.SIGKILL else GOES_ON
        yield Fault(
            f"{number.name} at a random moment",
            command,
            f"after {seconds:.2f} s",
            frozenset({STATUS[number]}),
            says,
            signal=(number, seconds),
            is_outside=True,
        )


def signals_while_writing(draw: Drawer, command: str, count: int | None) -> Iterator[Fault]:
    """Before a change to the files, so that none of their orders is left out."""
    changes = draw.recorded(command)["changes"]
    for index, at in enumerate(draw.sample(list(range(1, 1 + len(changes))), count)):
        number = SIGNALS[index % 3] if count is None or index % 2 else signal.SIGKILL
        yield Fault(
            f"{number.name} at a change to files",
            command,
            f"before change {at}",
            frozenset({STATUS[number]}),
            "" if number == signal.SIGKILL else GOES_ON,
            injections=[partial(inject.signal_at, at, number)],
            strikes=True,
        )


def disk_full(draw: Drawer, command: str, count: int | None) -> Iterator[Fault]:
    """At a random byte of each file that is written; the disk stays full."""
    spans: dict[str, list[int]] = {}
    used = 0
    for path, size in draw.recorded(command)["written"]:
        spans.setdefault(path, [used, used])[1] = used + size
        used += size
    for path, (first, last) in draw.sample(list(spans.items()), count):
        free = draw.random.randrange(first, max(last, first + 1))
        yield Fault(
            "disk full after n bytes",
            command,
            f"{free} bytes, in {Path(path).name}",
            DISK,
            injections=[partial(inject.limited_disk, free)],
            strikes=True,
        )


def change_fails(draw: Drawer, command: str, count: int | None) -> Iterator[Fault]:
    """Once: opening to write, renaming, removing, making a folder."""
    for at in draw.sample(list(range(1, 1 + len(draw.recorded(command)["changes"]))), count):
        number = draw.random.choice([errno.ENOSPC, errno.EIO])
        yield Fault(
            "a change to files fails",
            command,
            f"{errno.errorcode[number]} at change {at}",
            DISK,
            injections=[partial(inject.fail_at, at, number)],
            strikes=True,
        )


def file_size_limit(draw: Drawer, command: str, count: int | None) -> Iterator[Fault]:
    """RLIMIT_FSIZE: the system itself refuses to write more to a file, whichever language it is written in."""
    draw.bench.clean(command)
    clean = draw.bench.clean_folder(command)
    files = (path for name in COMMANDS[command].writes for path in [clean / name, *(clean / name).rglob("*")])
    largest = max(path.stat().st_size for path in files if path.is_file())
    for _ in range(count or 0):  # what is printed has to fit
        size = int(math.exp(draw.random.uniform(math.log(SMALLEST_LIMIT), math.log(largest))))
        yield Fault(
            "the system refuses to write",
            command,
            f"files of at most {size} bytes",
            DISK,
            injections=[partial(inject.limit_file_size, size)],
            is_outside=True,
        )


def small_file_system(draw: Drawer, command: str, count: int | None) -> Iterator[Fault]:
    """A file system of the fault's own, with room for a part of what the command writes."""
    written = sum(size for _, size in draw.recorded(command)["written"])
    for _ in range(count or 0):
        free = draw.random.randrange(2 * written)
        yield Fault("a small file system", command, f"{free} bytes free", DISK, free=free, is_outside=True)


def damage(draw: Drawer, command: str, count: int | None) -> Iterator[Fault]:
    """A bit is flipped in, or the end is cut off, a file that the command reads."""
    given = COMMANDS[command].given
    files = sorted(
        str(path.relative_to(draw.bench.finished))
        for name in given
        for path in [draw.bench.finished / name, *(draw.bench.finished / name).rglob("*")]
        if path.suffix in ARTEFACTS and path.stat().st_size
    )
    read = set(draw.recorded(command)["reads"])
    folders = {str(Path(name).parent) for name in read}
    files = [
        name for name in files if name in read or (name.endswith(".safetensors") and str(Path(name).parent) in folders)
    ]
    for index in range(count or 0):
        name, is_cut, where = draw.random.choice(files), index % 3 == 2, draw.random.random()
        bit = draw.random.randrange(8)
        what = "a file is cut" if is_cut else "a bit is flipped"
        yield Fault(
            what,
            command,
            f"{name}, at {where:.4f}" + ("" if is_cut else f", bit {bit}"),
            frozenset({1, 2} if command == "verify" else {2}),
            "FAILED|error: " if command == "verify" else "",
            damage=partial(_damage, name, where, None if is_cut else bit),
            may_lose_probes=command == "resume",  # of a step of the trail that cannot be read
        )


def _damage(name: str, where: float, bit: int | None, folder: Path) -> str:
    path = folder / name
    content = bytearray(path.read_bytes())
    at = int(where * len(content))
    if bit is None:
        del content[at:]
    else:
        content[at] ^= 1 << bit
    path.write_bytes(content)
    return name


def not_finite(draw: Drawer, command: str, count: int | None) -> Iterator[Fault]:
    """In training: a loss, gradient or weight; in a probe: what the model returns."""
    for _ in range(count or 0):
        value = draw.random.choice([math.nan, math.inf, -math.inf])
        if command in ("fit", "resume"):
            where, step = draw.random.choice(["loss", "gradient", "weight"]), draw.random.randrange(2, 6)
            injection = partial(inject.not_finite, step, where, value, draw.random.randrange(10_000))
            what = f"{where} {value} at step {step}"
        else:
            call = draw.random.randint(1, 4)
            injection, what = partial(inject.not_finite_output, call, value), f"output {value} from pass {call} on"
        yield Fault(
            "a number is not finite",
            command,
            what,
            frozenset({1, 2}),
            "finite|NaN|infinite",
            [injection],
            strikes=True,
            may_lose_probes=True,
        )


def too_little_memory(draw: Drawer, command: str, count: int | None) -> Iterator[Fault]:
    """At a random pass of a model that is probed: once, or from there on."""
    for index in range(count or 0):
        call, stays = draw.random.randint(1, 12), bool(index % 2)
        yield Fault(
            "too little memory in a probe",
            command,
            f"at pass {call}" + (" and later" if stays else ""),
            frozenset({1}),
            "memory",
            [partial(inject.out_of_memory, call, stays)],
            splits=not stays,
            strikes=True,
            may_lose_probes=True,
        )


def wandb(draw: Drawer, command: str, count: int | None) -> Iterator[Fault]:
    """Each of W&B's calls raises, hangs, or does nothing."""
    ways = [(call, how) for call in range(1, len(draw.wandb_calls) + 1) for how in ("raises", "hangs", "does nothing")]
    for call, how in draw.sample(ways, count):
        name = draw.wandb_calls[call - 1]
        yield Fault(
            f"W&B {how}",
            command,
            f"call {call}, {name}",
            frozenset(),
            "" if how == "does nothing" else "has failed to|the run is offline|does not take",
            [partial(inject.wandb_fails, call, how)],
            strikes=True,
            environment=OFFLINE,
        )


def worker(draw: Drawer, command: str, count: int | None) -> Iterator[Fault]:
    """The process that draws training examples dies; it may draw some ahead, and so die when the trail is probed."""
    for _ in range(count or 0):
        batch = draw.random.randint(1, 4)
        yield Fault(
            "a worker dies",
            command,
            f"at batch {batch}",
            frozenset({1}),
            "",
            [partial(inject.worker_dies, batch, signal.SIGKILL)],
            strikes=True,
            may_lose_probes=True,
            extra=("--data.num_workers=1",),
            is_outside=True,
        )


KINDS: Mapping[str, tuple[Kind, Mapping[str, int | None]]] = {
    "damage": (damage, dict.fromkeys(READERS, 20)),
    "not finite": (not_finite, {"fit": 5, "resume": 5, "run": 4, "baseline": 4, "trail": 4}),
    "memory": (too_little_memory, {"fit": 6, "run": 8, "baseline": 4, "trail": 6}),
    "W&B": (wandb, {"fit": None}),
    "a worker": (worker, {"fit": 2, "resume": 2}),
    "signals": (
        signals,
        dict.fromkeys(WRITERS, 9) | {"fit": 6, "resume": 6, "report": 6, "compare": 6, "verify": 3, "study": 3},
    ),
    "signals while writing": (
        signals_while_writing,
        {"fit": 8, "resume": 8, "run": 20, "baseline": 20, "trail": 10, "report": 4, "compare": 4}
        | {"export": 18, "prune": 12},
    ),
    "disk full": (disk_full, dict.fromkeys(WRITERS, None) | {"fit": 8, "resume": 6, "report": 4}),
    "a change fails": (
        change_fails,
        {"fit": 6, "resume": 6, "run": 12, "baseline": 12, "trail": 6, "report": 3, "compare": 3, "export": 9}
        | {"prune": 6},
    ),
    "limits of the system": (
        file_size_limit,
        {"fit": 2, "resume": 2, "run": 4, "baseline": 4, "trail": 2, "report": 2, "compare": 2, "export": 2},
    ),
    "a small file system": (
        small_file_system,
        dict.fromkeys(("fit", "resume", "run", "baseline", "trail", "export"), 2),
    ),
}
"""Name -> how faults are drawn, and of each command how many in the long run; None for all there are."""


def drawn(
    bench: Bench, name: str, seed: int, count: int | None = -1, commands: Collection[str] | None = None
) -> Iterator[Fault]:
    """Faults of one of `KINDS`, of each command in turn.

    Args:
        count: of each command at most; by default as many as the long run has.
        commands: those that are disturbed; by default all that the kind has.
    """
    kind, counts = KINDS[name]
    draw = Drawer(bench, random.Random(f"{seed} {name}"))
    for command, planned in counts.items():
        if commands is None or command in commands:
            yield from kind(draw, command, planned if count == -1 else count)
