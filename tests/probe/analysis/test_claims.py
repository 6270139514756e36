"""The claims, of models whose mechanism is planted and of the analytic baseline: statements from rows that exist."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from attnres import FAMILIES, SUBLAYERS, wrap_qwen3
from attnres.sites import REGIONS
from probe import Effects, ProbeSettings, measure
from probe.analysis.claims import FAILS, HOLDS, IN_TRAINING, PARTLY, UNTESTED, find_claims
from probe.analysis.emergence import Emergence, find_emergence
from probe.analysis.inference import Inference
from probe.analysis.roles import INTERACTS, TESTS, Roles
from probe.examples.examples import Examples
from probe.vocabulary import ROUTE, Route, primary_rows
from tests.support import planted
from tests.support.simulated_run import EARLY_ATTENTION, Planted, SimulatedRun, simulate

KINDS = ("mask_renormalise", "keep_only", "keep_random")


def probe(model, kinds=KINDS, coalitions=("all",), task=planted.TASK) -> Effects:
    inputs = Examples.from_batch(task.batch("train", range(48)))
    settings = ProbeSettings(
        kinds=kinds,
        coalitions=coalitions,
        positions=("all",),
        sublayers=SUBLAYERS,
        scopes=(*REGIONS, "all"),
        num_resamples=500,
    )
    return measure(model, inputs, settings)


def claims_of(found: Effects):
    coalitions = None if found.coalitions.empty else found.coalitions
    claims = find_claims(found.effects, found.clusters, coalitions, None, found.summary)
    return {claim.claim: claim for claim in claims}


@cache
def idle_family() -> Effects:
    return probe(planted.mass_without_role().model)


@cache
def stand_ins() -> Effects:
    return probe(planted.redundant_blocks().model)


@cache
def wrapped() -> Effects:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": planted.V}
    vanilla = Qwen3ForCausalLM(Qwen3Config(**shape, bos_token_id=None, eos_token_id=None))
    return probe(wrap_qwen3(vanilla, 3, 3.0).eval(), ("mask_renormalise",), ())


def test_families_without_a_role_are_named_and_no_others():
    """Block sums, of which late attention alone reads: MLPs write nothing, so no family has a role there.

    In attention, prev_completed (mass 0.34, junk) is neither necessary nor sufficient, but its interactions, of up to
    1.4 % of the margin, are not within epsilon.
    """
    found = idle_family()
    claim = claims_of(found)["C4"]
    assert claim.verdict == HOLDS
    idle, *rest = " ".join(claim.details).split(": neither necessary nor sufficient")
    assert [f"{family} in MLP" in idle for family in FAMILIES] == [True] * 4
    assert "older in attention" not in idle
    assert "attention older" in rest[0]
    coalitions = found.coalitions
    roles = {role.route: role for role in Roles(found.effects, found.clusters, coalitions, found.summary).families()}
    assert roles[Route("self_attn", "all", "prev_completed")].failed == [INTERACTS]
    assert roles[Route("self_attn", "all", "older")].failed == list(TESTS)


def test_motifs_and_dissociation_of_a_planted_model():
    claims = claims_of(idle_family())
    assert claims["C2"].verdict == HOLDS
    assert claims["C2"].statements[0].startswith("older -> late attention* ")
    assert claims["C3"].verdict in (HOLDS, PARTLY)
    assert "most harm older" in claims["C3"].statements[0]


def test_families_that_stand_in_for_each_other_are_named():
    claim = claims_of(stand_ins())["redundancy"]
    assert claim.verdict == HOLDS
    assert claim.statements[0].startswith("prev_completed + older in attention ")


def test_only_routing_without_queries_is_independent_of_content():
    assert claims_of(wrapped())["C1"].verdict == HOLDS
    assert claims_of(idle_family())["C1"].verdict == FAILS


def test_a_model_at_chance_has_no_claim_on_strengths():
    claims = claims_of(wrapped())
    assert [claims[name].verdict for name in ("C2", "C3", "C4")] == [UNTESTED] * 3
    assert all("not clear of zero" in claims[name].text for name in ("C2", "C3", "C4"))


@cache
def faded() -> tuple[SimulatedRun, Emergence]:
    """A training in which current -> early attention matters until step 140, more and more, and not at its end."""
    run = simulate(Planted(time=75.0, width=40.0), np.arange(10) * 20, seed=0, num_resamples=200)
    at = (run.clusters[ROUTE] == list(EARLY_ATTENTION.key)).all(axis=1) & (run.clusters["step"] > 140)
    clusters = run.clusters.assign(summed_effect=run.clusters["summed_effect"].mask(at, 0.0))
    emergence = find_emergence(run.effects, clusters, how=Inference(num_resamples=200))
    assert emergence is not None
    return replace(run, clusters=clusters), emergence


def with_emergence(found: Effects, emergence: Emergence):
    return find_claims(found.effects, found.clusters, found.coalitions, emergence, found.summary)


def test_what_was_a_motif_is_told_with_the_share_of_the_margin_of_that_step():
    run, emergence = faded()
    (claim,) = (c for c in with_emergence(idle_family(), emergence) if c.claim == "C2")
    rows = primary_rows(run.clusters)
    rows = rows[(rows[ROUTE] == list(EARLY_ATTENTION.key)).all(axis=1)]
    sums = rows.groupby("step")[["summed_effect", "summed_clean"]].sum()
    strengths = -sums["summed_effect"] / sums["summed_clean"]
    peak = strengths.idxmax()
    assert 0 < peak <= 140
    (told,) = (statement for statement in claim.statements if statement.startswith("earlier"))
    assert told == f"earlier {EARLY_ATTENTION}* {100 * strengths[peak]:.0f} % at {peak}"
    (detail,) = (detail for detail in claim.details if detail.startswith(f"{EARLY_ATTENTION}* a motif at steps"))
    assert f"of the margin of step {peak}, now 0.0 %" in detail


def test_every_row_that_a_claim_names_is_in_its_table():
    found, (run, emergence) = idle_family(), faded()
    tables = {"effects": found.effects, "coalitions": found.coalitions, IN_TRAINING: run.effects}
    claims = with_emergence(found, emergence)
    assert {row["table"] for claim in claims for row in claim.rows} == set(tables)
    for claim in claims:
        assert claim.rows, claim.claim
        for row in claim.rows:
            table: pd.DataFrame = tables[row["table"]]
            keys = {name: value for name, value in row.items() if name != "table"}
            assert (table[list(keys)] == pd.Series(keys)).all(axis=1).any(), (claim.claim, row)


@pytest.mark.parametrize("scale", [0.25, 16])
def test_no_claim_minds_the_scale_of_the_logits(scale):
    model = copy.deepcopy(planted.mass_without_role().model)
    model.lm_head.weight.mul_(scale)
    scaled, claims = claims_of(probe(model)), claims_of(idle_family())
    assert {name: str(claim) for name, claim in scaled.items()} == {name: str(claim) for name, claim in claims.items()}


@pytest.mark.parametrize(
    ("scopes", "untested"),
    [
        (("all",), {"C2": "regions", "coverage": "regions"}),
        (REGIONS, {"C1": "the whole depth", "C3": "the whole depth"}),
    ],
)
def test_scopes_that_were_not_probed_are_named(scopes, untested):
    inputs = Examples.from_batch(planted.TASK.batch("train", range(48)))
    settings = ProbeSettings(scopes=scopes, positions=("all",), sublayers=SUBLAYERS, num_resamples=100)
    claims = claims_of(measure(planted.mass_without_role().model, inputs, settings))
    for name, what in untested.items():
        assert claims[name].verdict == UNTESTED
        assert what in claims[name].text
        assert "were not probed" in claims[name].text


@pytest.mark.parametrize("detectable", [math.nan, math.inf])
def test_what_would_have_shown_is_a_number_or_said_not_to_be_known(detectable):
    found = copy.copy(idle_family())
    claims = find_claims(found.effects.assign(detectable=detectable), found.clusters, None, None, found.summary)
    (coverage,) = (claim for claim in claims if claim.claim == "coverage")
    assert "is not known: there are too few sequences or resamples" in coverage.text
    assert "nan" not in coverage.text
    assert "inf" not in coverage.text


def test_what_was_not_probed_cannot_be_tested():
    found = probe(planted.mass_without_role().model, ("mask_renormalise",), ())
    claims = claims_of(found)
    assert claims["redundancy"].verdict == UNTESTED
    assert claims["C4"].verdict == UNTESTED
    assert "not tested" in claims["C4"].text


def test_no_claim_says_more_than_a_test_can():
    """Small is not zero: the tests tell what is within epsilon, and what was not shown to be."""
    found = [idle_family(), stand_ins(), wrapped()]
    told = [str(claim) for one in found for claim in claims_of(one).values()]
    told += [str(claim) for claim in with_emergence(idle_family(), faded()[1])]
    assert not [line for line in told for word in ("equivalent", "no role", "never") if word in line]
