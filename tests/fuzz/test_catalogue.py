"""Every hostile command of `docs/errors.md` ends with the line and the status that are written there."""

from __future__ import annotations

import pytest

from tests.fuzz.cases import CASES
from tests.fuzz.catalogue import PAGE, ended, row, sections
from tests.fuzz.world import World


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.command[:60]} {case.given}")
def test_a_case_ends_as_documented(world: World, case):
    """To write the page anew: python -m tests.fuzz.catalogue."""
    documented = PAGE.read_text(encoding="utf-8").splitlines()
    assert row(case, *ended(world, case)) in documented


def test_the_page_has_the_cases_and_no_other():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `attnres-")]
    assert len(rows) == len(CASES) == len(set(rows)) == sum(map(len, sections().values()))
    assert len(rows) >= 80
