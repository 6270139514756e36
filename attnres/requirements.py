"""The transformers releases that attnres works with, checked before anything else is imported from transformers."""

from __future__ import annotations

import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version

# Both ends are tested (`make test-oldest`, constraints.txt). A test compares this range with pyproject.toml's.
TRANSFORMERS = ">=5.4,<5.24"


def check_transformers(version: str = transformers.__version__) -> None:
    """Raise an ImportError if `version` is not in the supported range."""
    if not SpecifierSet(TRANSFORMERS).contains(Version(version).base_version):  # a development version is its release
        raise ImportError(
            f"attnres works with transformers {TRANSFORMERS}, found {version}; pip install 'transformers{TRANSFORMERS}'"
        )


__all__ = ["TRANSFORMERS", "check_transformers"]
