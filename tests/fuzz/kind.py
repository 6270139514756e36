"""A kind of input: how it is drawn, and what is checked of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis.strategies import SearchStrategy

from tests.fuzz.world import World


@dataclass(frozen=True)
class Kind:
    """Inputs of one kind.

    Attributes:
        strategy: of the inputs.
        check: gives one to what reads it. Returns whether it was accepted; raises AssertionError where the property
            does not hold.
        short: how many are drawn in `make test`.
        recorded: how many in the recorded run.
    """

    name: str
    strategy: Callable[[World], SearchStrategy[Any]]
    check: Callable[[World, Any], bool]
    short: int
    recorded: int


__all__ = ["Kind"]
