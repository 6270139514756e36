"""Where the next probe goes: on simulated curves, and by properties that any placement must have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe.analysis.placement import MARGIN_WEIGHT, MASS_WEIGHT, Reading, next_step, spread

CHANCE = 1 / 16
EVERY_2 = list(range(0, 301, 2))
Curve = Callable[[int], Reading]


def rise(step: float, middle: float, width: float) -> float:
    """From 0 to 1; 5 to 95 % takes `width` steps."""
    return 1 / (1 + math.exp(max(-60.0, min(60.0, 2 * math.log(19) * (middle - step) / width))))


def learning(*jumps: tuple[float, float, float], slowly: float = 12.0) -> Curve:
    """Accuracy with jumps (middle, width, height). The margin goes on rising, by `slowly` nats, and masses drift."""

    def read(step: int) -> Reading:
        done = sum(height * rise(step, middle, width) for middle, width, height in jumps)
        late = slowly * (1 - math.exp(-max(0.0, step - jumps[0][0]) / 100)) if jumps else 0.0
        masses = {
            "drifts": 0.25 + 0.001 * step,
            "learned": 0.25 + 0.45 * done,
            "early": 0.6 - 0.4 * math.exp(-step / 60),
        }
        return Reading(CHANCE + (1 - CHANCE) * done, 4 * done - 0.3 + late, masses)

    return read


def place(curve: Curve, steps: list[int] = EVERY_2, num_probes: int = 24) -> list[int]:
    """Steps in the order in which they are probed."""
    probed: dict[int, Reading] = {}
    while (step := next_step(steps, probed, num_probes)) is not None:
        assert step not in probed
        probed[step] = curve(step)
    return list(probed)


def in_rise(curve: Curve, steps: list[int], start: float = CHANCE, end: float = 1.0) -> list[int]:
    """Steps at which accuracy is between 5 and 95 % of its way."""
    return [step for step in steps if 0.05 <= (curve(step).accuracy - start) / (end - start) <= 0.95]


@pytest.mark.parametrize("middle", [45, 77, 101, 150, 203, 260])
@pytest.mark.parametrize(
    ("width", "height", "least"),
    [
        (40, 1.0, 10),  # what was asked for
        (90, 1.0, 10),
        (40, 0.5, 10),  # a model that stops half-way
        (16, 1.0, 7),  # of the 8 that there are
        (4, 1.0, 2),  # of 2 or 3
    ],
)
def test_half_of_the_probes_see_the_rise(middle, width, height, least):
    curve = learning((middle, width, height))
    steps = place(curve)
    assert len(steps) == 24
    end = CHANCE + (1 - CHANCE) * height
    assert len(in_rise(curve, steps, end=end)) >= min(least, len(in_rise(curve, EVERY_2, end=end)))


def test_two_jumps_are_both_seen():
    curve = learning((80, 16, 0.5), (220, 16, 0.5))
    steps = place(curve)
    assert sum(72 <= step <= 88 for step in steps) >= 4
    assert sum(212 <= step <= 228 for step in steps) >= 4


def test_where_nothing_happens_probes_are_spread_evenly():
    steps = sorted(place(lambda _: Reading(CHANCE, -1.0, {"any": 0.5}), num_probes=17))
    assert {b - a for a, b in pairwise(steps)} <= {18, 20}


def test_a_margin_that_rises_after_accuracy_is_followed_too():
    curve = learning((50, 10, 1.0), slowly=40.0)
    assert sum(step > 80 for step in place(curve)) >= 6


def naive_next(steps: list[int], probed: dict[int, Reading]) -> int | None:
    """The rule in the words of the module, without cleverness."""
    best, found = None, None
    largest = max(abs(reading.margin) for reading in probed.values()) or 1.0
    for a in sorted(probed):
        later = [step for step in sorted(probed) if step > a]
        between = [step for step in steps if later and a < step < later[0]]
        if not between:
            continue
        one, two = probed[a], probed[later[0]]
        change = max(
            abs(one.accuracy - two.accuracy),
            MARGIN_WEIGHT * abs(one.margin - two.margin) / largest,
            *(MASS_WEIGHT * abs(one.masses[cell] - two.masses[cell]) for cell in one.masses),
        )
        score = (round(change, 3), len(between))
        if best is None or score > best:
            best, found = score, between[(len(between) - 1) // 2]
    return found


READINGS = st.builds(
    Reading,
    st.integers(0, 64).map(lambda hits: hits / 64),
    st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0, 16.0]),
    st.fixed_dictionaries({"a": st.sampled_from([0.0, 0.5, 1.0]), "b": st.floats(0, 1)}),
)
STEPS = st.sets(st.integers(0, 400), min_size=6, max_size=40).map(sorted)


@given(steps=STEPS, data=st.data())
def test_after_the_spread_ones_it_is_the_naive_rule(steps, data):
    chosen = {*spread(steps), *data.draw(st.sets(st.sampled_from(steps)))}
    probed = {step: data.draw(READINGS) for step in data.draw(st.permutations(sorted(chosen)))}
    assert next_step(steps, probed, 1000) == naive_next(steps, probed)


@given(steps=STEPS, data=st.data(), num_probes=st.integers(1, 50))
def test_it_starts_spread_and_ends_at_the_number_or_the_resolution(steps, data, num_probes):
    readings = {step: data.draw(READINGS) for step in steps}
    placed = place(readings.__getitem__, steps, num_probes)
    assert len(placed) == min(num_probes, len(steps))
    assert set(spread(steps, num_probes)) == set(placed[: len(spread(steps, num_probes))])
    if num_probes > 1:
        assert {steps[0], steps[-1]} <= set(placed)


@given(steps=STEPS, data=st.data(), scale=st.sampled_from([0.25, 4.0, 16.0]))
def test_logits_times_a_constant_change_nothing(steps, data, scale):
    readings = {step: data.draw(READINGS) for step in steps}
    scaled = {step: replace(reading, margin=reading.margin * scale) for step, reading in readings.items()}
    assert place(readings.__getitem__, steps) == place(scaled.__getitem__, steps)


@given(st.data())
def test_rounding_of_a_machine_changes_nothing(data):
    curve = learning((101, 40, 1.0))
    noise = st.floats(-1e-7, 1e-7)

    def noisy(step: int) -> Reading:
        reading = curve(step)
        masses = {cell: mass + data.draw(noise) for cell, mass in reading.masses.items()}
        return Reading(reading.accuracy, reading.margin * (1 + data.draw(noise)), masses)

    assert place(curve) == place(noisy)


@pytest.mark.parametrize("probed", [[], [2], [150, 2, 300]])
def test_steps_that_were_probed_before_count(probed):
    """As by a schedule while the model trained; the rest is the same however it is interrupted."""
    curve = learning((101, 40, 1.0))
    readings = {step: curve(step) for step in probed}
    while (step := next_step(EVERY_2, readings, 12)) is not None:
        readings = {step: curve(step)} | readings  # another order: only which they are matters
    assert len(readings) == 12
    assert {0, 300, *probed} <= set(readings)


def test_spread():
    assert spread(EVERY_2) == [0, 38, 76, 112, 150, 188, 224, 262, 300]
    assert spread([0, 4, 8]) == [0, 4, 8]
    assert spread([0, 1, 2, 3, 100]) == [0, 1, 2, 3, 100]
    assert spread(EVERY_2, 24) == spread(EVERY_2)
    assert spread([0, 2, 4], 2) == [0, 4]
    assert spread([0, 2, 4], 1) == [0]
    assert spread([7]) == [7]
    assert spread([]) == []
    assert next_step([], {}, 5) is None
