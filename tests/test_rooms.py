"""The house: no room imports from one above it, and `--help` opens no heavy one."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from probe.cli import COMMANDS
from tests.support.paths import ROOT

FLOORS = [  # from the bottom; a room may import from its own floor and those below
    ["attnres"],
    ["probe.failures"],
    ["probe.command_line", "probe.settings", "probe.vocabulary"],
    ["probe.examples"],
    ["probe.ablation"],
    ["probe.analysis"],
    ["probe.trace"],
    ["probe.heads"],
    ["probe.curves"],
    ["probe.files"],
    ["probe.runner"],
    ["probe.report"],
    ["probe.training"],
    ["probe.cli", "probe.commands", "probe.curve_commands", "probe.trail_commands", "probe.verify"],
    ["train.run", "train.recall", "train.loggers"],
    ["train.estimate"],
    ["train.cli"],
    ["train.study"],
]
HEAVY = ("torch", "transformers", "lightning", "numpy", "pandas", "scipy", "matplotlib", "plotly", "wandb", "attnres")
NOT_YET = {("probe.settings", "probe.ablation")}  # imported when a settings object is made, to check its names


def floor_of(module: str) -> tuple[int, str] | None:
    """The floor and room of a module of ours; None for a package's own `__init__` and for modules of others."""
    for number, rooms in enumerate(FLOORS):
        for room in rooms:
            if module == room or module.startswith(f"{room}."):
                return number, room
    return None


def imported(path: Path) -> Iterator[str]:
    """What a file imports at its top level, and inside of functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_no_room_imports_from_one_above_it():
    wrong, checked = [], 0
    for path in [path for top in ("attnres", "probe", "train") for path in (ROOT / top).rglob("*.py")]:
        own = floor_of(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        for module in imported(path):
            other = floor_of(module)
            if own is None or other is None:
                continue
            checked += 1
            if other[0] > own[0] and (own[1], other[1]) not in NOT_YET:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert checked > 200
    assert not wrong


@pytest.mark.parametrize(
    ("program", "arguments"),
    [("train", []), ("probe", []), *(("probe", [command]) for command in COMMANDS)],
)
def test_help_imports_nothing_heavy(program, arguments):
    code = (
        f"import sys; from {program}.cli import main\n"
        f"try: main({[*arguments, '--help']})\n"
        f"except SystemExit as end: assert not end.code\n"
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "usage:" in done.stdout
