"""Reading tables whose answer is planted: dissociation, motifs, equivalence."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from probe.analysis import effects as results
from probe.analysis.motifs import Reader
from probe.vocabulary import ALL, FAMILIES, REGIONS, SUBLAYERS, Route, equivalent_within, matters_from

K, SEQUENCES, QUERIES = 16, 64, 16
MATTERS, MARGIN = matters_from(K), equivalent_within(K)
MASS = {"embedding": 0.2, "current": 0.5, "prev_completed": 0.2, "older": 0.1}
PRIMARY = {"kind": "mask_renormalise", "positions": "all", "with_aliases": False, "metric": "nll"}


def read(harm: dict[tuple[str, str, str], float], spread: float = 0.001, mass=MASS, **change) -> Reader:
    """Both sublayers, all scopes; mean `harm` per query by (sublayer, scope, family), zero where it says nothing."""
    rng = np.random.default_rng(0)
    routes = [Route(s, scope, f) for s in SUBLAYERS for scope in (*REGIONS, ALL) for f in FAMILIES]
    noise = spread * rng.normal(size=(SEQUENCES, len(routes)))
    noise -= noise.mean(0)
    sums = QUERIES * (np.array([harm.get(route.key, 0.0) for route in routes]) + noise)
    effects = pd.DataFrame(routes).assign(**{**PRIMARY, **change})
    effects["mass"] = effects["family"].map(mass)
    effects["applicable"] = (effects["scope"] != "early") | (effects["family"] != "older")
    same = {"aliased_mass": 0.1, "mass_uniform": 0.25, "mass_schedule": 0.25, "dose": 1.0, "task_learned": True}
    effects = effects.assign(**same, n_reads=2, n_unaliased_reads=1)
    effects = pd.concat([effects, results.effect_statistics(sums, np.full(SEQUENCES, QUERIES), "nll", K)], axis=1)
    clusters = effects[[*PRIMARY, "sublayer", "scope", "family", "mass"]].loc[effects.index.repeat(SEQUENCES)]
    clusters = clusters.assign(
        sequence=np.tile(np.arange(SEQUENCES), len(routes)), n_queries=QUERIES, summed_effect=sums.T.flatten()
    )
    return Reader(effects, clusters, K)


def test_mass_and_effect_part_ways():
    found = read({("mlp", "all", "embedding"): 1.0, ("self_attn", "all", "current"): 1.0}).dissociation()
    assert found["mlp"]["heaviest"] == "current"
    assert found["mlp"]["most_harmful"] == "embedding"
    assert found["mlp"]["dissociated"] is True
    assert found["mlp"]["p_heaviest_is_most_harmful"] == 0
    assert found["self_attn"]["dissociated"] is False
    assert found["self_attn"]["p_heaviest_is_most_harmful"] == 1


def test_a_close_race_is_said_to_be_one():
    harm = {("mlp", "all", "embedding"): 1.0, ("mlp", "all", "current"): 1.0}
    found = read(harm, spread=1.0).dissociation()
    assert 0.1 < found["mlp"]["p_heaviest_is_most_harmful"] < 0.9


@pytest.mark.parametrize(("effect", "spread"), [(0.9 * MATTERS, 0.01), (2 * MATTERS, 20 * MATTERS)])
def test_no_verdict_on_effects_that_do_not_matter(effect, spread):
    """Too small, or not told from zero."""
    assert read({("mlp", "all", "embedding"): effect}, spread).dissociation()["mlp"]["dissociated"] is None


def test_mass_without_role_needs_mass_and_equivalence():
    heavy = {**MASS, "older": 0.04}
    found = read({("mlp", "all", "embedding"): 2 * MARGIN}, spread=MARGIN, mass=heavy).dissociation()
    idle = {sublayer: {entry["family"] for entry in found[sublayer]["mass_without_role"]} for sublayer in found}
    assert idle == {"mlp": {"current", "prev_completed"}, "self_attn": {"embedding", "current", "prev_completed"}}
    assert found["mlp"]["mass_without_role"][0]["aliased_mass"] == 0.1
    vague = read({}, spread=50 * MARGIN).dissociation()  # not significant, yet far from shown to be nothing
    assert all(entry["mass_without_role"] == [] for entry in vague.values())


def test_a_localised_role_is_named_where_it_is():
    harm = {
        ("self_attn", "late", "older"): 1.0,
        ("self_attn", "middle", "older"): 0.4,
        ("mlp", "early", "embedding"): 0.5,
    }
    found = {Route.of(motif): motif for motif in read(harm).motifs()}
    older = Route("self_attn", "late", "older")
    assert set(found) == {older, Route("mlp", "early", "embedding")}
    assert found[older]["per_read"] == pytest.approx(0.5)
    assert found[older]["p_larger_than_elsewhere"] < 0.01
    assert not any(m["only_region"] for m in found.values())


def test_what_does_not_matter_is_no_motif():
    assert read({("mlp", "late", "current"): 1.9 * MATTERS}).motifs() == []  # two reads: 0.95 each
    assert read({("mlp", "late", "current"): 1.0}, spread=10.0).motifs() == []
    assert read({("mlp", "late", "current"): -1.0}).motifs() == []  # masking helps: no harm
    assert read({}).motifs() == []


def test_what_is_everywhere_is_not_localised():
    everywhere = {("mlp", region, "current"): 1.0 for region in REGIONS}
    assert read(everywhere, spread=0.5).motifs() == []
    more_in_one = {**everywhere, ("mlp", "late", "current"): 1.05}
    assert read(more_in_one, spread=1.0).motifs() == []  # by chance
    assert len(read(more_in_one, spread=0.02).motifs()) == 1


def test_a_family_of_one_region_is_marked():
    reader = read({("mlp", "late", "older"): 1.0})
    here = (reader.effects["family"] == "older") & (reader.effects["scope"] == "middle")
    reader.effects["applicable"] &= ~here
    (motif,) = reader.motifs()
    assert motif["only_region"] is True
    assert motif["p_larger_than_elsewhere"] is None


@pytest.mark.parametrize(
    "change", [{"positions": "query"}, {"with_aliases": True}, {"metric": "kl"}, {"kind": "zero"}], ids=str
)
def test_other_kinds_of_rows_are_left_out(change):
    wrong = read({("mlp", "late", "current"): 1.0, ("mlp", "all", "current"): 1.0}, **change)
    assert wrong.motifs() == []
    assert wrong.dissociation() == {}
