"""The transformers releases that attnres works with, checked before anything of theirs is used."""

from __future__ import annotations

import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version

# Both ends are tested (`make test-oldest`, constraints.txt). pyproject.toml says the same to pip; a test compares.
TRANSFORMERS = ">=5.4,<5.24"


def check_transformers(version: str = transformers.__version__) -> None:
    """
    Raises:
        ImportError: `version` is none of those.
    """
    if not SpecifierSet(TRANSFORMERS).contains(Version(version).base_version):  # a development version is its release
        raise ImportError(
            f"attnres works with transformers {TRANSFORMERS}, found {version}; pip install 'transformers{TRANSFORMERS}'"
        )


__all__ = ["TRANSFORMERS", "check_transformers"]
