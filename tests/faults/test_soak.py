"""Rounds of the main job in one process leave nothing behind, and what grows is seen. The long run: docs/faults.md."""

from __future__ import annotations

import threading

import pytest

from benchmarks.soak import Soak, is_flat, summary

COUNTS = {"memory": 1000, "threads": 1, "system_threads": 4, "descriptors": 9, "temporary": 0, "processes": 0}


@pytest.mark.slow
def test_rounds_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    soak = Soak(tmp_path, seed=0)
    try:
        rounds = [soak.round() for _ in range(3)]
    finally:
        soak.close()
    assert [row["differ"] for row in rounds] == [[]] * 3
    assert [row["processes"] for row in rounds] == [0] * 3
    assert rounds[2]["threads"] == rounds[1]["threads"] == threading.active_count()
    assert rounds[2]["descriptors"] == rounds[1]["descriptors"]


@pytest.mark.parametrize(("name", "by"), [("memory", 10), ("threads", 1), ("descriptors", 1), ("temporary", 1)])
def test_what_grows_is_seen(name, by):
    flat = [{"differ": [], **COUNTS} for _ in range(20)]
    assert is_flat(summary(flat))
    grown = [row | {name: row[name] + by * number} for number, row in enumerate(flat)]
    assert not is_flat(summary(grown))


def test_the_warm_up_does_not_count():
    rounds = [{"differ": [], **COUNTS, "memory": min(1000, 900 + 50 * number)} for number in range(20)]
    assert is_flat(summary(rounds))
