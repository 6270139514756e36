"""What interventions and tables mean where routes are added to the stream, against a vanilla Qwen3 and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from attnres import FAMILIES, SUBLAYERS, AttnResForCausalLM, Read
from attnres.tasks import MQAR
from probe import Effects, ProbeSettings, measure
from probe.ablation.engine import Engine
from probe.ablation.grid import Kind, build_grid
from probe.ablation.interventions import Ablation, Coalition, KeepOnly, MaskRenormalise, Silence, everywhere
from probe.analysis.claims import find_claims
from probe.analysis.roles import content_is_shared
from probe.examples.examples import Examples
from probe.vocabulary import primary_rows
from tests.conftest import MODES, SMALL_SHAPE

INPUTS = Examples.from_batch(MQAR(num_pairs=4, vocab_size=40).batch("probe", range(6)))
EACH_MODE = pytest.mark.parametrize("mode", MODES)


def make(make_model, mode: str = "block", **fields) -> AttnResForCausalLM:
    return make_model(attnres_source="delta_block", attnres_mode=mode, **({"attnres_num_blocks": 4} | fields))


def record(model: AttnResForCausalLM) -> list[Read]:
    reads: list[Read] = []
    with torch.no_grad():
        model(INPUTS.input_ids, intervention=lambda read: reads.append(read) or read)
    return reads


@EACH_MODE
@pytest.mark.parametrize("kind", [Coalition, Silence])
def test_with_all_routes_masked_the_model_is_a_vanilla_one(make_model, mode, kind):
    model = make(make_model, mode)
    vanilla = Qwen3ForCausalLM(Qwen3Config(**SMALL_SHAPE)).eval()
    vanilla.load_state_dict({name: value for name, value in model.state_dict().items() if "_res_" not in name})
    ablation = kind(FAMILIES, frozenset(range(len(model.sites))))
    with torch.no_grad():
        masked = model(INPUTS.input_ids, intervention=ablation).logits
        assert (model(INPUTS.input_ids).logits - masked).abs().max() > 0.01
        torch.testing.assert_close(masked, vanilla(INPUTS.input_ids).logits, atol=1e-6, rtol=0)


@EACH_MODE
def test_what_is_kept_is_added_to_the_stream(make_model, mode):
    checked = 0
    for read in record(make(make_model, mode)):
        for family in set(read.site.families):
            ablation = KeepOnly([family], frozenset([read.site.index]))
            own = [i for i, name in enumerate(read.site.families) if name == family]
            weights = read.routing_weights[..., own]
            kept = sum(w.unsqueeze(-1) * read.sources[i] for i, w in zip(own, weights.unbind(-1), strict=True))
            if ablation.exists_at(read.site):
                expected = read.stream + kept / weights.sum(-1, keepdim=True)
                torch.testing.assert_close(ablation(read).hidden_states, expected)
                checked += 1
    assert checked > 5


@EACH_MODE
def test_a_single_source_cannot_be_masked_and_no_source_not_be_silenced(make_model, mode):
    for site in make(make_model, mode).sites:
        for known in Ablation.known.values():
            if "delta_block" in known.attnres_sources:
                assert site.num_sources or not known(FAMILIES, frozenset([site.index])).exists_at(site)
        for family in FAMILIES:
            possible = MaskRenormalise([family], frozenset([site.index])).exists_at(site)
            assert possible == (family in site.families and site.num_sources > 1)
        assert Silence(FAMILIES, frozenset([site.index])).exists_at(site) == (site.num_sources > 0)


@EACH_MODE
def test_an_intervention_does_not_move_the_stream(make_model, mode):
    """It says what is routed. A Read that is made anew, without the stream, adds all the same."""
    model = make(make_model, mode)
    with torch.no_grad():
        clean = model(INPUTS.input_ids).logits
        for change in (
            lambda read: read._replace(stream=torch.zeros_like(read.stream)),
            lambda read: Read(read.site, read.routing_weights, read.sources),
        ):
            assert torch.equal(model(INPUTS.input_ids, intervention=change).logits, clean)


def test_a_kind_of_your_own_need_not_know_of_the_stream(make_model, monkeypatch):
    """Its dose is that of what it changes, not of a stream that it would have lost."""
    monkeypatch.setattr(Ablation, "known", dict(Ablation.known))

    class Anew(Ablation):
        kind = "anew"

        def ablated(self, read: Read) -> tuple[Read, torch.Tensor]:
            return Read(read.site, read.routing_weights / 2, read.sources), everywhere(read)

    model = make(make_model)
    cells = build_grid(model.sites, Kind(Anew), ["embedding"], ["mlp"], ["all"])
    result = Engine(model, cells, ("all",)).run(INPUTS)
    read = record(model)[-1]
    half = read._replace(routing_weights=read.routing_weights / 2).hidden_states
    expected = ((half - read.hidden_states).norm(dim=-1) / read.hidden_states.norm(dim=-1)).flatten()
    dose = result.routing.dose["anew", False][read.site.index, FAMILIES.index("embedding")]
    np.testing.assert_allclose(dose, expected.numpy(), rtol=1e-4)


@pytest.fixture(scope="module", params=MODES)
def found(request, make_model) -> Effects:
    settings = ProbeSettings(
        kinds=("mask_renormalise", "keep_only", "keep_random", "silence"),
        coalitions=("all",),
        positions=("all",),
        sublayers=SUBLAYERS,
        num_resamples=50,
        mode="both",
    )
    return measure(make(make_model, request.param), INPUTS, settings)


def test_masses_sum_to_one_over_routed_sources_and_current_is_not_applicable(found):
    rows = primary_rows(found.effects)
    sums = rows.groupby(["sublayer", "scope"])["mass"].sum()
    np.testing.assert_allclose(sums, 1.0, atol=1e-6)
    assert ("self_attn", "layer:0") not in sums.index  # it routes nothing
    assert ("mlp", "layer:0") in sums.index
    current = found.effects[found.effects["family"] == "current"]
    assert len(current) > 10
    assert not current["applicable"].any()
    assert (current["mass"] == 0).all()
    assert current["effect"].isna().all()
    schedule = rows.groupby(["sublayer", "scope"])["mass_schedule"].sum()
    np.testing.assert_allclose(schedule, 1.0)  # even weights: there is no recency bias
    np.testing.assert_allclose(rows["mass_schedule"], rows["mass_uniform"])


def test_geometry_of_a_read_without_sources_is_not_a_number(found):
    first, *rest = found.geometry.to_dict("records")
    assert first["n_sources"] == 0
    assert np.isnan(first["entropy"])
    assert not any(np.isnan(row["entropy"]) for row in rest)


def test_all_families_masked_is_silence(found):
    games = found.coalitions
    games = games[(games["term"] == "value:all") & (games["metric"] == "nll")].set_index("sublayer")["effect"]
    silence = found.effects[(found.effects["kind"] == "silence") & (found.effects["metric"] == "nll")]
    silence = silence[silence["scope"] == "all"].set_index("sublayer")["effect"]
    for sublayer in SUBLAYERS:
        assert games[sublayer] == pytest.approx(silence[sublayer], abs=1e-6)


def test_the_claims_are_of_routes(found):
    sharing = content_is_shared(found.summary)
    assert sharing == (found.summary["model"]["attnres_mode"] == "block")  # alternating sums; single outputs
    effects = found.effects.assign(no_strength="")  # as of a model that has a margin
    claims = {c.claim: c for c in find_claims(effects, found.clusters, found.coalitions, None, found.summary)}
    assert "off even weights" in claims["C1"].text
    for claim in ("C2", "C4"):
        assert any("of routes: the stream" in text for text in claims[claim].details)
    untested = [text for text in claims["C4"].details if text.startswith("of routes") or "not tested whether" in text]
    assert any("sufficient or interacting" in text for text in untested) <= sharing
    assert ("sources share content" in claims["redundancy"].statements) == sharing


def test_increments_are_refused(make_model):
    with pytest.raises(ValueError, match="'increment' is for cumulative sources; this model's are delta_block"):
        measure(make(make_model), INPUTS, ProbeSettings(kinds=("increment",)))


def test_a_mask_at_one_read_changes_what_is_added_there_by_hand(make_model):
    model = make(make_model)
    reads = [read for read in record(model) if read.site.num_sources == 3]
    for read in reads:
        masked = MaskRenormalise(["older"], frozenset([read.site.index]))(read)
        w = read.routing_weights
        left = w[..., [0, 2]] / w[..., [0, 2]].sum(-1, keepdim=True)
        expected = read.stream + left[..., :1] * read.sources[0] + left[..., 1:] * read.sources[2]
        torch.testing.assert_close(masked.hidden_states, expected)
    assert len(reads) > 1


@pytest.mark.parametrize(("layers", "mode"), [(1, "block"), (3, "block"), (1, "full")])
def test_a_model_with_hardly_anything_routed_is_probed_all_the_same(make_model, layers, mode):
    """One block: no read has a choice, so that no row of a mask is applicable, and routing can still be silenced."""
    model = make(make_model, mode, num_hidden_layers=layers, attnres_num_blocks=1)
    settings = ProbeSettings(kinds=("mask_renormalise", "silence"), coalitions=("all",), num_resamples=20)
    found = measure(model, INPUTS, settings)
    rows = primary_rows(found.effects)
    assert rows["applicable"].any() == (mode == "full")
    assert primary_rows(found.effects, kind="silence")["applicable"].all()
    verdicts = find_claims(found.effects, found.clusters, found.coalitions, None, found.summary)
    assert {claim.claim for claim in verdicts} >= {"C1", "C2", "C3", "C4"}
