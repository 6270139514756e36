"""Every setting of a probe is checked when the settings are made, and the message names it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe import ProbeSettings
from probe.analysis.inference import Inference
from probe.settings import MOST_RESAMPLES, NAMED


@pytest.mark.parametrize("name", NAMED)
def test_a_list_that_names_something_twice_is_refused(name):
    default = {"scopes": ("all", "early"), "coalitions": ("all",)}.get(name) or getattr(ProbeSettings(), name)
    ProbeSettings(**{name: default})
    with pytest.raises(ValueError, match=f"^{name} names '{default[0]}' twice: name it once$"):
        ProbeSettings(**{name: (*default, default[0])})


def test_a_kind_is_the_same_by_its_name_and_by_its_place():
    with pytest.raises(ValueError, match=r"^kinds names 'zero' twice"):
        ProbeSettings(kinds=["zero", "probe.ablation.necessity.Zero"])


def test_nothing_is_probed_of_an_empty_list():
    for name in set(NAMED) - {"coalitions"}:
        with pytest.raises(ValueError, match=f"^{name} must name at least one$"):
            ProbeSettings(**{name: ()})
    assert ProbeSettings(coalitions=()).coalitions == ()


BOUNDS = {"num_sequences": (1, 2**63 - 1), "batch_size": (1, 2**63 - 1), "tokens_per_pass": (1, 2**63 - 1)}
BOUNDS |= {"num_resamples": (1, MOST_RESAMPLES), "seed": (0, 2**63 - 1)}


@pytest.mark.parametrize("name", BOUNDS)
@given(value=st.integers() | st.integers(-(10**400), 10**400))
def test_a_number_is_taken_if_and_only_if_it_is_in_bounds(name, value):
    least, most = BOUNDS[name]
    if least <= value <= most:
        assert getattr(ProbeSettings(**{name: value}), name) == value
    else:
        with pytest.raises(ValueError, match=f"^{name} must be at (least|most) "):
            ProbeSettings(**{name: value})


@given(matters=st.floats(), equivalent=st.floats())
def test_thresholds_are_in_order_and_are_numbers(matters, equivalent):
    if 0 < equivalent < matters < 1:
        ProbeSettings(matters=matters, equivalent=equivalent)
    else:
        with pytest.raises(ValueError, match=r"^0 < equivalent < matters < 1 must hold, got "):
            ProbeSettings(matters=matters, equivalent=equivalent)


@pytest.mark.parametrize("fields", [{"num_resamples": 0}, {"num_resamples": 10**12}, {"seed": -1}, {"seed": 2**64}])
def test_an_inference_has_the_same_bounds(fields):
    with pytest.raises(ValueError, match=f"^{next(iter(fields))} must be at (least|most) "):
        Inference(**fields)
