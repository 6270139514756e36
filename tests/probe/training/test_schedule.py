"""When to probe: schedules, and when motifs have settled; what probes have cost."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe.training import schedule as module
from probe.training.schedule import Cost, Schedule, Settled, percent


class TestSchedule:
    @given(
        every=st.integers(0, 40),
        log=st.booleans(),
        at=st.frozensets(st.integers(0, 90), max_size=4),
        max_steps=st.integers(1, 80),
    )
    def test_the_list_is_that_of_the_steps_that_are_named(self, every, log, at, max_steps):
        schedule = Schedule(every, log, at)
        steps = schedule.steps(max_steps)
        assert steps == [step for step in range(max_steps + 1) if schedule.names(step, max_steps)]

    @pytest.mark.parametrize(
        ("schedule", "expected"),
        [
            (Schedule(), [0, 20]),
            (Schedule(every_n_steps=8), [0, 8, 16, 20]),
            (Schedule(log_spaced=True), [0, 1, 2, 4, 8, 16, 20]),
            (Schedule(at_steps=frozenset({3, 5, 33})), [0, 3, 5, 20]),
        ],
    )
    def test_steps(self, schedule, expected):
        assert schedule.steps(20) == expected


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock whose attribute `now` is set here."""
    clock = SimpleNamespace(now=1e6)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


class TestCost:
    def run(self, clock, cost: Cost) -> None:
        """Ten seconds of training with two probes between, of three seconds each; the trail's; the last one."""
        cost.start()
        for seconds in (4, 6):
            clock.now += seconds
            with cost.counted("in_training"):
                clock.now += 3
            cost.num_probed += 1
        with cost.counted("on_trail"):
            clock.now += 5
        cost.num_of_trail += 2
        with cost.counted("after_training"):
            clock.now += 7

    def test_parts_are_counted_apart(self, clock):
        cost = Cost()
        self.run(clock, cost)
        assert cost.to_dict() == {
            "in_training_seconds": 6,
            "trail_seconds": 5,
            "after_training_seconds": 7,
            "curves_seconds": 0,
            "training_seconds": 10,
            "fraction": 1.1,
            "n_probed": 2,
            "n_of_trail": 2,
        }
        said = "probes: 2 while training, 6.0 s; 2 of the trail, 5.0 s; together 110 % of training time"
        assert str(cost) == f"{said}; the last one, 7.0 s"

    def test_training_goes_on_after_a_probe(self, clock):
        cost = Cost()
        self.run(clock, cost)
        clock.now += 10
        assert cost.to_dict()["training_seconds"] == 20

    def test_a_probe_that_fails_counts_too(self, clock):
        cost = Cost()
        cost.start()
        with pytest.raises(KeyError), cost.counted("in_training"):  # noqa: PT012
            clock.now += 2
            raise KeyError
        assert (cost.in_training, cost.to_dict()["training_seconds"]) == (2, 0)

    def test_a_resumed_run_goes_on_counting(self, clock):
        """The time between is nobody's."""
        whole, first, second = Cost(), Cost(), Cost()
        self.run(clock, first)
        state = json.loads(json.dumps(first.state_dict()))  # plain values
        clock.now += 1e5
        second.load_state_dict(state)
        self.run(clock, second)
        found = second.to_dict()
        for _ in range(2):
            self.run(clock, whole)
        assert found == whole.to_dict()

    def test_before_training_there_is_no_fraction(self):
        assert Cost().to_dict()["fraction"] is None
        assert "together ? of training time" in str(Cost())


A, B = ("older", "self_attn", "late"), ("embedding", "mlp", "early")


@pytest.mark.parametrize(
    ("probes", "count"),
    [
        ([([A], True)] * 3, 3),
        ([([A, B], True), ([B, A], True)], 2),  # a set
        ([([A], True), ([A], True), ([A, B], True)], 1),
        ([([A], True), ([], True), ([A], True)], 1),
        ([([], True)] * 4, 0),
        ([([A], True), ([A], False)], 0),  # the task is no longer solved
        ([([A], False)] * 5, 0),
    ],
)
def test_motifs_settle_when_they_stay_the_same(probes, count):
    settled = Settled(3)
    for motifs, learned in probes:
        again = Settled(3)
        again.load_state_dict(json.loads(json.dumps(settled.state_dict())))  # resumed after every probe
        settled = again
        settled.update(motifs, learned)
    assert settled.count == count
    assert settled.is_settled == (count >= 3)


def test_percentages_are_as_people_write_them():
    assert [percent(value) for value in (0.1, 0.05, 0.0123, None)] == ["10 %", "5 %", "1.23 %", "?"]
