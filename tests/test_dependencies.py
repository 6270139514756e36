"""Everything that the packages import is declared in pyproject.toml."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

from packaging.requirements import Requirement

from attnres.versions import PACKAGES
from tests.support.paths import ROOT


def imported_packages() -> set[str]:
    names: set[str] = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - set(PACKAGES) - sys.stdlib_module_names


def named(text: str) -> str:
    """A distribution's name as declarations and metadata can both be compared by."""
    return re.sub(r"[-_.]+", "-", text).lower()


def test_every_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *extras["tensorboard"], *extras["wandb"]]
    declared = {named(Requirement(text).name) for text in texts}
    owners = packages_distributions()
    found = {name: {named(owner) for owner in owners.get(name, [name])} for name in imported_packages()}
    assert {"torch", "yaml", "datasets"} < found.keys()
    assert {name for name, distributions in found.items() if not distributions & declared} == set()
