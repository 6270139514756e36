"""Multiplying a model's logits by a constant changes no strength, rank, motif or claim about it, from end to end.

Of simulated onsets and curves: tests/probe/analysis/test_emergence.py.
"""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pandas as pd
import pytest

from attnres import REGIONS, SUBLAYERS, AttnResForCausalLM
from probe import Effects, ProbeSettings, measure
from probe.examples.examples import Examples
from probe.vocabulary import MARGINS, ROUTE
from tests.support import planted

FACTORS = (0.25, 4.0, 16.0)
INVARIANT = ["strength", "strength_low", "strength_high", "detectable", "p_value", "p_adjusted", "p_matters"]
INVARIANT += ["p_equivalent"]
SAME = ["no_strength", "below_floor", "task_learned", "applicable"]
IN_NATS = {"effect", "clean"}


def probe(model: AttnResForCausalLM, task, factor: float) -> Effects:
    scaled = deepcopy(model).requires_grad_(False)
    scaled.lm_head.weight.mul_(factor)
    settings = ProbeSettings(positions=("all",), sublayers=SUBLAYERS, scopes=(*REGIONS, "all"), num_resamples=500)
    return measure(scaled, Examples.from_batch(task.batch("probe", range(32))), settings)


def on_margins(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["metric"].isin(MARGINS)].reset_index(drop=True)


def without_nats(value):
    """What summaries say, less what is in nats."""
    if isinstance(value, dict):
        return {key: without_nats(item) for key, item in value.items() if key not in IN_NATS}
    return [without_nats(item) for item in value] if isinstance(value, list) else value


def old_claims(found: Effects) -> tuple[bool, frozenset]:
    """The criterion before: NLL at a fraction of ln K. Whether the task is learned, and the routes that matter."""
    ln_k = np.log(found.summary["num_pairs"])
    rows = found.effects[(found.effects["metric"] == "nll") & found.effects["applicable"]]
    matters = rows[(rows["effect"] / rows["n_reads"] >= 0.05 * ln_k) & (rows["p_adjusted"] <= 0.05)]
    return found.summary["clean"]["nll"] < ln_k / 2, frozenset(map(tuple, matters[ROUTE].to_numpy().tolist()))


def assert_same_but_nats(one: Effects, other: Effects) -> None:
    a, b = (on_margins(found.effects) for found in (one, other))
    real = ~a["below_floor"].to_numpy(bool)
    assert real.sum() > 10
    for name in INVARIANT:
        tolerance = {"atol": 0.02} if name.startswith("p_") else {"rtol": 2e-3, "atol": 2e-6}
        np.testing.assert_allclose(b.loc[real, name], a.loc[real, name], **tolerance, err_msg=name)
    for name in SAME:
        assert a[name].tolist() == b[name].tolist(), name
    for name in ("motifs", "motifs_at_half_tau", "motifs_to_mean_only", "dissociation"):
        a, b = (pd.json_normalize({name: without_nats(found.summary[name])}) for found in (one, other))
        pd.testing.assert_frame_equal(a, b, atol=0.02)
    for name in ("task_learned", "saturated", "accuracy", "accuracy_low"):
        assert one.summary["clean"][name] == other.summary["clean"][name]


@pytest.mark.parametrize("name", ["saturated", pytest.param("mass_without_role", marks=pytest.mark.slow)])
def test_nothing_but_nats_depends_on_the_scale_of_a_planted_model(name):
    found = getattr(planted, name)()
    one = probe(found.model, found.task, 1.0)
    others = [probe(found.model, found.task, factor) for factor in FACTORS]
    assert [(m["family"], m["sublayer"], m["scope"]) for m in one.summary["motifs"]] == list(found.sites)
    for other, factor in zip(others, FACTORS, strict=True):
        assert_same_but_nats(one, other)
        assert other.summary["clean"]["logit_diff"] == pytest.approx(factor * one.summary["clean"]["logit_diff"])


@pytest.mark.parametrize("source", ["cumulative", pytest.param("block_sum", marks=pytest.mark.slow)])
def test_nothing_but_nats_depends_on_the_scale_of_a_trained_model(trained_model, source):
    """The old criterion, on NLL at a fraction of ln K, fails the same test."""
    model = trained_model(source)
    one = probe(model, trained_model.task, 1.0)
    assert one.effects["strength"].max() > 0.05
    others = [probe(model, trained_model.task, factor) for factor in FACTORS]
    for other in others:
        assert_same_but_nats(one, other)
    assert len({old_claims(found) for found in (one, *others)}) > 1
