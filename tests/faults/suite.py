"""The whole suite: faults of every kind, one after another, and the counts of what came of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

from tests.faults import pairs
from tests.faults.kinds import KINDS, drawn
from tests.faults.trial import Bench, Outcome

NAMES = (*KINDS, pairs.KIND)
WRONG: tuple[str, ...] = ("lost", "altered", "silent", "leftover", "status", "hang")
"""The first word of each thing that can be wrong."""
TRIES = 3


def outcomes(
    bench: Bench, name: str, seed: int, count: int | None = -1, commands: Collection[str] | None = None
) -> Iterator[Outcome]:
    """Of the faults of one of `NAMES`; see `drawn`. A signal that came too late is sent anew, sooner."""
    if name == pairs.KIND:
        together = list(pairs.pairs())
        random.Random(seed).shuffle(together)
        yield from (pairs.carry_out(bench, a, b) for a, b in (together if count == -1 else together[:count]))
        return
    for fault in drawn(bench, name, seed, count, commands):
        for attempt in range(TRIES):
            if attempt and fault.signal is not None:
                number, seconds = fault.signal
                fault = replace(fault, what=f"after {seconds / 2:.2f} s", signal=(number, seconds / 2))
            if (outcome := bench.carry_out(fault)) is not None:
                yield outcome
            if outcome is not None or fault.signal is None:
                break


def tally(found: Iterable[Outcome]) -> dict[str, dict[str, Any]]:
    """[kind of fault] -> how many faults, on real processes, of which command; how they ended; what was wrong."""
    counts: dict[str, dict[str, Any]] = {}
    for outcome in found:
        row = counts.setdefault(
            outcome.fault.kind,
            {"faults": 0, "from outside": 0} | dict.fromkeys(WRONG, 0) | {"statuses": {}, "commands": {}, "wrong": []},
        )
        row["faults"] += 1
        row["from outside"] += outcome.fault.is_outside
        for key, value in (("statuses", str(outcome.status)), ("commands", outcome.fault.command)):
            row[key][value] = row[key].get(value, 0) + 1
        for name, number in Counter(what.split(":")[0] for what in outcome.wrong).items():
            row[name] += number
        row["wrong"] += [f"{outcome.fault.command}, {outcome.fault.what}: {what}" for what in outcome.wrong]
    return counts


def table(counts: dict[str, dict[str, Any]]) -> str:
    """The counts by kind, as text; the last row is of all."""
    columns = ("faults", "from outside", *WRONG)
    rows = [("kind", *columns)]
    rows += [(kind, *(str(row[name]) for name in columns)) for kind, row in sorted(counts.items())]
    rows.append(("all", *(str(sum(row[name] for row in counts.values())) for name in columns)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
