"""Weights beside flow: against Hugging Face's own attentions, the model's own routing, a naive patch of each edge."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from probe.analysis import stats
from probe.analysis.inference import Inference
from probe.trace import DIRECTIONS, Flips, TraceResult, plan, trace, trace_sites
from probe.trace.flow import FLOW_KINDS, flow, reading, spearman
from tests.probe.trace.test_engine import LAYERS, SEQ, each_model, flips, make, model, single  # noqa: F401 (a fixture)
from tests.probe.trace.test_planted import ASKED, CHANGED, COPIED, copies, tokens, vanilla_blank
from tests.probe.trace.test_result import recall_flips
from tests.support.naive_trace import NaiveTrace
from tests.support.planted import HEAD, OUT, TASK, look_back, move, redundant_blocks

HOW = Inference(num_resamples=200)


def naive_edges(model, pairs: Flips, masks) -> np.ndarray:  # noqa: F811
    """What `TraceResult.logits` should be of edges."""
    model.set_attn_implementation("eager")
    naive, rows = NaiveTrace(model, pairs.clean_ids, pairs.corrupted_ids), torch.arange(len(pairs))
    answers = torch.stack((pairs.answer, pairs.flipped_answer), dim=1)
    sites = trace_sites(model, ["edge"])
    found = np.zeros((2, len(sites), len(masks), len(pairs), 2))
    for (d, base), (s, site), (p, mask) in product(
        enumerate(("corrupted", "clean")), enumerate(sites), enumerate(masks)
    ):
        assert site.layer is not None
        logits = naive.edge_logits(base, site.layer, site.head, mask, pairs.position)
        found[d, s, p] = logits[rows, pairs.position].gather(1, answers).double().numpy()
    return found


@each_model
def test_every_edge_equals_a_naive_full_forward(model):  # noqa: F811
    pairs = flips()
    result = trace(model, pairs, ["edge"])
    np.testing.assert_allclose(result.logits, naive_edges(model, pairs, single(pairs)), atol=1e-5)
    assert len(result.sites) == LAYERS * (1 + model.config.num_attention_heads)
    moved = np.abs(result.margins[0] - result.corrupted) > 1e-4  # (sites, positions, sequences)
    assert moved.any((1, 2)).mean() > 0.9
    assert not moved[~result.live].any()


@pytest.mark.parametrize("name", ["vanilla", "block_sum"])
def test_edges_from_several_positions_in_a_sliding_window_equal_a_naive_full_forward(make_model, make_vanilla, name):
    fields = {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1}
    model, pairs = make(name, make_model, make_vanilla, **fields), flips(count=5)  # noqa: F811
    places = {"all": torch.ones_like(pairs.differs), "own": torch.tensor([2, 4, 1, 5, 3])}
    masks = [places["all"], torch.arange(SEQ) == places["own"][:, None]]
    result = trace(model, pairs, ["edge"], positions=places, batch_size=3)
    np.testing.assert_allclose(result.logits, naive_edges(model, pairs, masks), atol=1e-5)
    outside = np.array([site.window == 2 for site in result.sites])
    assert not result.live[outside, 1][:, [0, 2]].any()  # positions 2 and 1, asked from 6 and 6
    assert result.live[outside, 0].all()


@each_model
@pytest.mark.parametrize("settings", [{}, {"batch_size": 2}, {"tokens_per_pass": 20}])
def test_what_edges_cost_is_known_in_advance(model, settings):  # noqa: F811
    pairs = flips(count=5)
    planned, result = plan(model, pairs, ["edge"], **settings), trace(model, pairs, ["edge"], **settings)
    assert planned.forward_passes == result.forward_passes
    patches = len(result.sites) * SEQ * 2
    assert planned.forward_passes < 2 + 0.25 * patches  # one position of each sequence is run on


@each_model
@torch.no_grad()
def test_weights_are_the_models_own(model):  # noqa: F811
    """Attention as eager attention of transformers gives it, masses as the forward does."""
    pairs = flips(count=5)
    result = trace(model, pairs, [*FLOW_KINDS] if hasattr(model, "sites") else ["edge"], ["noise"], batch_size=2)
    model.set_attn_implementation("eager")
    routed = {"output_routing_weights": True} if hasattr(model, "sites") else {}
    output, rows = model(pairs.clean_ids, output_attentions=True, **routed), torch.arange(5)
    for index, site in enumerate(result.sites):
        if site.kind == "edge":
            attention = output.attentions[site.layer][rows, :, pairs.position]  # (B, heads, T)
            expected = attention.mean(1) if site.head is None else attention[:, site.head]
        else:
            expected = output.routing_weights[site.read][..., site.source]
        np.testing.assert_allclose(result.weights[index], expected.T.double(), atol=1e-6)
    assert {site.kind for site in result.sites} >= {"edge"}


@torch.no_grad()
def test_weights_of_several_positions_are_summed_for_attention_and_averaged_for_routing(make_model):
    model, pairs = make_model(num_hidden_layers=2), flips(count=2)  # noqa: F811
    some = torch.tensor([[0, 1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]]).bool()
    alone, together = (trace(model, pairs, FLOW_KINDS, ["denoise"], at) for at in (None, {"some": some}))
    for index, site in enumerate(alone.sites):
        chosen = alone.weights[index, [1, 2, 4], 0]
        expected = chosen.sum() if site.kind == "edge" else chosen.mean()
        np.testing.assert_allclose(together.weights[index, 0], [expected, 0], atol=1e-12)
    table = together.table(HOW)
    assert table["weight"].to_numpy() == pytest.approx(together.weights[:, 0].mean(-1))


def test_rank_agreement_is_scipys_with_and_without_ties():
    rng = np.random.default_rng(0)
    weight, strength = rng.random((20, 30)).round(1), rng.normal(size=(20, 30)).round(1)
    expected = [scipy_stats.spearmanr(w, abs(s)).statistic for w, s in zip(weight, strength, strict=True)]
    np.testing.assert_allclose(spearman(weight, strength), expected, atol=1e-12)
    assert np.isnan(spearman(np.ones((1, 5)), rng.random((1, 5)))).all()


@pytest.fixture(scope="module")
def traced() -> TraceResult:
    """Of a model that solves recall with depth routing."""
    pairs = recall_flips(TASK, 24)
    value = pairs.differs.int().argmax(1)
    places = {"key": value - 1, "value": value, "query": pairs.position}
    return trace(redundant_blocks().model, pairs, FLOW_KINDS, positions=places)


@pytest.mark.parametrize("kind", FLOW_KINDS)
def test_numbers_are_those_of_a_loop_over_the_table(traced, kind):
    """Cells are rows of the table; what is said of them can be found again from it."""
    found, table = flow(traced, kind, HOW), traced.table(HOW)
    assert found is not None
    own = "head" if kind == "edge" else "source"
    rows = table[(table["direction"] == "denoise") & (table["site"] == kind) & table[own].notna() & table["live"]]
    if kind == "source":
        rows = rows[rows.groupby(["read"])["source"].transform("nunique") > 1]
    assert len(rows) == len(found.cells) == len(found.rows(table))
    strength = rows["strength"].where(~rows["below_floor"], 0.0)
    np.testing.assert_allclose(found.weight, rows["weight"], atol=1e-12)
    np.testing.assert_allclose(found.strength, strength, atol=1e-12)
    assert found.agreement.value == pytest.approx(scipy_stats.spearmanr(rows["weight"], strength.abs()).statistic)
    assert found.agreement.low <= found.agreement.value <= found.agreement.high
    carries = strength.abs() >= 0.05
    assert carries.sum() > 0
    heavy = rows["weight"] >= 0.5
    assert found.heavy_cells == heavy.sum() > 0
    assert found.heavy.value == pytest.approx(carries[heavy].mean())
    heaviest = rows["weight"].sort_values(ascending=False, kind="stable").index[: carries.sum()]
    assert found.found.value == pytest.approx(carries.loc[heaviest].mean())
    told = [
        group["weight"].idxmax() == group["strength"].abs().idxmax()
        for _, group in rows.assign(strength=strength).groupby(["read", own if kind == "edge" else "position"])
        if (group["strength"].abs() >= 0.05).any()
    ]
    assert found.told.value == pytest.approx(np.mean(told))
    assert found.carrying_softmaxes == len(told)
    assert 0 < found.told_by_chance < 1


@pytest.mark.parametrize("kind", FLOW_KINDS)
def test_weights_and_strengths_are_computed_anew_in_every_resample(traced, kind):
    found, values = flow(traced, kind, HOW), []
    assert found is not None
    cells = [(traced.sites.index(site), traced.positions.index(position)) for site, position in found.cells]
    moved, gap = traced.margins[0] - traced.corrupted, traced.clean - traced.corrupted
    for times in stats.resample_weights(24, HOW.num_resamples, HOW.seed):
        drawn = np.repeat(np.arange(24), times.astype(int))
        weight = [traced.weights[s, p, drawn].mean() for s, p in cells]
        strength = [moved[s, p, drawn].mean() for s, p in cells]
        strength = np.where(np.abs(strength) <= traced.floor, 0, strength) / gap[drawn].mean()
        values.append(scipy_stats.spearmanr(weight, np.abs(strength)).statistic)
    ends = np.percentile(values, [2.5, 97.5])
    assert (found.agreement.low, found.agreement.high) == pytest.approx(ends, abs=1e-6)


def test_in_a_planted_copy_circuit_weight_is_flow_and_the_reading_is_found():
    model = vanilla_blank(num_layers=2)  # noqa: F811
    copies(model, 0, 1)
    result = trace(model, tokens(), ["edge"])
    found, read = flow(result, "edge", HOW), reading(result, HOW)
    assert found is not None
    assert read is not None
    carrying = [
        (site.layer, site.head, position) for (site, position), x in zip(found.cells, found.carries, strict=True) if x
    ]
    assert carrying == [(1, 0, COPIED)]  # what layer 0 copies does not go to the position that asks
    assert found.found.value == found.told.value == 1
    assert (read.layer, read.position, read.head) == (1, COPIED, 0)
    assert read.strength == pytest.approx(1, abs=0.1)
    assert read.largest_head.value > 0.9
    assert result.weights[0, CHANGED].mean() < 0.5


def test_a_decoy_head_of_large_weight_that_carries_nothing_is_told_apart():
    """Its weight is the largest of all, its output is never used: weight without flow."""
    model = vanilla_blank(num_layers=2)  # noqa: F811
    copies(model, 0, 1)
    without = flow(trace(model, tokens(), ["edge"]), "edge", HOW)
    look_back(model, 1, 1, ASKED - COPIED - 1)
    model.model.layers[1].self_attn.q_proj.weight[HEAD : 2 * HEAD] *= 3  # norms make of it what they do of the first
    result = trace(model, tokens(), ["edge"])
    decoy = flow(result, "edge", HOW)
    assert without is not None
    assert decoy is not None
    at = {(site.layer, site.head, position): i for i, (site, position) in enumerate(decoy.cells)}
    false, true = at[1, 1, COPIED + 1], at[1, 0, COPIED]
    assert decoy.weight[false] > 0.9
    assert decoy.strength[false] == 0
    assert decoy.strength[true] > 0.9
    assert decoy.agreement.value < without.agreement.value
    move(model, 1, 1, slice(0, 1), slice(OUT.stop, OUT.stop + 1), 0.0)
    assert flow(trace(model, tokens(), ["edge"]), "edge", HOW).strength[false] == 0  # type: ignore[union-attr]


def test_without_shares_or_cells_there_is_no_flow(make_model):
    result = trace(make_model(), flips(count=8), FLOW_KINDS)
    assert result.no_strength(HOW)
    assert flow(result, "edge", HOW) is None
    assert reading(result, HOW) is None
    model = vanilla_blank(num_layers=1)  # noqa: F811
    copies(model, 0, 0)
    edges_only = trace(model, tokens(), ["stream"])
    assert flow(edges_only, "edge", HOW) is None
    assert reading(edges_only, HOW) is None


@pytest.mark.parametrize(
    ("kind", "directions", "message"),
    [
        ("stream", DIRECTIONS, "a stream has no weight: weights are of edge and source sites"),
        ("edge", ["noise"], "flow is what denoising brings back: trace with the direction denoise"),
    ],
)
def test_bad_input_is_one_line(make_model, kind, directions, message):
    result = trace(make_model(num_hidden_layers=2), flips(), ["edge"], directions)
    with pytest.raises(ValueError, match=f"^{message}$") as error:
        flow(result, kind)
    assert "\n" not in str(error.value)
