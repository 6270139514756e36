"""The claims as they are printed: in lines that can be read at a glance, with nothing left out unsaid."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe.analysis.claims import HOLDS, TITLES, Claim
from probe.files.runs import ProbedRun
from probe.report import text
from probe.vocabulary import MARGIN

STATEMENTS = st.lists(
    st.text("abc %>-", min_size=1, max_size=70).map(" ".join(["x{}x"]).format), min_size=1, max_size=9
)


def printed(claims: list[Claim]) -> list[str]:
    clean = {"accuracy": 1.0, MARGIN: 9.46}
    run: Any = SimpleNamespace(summary={"clean": clean}, label="cumulative (seed 0, step 300)", claims=claims)
    return text.claims(cast(ProbedRun, run))


def words(line: str) -> str:
    return re.sub(r"\s+", " ", line).strip()


@given(st.fixed_dictionaries(dict.fromkeys(TITLES, STATEMENTS)))
def test_a_model_takes_seven_lines_that_say_how_much_they_leave_out(statements):
    claims = {claim: Claim(claim, HOLDS, found) for claim, found in statements.items()}
    lines = printed(list(claims.values()))
    assert len(lines) <= 7
    assert max(map(len, lines)) <= text.WIDTH
    joined = words(" ".join(lines))
    for claim, found in statements.items():
        head = "" if claim == "coverage" else f"{claims[claim].name}: {HOLDS}. "
        told = [
            words(f"{head}{'; '.join(found[:n])}" + (f"; +{len(found) - n}" if n < len(found) else ""))
            for n in range(1, len(found) + 1)
        ]
        assert any(one in joined for one in told), claim


@pytest.mark.parametrize("coverage", [[], [Claim("coverage", HOLDS, ["all 22 routes tested", "harm from 4 % shows"])]])
def test_a_model_is_named_with_what_was_tested(coverage):
    tested = "; all 22 routes tested; harm from 4 % shows" if coverage else ""
    assert printed(coverage) == [f"cumulative (seed 0, step 300): accuracy 1.000, margin 9.46{tested}"]
