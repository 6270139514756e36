"""Option values of every command of both programs. What is accepted ends where the work would begin."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from jsonargparse import ArgumentParser

import probe.cli
import train.cli
from probe.files import checkpoints
from probe.settings import ProbeSettings
from tests.fuzz.files import INTEGERS, NAMES, REALS, is_probe
from tests.fuzz.kind import Kind
from tests.fuzz.oracle import Outcome, Reached, outcome, untouched
from tests.fuzz.values import WORDS
from tests.fuzz.world import PROBE, TRAIN, World
from tests.support.paths import CONFIGS
from train.cli.options import ConfigReader

WORK = (
    "probe.commands._sweep",
    "probe.commands.compare_runs",
    "probe.report.command.write_report",
    "probe.verify.findings",
    "probe.trail_commands.probe_trail",
    "probe.trail_commands.watch_trail",
    "probe.files.trail.Trail.prune",
    "lightning.pytorch.Trainer.fit",
    "lightning.pytorch.Trainer.validate",
    "train.study.cli._run_all",
    "train.study.cli._report",
)
"""Where a command's work begins."""
BASES = {
    "run": ["RUN", "--output", "NEW", *PROBE],
    "baseline": ["VANILLA", "--output", "NEW", "--num_blocks", "2", *PROBE],
    "compare": ["RUN", "RUN"],
    "report": ["RUN"],
    "verify": ["RUN"],
    "trail": ["RUN", "--device", "cpu"],
    "prune": ["RUN"],
    "export": ["RUN", "2", "NEW"],
}
"""Commands that are accepted; capitals are replaced by paths."""
PLACES = ("RUN", "RUN/hf", "RUN/checkpoints/last.ckpt", "RUN/trail/step_2", "RUN/probe", "RUN/metrics.csv", "VANILLA")
PLACES += ("WORDS", "NEW", "PIPE", "ROOT", "RUN/config.yaml", "RUN/hf/task.json", "NEW/x.json", "NEW/x.parquet")
TYPED = st.one_of(
    INTEGERS.map(str),
    REALS.map(str),
    st.sampled_from(sorted(NAMES))
    .flatmap(lambda name: st.lists(st.sampled_from(NAMES[name]), max_size=3))
    .map(lambda names: f"[{','.join(names)}]"),
    st.sampled_from(("true", "false", "null", "cpu", "cuda", "meta", "float32", "bfloat16", "logit_diff", "exact")),
    st.sampled_from(PLACES),
)


def reached(*args: Any, **kwargs: Any) -> NoReturn:
    raise Reached(*args)


@contextmanager
def checked_only(world: World) -> Iterator[None]:
    """Commands end where their work begins; models of the world are loaded once."""
    load = _loader(world.root)
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {"WANDB_MODE": "disabled"}))
        for place in WORK:
            stack.enter_context(patch(place, reached))
        stack.enter_context(patch("probe.commands.load_model", load))
        yield


@cache
def _loader(root: Path) -> Any:
    whole = cache(checkpoints.load_model)
    known = {str(root / name) for name in ("run", "vanilla", "words")}
    return lambda source: (whole if source in known else checkpoints.load_model)(source)


@cache
def options_of(command: str) -> tuple[str, ...]:
    """The options of a command of attnres-probe."""
    parser = ArgumentParser()
    probe.cli.OPTIONS[command][1](parser)
    return _options(parser)


@cache
def training_options() -> tuple[str, ...]:
    return _options(ConfigReader([]).parser)


def _options(parser: Any) -> tuple[str, ...]:
    found = {text for action in parser._actions for text in action.option_strings if text.startswith("--")}
    return tuple(sorted(found))


@st.composite
def command_lines(draw: DrawFn, known: tuple[str, ...], base: list[str], edits: int = 3) -> list[str]:
    """`base` after some edits."""
    words = list(base)
    for _ in range(draw(st.integers(0, edits))):
        option, value = draw(st.sampled_from(known)), draw(st.one_of(TYPED, TYPED, WORDS))
        match draw(st.integers(0, 9)):
            case 0 if words:
                del words[draw(st.integers(0, len(words) - 1))]
            case 1 if words:
                words[draw(st.integers(0, len(words) - 1))] = value
            case 2:
                words.insert(draw(st.integers(0, len(words))), value)
            case 3:
                words += [option]
            case 4:
                words += [f"--{draw(WORDS)}", value]
            case 5 | 6:
                words += [f"{option}={value}"]
            case _:
                words += [option, value]
    return words


@contextmanager
def places(world: World) -> Iterator[dict[str, str]]:
    """What the capitals of a command line stand for; relative paths end in a folder that is removed."""
    with world.scratch() as folder, inside(folder):
        os.mkfifo(folder / "pipe")
        yield {
            "RUN": str(world.run),
            "VANILLA": str(world.vanilla),
            "WORDS": str(world.words),
            "NEW": str(folder / "new"),
            "PIPE": str(folder / "pipe"),
            "ROOT": "/",
        }


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def placed(words: list[str], names: dict[str, str]) -> list[str]:
    """`words` with paths in place of capitals, at their beginning or after an equals sign."""
    found = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        name, slash, rest = value.partition("/")
        found.append(f"{option}{equals}{names.get(name, name)}{slash}{rest}")
    return found


def check_command(main: Any, world: World, command: str, words: list[str], statuses: tuple[int, ...] = (2,)) -> Outcome:
    with places(world) as names, checked_only(world), untouched(world.run, world.vanilla, world.words):
        return outcome(lambda: main([command, *placed(words, names)]), statuses)


def probe_commands() -> st.SearchStrategy[tuple[str, list[str]]]:
    def of(command: str) -> st.SearchStrategy[tuple[str, list[str]]]:
        return command_lines(options_of(command), BASES[command]).map(lambda words: (command, words))

    return st.sampled_from((*BASES, "run", "run", "baseline")).flatmap(of)


def check_probe_command(world: World, drawn: tuple[str, list[str]]) -> bool:
    found = check_command(probe.cli.main, world, *drawn)
    settings = next((item for item in found.found if isinstance(item, ProbeSettings)), None)
    if settings is not None:
        given = asdict(settings)
        given["scopes"] = [name for name in given["scopes"] or ["all"] if not name.startswith("layer:")] or ["all"]
        given["coalitions"] = [name for name in given["coalitions"] if name in NAMES["coalitions"]]
        given["kinds"] = [name for name in given["kinds"] if name in NAMES["kinds"]]
        assert is_probe(given), f"accepted, and is not right: {settings}"
    return found.accepted


def training_commands() -> st.SearchStrategy[tuple[str, list[str]]]:
    config = ["--config", str(CONFIGS / "demo.yaml"), *TRAIN]
    fit = command_lines(training_options(), [*config, "--run_dir", "NEW"])
    estimate = command_lines(training_options(), config)
    return st.one_of(fit.map(lambda words: ("fit", words)), estimate.map(lambda words: ("estimate", words)))


def check_training_command(world: World, drawn: tuple[str, list[str]]) -> bool:
    return check_command(train.cli.main, world, *drawn).accepted


IN_COMMANDS = (
    Kind("options of attnres-probe", lambda world: probe_commands(), check_probe_command, 60, 3_000),
    Kind("options of attnres-train", lambda world: training_commands(), check_training_command, 20, 150),
)
__all__ = ["BASES", "IN_COMMANDS", "check_command", "checked_only", "placed", "places"]
