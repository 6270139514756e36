"""The versions of the code that runs: of the packages, and of this project's sources and commit."""

from __future__ import annotations

import hashlib
import os
import subprocess
from functools import cache
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = ("attnres", "probe", "train")


@cache
def package_versions() -> dict[str, str]:
    """The version of attnres and of every package that pyproject.toml names, by name."""
    needed = [Requirement(text) for text in requires("attnres") or ()]
    names = [need.name for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    return {name: version(name) for name in ("attnres", *names)}


@cache
def code_version(root: Path = ROOT) -> dict[str, Any]:
    """Identify the code in `root`, as it is when this is first called.

    Returns:
        `sources_sha256`: a hash over the names and contents of the packages' Python files. `commit` and `dirty`
        (whether the packages differ from the commit) are null where git does not tell; `why_no_commit` says why.
    """
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return {"sources_sha256": digest.hexdigest(), **_commit(root)}


def _commit(root: Path) -> dict[str, Any]:
    nothing = {"commit": None, "dirty": None}
    folders = [package for package in PACKAGES if (root / package).is_dir()]
    try:
        # Tracked: an installed copy may lie in a checkout of something else.
        if not folders or _git(root, "ls-files", "--error-unmatch", f"{folders[0]}/__init__.py") is None:
            return {**nothing, "why_no_commit": "the code is not in a git checkout of its own"}
        commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--", *folders)
    except OSError:
        return {**nothing, "why_no_commit": "git is not installed"}
    if commit is None or changes is None:
        return {**nothing, "why_no_commit": "git cannot read the checkout"}
    return {"commit": commit, "dirty": bool(changes), "why_no_commit": None}


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints, or None if it fails. Git writes nothing and ignores GIT_DIR and the like, which hooks set."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


__all__ = ["code_version", "package_versions"]
