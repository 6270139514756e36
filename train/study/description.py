"""A study: the same training under several conditions and seeds, described by one YAML file.

    base: [demo.yaml]                              # of every run: configurations, and options as key=value
    conditions:
      frozen: [conditions/frozen.yaml]             # laid over the base
      slow: [model.learning_rate=1.0e-3]
    seeds: [0, 1, 2]
    probe: --kinds [mask_renormalise,matched_mass] # options of `attnres-probe` for the final probe; null for none
    baseline: --num_blocks 4                       # more of them, for vanilla models

Files are named from the folder of the YAML file. A run is what `attnres-train fit` makes of these options.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnres.inputs import read_yaml
from probe.cli import parse
from probe.command_line import UsageError
from probe.commands import probe_settings
from train.cli.options import read_config
from train.loggers.build import WANDB_PROJECT

KEYS = ("base", "conditions", "seeds", "probe", "baseline")
SET_BY_THE_STUDY = ("config", "run_dir", "seed_everything", "ckpt_path")
"""Options of `fit`."""


@dataclass(frozen=True)
class Study:
    """A study that can be run.

    Attributes:
        file: where it is described.
        options: by condition, those of `attnres-train fit`.
        configs: by condition, the whole configuration that they give, without what the study sets.
        seeds: of each condition.
        probe: options of `attnres-probe run` and `baseline`; `None` for no final probe.
        baseline: further options of `baseline`.
    """

    file: Path
    options: Mapping[str, tuple[str, ...]]
    configs: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    probe: tuple[str, ...] | None
    baseline: tuple[str, ...]

    def runs(self, directory: Path) -> Iterator[StudyRun]:
        """Seed by seed, so that every condition has as many runs as any other when a study is stopped."""
        for seed in self.seeds:
            for condition in self.options:
                yield StudyRun(self, condition, seed, directory / f"{condition}-seed{seed}")


@dataclass(frozen=True)
class StudyRun:
    """One run of a study; `directory` is its run directory."""

    study: Study
    condition: str
    seed: int
    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def is_vanilla(self) -> bool:
        return self.study.configs[self.condition]["model"]["architecture"] == "vanilla"

    @property
    def probed(self) -> Path:
        """The run directory that is probed: a vanilla model is wrapped into one of its own."""
        return self.directory.with_name(f"{self.name}-wrapped") if self.is_vanilla else self.directory

    @property
    def probe_output(self) -> Path:
        """What `attnres-probe` writes to."""
        return self.probed if self.is_vanilla else self.directory / "probe" / "final"

    def train_command(self) -> list[str]:
        place = ["--seed_everything", str(self.seed), "--run_dir", str(self.directory)]
        return ["attnres-train", "fit", *self.study.options[self.condition], *place]

    def probe_command(self) -> list[str]:
        command, extra = ("baseline", self.study.baseline) if self.is_vanilla else ("run", ())
        place = [str(self.directory), "--output", str(self.probe_output)]
        return ["attnres-probe", command, *place, *extra, *(self.study.probe or ())]


def load_study(file: Path) -> Study:
    """The study that `file` describes.

    Raises:
        ValueError: no such file, or a key or value in it that cannot be used.
    """
    content = _read(file)
    conditions = content.get("conditions")
    if not isinstance(conditions, dict) or not conditions:
        raise ValueError(f"conditions in '{file}' must name at least one condition, got {conditions}")
    base = _options(file, "base", content.get("base"))
    options = {str(name): base + _options(file, f"conditions.{name}", items) for name, items in conditions.items()}
    for name in options:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"conditions.{name} in '{file}' names a folder: use letters, digits, '.', '-' and '_'")
    return Study(
        file,
        options,
        configs={name: _config(file, name, given) for name, given in options.items()},
        seeds=_seeds(file, content.get("seeds")),
        probe=_probe_options(file, content, "probe", "run"),
        baseline=_probe_options(file, content, "baseline", "baseline") or (),
    )


def _seeds(file: Path, seeds: Any) -> tuple[int, ...]:
    integers = [seed for seed in seeds if type(seed) is int and seed >= 0] if isinstance(seeds, list) else []
    if not integers or len(set(integers)) < len(seeds):
        raise ValueError(f"seeds in '{file}' must be a list of different integers from 0, got {seeds}")
    return tuple(integers)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = read_yaml(file)
    except ValueError as error:
        raise ValueError(f"--config {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config '{file}' must have the keys {', '.join(KEYS)}; see configs/study.yaml")
    if unknown := [key for key in content if key not in KEYS]:
        raise ValueError(f"{unknown[0]} in '{file}' is not a key of a study; there are {', '.join(KEYS)}")
    return content


def _options(file: Path, key: str, items: Any) -> tuple[str, ...]:
    """Options of `fit`: a file for each name of one, and `--key=value` for each `key=value`."""
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"{key} in '{file}' must be a list of configuration files and of options key=value")
    options: list[str] = []
    for item in items:
        name, is_option, _ = item.partition("=")
        if is_option and name.lstrip("-") in SET_BY_THE_STUDY:
            raise ValueError(f"{key} in '{file}' must not set {name.lstrip('-')}: the study does")
        options += [f"--{item.lstrip('-')}"] if is_option else ["--config", str(file.parent / item)]
    return tuple(options)


def _config(file: Path, condition: str, options: tuple[str, ...]) -> dict[str, Any]:
    try:
        config = read_config(options)
    except UsageError as error:
        raise ValueError(f"conditions.{condition} in '{file}': {error}") from None
    return {key: value for key, value in config.items() if key not in SET_BY_THE_STUDY}


def _probe_options(file: Path, content: Mapping[str, Any], key: str, command: str) -> tuple[str, ...] | None:
    """Options of `attnres-probe`, refused here and not after the first training."""
    text = content.get(key)
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"{key} in '{file}' must be options as on the command line of attnres-probe, got {text}")
    try:
        options = tuple(shlex.split(text))
        if any(option.partition("=")[0] == "--output" for option in options):
            raise ValueError("--output is set by the study")
        check_probe_command(command, ["CHECKPOINT", "--output", "OUTPUT", *options])
    except ValueError as error:
        raise ValueError(f"{key} in '{file}': {error}") from None
    return options


def check_probe_command(command: str, args: list[str]) -> None:
    """Raises ValueError if `attnres-probe` would refuse these arguments. The one place that knows how it parses."""
    if not {"-h", "--help"}.isdisjoint(args):
        raise ValueError("--help is no option of a probe")
    probe_settings(parse(command, args))


def sweep(study: Study) -> dict[str, Any]:
    """The study as a W&B sweep: each agent takes a condition and a seed, and runs the study's run of these."""
    # The sweep's folder is the same on every machine; agents fill in its id.
    place = ["--config", str(study.file), "--dir", "runs/sweep-${envvar:WANDB_SWEEP_ID}"]
    return {
        "name": study.file.stem,
        "project": WANDB_PROJECT,
        "program": "attnres-train",
        "method": "grid",
        "metric": {"name": "val/accuracy", "goal": "maximize"},
        "parameters": {"condition": {"values": list(study.options)}, "seed": {"values": list(study.seeds)}},
        "command": ["${env}", "${program}", "study", *place, "${args}"],
    }
