"""Finished batches of a sweep on disk: a killed sweep goes on where it stopped, and processes share one sweep."""

from __future__ import annotations

import hashlib
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
from probe.files.checkpoints import first_line, read_json
from probe.files.layout import SWEEP


class Parts:
    """Parts of one sweep in `directory`, a file for each batch; each appears at once or not at all.

    Each says of which sweep and batch it is, and has a digest of all that it holds.

    Args:
        directory: made if it is not there.
        identity: what the sweep is (model, data, grid, settings), as JSON values.

    Raises:
        ValueError: the directory holds parts of another sweep, or what it says of its sweep cannot be read.
    """

    def __init__(
        self, directory: Path, identity: Mapping[str, Any], cells: tuple[Cell, ...], sites: tuple[ReadSite, ...]
    ) -> None:
        self.directory, self.cells, self.sites = directory, cells, sites
        text = json.dumps(identity, indent=2, sort_keys=True) + "\n"
        self.sweep = hashlib.sha256(text.encode()).hexdigest()
        path = directory / SWEEP
        if path.exists():
            before, now = read_json(path), json.loads(text)
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
        """A finished batch, or None.

        Raises:
            ValueError: it is of another sweep or batch, or not what was written.
        """
        path = self._path(number)
        if not path.exists():
            return None
        arrays = read_part(path)
        if json.loads(arrays.pop(OF).item()) != {"sweep": self.sweep, "batch": number}:
            raise ValueError(f"{path} is of another sweep or batch: {MEASURE_AGAIN}")
        return _from_arrays(arrays, self.cells, self.sites)

    def save(self, number: int, part: ProbeResult) -> None:
        arrays = _to_arrays(part) | {OF: np.array(json.dumps({"sweep": self.sweep, "batch": number}))}
        arrays[DIGEST] = np.array(_digest(arrays))
        with replacing(self._path(number), shared=True) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def remove(self) -> None:
        """Once the tables are written. What the sweep is goes first: without that, nothing goes on with the rest."""
        (self.directory / SWEEP).unlink()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.directory / f"batch-{number:05d}.npz"


OF, DIGEST = "of", "sha256"
"""Arrays of a part that hold JSON and hexadecimal digits."""
MEASURE_AGAIN = "remove it, and the same command measures that batch again"


def read_part(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a part, without its digest. Arrays only: nothing is unpickled.

    Raises:
        ValueError: it is not what was written.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if arrays.pop(DIGEST).item() == _digest(arrays):
            return arrays
        reason = "it has another digest"
    except Exception as error:  # of many kinds, by what of an archive is torn
        reason = first_line(error)
    raise ValueError(f"{path} is not what was written ({reason}): {MEASURE_AGAIN}")


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(arrays.items()):
        digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


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
