"""What a run records of itself: `provenance.json`, with a segment for each start or resumption of training.

It holds no environment variables, user, host or home. Paths outside the working directory are recorded by name alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from attnres.files import replacing
from attnres.inputs import read_yaml
from attnres.versions import code_version, package_versions
from probe.files import layout
from probe.files.checkpoints import read_json
from probe.training.loggers import run_logger

FILE = layout.PROVENANCE
# Options of config.yaml that say where a run is and how it was started, not what it does.
NOT_OF_THE_RUN = ("run_dir", "ckpt_path")
# Anything between quotes, brackets and separators, such as a path. Blanks belong to it unless a path follows them.
WORD = re.compile(r"""[^\s=,:;'"\[\]{}()](?:[^\s=,:;'"\[\]{}()]|\s+(?![\s/~.]))*""")


def record_provenance(trainer: Trainer, config_file: Path, seed: int) -> None:
    """Add this start to `provenance.json` beside `config_file`; log the whole record and the configuration.

    Called on the first process only. Raises ValueError if the record of earlier starts has been altered.
    """
    path = config_file.with_name(FILE)
    segments = read_segments(path) if path.exists() else []
    record = {"segments": [*segments, describe_start(trainer, config_file, seed)]}
    with replacing(path, recorded=True) as part:
        part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    config = read_config(config_file)
    for logger in trainer.loggers:
        run_logger(logger).log_start(config, record)


def read_segments(path: Path) -> list[dict[str, Any]]:
    """The starts that `path` records. Raises ValueError, naming the file, if it holds something else."""
    segments = read_json(path).get("segments")
    if not isinstance(segments, list):
        raise ValueError(f"{path} must hold a list of segments, got {segments}; remove it to go on without its record")
    return segments


def describe_start(trainer: Trainer, config_file: Path, seed: int) -> dict[str, Any]:
    """One segment: when, what, which code, and the hardware of the first process."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": trainer.global_step,
        "command": describe_command(sys.argv),
        "config_sha256": config_hash(config_file),
        "seed": seed,
        "code": code_version(),
        "versions": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hardware": describe_hardware(),
        "devices": {
            "accelerator": type(trainer.accelerator).__name__,
            "strategy": type(trainer.strategy).__name__,
            "world_size": trainer.world_size,
            "num_nodes": trainer.num_nodes,
        },
    }


def read_config(config_file: Path) -> dict[str, Any]:
    """What a run's `config.yaml` says it does, wherever the run lies."""
    config = read_yaml(config_file)
    return {key: value for key, value in config.items() if key not in NOT_OF_THE_RUN}


def config_hash(config_file: Path) -> str:
    """SHA-256 of `read_config`."""
    return hashlib.sha256(json.dumps(read_config(config_file), sort_keys=True).encode()).hexdigest()


def describe_command(arguments: Sequence[str]) -> list[str]:
    """The command line, with paths relative to the working directory; those outside it by name (`.../name`)."""
    described = (WORD.sub(lambda word: _describe_word(word.group()), argument) for argument in arguments[1:])
    return [Path(arguments[0]).name, *described]


def _describe_word(word: str) -> str:
    if "/" not in word and not word.startswith("~"):
        return word
    path = Path(os.path.normpath(Path.cwd() / word))
    inside = path.is_relative_to(Path.cwd()) and not word.startswith("~")
    return str(path.relative_to(Path.cwd())) if inside else f".../{path.name}"


def describe_hardware() -> dict[str, Any]:
    """Processor, cores (all, and those this process may use), threads, memory and GPUs of this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "cuda": torch.version.cuda,
    }


def _processor() -> str:
    """The processor's name as Linux and macOS give it, else its architecture."""
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except (OSError, subprocess.CalledProcessError):
        names = []
    return names[0] if names else platform.processor() or platform.machine()
