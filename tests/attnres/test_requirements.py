"""The range of transformers releases: one, said to pip and checked at import."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest
import transformers
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from attnres.requirements import TRANSFORMERS, check_transformers
from tests.support.paths import ROOT


def test_pip_is_told_the_same():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (transformers_range,) = [
        requirement.specifier for requirement in map(Requirement, dependencies) if requirement.name == "transformers"
    ]
    assert transformers_range == SpecifierSet(TRANSFORMERS)


def test_both_ends_are_tested():
    """The newest release by the constraints, the oldest by the Makefile; this run is with one of them."""
    lowest, highest = (specifier.split(".")[1] for specifier in TRANSFORMERS.split(","))
    newest = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if "transformers==" in line)
    oldest = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "transformers==" in line)
    assert f"transformers==5.{int(highest) - 1}." in newest
    assert f"transformers==5.{lowest}.0" in oldest
    assert transformers.__version__.startswith((f"5.{lowest}.0", newest.split("==")[1]))


def test_only_releases_of_the_range_are_taken():
    for version in ("5.4.0", "5.4.1", "5.13.0.dev0", "5.23.0", "5.23.7"):
        check_transformers(version)
    for version in ("4.57.6", "5.3.0", "5.24.0", "6.0.0", "5.24.0.dev0"):
        with pytest.raises(ImportError, match=f"attnres works with transformers {TRANSFORMERS}, found {version}"):
            check_transformers(version)


def test_importing_says_it_in_one_line_before_anything_fails():
    script = "import transformers; transformers.__version__ = '4.57.6'; import attnres"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"ImportError: attnres works with transformers {TRANSFORMERS}, ")
    assert "During handling" not in result.stderr
