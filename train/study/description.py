"""A study: the same training under several conditions and seeds, described by one YAML file.

    base: [demo.yaml]                              # of every run: configurations, and options as key=value
    conditions:
      frozen: [conditions/frozen.yaml]             # laid over the base
      slow: [model.learning_rate=1.0e-3]
    seeds: [0, 1, 2]
    probe: --kinds mask_renormalise matched_mass   # options of `attnres-probe` for the final probe; null for none
    baseline: --num-blocks 4                       # more of them, for vanilla models

Files are named from the folder of the YAML file. A run is what `attnres-train fit` makes of these options.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from attnres.files import replacing
from probe.cli import build_parser
from probe.commands import probe_settings
from probe.files.checkpoints import read_json
from train.cli.checks import UsageError
from train.cli.fit import run_cli
from train.loggers.build import WANDB_PROJECT

KEYS = ("base", "conditions", "seeds", "probe", "baseline")
OF_THE_STUDY = ("config", "run_dir", "seed_everything", "ckpt_path")
"""Options of `fit` that the study sets."""
FILE = "study.json"
"""In the folder of a study: what it is."""


@dataclass(frozen=True)
class Study:
    """A study that can be run.

    Attributes:
        file: where it is described.
        options: by condition, those of `attnres-train fit`.
        configs: by condition, the whole configuration they give, but for what differs between its runs.
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

    def runs(self, directory: Path) -> Iterator[Run]:
        """Seed by seed, so that every condition has as many runs as any other when a study is stopped."""
        for seed in self.seeds:
            for condition in self.options:
                yield Run(self, condition, seed, directory / f"{condition}-seed{seed}")


@dataclass(frozen=True)
class Run:
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
        command = "baseline" if self.is_vanilla else "run"
        extra = self.study.baseline if self.is_vanilla else ()
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
    configs = {name: _config(file, name, given) for name, given in options.items()}
    probe = _probe_options(file, content, "probe", "run")
    baseline = _probe_options(file, content, "baseline", "baseline") or ()
    return Study(file, options, configs, _seeds(file, content.get("seeds")), probe, baseline)


def _seeds(file: Path, seeds: Any) -> tuple[int, ...]:
    integers = [seed for seed in seeds if type(seed) is int and seed >= 0] if isinstance(seeds, list) else []
    if not integers or len(set(integers)) < len(seeds):
        raise ValueError(f"seeds in '{file}' must be a list of different integers from 0, got {seeds}")
    return tuple(integers)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config '{file}' cannot be read as YAML ({' '.join(str(error).split())})") from None
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
        if is_option and name.lstrip("-") in OF_THE_STUDY:
            raise ValueError(f"{key} in '{file}' must not set {name.lstrip('-')}: the study does")
        options += [f"--{item.lstrip('-')}"] if is_option else ["--config", str(file.parent / item)]
    return tuple(options)


def read_config(options: Sequence[str]) -> dict[str, Any]:
    """The whole configuration that `fit` has with these options. Raises UsageError for options that it refuses."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):  # printing ends it
        run_cli(["fit", *options, "--print_config"])
    return yaml.safe_load(printed.getvalue())


def _config(file: Path, condition: str, options: tuple[str, ...]) -> dict[str, Any]:
    try:
        config = read_config(options)
    except UsageError as error:
        raise ValueError(f"conditions.{condition} in '{file}': {error}") from None
    return {key: value for key, value in config.items() if key not in OF_THE_STUDY}


def _probe_options(file: Path, content: Mapping[str, Any], key: str, command: str) -> tuple[str, ...] | None:
    """Options of `attnres-probe`, refused here and not after the first training."""
    text = content.get(key)
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"{key} in '{file}' must be options as on the command line of attnres-probe, got {text}")
    options, place = tuple(shlex.split(text)), Path("OUTPUT")
    refused = io.StringIO()
    try:
        with contextlib.redirect_stderr(refused), contextlib.redirect_stdout(refused):
            parsed = build_parser().parse_args([command, "CHECKPOINT", "--output", str(place), *options])
        arguments = parsed[command]
        probe_settings(arguments)
    except SystemExit:
        reason = refused.getvalue().strip() or "--help is no option of a probe"
        raise ValueError(f"{key} in '{file}': {reason}") from None
    except ValueError as error:
        raise ValueError(f"{key} in '{file}': {error}") from None
    if arguments.output != place:
        raise ValueError(f"{key} in '{file}' must not set --output: the study does")
    return options


def claim_directory(study: Study, directory: Path) -> None:
    """Write what the study is into `directory`, which may hold an earlier, smaller part of the same study.

    Raises:
        ValueError: it holds something else, or the same study with other settings.
    """
    path, now = directory / FILE, _identity(study)
    if path.exists():
        _check_same(_read_identity(path), now, directory)
    elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"--dir '{directory}' is not empty and holds no study ({FILE}); give another folder")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as part:
            part.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--dir '{directory}' cannot be used: {error.strerror}; give another folder") from None


def check_directory(study: Study, directory: Path) -> None:
    """What `claim_directory` refuses, but for a folder of runs without a `study.json`; nothing is written.

    Raises:
        ValueError: no such folder, or it holds another study.
    """
    if not directory.is_dir():
        raise ValueError(f"--dir '{directory}' is no folder; give the one that holds the runs of the study")
    if (directory / FILE).exists():
        _check_same(_read_identity(directory / FILE), _identity(study), directory)


def _identity(study: Study) -> dict[str, Any]:
    """What a study is, as JSON has it."""
    now = {"probe": study.probe, "baseline": study.baseline, "seeds": study.seeds, "conditions": study.configs}
    return json.loads(json.dumps(now))


def _read_identity(path: Path) -> dict[str, Any]:
    content = read_json(path)
    kinds = {"seeds": list, "conditions": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]:
        raise ValueError(f"'{path}' is not a study's: it lacks {wrong[0]}; remove it, or give another --dir")
    return content


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], directory: Path) -> None:
    """Raises ValueError, naming the first difference, unless `now` only has more seeds and conditions."""
    advice = "give the study as it was, with more seeds or conditions if you like, or another --dir"
    for key, what in (("seeds", "seed"), ("conditions", "condition")):
        if gone := [item for item in before[key] if item not in now[key]]:
            raise ValueError(f"--dir '{directory}' holds a study with the {what} {gone[0]}, which is gone; {advice}")
    shared = {name: now["conditions"][name] for name in before["conditions"]}
    old, new = dict(_flat(before)), dict(_flat({**now, "seeds": before["seeds"], "conditions": shared}))
    for key in [*old, *new]:
        if old.get(key, "absent") != new.get(key, "absent"):
            was, is_ = (json.dumps(values[key]) if key in values else "absent" for values in (old, new))
            raise ValueError(f"--dir '{directory}' holds a study with another {key} ({was}, now {is_}); {advice}")


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


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


__all__ = ["Run", "Study", "check_directory", "claim_directory", "load_study", "sweep"]
