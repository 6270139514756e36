"""Hostile inputs of every kind, drawn by fixed seeds: a short form of `benchmarks/fuzz.py`."""

from __future__ import annotations

import pytest

from tests.fuzz.kinds import KINDS
from tests.fuzz.run import fuzz
from tests.fuzz.world import World


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_inputs_are_taken_or_refused_in_a_line(world: World, kind):
    found = fuzz(world, kind, kind.short, seed=0)
    assert sum(found.values()) >= kind.short // 2, found  # hypothesis draws no input twice
    assert found["refused"] > 0, found
