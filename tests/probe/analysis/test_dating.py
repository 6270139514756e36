"""When what was found began: dated back by a test of its own, bounded by the last probe that refutes it."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from probe.analysis import onsets, stats
from probe.analysis.inference import Inference
from probe.analysis.motifs import Harm
from probe.vocabulary import MATTERS, Route

HOW = Inference(num_resamples=399)
probes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=9)


@given(probes)
def test_an_onset_is_dated_back_as_long_as_the_route_matters(pairs):
    holds = np.array([held for held, _ in pairs])
    matters = holds | np.array([mattered for _, mattered in pairs])
    found = onsets.first_lasting(holds)
    date = onsets.onset(holds, matters)
    if math.isnan(found):
        assert math.isnan(date)
        return
    expected = int(found)
    while expected > 0 and matters[expected - 1]:
        expected -= 1
    assert date == expected


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(0, 8))
def test_an_onset_lies_after_the_last_probe_that_refutes_it(refuted, place):
    time = min(place, len(refuted) - 1)
    expected = max((i for i in range(time + 1) if refuted[i]), default=0)
    assert onsets.last_before(np.array(float(time)), np.array(refuted)) == expected
    assert math.isnan(onsets.last_before(np.array(math.nan), np.array(refuted)))


def of_regions(seed: int, strength: float, elsewhere: float = 0.0, margin: float = 4.0) -> Harm:
    """64 sequences; `current` in early and late attention, two reads each, and three cells without an effect."""
    rng = np.random.default_rng(seed)
    routes = [Route("self_attn", scope, "current") for scope in ("early", "late")]
    routes += [Route("mlp", scope, "older") for scope in ("early", "middle", "late")]
    margins = margin + rng.normal(size=64)
    harm = 0.4 * rng.normal(size=(64, 5)) + np.outer(margins, [strength, elsewhere, 0, 0, 0])
    return Harm(routes, 16 * harm, 16 * margins, np.full(64, 16), np.full(5, 2.0))


def matters_in_a_loop(harm: Harm) -> bool:
    """Of the first route, on the sample."""

    def t(sums: np.ndarray) -> tuple[float, float]:
        bootstrap = stats.bootstrap_t(sums[:, None], harm.counts, *HOW.resampling)
        return float(bootstrap.mean[0]), float(bootstrap.p_above(0.0)[0])

    above, p_above = t(harm.sums[:, 0] - MATTERS * harm.margins)
    _, p_margin = t(harm.margins)
    larger = (harm.sums[:, 0] / harm.n_reads[0]).mean() > (harm.sums[:, 1] / harm.n_reads[1]).mean()
    return above > 0 and p_above <= 0.05 and p_margin <= 0.05 and bool(larger)


def test_mattering_is_a_test_of_the_cell_itself_and_less_than_a_motif():
    seen = set()
    for seed in range(30):
        margin = 0.0 if seed % 5 == 4 else 4.0
        harm = of_regions(seed, strength=0.05 + 0.003 * seed, elsewhere=0.04 * (seed % 3), margin=margin)
        once = np.ones((1, 64))
        matters, holds = harm.matters(once, HOW)[0], harm.holds(once, HOW)[0]
        assert matters[0] == matters_in_a_loop(harm)
        assert (matters | ~holds).all()
        seen.add((bool(matters[0]), bool(holds[0])))
    assert seen == {(False, False), (True, False), (True, True)}


def test_what_is_refuted_is_what_would_be_needed():
    """A strength well below tau, a margin below zero, or more harm elsewhere; not a strength that cannot be told."""
    assert of_regions(0, strength=0.0).shown_not_to_matter(HOW)[0]
    assert of_regions(0, strength=0.3, margin=-2.0).shown_not_to_matter(HOW)[0]
    assert of_regions(0, strength=0.1, elsewhere=0.3).shown_not_to_matter(HOW)[0]
    assert not of_regions(0, strength=0.3).shown_not_to_matter(HOW)[0]
    at_tau = [of_regions(seed, strength=0.05).shown_not_to_matter(HOW)[0] for seed in range(60)]
    assert np.mean(at_tau) <= 0.1
