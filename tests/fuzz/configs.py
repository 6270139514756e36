"""YAML files: configurations of training, and studies."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

import train.cli
from tests.fuzz.commands import check_command
from tests.fuzz.kind import Kind
from tests.fuzz.oracle import outcome, reading, untouched
from tests.fuzz.values import HOSTILE, yaml_texts
from tests.fuzz.world import TRAIN, World
from tests.support.paths import CONFIGS
from train.cli.options import read_config
from train.study import description

NAMES = ("demo.yaml", "block_sum.yaml", "frozen.yaml", "demo_vanilla.yaml")
PLAIN = st.one_of(st.integers(0, 20), st.floats(0, 1), st.sampled_from(("vanilla", "auto", "learned", [], [1, 2])))


def documents() -> tuple[Any, ...]:
    return tuple(yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8")) for name in NAMES)


@st.composite
def configurations(draw: DrawFn) -> tuple[str, bytes]:
    """A command, and what its configuration holds."""
    return draw(st.sampled_from(("fit", "estimate"))), draw(yaml_texts(documents(), PLAIN | HOSTILE))


def check_configuration(world: World, drawn: tuple[str, bytes]) -> bool:
    command, content = drawn
    with world.scratch() as folder:
        path = folder / "config.yaml"
        path.write_bytes(content)
        place = ["--run_dir", "NEW"] if command == "fit" else []
        small = [*TRAIN] if command == "fit" else []
        with untouched(folder):
            return check_command(train.cli.main, world, command, ["--config", str(path), *place, *small]).accepted


STUDY = {
    "base": ["demo.yaml"],
    "conditions": {"one": ["conditions/cumulative.yaml"], "slow": ["model.learning_rate=1.0e-3"]},
    "seeds": [0, 1],
    "probe": "--kinds [zero] --num_sequences 64",
    "baseline": "--num_blocks 4",
}


@cache
def read_once(options: tuple[str, ...]) -> dict[str, Any]:
    return read_config(options)


def check_study(world: World, content: bytes) -> bool:
    """Configurations that are named as they are in `STUDY` are read once: that takes most of the time."""
    known = (("--config", "demo.yaml"), ("--config", "demo.yaml", "--config", "conditions/cumulative.yaml"))

    def read(options: tuple[str, ...]) -> dict[str, Any]:
        named = tuple(os.path.relpath(o, folder) if o.startswith(str(folder)) else o for o in options)
        if named in (*known, (*known[0], "--model.learning_rate=1.0e-3")):
            return read_once(tuple(str(CONFIGS / o) if o.endswith(".yaml") else o for o in named))
        return read_config(options)

    with world.scratch() as folder:
        for name in ("demo.yaml", "conditions/cumulative.yaml"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(CONFIGS / name)
        path = folder / "study.yaml"
        path.write_bytes(content)
        with untouched(folder), patch.object(description, "read_config", read):
            found = outcome(reading(lambda: description.load_study(path)))
    if found.accepted:
        is_study(found.found[0])
    return found.accepted


def is_study(study: description.Study) -> None:
    """Fails the test unless its runs have commands and folders of their own."""
    runs = list(study.runs(Path("studies")))
    assert runs
    assert len({run.directory for run in runs}) == len(runs) == len(study.options) * len(study.seeds)
    assert all(run.directory.parent == Path("studies") and run.seed >= 0 for run in runs)
    assert all(run.train_command()[:2] == ["attnres-train", "fit"] for run in runs)


IN_CONFIGS = (
    Kind("configurations", lambda world: configurations(), check_configuration, 15, 100),
    Kind("studies", lambda world: yaml_texts((STUDY,)), check_study, 60, 300),
)
__all__ = ["IN_CONFIGS"]
