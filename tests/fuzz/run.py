"""Draws inputs of a kind and checks each."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.kind import Kind
from tests.fuzz.world import World


def fuzz(world: World, kind: Kind, count: int, seed: int) -> Counter[str]:
    """How many of `count` inputs were accepted and how many refused. Raises AssertionError, with the smallest input."""
    found: Counter[str] = Counter()

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(kind.strategy(world))
    def check(value: Any) -> None:
        found["accepted" if kind.check(world, value) else "refused"] += 1

    check()
    return found


__all__ = ["fuzz"]
