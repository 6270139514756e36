"""Probes of a training that have failed: training goes on without them, and the run says so, `probe/failed.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnres.files import remove, replacing
from probe.failures import in_words
from probe.files.checkpoints import read_json
from probe.files.layout import FAILED


@dataclass(frozen=True)
class FailedProbes:
    """Those of the steps so far, in the folder of the probes. One process writes it."""

    directory: Path

    def add(self, step: int, error: Exception) -> None:
        """The probe of `step` has failed."""
        others = [probe for probe in read_failed(self.directory) if probe["step"] != step]
        self._write([*others, {"step": step, "why": in_words(error)[:500]}])

    def remove(self, step: int) -> None:
        """The probe of `step` has been made after all."""
        self._keep(lambda probe: probe["step"] != step)

    def remove_after(self, step: int) -> None:
        """Training goes on from `step`: probes of later steps are to come."""
        self._keep(lambda probe: probe["step"] <= step)

    def _keep(self, is_kept: Any) -> None:
        before = read_failed(self.directory)
        after = [probe for probe in before if is_kept(probe)]
        if not after:
            remove(self.directory / FAILED)
        elif after != before:
            self._write(after)

    def _write(self, probes: list[dict[str, Any]]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with replacing(self.directory / FAILED, recorded=True) as part:
            content = {"failed": sorted(probes, key=lambda probe: probe["step"])}
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def describe_failed(directory: Path) -> str | None:
    """The probes that have failed, in a line; None where none has."""
    failed = read_failed(directory)
    if not failed:
        return None
    steps = ", ".join(str(probe["step"]) for probe in failed)
    return f"{len(failed)} probes have failed and are missing, at steps {steps}; the last one: {failed[-1]['why']}"


def read_failed(directory: Path) -> list[dict[str, Any]]:
    """[{step, why}] of the probes that have failed, in order. Raises ValueError, naming the file, if it holds else."""
    path = directory / FAILED
    if not path.exists():
        return []
    failed = read_json(path).get("failed")
    if not isinstance(failed, list) or not all(isinstance(p, dict) and {"step", "why"} <= p.keys() for p in failed):
        raise ValueError(f"{path} must hold the probes that have failed; remove it to go on without its record")
    return failed
