"""When to probe: schedules, what a budget of time allows in simulated runs, and when motifs have settled."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe.training.schedule import RECENT_STEPS, Budget, Schedule, Settled, percent

EVERY_15 = Schedule(every_n_steps=15, log_spaced=True)
LEARNING = (100, 110, 120)
"""Validations at which accuracy jumps."""


def growing(step: int) -> float:
    """Seconds of a step while a curriculum makes sequences longer, as the demo's."""
    return 0.03 + 0.1 * min(1.0, step / 140)


class Simulation:
    """A run whose clock moves by `step_seconds(step)` and, at a probe, by `probe_seconds(number of the probe)`.

    Decides as the callback does: step 0 and `at_steps` always, the schedule and jumps where the budget allows; a jump
    that was not probed is tried again ten steps later. It can stop at a step, and go on from its saved state.
    """

    def __init__(
        self,
        max_steps: int,
        step_seconds: Callable[[int], float],
        probe_seconds: Callable[[int], float],
        schedule: Schedule = EVERY_15,
        jumps: Collection[int] = (),
        max_fraction: float | None = 0.1,
    ) -> None:
        self.max_steps, self.step_seconds, self.probe_seconds = max_steps, step_seconds, probe_seconds
        self.schedule, self.jumps, self.max_fraction = schedule, jumps, max_fraction
        self.now, self.step, self.trained = 0.0, 0, 0.0
        self.probed: list[int] = []
        self.waits = False
        self.budget = Budget(max_fraction, clock=lambda: self.now)
        self.budget.start()
        self.probe(obligatory=True)

    def probe(self, obligatory: bool = False) -> None:
        seconds = self.probe_seconds(len(self.probed))
        self.now += seconds
        self.probed.append(self.step)
        self.budget.add(self.step, seconds, obligatory)

    def allows(self, jump: bool = False) -> bool:
        return self.budget.allows(self.step, self.max_steps, self.schedule, jump)

    def run(self, until: int | None = None) -> Simulation:
        while self.step < (self.max_steps if until is None else until):
            self.step += 1
            self.now += self.step_seconds(self.step)
            self.trained += self.step_seconds(self.step)
            self.budget.step_done(self.step)
            if self.step == self.max_steps:
                break
            if self.step in self.schedule.at_steps:
                self.probe(obligatory=True)
            elif self.schedule.names(self.step, self.max_steps) and self.allows():
                self.probe()
            self.waits = (self.waits or self.step in self.jumps) and self.step != self.probed[-1]
            if self.waits and self.step % 10 == 0 and self.allows(jump=True):
                self.probe()
                self.waits = False
        return self

    def resume(self) -> Simulation:
        """As from a checkpoint: another process, whose clock has another origin."""
        state = json.loads(json.dumps(self.budget.state_dict()))  # plain values
        self.now += 1e6
        self.budget = Budget(self.max_fraction, clock=lambda: self.now)
        self.budget.load_state_dict(state)
        self.budget.start()
        return self


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
        assert set(schedule.always(max_steps)) == {0, *at} & set(range(max_steps))

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


class TestBudget:
    @given(
        scale=st.floats(0.01, 0.5),
        growth=st.floats(0.0, 5.0),
        probe=st.floats(0.01, 6.0),
        every=st.integers(1, 50),
        jumps=st.frozensets(st.integers(1, 290).map(lambda tens: 10 * (tens // 10)), max_size=8),
        fraction=st.floats(0.02, 0.5),
    )
    def test_it_is_kept_wherever_it_can_be(self, scale, growth, probe, every, jumps, fraction):
        """Steps that become slower, as under a curriculum; probes of one cost."""
        schedule = Schedule(every, True)
        run = Simulation(
            300, lambda s: scale * (1 + growth * s / 300), lambda _: probe, schedule, jumps, fraction
        ).run()
        assert run.budget.training == pytest.approx(run.trained)
        if len(run.probed) > 1:
            assert run.budget.fraction <= fraction * (1 + 1e-9)
        if 1.2 * len(schedule.steps(300)) * probe < fraction * 300 * scale:  # at the speed of the first steps
            assert set(run.probed) >= set(schedule.steps(300)[:-1])
        # More are not left out than the margin, the unspent part of one's cost and a whole one explain.
        elif not jumps and growth == 0:
            assert 1.1 * (len(run.probed) + 2) * probe > fraction * run.trained * (1 - every / 300)

    def test_probes_spread_over_the_run(self):
        run = Simulation(600, growing, lambda _: 0.9).run()
        assert 0.08 < run.budget.fraction <= 0.1
        gaps = [later - earlier for earlier, later in zip(run.probed, [*run.probed[1:], 600], strict=True)]
        assert max(gaps) <= 120
        assert min(gaps[1:]) >= 45

    def test_an_accuracy_jump_takes_from_what_is_left_for_later(self):
        even, jumping = (Simulation(600, growing, lambda _: 0.9, jumps=jumps).run() for jumps in ((), LEARNING))
        assert set(LEARNING) <= set(jumping.probed)
        assert not set(LEARNING[:2]) & set(even.probed)
        assert jumping.budget.fraction <= 0.1
        between = [step for step in jumping.probed if LEARNING[-1] < step < 300]
        assert between == []  # it has been spent
        assert len([step for step in jumping.probed if step >= 300]) >= 3  # but not all of it

    def test_a_jump_that_cannot_be_afforded_waits(self):
        run = Simulation(600, growing, lambda _: 1.8, Schedule(), jumps=(30,)).run()
        assert run.probed[0] == 0 < 30 < run.probed[1]
        assert len(run.probed) == 2

    def test_what_must_come_later_is_kept_back(self):
        schedule = Schedule(15, True, frozenset({500, 590}))
        run = Simulation(600, growing, lambda _: 0.9, schedule, jumps=range(10, 600, 10)).run()
        assert {500, 590} <= set(run.probed)
        assert run.budget.fraction <= 0.1

    def test_obligatory_probes_are_made_and_their_excess_is_said(self):
        run = Simulation(600, growing, lambda _: 8.0, Schedule(15, True, frozenset({50})), LEARNING).run()
        assert run.probed == [0, 50]
        assert run.budget.to_dict()["fraction"] == pytest.approx(16 / run.trained)
        assert run.budget.fraction > 0.1
        assert run.budget.to_dict()["obligatory_seconds"] == 16
        assert "more than probe.max_probe_fraction, 10 %" in str(run.budget)
        assert "more than" not in str(Simulation(600, growing, lambda _: 0.9).run().budget)

    def test_a_slow_first_step_does_not_pass_for_the_speed_of_all(self):
        """torch.compile, a minute."""
        run = Simulation(600, lambda step: 60.0 if step == 1 else 0.1, lambda _: 0.9).run()
        assert run.budget.fraction <= 0.1
        assert len([step for step in run.probed if step < 60]) <= 2

    def test_one_disturbed_probe_does_not_end_probing(self):
        """Their median foretells the next; the disturbed one has cost what it has cost."""
        run = Simulation(3000, growing, lambda number: 9.0 if number == 2 else 0.9).run()
        assert len([step for step in run.probed if step > 1000]) >= 15
        assert run.budget.fraction <= 0.1

    def test_without_a_limit_all_are_made(self):
        run = Simulation(100, growing, lambda _: 50.0, jumps=(70,), max_fraction=None).run()
        assert run.probed == sorted({*EVERY_15.steps(100)[:-1], 70})
        assert "more than" not in str(run.budget)

    @pytest.mark.parametrize("at", [7, 111, 333])
    def test_a_resumed_run_goes_on_with_what_it_had(self, at):
        whole, halves = (Simulation(600, growing, lambda _: 0.9, jumps=LEARNING) for _ in range(2))
        whole.run()
        halves.run(until=at).resume().run()
        assert halves.budget.training == pytest.approx(whole.trained)
        assert halves.budget.fraction <= 0.1
        before = [step for step in whole.probed if step <= at]
        assert halves.probed[: len(before)] == before
        if at > RECENT_STEPS:  # the present speed is known again after some steps
            assert abs(len(halves.probed) - len(whole.probed)) <= 1

    def test_a_step_that_was_skipped_and_then_probed_is_not_counted_as_skipped(self):
        budget = Budget(0.1, clock=lambda: 0.0, skipped=[10, 20])
        budget.start()
        budget.add(20, 0.0, obligatory=False)
        assert budget.to_dict()["skipped_steps"] == [10]

    def test_the_probe_after_training_is_counted_apart(self):
        run = Simulation(600, growing, lambda _: 0.9).run()
        fraction, spent = run.budget.fraction, run.budget.spent
        run.now += 5
        run.budget.add_after_training(5)
        assert (run.budget.fraction, run.budget.spent) == (pytest.approx(fraction), spent)
        assert run.budget.to_dict()["after_training_seconds"] == 5
        assert run.budget.training == pytest.approx(run.trained)


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
