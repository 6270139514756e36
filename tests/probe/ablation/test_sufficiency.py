"""What keeping does to a read, to a model, and to the rows of a table."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from attnres import FAMILIES, Read, wrap_qwen3
from attnres.tasks import MQAR
from probe.ablation.engine import Engine
from probe.ablation.grid import Kind, build_grid
from probe.ablation.interventions import Ablation, Coalition, Context, KeepOnly, KeepRandom, Rescue, Silence
from probe.examples.examples import Examples
from probe.runner import grid, measure
from probe.settings import ProbeSettings
from tests.conftest import MODES, SOURCES, randomize_
from tests.support import planted

INPUTS = Examples.from_batch(MQAR(num_pairs=4, vocab_size=40).batch("probe", range(6)))
SHAPES = [(source, mode) for source in SOURCES for mode in MODES]
KINDS = (KeepOnly, KeepRandom, Silence, Rescue)


def record(model) -> list[Read]:
    reads: list[Read] = []
    with torch.no_grad():
        model(INPUTS.input_ids, intervention=lambda read: reads.append(read) or read)
    return reads


def draws(reads: list[Read], seed: int = 0) -> Context:
    generator = torch.Generator().manual_seed(seed)
    batch, seq = reads[0].routing_weights.shape[:2]
    priorities = torch.rand(batch, 1, len(reads), max(r.site.num_sources for r in reads), generator=generator)
    return Context(priorities=priorities.expand(-1, seq, -1, -1))


def hidden(read: Read) -> torch.Tensor:
    return sum(w.unsqueeze(-1) * v for w, v in zip(read.routing_weights.unbind(-1), read.sources, strict=True))


def run(model, cells, positions=("all",)):
    return Engine(model, cells, positions, seed=1).run(INPUTS)


@pytest.mark.parametrize(("source", "mode"), SHAPES)
def test_what_is_kept_sums_to_one_and_nothing_else_is_left(make_model, source, mode):
    reads, checked = record(make_model(attnres_source=source, attnres_mode=mode)), 0
    for read in reads:
        twins = read.site.aliased_sources
        for family in FAMILIES:
            ablation = KeepOnly([family], frozenset([read.site.index]))
            own = [i for i, name in enumerate(read.site.families) if name == family]
            kept = sorted({*own, *(twins if set(own) & set(twins) else ())})
            new, old = ablation(read), read.routing_weights
            if not kept or len(kept) == read.site.num_sources:
                assert new is read
                assert not ablation.exists_at(read.site)
                continue
            others = [i for i in range(read.site.num_sources) if i not in kept]
            assert (new.routing_weights[..., others] == 0).all()
            torch.testing.assert_close(new.routing_weights.sum(-1), torch.ones_like(old[..., 0]))
            torch.testing.assert_close(
                new.routing_weights[..., kept], old[..., kept] / old[..., kept].sum(-1, keepdim=True)
            )
            checked += 1
    assert checked > 5


def test_keeping_everything_is_the_identity(make_model):
    for source, mode in SHAPES:
        model = make_model(attnres_source=source, attnres_mode=mode)
        clean = model(INPUTS.input_ids).logits
        for kind in (KeepOnly, KeepRandom):
            everywhere = kind(FAMILIES, frozenset(range(len(model.sites))))
            assert torch.equal(model(INPUTS.input_ids, intervention=everywhere).logits, clean)


def test_keeping_the_only_source_is_not_applicable(make_model):
    """Layer 0's attention reads the embedding alone (block_sum), or as `current`, too (cumulative)."""
    for source in ("block_sum", "cumulative"):
        model = make_model(attnres_source=source)
        for kind in (KeepOnly, KeepRandom):
            cells = build_grid(model.sites, Kind(kind), sublayers=["self_attn"], scopes=["layer:0"])
            assert not run(model, cells).effects


def test_twins_are_one_source(make_model):
    """Keeping the newest block where it is the running stream keeps the running stream, and the other way round."""
    reads = [read for read in record(make_model(num_hidden_layers=6, attnres_num_blocks=3)) if read.site.layer_idx]
    twins = [read for read in reads if read.site.current_is_alias]
    assert len(twins) == 2
    for read in twins:
        kept = [KeepOnly([f], frozenset([read.site.index])) for f in ("prev_completed", "current")]
        assert torch.equal(kept[0](read).routing_weights, kept[1](read).routing_weights)
        torch.testing.assert_close(hidden(kept[0](read)), read.sources[-1])
        assert kept[0].is_aliased(read.site)
        assert not KeepOnly(["older"], frozenset()).is_aliased(read.site)
        random = KeepRandom(["current"], frozenset([read.site.index]), context=draws(reads))(read).routing_weights
        assert (random[..., -2:] == 0).all()  # another set of one, never the twins
        other = KeepRandom(["embedding"], frozenset([read.site.index]), context=draws(reads))(read).routing_weights
        both = (other[..., -1] > 0) == (other[..., -2] > 0)
        assert both.all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_set_has_the_familys_size_is_never_its_own_and_any_other(make_model, family):
    reads = record(make_model(attnres_source="block_sum", num_hidden_layers=5, attnres_num_blocks=5))
    read = reads[-2]  # the MLP of the last layer: embedding, four blocks, current
    own = [name == family for name in read.site.families]
    seen = set()
    for seed in range(60):
        random = KeepRandom([family], frozenset([read.site.index]), context=draws(reads, seed))
        new = random(read)
        kept = new.routing_weights > 0
        assert (kept.sum(-1) == sum(own)).all()
        assert (kept == kept[:, :1]).all()  # one draw for each sequence
        torch.testing.assert_close(new.routing_weights.sum(-1), torch.ones_like(read.routing_weights[..., 0]))
        seen |= {tuple(row) for row in kept[:, 0].tolist()}
    assert tuple(own) not in seen
    assert len(seen) == (19 if family == "older" else 5)  # 20 sets of three of six, 6 of one


@pytest.mark.parametrize("gap", [69.0, 500.0])
def test_a_family_is_kept_whole_however_light_it_is(make_model, gap):
    """A weight of 1e-30, and one that float32 cannot hold."""
    reads = record(make_model(num_hidden_layers=5, attnres_num_blocks=5))
    read = reads[-1]  # embedding, three older, prev_completed, current
    logits = read.logits - gap * torch.tensor([name != "current" for name in read.site.families])
    light = read._replace(routing_weights=logits.softmax(-1), logits=logits)
    assert light.routing_weights[..., 0].max() < 1e-25
    here = frozenset([read.site.index])
    assert torch.equal(hidden(KeepOnly(["embedding"], here)(light)), read.sources[0])
    older = [name == "older" for name in read.site.families]
    expected = read.logits.double()[..., older].softmax(-1).float()
    torch.testing.assert_close(KeepOnly(["older"], here)(light).routing_weights[..., older], expected)
    assert torch.equal(hidden(KeepOnly(["embedding"], here)(light._replace(logits=None))), read.sources[0])


def test_in_a_model_whose_recency_bias_leaves_nothing_for_others(make_model):
    """Through the engine: weights that float32 cannot hold, and the effects that they have in float64, which can."""
    model = make_model(num_hidden_layers=5, attnres_num_blocks=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_res_bias"):
                parameter.fill_(200.0)
    assert record(model)[-1].routing_weights[..., :-1].max() == 0
    kinds = (KeepOnly, KeepRandom, Rescue)
    cells = [cell for kind in kinds for cell in build_grid(model.sites, Kind(kind), scopes=["late", "all"])]
    single, double = run(model, cells), run(copy.deepcopy(model).double(), cells)
    assert len(single.effects) == len(double.effects) == 3 * 2 * 3 * len(FAMILIES)
    for key, effects in single.effects.items():
        np.testing.assert_allclose(effects["nll"], double.effects[key]["nll"], atol=1e-4)
    older = [i for i, cell in enumerate(cells) if cell.route.family == "older"]
    assert all(np.abs(single.effects[i, "all"]["nll"]).max() > 0.01 for i in older)


def test_keeping_current_everywhere_is_the_vanilla_model(make_vanilla):
    """Content shared: with cumulative sources that is no evidence of a route."""
    vanilla = make_vanilla()
    model = wrap_qwen3(vanilla, num_blocks=2)
    randomize_(model.model.layers)  # norms, too: those of the vanilla model again
    state = {name: value for name, value in vanilla.state_dict().items() if "norm" in name}
    model.load_state_dict(state, strict=False)
    keep = KeepOnly(["current"], frozenset(range(len(model.sites))))
    with torch.no_grad():
        expected = vanilla(INPUTS.input_ids).logits
        assert (model(INPUTS.input_ids).logits - expected).abs().max() > 0.01
        torch.testing.assert_close(model(INPUTS.input_ids, intervention=keep).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("source", "mode"), SHAPES)
def test_rescue_acts_on_all_reads_of_its_sublayer_and_gives_one_family_back_in_its_scope(make_model, source, mode):
    model = make_model(attnres_source=source, attnres_mode=mode)
    reads = record(model)
    for cell in build_grid(model.sites, Kind(Rescue), scopes=["early", "late", "all"]):
        ablation = cell.ablation()
        wanted = ("self_attn", "mlp") if cell.route.sublayer == "both" else (cell.route.sublayer,)
        for read in reads:
            new = ablation(read)
            keep = KeepOnly(cell.families, frozenset([read.site.index]))
            if read.site.sublayer not in wanted:
                assert new is read
            elif read.site.index not in cell.reads or not any(keep.chosen(read.site)):
                assert (new.routing_weights == 0).all()
            else:  # also where nothing else is there, which `keep_only` leaves as it is
                torch.testing.assert_close(new.routing_weights, keep(read).routing_weights)


def test_a_first_layer_given_its_only_family_is_the_clean_one(make_model):
    """One layer: its attention reads the embedding and nothing else, so that all of the loss comes back."""
    for source in ("cumulative", "block_sum"):
        model = make_model(attnres_source=source, num_hidden_layers=1, attnres_num_blocks=1)
        cells = build_grid(model.sites, Kind(Rescue), ["embedding"], ["self_attn"], ["all"])
        silence = build_grid(model.sites, Kind(Silence), ["all"], ["self_attn"], ["all"])
        result = run(model, (*cells, *silence))
        np.testing.assert_allclose(result.effects[0, "all"]["nll"], 0, atol=1e-5)
        assert np.abs(result.effects[1, "all"]["nll"]).max() > 1e-3


def test_in_the_final_read_rescue_is_keep_only(make_model):
    model = make_model(attnres_source="block_sum")
    cells = [build_grid(model.sites, Kind(kind), scopes=["final"]) for kind in (Rescue, KeepOnly)]
    result = run(model, (*cells[0], *cells[1]))
    assert len(result.effects) == 6  # a final read has no current
    for index in range(len(FAMILIES)):
        if (index, "all") in result.effects:
            rescued, kept = (result.effects[i, "all"] for i in (index, index + len(FAMILIES)))
            np.testing.assert_allclose(rescued["nll"], kept["nll"], atol=1e-6)


def test_silence_is_masking_all_families(make_model):
    model = make_model()
    silence = build_grid(model.sites, Kind(Silence), ["all"])
    masked = [replace(cell, kind=Kind(Coalition)) for cell in silence]
    result = run(model, (*silence, *masked), ("all", "query"))
    for (index, positions), effects in result.effects.items():
        twin = (index + len(silence)) % (2 * len(silence))
        for metric, values in effects.items():
            np.testing.assert_allclose(values, result.effects[twin, positions][metric], atol=1e-5)
    assert len(result.effects) == 4 * len(silence)


def test_rescue_comes_with_its_baseline(make_model):
    model = make_model(attnres_source="block_sum")
    settings = ProbeSettings(kinds=("rescue",), scopes=("early", "layer:3", "final"), sublayers=("mlp", "both"))
    cells = grid(model, settings)
    found = [(c.route.key, c.reads) for c in cells if c.intervention is Silence]
    mlps = tuple(range(1, 8, 2))
    assert sorted(found) == [
        (("both", "all", "all"), tuple(range(8))),
        (("final", "final", "all"), (8,)),
        (("mlp", "all", "all"), mlps),
    ]
    asked = grid(model, replace(settings, kinds=("silence", "rescue"), scopes=("all", "early")))
    assert len(asked) == len(set(asked))  # none twice
    assert not [c for c in grid(model, replace(settings, kinds=("keep_only",))) if c.intervention is Silence]


def test_rows_are_of_the_reads_of_the_route(make_model):
    """Masses, doses and counts of a rescue are of the reads at which the family comes back, not of those silenced."""
    model = make_model(num_hidden_layers=6, attnres_num_blocks=3)
    settings = ProbeSettings(
        kinds=("keep_only", "rescue"),
        scopes=("early", "late"),
        sublayers=("mlp",),
        positions=("all",),
        num_resamples=20,
    )
    found = measure(model, INPUTS, settings)
    rows = found.effects[found.effects["metric"] == "nll"].set_index(["kind", "scope", "family"]).sort_index()
    for scope in ("early", "late"):
        for family in FAMILIES:
            keep, rescue = rows.loc["keep_only", scope, family], rows.loc["rescue", scope, family]
            for name in ("mass", "mass_applicable", "aliased_mass", "applicable", "n_reads", "n_unaliased_reads"):
                assert keep[name] == rescue[name] or (np.isnan(keep[name]) and np.isnan(rescue[name]))
            if keep["applicable"]:
                assert keep["dose"] == pytest.approx(rescue["dose"])
                assert keep["effect"] != pytest.approx(rescue["effect"])
    assert not rows.loc["rescue", "early", "older"]["applicable"]  # nothing to give back: that would be silence
    silence = rows.loc["silence", "all", "all"]
    assert silence["dose"] == pytest.approx(1)
    assert silence["mass"] == pytest.approx(1)
    assert silence["n_reads"] == 6
    early = next(c for c in grid(model, settings) if c.route.key == ("mlp", "early", "prev_completed"))
    assert early.reads_without(model.sites) == early.reads  # the first block is not complete yet
    late = next(c for c in grid(model, settings) if c.route.key == ("mlp", "late", "prev_completed"))
    assert late.reads_without(model.sites) == ()


@pytest.mark.parametrize("kind", KINDS)
def test_none_has_a_integrated_estimate(make_model, kind):
    settings = ProbeSettings(kinds=("mask_renormalise", kind.kind), mode="integrated", scopes=("all",))
    with pytest.raises(ValueError, match=f"kind '{kind.kind}' has no estimate.*choose mode exact or both"):
        grid(make_model(), settings)
    names = {cell.kind.name for cell in grid(make_model(), replace(settings, mode="both"))}
    exact = {"mask_renormalise", kind.kind, *(["silence"] if kind is Rescue else [])}
    assert names == {*exact, "mask_renormalise_integrated"}


def test_they_are_known_by_name():
    assert {kind.kind for kind in KINDS} <= Ablation.known.keys()
    assert ProbeSettings(kinds=("keep_only", "keep_random", "silence", "rescue")).kinds[3] == "rescue"
    assert ProbeSettings().kinds == ("mask_renormalise",)


def harms(found: planted.Planted, kind: type[Ablation], sublayer: str) -> dict[tuple[str, str], float]:
    """Mean fall of the logit difference by (scope, family), as a share of the clean one."""
    inputs = Examples.from_batch(found.task.batch("train", range(16)))
    scopes = ("early", "middle", "late", "all")
    cells = build_grid(found.model.sites, Kind(kind), kind.labels, [sublayer], scopes)
    result = Engine(found.model, cells, ("all",)).run(inputs)
    clean = result.clean["logit_diff"].sum()
    keys = {index: (cell.route.scope, cell.route.family) for index, cell in enumerate(cells)}
    return {keys[index]: -effects["logit_diff"].sum() / clean for (index, _), effects in result.effects.items()}


def test_of_two_routes_that_stand_in_for_each_other_each_suffices():
    """Masks find neither (tests/probe/analysis/test_planted.py)."""
    found = planted.redundant_pair()
    kept, random = (harms(found, kind, "self_attn") for kind in (KeepOnly, KeepRandom))
    for family in ("current", "prev_completed"):
        assert kept["late", family] < 0.05
        assert random["late", family] > 0.25  # the draw is the other one now and then
    for family in ("embedding", "older"):
        assert kept["late", family] > 0.5


def test_a_family_with_mass_and_no_role_does_not_suffice():
    kept = harms(planted.mass_without_role(), KeepOnly, "self_attn")
    assert kept["late", "older"] < 0.05
    assert kept["late", "prev_completed"] > 0.5


def test_a_planted_route_gives_back_what_its_sublayer_was_worth():
    found = planted.embedding_to_early_mlp()
    silence, rescued = (harms(found, kind, "mlp") for kind in (Silence, Rescue))
    worth = silence["all", "all"]
    assert worth > 0.5
    recovered = {key: 1 - harm / worth for key, harm in rescued.items()}
    assert recovered.pop(("early", "embedding")) == pytest.approx(1, abs=0.05)
    assert recovered.pop(("all", "embedding")) == pytest.approx(1, abs=0.05)
    assert max(recovered.values()) < 0.3
