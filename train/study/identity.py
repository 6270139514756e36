"""What study a folder holds: `study.json`, so that a changed study does not go on in the folder of another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attnres.files import replacing
from probe.files.checkpoints import read_json
from train.study.description import Study

FILE = "study.json"


def claim_directory(study: Study, directory: Path) -> None:
    """Write what the study is into `directory`, which may hold an earlier, smaller part of the same study.

    Raises:
        ValueError: it holds something else, or the same study with other settings.
    """
    if (
        not _check_same(study, directory)
        and directory.exists()
        and (not directory.is_dir() or any(directory.iterdir()))
    ):
        raise ValueError(f"--dir '{directory}' is not empty and holds no study ({FILE}); give another folder")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / FILE, shared=True) as part:
            part.write_text(json.dumps(_identity(study), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--dir '{directory}' cannot be used: {error.strerror}; give another folder") from None


def check_directory(study: Study, directory: Path) -> None:
    """As `claim_directory`, but writes nothing and accepts a folder of runs without a `study.json`."""
    if not directory.is_dir():
        raise ValueError(f"--dir '{directory}' is no folder; give the one that holds the runs of the study")
    _check_same(study, directory)


def _identity(study: Study) -> dict[str, Any]:
    return {"probe": study.probe, "baseline": study.baseline, "seeds": study.seeds, "conditions": study.configs}


def _check_same(study: Study, directory: Path) -> bool:
    """Whether `directory` says what study it holds.

    Raises:
        ValueError: another study; the first difference is named. More seeds and conditions are no difference.
    """
    path = directory / FILE
    if not path.exists():
        return False
    before, now = read_json(path), json.loads(json.dumps(_identity(study)))
    for key, kind in (("seeds", list), ("conditions", dict)):
        if not isinstance(before.get(key), kind):
            raise ValueError(f"'{path}' is not a study's: it lacks {key}; remove it, or give another --dir")
    advice = "give the study as it was, with more seeds or conditions if you like, or another --dir"
    for key, what in (("seeds", "seed"), ("conditions", "condition")):
        if gone := [item for item in before[key] if item not in now[key]]:
            raise ValueError(f"--dir '{directory}' holds a study with the {what} {gone[0]}, which is gone; {advice}")
    now["seeds"] = before["seeds"]
    now["conditions"] = {name: now["conditions"][name] for name in before["conditions"]}
    old, new = dict(_flat(before)), dict(_flat(now))
    for key in [*old, *new]:
        if old.get(key, "absent") != new.get(key, "absent"):
            was, is_ = (json.dumps(values[key]) if key in values else "absent" for values in (old, new))
            raise ValueError(f"--dir '{directory}' holds a study with another {key} ({was}, now {is_}); {advice}")
    return True


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
