"""`docs/errors.md`: what is printed, and the exit status, where a command is refused or ended.

python -m tests.fuzz.catalogue        # writes it anew; tests/fuzz/test_catalogue.py says if it is not up to date
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from pathlib import Path
from unittest.mock import patch

import probe.cli
import train.cli
from tests.fuzz.cases import CASES, Case, prepared
from tests.fuzz.commands import inside
from tests.fuzz.oracle import outcome, untouched
from tests.fuzz.world import PROBE, TRAIN, World
from tests.support.paths import CONFIGS, ROOT

PAGE = ROOT / "docs" / "errors.md"
MAINS = {"attnres-probe": probe.cli.main, "attnres-train": train.cli.main}
HEAD = """# Errors

What a command says when it cannot do what it was asked for, and its exit status. This page is made by
`python -m tests.fuzz.catalogue` from the cases of `tests/fuzz/cases.py`, each of which is a test.

| status | |
|---|---|
| 2 | bad input: nothing was begun, nothing is written |
| 74 | the system could not read or write a file: what was written stays, and the same command goes on |
| 130, 143 | SIGINT, SIGTERM: the line has the command that goes on |
| 1 | work that cannot go on, too little memory, or a bug, which the line says how to report |

`RUN` is a finished run directory, `VANILLA` and `WORDS` are exported models, `FILE` is a file, `NEW` is a path where
nothing is. Small sizes that all commands share are left out.
"""
VARIES = (
    (r"this machine has [\d.,]+ \w+", "this machine has …"),
    (r"more than the \d+ of", "more than the … of"),
    (r"\.py:\d+", ".py:…"),
    (r"about [\d.,]+ hours", "about … hours"),
    (r"n{50,}", "nnn…"),
)
"""From machine to machine, or with every line of code; and a name that is too long."""


def ended(world: World, case: Case) -> tuple[str, int]:
    """The line that the case's command prints, with paths as they are named in it; and its status."""
    with world.copy_of(*case.parts, manifests=case.manifests) as copied, world.scratch() as folder, inside(folder):
        own = copied if case.parts else world.run
        paths = {
            "RUN": own,
            "VANILLA": world.vanilla,
            "WORDS": world.words,
            "FILE": folder / "file",
            "NEW": folder / "new",
        }
        names = re.compile(rf"(?<!\w)({'|'.join(paths)})(?!\w)")
        words = [names.sub(lambda found: str(paths[found[0]]), word) for word in shlex.split(case.words)]
        with (
            patch.dict(os.environ, {"WANDB_MODE": "disabled"}),
            prepared(case, paths),
            untouched(world.root, but=folder),
        ):
            found = outcome(lambda: MAINS[case.program](words), (case.status,), case.is_bug)
        return shown(found.line, paths).replace(f"{folder}/", ""), found.status


def shown(line: str, paths: dict[str, Path]) -> str:
    line = line.replace(f" {' '.join(TRAIN)}", "").replace(f" {' '.join(PROBE)}", "").replace(f"{CONFIGS}/", "configs/")
    for name, path in sorted(paths.items(), key=lambda item: -len(str(item[1]))):
        line = line.replace(str(path), name).replace(path.name, name if path.name.startswith("scratch-") else path.name)
    for pattern, text in VARIES:
        line = re.sub(pattern, text, line)
    return line


def sections() -> dict[str, list[Case]]:
    """Cases by command."""
    found: dict[str, list[Case]] = {}
    for case in CASES:
        command = " ".join([case.program, *case.words.split()[:1]])
        found.setdefault(command if command.endswith(COMMANDS) else case.program, []).append(case)
    return found


COMMANDS = tuple(f" {name}" for name in (*probe.cli.COMMANDS, *train.cli.commands.COMMANDS))


def row(case: Case, line: str, status: int) -> str:
    command = shown(case.command, {}).replace("|", "\\|")
    cells = (f"`{command}`", case.given, f"`{line}`".replace("|", "\\|"), str(status))
    return f"| {' | '.join(cells)} |"


def page(world: World) -> str:
    lines = [HEAD]
    for command, cases in sections().items():
        lines += [f"## {command}\n", "| command | what was given | line | status |", "|---|---|---|---|"]
        lines += [row(case, *ended(world, case)) for case in cases]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        PAGE.write_text(page(World(Path(root))), encoding="utf-8")
