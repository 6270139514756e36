"""Two commands at once, in one folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import combinations_with_replacement

from tests.faults import world
from tests.faults.nursery import Request
from tests.faults.trial import LINE, LONGEST, Bench, Fault, Outcome
from tests.faults.world import COMMANDS

KIND = "two commands at once"
TOGETHER = ("resume", "run", "baseline", "trail", "report", "compare", "export", "prune", "verify")
DEPEND = ({"trail", "prune"}, {"export", "prune"})
"""Pairs of which one finds what the other has left: the result is that of one order or of the other."""
WATCHES = "verify"
"""May say that a file is not right while another command writes it."""


def pairs() -> Iterator[tuple[str, str]]:
    yield from combinations_with_replacement(TOGETHER, 2)


def carry_out(bench: Bench, a: str, b: str) -> Outcome:
    """Start both; the one that is refused is given again. All files must say what they say after one and the other."""
    names = dict.fromkeys((a, b))
    folder = bench.new_folder(tuple(dict.fromkeys(part for name in names for part in COMMANDS[name].given)))
    outputs = [bench.folder / f"{folder.name}-{index}.txt" for index in (1, 2)]
    requests = [Request(COMMANDS[name].words, folder, output) for name, output in zip((a, b), outputs, strict=True)]
    pids = [bench.nursery.start(request) for request in requests]
    statuses = [bench.nursery.status(pid, LONGEST) for pid in pids]
    wrong, lines = [], []
    for name, status, output in zip((a, b), statuses, outputs, strict=True):
        text = output.read_text()
        lines += LINE.findall(text)[-1:]
        if "Traceback" in text or "internal error" in text or status not in (0, 2, 1 if name == WATCHES else 0):
            wrong.append(f"status: {name} ends with {status}: {text.strip().splitlines()[-1:]}")
    for name, status, output in zip((a, b), statuses, outputs, strict=True):
        if status != 0 and {a, b} not in DEPEND:
            wrong += bench.go_on(COMMANDS[name].words, folder, output, {})
    expected = [bench.serially(order) for order in ([a, b], [b, a])] if {a, b} in DEPEND else []
    expected = expected or [_together(bench, a, b)]
    found = world.results(folder)
    if found not in expected:
        differ = sorted(name for name in found.keys() | expected[0].keys() if found.get(name) != expected[0].get(name))
        wrong.append(f"altered: {', '.join(differ)}")
    if left := bench.leftover():
        wrong.append(f"leftover: processes {left}")
    if not wrong:
        shutil.rmtree(folder)
    fault = Fault(KIND, f"{a} and {b}", "started together", frozenset({0, 2}), is_outside=True)
    return Outcome(fault, max(status or 0 for status in statuses), "; ".join(lines), tuple(wrong))


def _together(bench: Bench, a: str, b: str) -> dict[str, str]:
    """What both leave that have nothing to do with each other: what each of them has made, changed and removed."""
    untouched, found, gone = world.results(bench.finished), {}, set()
    for name in (a, b):
        clean = bench.clean(name)
        found |= {file: said for file, said in clean.items() if file not in found or said != untouched.get(file)}
        gone |= {file for file in untouched if file.split("/")[0] in COMMANDS[name].given and file not in clean}
    return {file: said for file, said in found.items() if file not in gone}
