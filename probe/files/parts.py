"""Finished batches of a sweep on disk: a killed sweep goes on where it stopped, and processes share one sweep."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attnres import ReadSite
from attnres.files import replacing
from probe.ablation.engine import ProbeResult
from probe.ablation.grid import Cell
from probe.ablation.observer import Routing
from probe.files.layout import SWEEP


class Parts:
    """Parts of one sweep in `directory`, a file for each batch; each appears at once or not at all.

    Args:
        directory: made if it is not there.
        identity: what the sweep is (model, data, grid, settings), as JSON values.

    Raises:
        ValueError: the directory holds parts of another sweep.
    """

    def __init__(
        self, directory: Path, identity: Mapping[str, Any], cells: tuple[Cell, ...], sites: tuple[ReadSite, ...]
    ) -> None:
        self.directory, self.cells, self.sites = directory, cells, sites
        text = json.dumps(identity, indent=2, sort_keys=True) + "\n"
        path = directory / SWEEP
        if path.exists():
            before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(text)
            if changed := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
                raise ValueError(
                    f"{directory} holds an unfinished probe with another {', '.join(changed)}: give the same settings "
                    "to go on with it, or choose another --output"
                )
        else:
            directory.mkdir(parents=True, exist_ok=True)
            with replacing(path, shared=True) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def load(self, number: int) -> ProbeResult | None:
        """A finished batch, or None. Arrays only: nothing is unpickled."""
        path = self._path(number)
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return _from_arrays({name: arrays[name] for name in arrays.files}, self.cells, self.sites)

    def save(self, number: int, part: ProbeResult) -> None:
        with replacing(self._path(number), shared=True) as temporary, temporary.open("wb") as file:
            np.savez(file, **_to_arrays(part))  # type: ignore[arg-type]

    def remove(self) -> None:
        """Once the tables are written."""
        shutil.rmtree(self.directory)

    def _path(self, number: int) -> Path:
        return self.directory / f"batch-{number:05d}.npz"


_ROUTING = ("mass", "applicable", "dose", "weight_left")


def _to_arrays(part: ProbeResult) -> dict[str, np.ndarray]:
    """Arrays by name: what they are and the keys under which they are found, as JSON."""
    arrays: dict[tuple, np.ndarray] = {("counts",): part.counts, ("logit_sizes",): part.logit_sizes}
    arrays |= {("cost",): np.array([part.spent, part.seconds])}
    arrays |= {("clean", metric): values for metric, values in part.clean.items()}
    arrays |= {("effects", *key, m): values for key, effects in part.effects.items() for m, values in effects.items()}
    for name in _ROUTING:
        arrays |= {(name, key): values for key, values in getattr(part.routing, name).items()}
    arrays |= {(name,): getattr(part.routing, name) for name in ("is_query", "geometry")}
    return {json.dumps(key): values for key, values in arrays.items()}


def _from_arrays(arrays: Mapping[str, np.ndarray], cells: tuple[Cell, ...], sites: tuple[ReadSite, ...]) -> ProbeResult:
    found: dict[str, Any] = {name: {} for name in ("clean", *_ROUTING)}
    effects: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    for text, values in arrays.items():
        match json.loads(text):
            case [name]:
                found[name] = values
            case ["effects", index, positions, metric]:
                effects.setdefault((index, positions), {})[metric] = values
            case [name, key]:
                found[name][tuple(key) if isinstance(key, list) else key] = values
    spent, seconds = found["cost"].tolist()
    routing = Routing(**{name: found[name] for name in (*_ROUTING, "is_query", "geometry")})
    clean = found["counts"], found["clean"], found["logit_sizes"]
    return ProbeResult(cells, sites, *clean, effects, routing, spent=spent, seconds=seconds)
