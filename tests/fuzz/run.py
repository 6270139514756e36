"""Draws inputs of a kind and checks each."""

from __future__ import annotations

import reprlib
from collections import Counter
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.kind import Kind
from tests.fuzz.world import World

MOST = 20_000
"""Characters of an input that is shown whole."""


def fuzz(world: World, kind: Kind, count: int, seed: int) -> Counter[str]:
    """How many of `count` inputs were accepted and how many refused. Raises AssertionError for one that is neither."""
    found: Counter[str] = Counter()

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=False,
        phases=(Phase.generate,),  # inputs are small, and some of them take seconds
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(kind.strategy(world))
    def check(value: Any) -> None:
        try:
            found["accepted" if kind.check(world, value) else "refused"] += 1
        except AssertionError as error:
            raise AssertionError(
                f"{kind.name}: {error}\n{reprlib.repr(value) if len(repr(value)) > MOST else value!r}"
            ) from error

    check()
    return found


__all__ = ["fuzz"]
