"""The trace against a naive full forward per patch (tests/support/naive_trace.py), and what must hold by theory."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from attnres import wrap_qwen3
from probe.trace import DIRECTIONS, Flips, TraceResult, engine, plan, stack, trace, trace_sites
from probe.trace import passes as passes_module
from tests.support.naive_trace import NaiveTrace

MODELS = ("vanilla", "wrapped", "cumulative", "block_sum", "delta_block", "cumulative full", "block_sum full")
MODELS += ("delta_block full",)
LAYERS, SEQ = 3, 7


def make(name: str, make_model, make_vanilla, **fields):
    shape = {"num_hidden_layers": LAYERS} | fields
    num_blocks = min(2, shape["num_hidden_layers"])
    if name in ("vanilla", "wrapped"):
        vanilla = make_vanilla(**shape)
        return wrap_qwen3(vanilla, num_blocks=num_blocks, recency_bias=1.0) if name == "wrapped" else vanilla
    source, mode = (*name.split(), "block")[:2]
    return make_model(attnres_source=source, attnres_mode=mode, attnres_num_blocks=num_blocks, **shape)


@pytest.fixture
def model(request, make_model, make_vanilla):
    return make(request.param, make_model, make_vanilla)


each_model = pytest.mark.parametrize("model", MODELS, indirect=True)


def flips(count: int = 3, seq: int = SEQ, seed: int = 0) -> Flips:
    """Random tokens, of which one or two are changed; the answer is asked for at different positions."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, 38, (count, seq), generator=generator)
    position = torch.tensor([seq - 1 - i % 2 for i in range(count)])
    corrupted = clean.clone()
    for row in range(count):
        for changed in (row % (seq - 2), (row + 2) % (seq - 2))[: 1 + row % 2]:
            corrupted[row, changed] = (clean[row, changed] + 1 + row) % 40
    return Flips(clean, corrupted, position, torch.arange(count), torch.arange(count) + 20)


def naive_logits(model, pairs: Flips, masks, with_aliases: bool = False) -> np.ndarray:
    """What `TraceResult.logits` should be."""
    naive, rows = NaiveTrace(model, pairs.clean_ids, pairs.corrupted_ids), torch.arange(len(pairs))
    answers = torch.stack((pairs.answer, pairs.flipped_answer), dim=1)
    sites = trace_sites(model)
    found = np.zeros((2, len(sites), len(masks), len(pairs), 2))
    for (d, base), (s, site), (p, mask) in product(
        enumerate(("corrupted", "clean")), enumerate(sites), enumerate(masks)
    ):
        twins = model.sites[site.read].aliased_sources if with_aliases and site.aliased else ()
        logits = naive.logits(base, site.kind, site.read, mask, site.source, twins)
        found[d, s, p] = logits[rows, pairs.position].gather(1, answers).double().numpy()
    return found


def single(pairs: Flips) -> list[torch.Tensor]:
    return [torch.arange(pairs.clean_ids.shape[1]).expand(len(pairs), -1) == p for p in range(SEQ)]


@each_model
def test_every_site_equals_a_naive_full_forward(model):
    pairs = flips()
    result = trace(model, pairs)
    np.testing.assert_allclose(result.logits, naive_logits(model, pairs, single(pairs)), atol=1e-5)
    kinds = {site.kind for site in result.sites}
    assert kinds == {"stream", "output", "input"} | ({"source"} if hasattr(model, "sites") else set())
    moved = np.abs(result.margins[0] - result.corrupted) > 1e-4  # (sites, positions, sequences)
    assert moved.any((1, 2)).mean() > 0.85  # the embedding of a late read hardly ever


@each_model
def test_positions_that_are_patched_together_equal_a_naive_full_forward(model):
    pairs = flips()
    span = torch.zeros((3, SEQ), dtype=torch.bool)
    span[:, 1:4] = True
    some = torch.rand((3, SEQ), generator=torch.Generator().manual_seed(1)) < 0.5
    places = {"span": span, "some": some, "own": torch.tensor([2, 4, 1]), "third": 3}
    masks = [span, some, torch.arange(SEQ) == places["own"][:, None], single(pairs)[3]]
    result = trace(model, pairs, positions=places)
    np.testing.assert_allclose(result.logits, naive_logits(model, pairs, masks), atol=1e-5)
    assert result.positions == ("span", "some", "own", "third")


@pytest.mark.parametrize("model", ["cumulative", "cumulative full", "wrapped"], indirect=True)
def test_a_source_with_its_alias_equals_a_naive_full_forward(model):
    pairs = flips()
    result = trace(model, pairs, with_aliases=True)
    np.testing.assert_allclose(result.logits, naive_logits(model, pairs, single(pairs), True), atol=1e-5)
    alone = trace(model, pairs)
    aliased = [site.aliased for site in result.sites]
    assert np.abs(result.logits - alone.logits)[:, aliased].max() > 1e-4
    assert np.array_equal(result.logits[:, np.invert(aliased)], alone.logits[:, np.invert(aliased)])


@pytest.mark.parametrize("name", ["vanilla", "block_sum"])
def test_sliding_attention_equals_a_naive_full_forward(make_model, make_vanilla, name):
    fields = {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1}
    model, pairs = make(name, make_model, make_vanilla, **fields), flips()
    assert "sliding_attention" in model.config.layer_types
    np.testing.assert_allclose(trace(model, pairs).logits, naive_logits(model, pairs, single(pairs)), atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree_with_the_naive_loop(make_model, make_vanilla, implementation):
    model, pairs = make("cumulative", make_model, make_vanilla), flips()
    model.set_attn_implementation(implementation)
    np.testing.assert_allclose(trace(model, pairs).logits, naive_logits(model, pairs, single(pairs)), atol=1e-5)


@each_model
def test_patching_everything_gives_the_other_run_and_nothing_the_same_one_bit_for_bit(model):
    pairs = flips()
    everything = torch.ones_like(pairs.differs)
    nothing = torch.zeros_like(everything)
    result = trace(model, pairs, positions={"everything": everything, "nothing": nothing})
    stream = next(i for i, site in enumerate(result.sites) if site.kind == "stream")
    base = np.stack((result.corrupted_logits, result.clean_logits))
    assert np.array_equal(result.logits[:, stream, 0], base[::-1])
    for index in range(len(result.sites)):
        assert np.array_equal(result.logits[:, index, 1], base)
    assert np.array_equal(result.normalised[:, stream, 0], np.stack((np.ones(3), np.zeros(3))))


@each_model
def test_a_run_in_which_everything_is_patched_is_run_to_the_same_bits(model, monkeypatch):
    """The same without the knowledge that nothing of the patched run is left: it is computed."""
    monkeypatch.setattr(passes_module, "is_cut", lambda *_, **__: False)
    pairs = flips(count=4)
    corrupted = pairs.clean_ids.clone()
    corrupted[:, 0] = (corrupted[:, 0] + 1) % 40  # nothing comes before: the passes have the shape of the kept runs
    pairs = replace(pairs, corrupted_ids=corrupted, position=torch.full((4,), SEQ - 1))
    for direction, other in zip(DIRECTIONS, ("clean_logits", "corrupted_logits"), strict=True):
        result = trace(model, pairs, ["stream"], [direction], {"all": torch.ones_like(pairs.differs)})
        assert result.forward_passes > 2.5
        assert np.array_equal(result.logits[0, 0, 0], getattr(result, other))


@each_model
def test_the_kept_runs_are_the_models_own_bit_for_bit(model):
    pairs = flips(count=4)
    cut = pairs.cut()
    result = trace(model, pairs, ["stream"], positions=[0])
    answers = torch.stack((pairs.answer, pairs.flipped_answer), 1)
    with torch.no_grad():
        for ids, found in ((cut.clean_ids, result.clean_logits), (cut.corrupted_ids, result.corrupted_logits)):
            hidden = model.model(ids, use_cache=False).last_hidden_state[torch.arange(4), pairs.position]
            assert np.array_equal(found, model.lm_head(hidden).gather(1, answers).numpy())


@each_model
def test_all_sources_of_a_read_are_its_input(model):
    """Where a read has one source, as the first of block sums does, patching it is patching what the read hands on.

    An additive read hands on the stream, too.
    """
    result = trace(model, flips())
    for index, site in enumerate(result.sites):
        read = model.sites[site.read] if site.kind == "source" else None
        if read is not None and read.num_sources == 1 and not read.is_additive:
            (same,) = [i for i, s in enumerate(result.sites) if s.kind == "input" and s.read == site.read]
            np.testing.assert_allclose(result.logits[:, index], result.logits[:, same], atol=1e-5)


@each_model
@pytest.mark.parametrize("settings", [{}, {"batch_size": 2}, {"tokens_per_pass": 20}, {"positions": [1, 3]}])
def test_what_a_trace_costs_is_known_in_advance(model, settings):
    pairs = flips(count=5)
    planned, seen = plan(model, pairs, **settings), []
    result = trace(model, pairs, on_progress=lambda done, total: seen.append((done, total)), **settings)
    assert planned.forward_passes == result.forward_passes
    assert seen[-1] == (planned.passes, planned.passes)
    patches = len(result.sites) * len(result.positions) * 2
    assert planned.naive == 2 + patches
    assert planned.forward_passes < 2 + 0.4 * patches


@each_model
def test_nothing_before_the_patched_site_is_run_again(model, monkeypatch):
    begun, ran = [], []
    patch, sublayer = engine._Batch.patch, stack.Stack.sublayer

    def recorded_patch(self, rows):
        begun.append((rows.kind, rows.read, rows.span[0]))
        patch(self, rows)

    def recorded_sublayer(self, index, hidden, attention=None, cache=None):
        if begun:
            ran.append((*begun[-1], index, cache.length if cache is not None and index % 2 == 0 else None))
        return sublayer(self, index, hidden, attention, cache)

    monkeypatch.setattr(engine._Batch, "patch", recorded_patch)
    monkeypatch.setattr(stack.Stack, "sublayer", recorded_sublayer)
    trace(model, flips(count=1, seed=3))
    assert len(begun) > 15
    for kind, read, first, index, before in ran:
        assert index >= read + (kind == "output")
        assert before in (first, None)


def test_a_plan_needs_no_weights(make_model):
    model, pairs = make_model(), flips()
    planned = plan(model, pairs, tokens_per_pass=64)
    assert plan(make_model().to("meta"), pairs, tokens_per_pass=64) == planned


@pytest.mark.parametrize("model", ["vanilla", "cumulative", "block_sum"], indirect=True)
def test_no_number_depends_on_how_the_work_is_split(model):
    pairs = flips(count=5)
    whole = trace(model, pairs)
    for settings in ({"batch_size": 2}, {"tokens_per_pass": 20}):
        np.testing.assert_allclose(trace(model, pairs, **settings).logits, whole.logits, atol=1e-5)


@each_model
def test_a_chosen_kind_and_direction_are_rows_of_the_whole_trace(model):
    pairs = flips()
    whole = trace(model, pairs)
    part = trace(model, pairs, ["output"], ["noise"], [4, 2])
    rows = [i for i, site in enumerate(whole.sites) if site.kind == "output"]
    assert part.sites == tuple(whole.sites[i] for i in rows)
    np.testing.assert_allclose(part.logits[0], whole.logits[1, rows][:, [4, 2]], atol=1e-5)


def test_the_two_directions_are_one_with_the_runs_exchanged(make_model):
    pairs, model = flips(), make_model(num_hidden_layers=LAYERS)
    turned = replace(pairs, clean_ids=pairs.corrupted_ids, corrupted_ids=pairs.clean_ids)
    found, other = trace(model, pairs), trace(model, turned)
    np.testing.assert_allclose(found.logits, other.logits[::-1], atol=1e-5)


def test_tokens_after_the_answer_change_nothing(make_model):
    pairs, model = flips(), make_model(num_hidden_layers=LAYERS)
    padded = [torch.cat((ids, ids[:, :2]), dim=1) for ids in (pairs.clean_ids, pairs.corrupted_ids)]
    longer = replace(pairs, clean_ids=padded[0], corrupted_ids=padded[1])
    assert np.array_equal(trace(model, pairs).logits, trace(model, longer).logits)


def test_a_float64_model_is_traced_in_float64(make_model):
    model, pairs = make_model(num_hidden_layers=LAYERS).double(), flips()
    result: TraceResult = trace(model, pairs)
    assert result.logits.dtype == np.float64
    np.testing.assert_allclose(result.logits, naive_logits(model, pairs, single(pairs)), atol=1e-12)


def test_a_model_in_bfloat16_is_traced_as_the_naive_loop_does(make_model):
    model, pairs = make_model(num_hidden_layers=2).bfloat16(), flips()
    result = trace(model, pairs)
    expected = naive_logits(model, pairs, single(pairs))
    assert np.abs(result.logits - expected).mean() < 0.01 * np.abs(expected).mean()
    assert result.floor > 1e-2


@pytest.mark.parametrize("seq", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_one_layer_and_a_token_or_two_equal_a_naive_full_forward(make_model, make_vanilla, name, seq):
    model = make(name, make_model, make_vanilla, num_hidden_layers=1)
    clean = torch.tensor([[1, 2], [3, 4]])[:, :seq]
    pairs = Flips(clean, clean + 5, seq - 1, 1, 2)
    masks = single(pairs)[:seq]
    np.testing.assert_allclose(trace(model, pairs).logits, naive_logits(model, pairs, masks), atol=1e-5)
