"""Reading tables whose answer is planted: dissociation, motifs, equivalence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from probe.analysis import stats
from probe.analysis.inference import Grid, Inference, grid_statistics
from probe.analysis.motifs import Harm, Reader, read_motifs
from probe.vocabulary import (
    ALL,
    EQUIVALENT,
    FAMILIES,
    MARGIN,
    MARGIN_TO_MEAN,
    MARGINS,
    MATTERS,
    REGIONS,
    SUBLAYERS,
    Route,
)

SEQUENCES, QUERIES, CLEAN = 64, 16, 10.0
HOW = Inference(num_resamples=1000)
MASS = {"embedding": 0.2, "current": 0.5, "prev_completed": 0.2, "older": 0.1}
PRIMARY = {"kind": "mask_renormalise", "positions": "all", "with_aliases": False}
ROUTES = [Route(s, scope, f) for s in SUBLAYERS for scope in (*REGIONS, ALL) for f in FAMILIES]
Strengths = dict[tuple[str, str, str], float]


def tables(
    strengths: Strengths, spread: float = 0.0005, mass=MASS, to_mean: Strengths | None = None, **change
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Effects and clusters of both sublayers and all scopes; by (sublayer, scope, family) their strengths, zero where
    they say nothing, of a clean margin of about 10 nats. Each is as precise as `spread`."""
    rng = np.random.default_rng(0)
    clean = CLEAN * (1 + 0.2 * rng.normal(size=SEQUENCES))
    noise = CLEAN * spread * rng.normal(size=(SEQUENCES, len(ROUTES)))
    noise -= noise.mean(0)
    own = {MARGIN: strengths, MARGIN_TO_MEAN: strengths if to_mean is None else to_mean}
    shares = np.concatenate([[own[metric].get(route.key, 0.0) for route in ROUTES] for metric in MARGINS])
    sums = -QUERIES * (shares * clean[:, None] + np.concatenate([noise, noise], axis=1))
    effects = pd.concat([pd.DataFrame(ROUTES).assign(metric=metric) for metric in MARGINS], ignore_index=True)
    effects = effects.assign(**{**PRIMARY, **change})
    effects["mass"] = effects["family"].map(mass)
    effects["applicable"] = (effects["scope"] != "early") | (effects["family"] != "older")
    same = {"aliased_mass": 0.1, "mass_uniform": 0.25, "mass_schedule": 0.25, "dose": 1.0, "task_learned": True}
    effects = effects.assign(**same, n_reads=2, n_unaliased_reads=1)
    counts, margins = np.full(SEQUENCES, QUERIES), dict.fromkeys(MARGINS, QUERIES * clean)
    found = grid_statistics(effects, ["metric"], sums, counts, margins, 1e-5, HOW)
    effects = pd.concat([effects, found], axis=1)
    keys = [*PRIMARY, "metric", "sublayer", "scope", "family", "mass"]
    clusters = (
        effects[keys]
        .loc[effects.index.repeat(SEQUENCES)]
        .assign(
            sequence=np.tile(np.arange(SEQUENCES), len(effects)),
            n_queries=QUERIES,
            summed_effect=sums.T.flatten(),
            summed_clean=np.tile(QUERIES * clean, len(effects)),
        )
    )
    return effects, clusters


def read(*args, metric: str = MARGIN, **options) -> Reader:
    return Reader(*tables(*args, **options), HOW, metric)


def test_mass_and_effect_part_ways():
    found = read({("mlp", "all", "embedding"): 0.5, ("self_attn", "all", "current"): 0.5}).dissociation()
    assert found["mlp"]["heaviest"] == "current"
    assert found["mlp"]["most_harmful"] == "embedding"
    assert found["mlp"]["dissociated"] is True
    assert found["mlp"]["p_heaviest_is_most_harmful"] == 0
    assert found["mlp"]["strength"]["embedding"] == pytest.approx(0.5)
    assert found["self_attn"]["dissociated"] is False
    assert found["self_attn"]["p_heaviest_is_most_harmful"] == 1


def test_a_close_race_is_said_to_be_one():
    strengths = {("mlp", "all", "embedding"): 0.3, ("mlp", "all", "current"): 0.3}
    found = read(strengths, spread=0.1).dissociation()
    assert 0.1 < found["mlp"]["p_heaviest_is_most_harmful"] < 0.9


@pytest.mark.parametrize(("strength", "spread"), [(0.9 * MATTERS, 0.001), (2 * MATTERS, 20 * MATTERS)])
def test_no_verdict_on_effects_that_do_not_matter(strength, spread):
    """Too small, or not told from zero."""
    assert read({("mlp", "all", "embedding"): strength}, spread).dissociation()["mlp"]["dissociated"] is None


def test_no_necessity_needs_mass_and_equivalence():
    heavy = {**MASS, "older": 0.04}
    found = read({("mlp", "all", "embedding"): 2 * EQUIVALENT}, spread=EQUIVALENT, mass=heavy).dissociation()
    idle = {sublayer: {entry["family"] for entry in found[sublayer]["not_necessary"]} for sublayer in found}
    assert idle == {"mlp": {"current", "prev_completed"}, "self_attn": {"embedding", "current", "prev_completed"}}
    assert found["mlp"]["not_necessary"][0]["aliased_mass"] == 0.1
    vague = read({}, spread=50 * EQUIVALENT).dissociation()  # not significant, yet far from shown to be nothing
    assert all(entry["not_necessary"] == [] for entry in vague.values())


def test_a_localised_role_is_named_where_it_is():
    strengths = {
        ("self_attn", "late", "older"): 0.5,
        ("self_attn", "middle", "older"): 0.2,
        ("mlp", "early", "embedding"): 0.25,
    }
    found = {Route.of(motif): motif for motif in read(strengths).motifs()}
    older = Route("self_attn", "late", "older")
    assert set(found) == {older, Route("mlp", "early", "embedding")}
    assert found[older]["strength"] == pytest.approx(0.5)
    assert found[older]["strength_low"] < 0.5 < found[older]["strength_high"]
    assert found[older]["effect"] == pytest.approx(-0.5 * CLEAN, rel=0.1)
    assert not any(m["only_region"] for m in found.values())


def test_what_does_not_matter_is_no_motif():
    assert read({("mlp", "late", "current"): 0.95 * MATTERS}).motifs() == []  # of the cell, not of each read
    assert len(read({("mlp", "late", "current"): 1.05 * MATTERS}).motifs()) == 1
    assert read({("mlp", "late", "current"): 0.3}, spread=3.0).motifs() == []
    assert read({("mlp", "late", "current"): -0.3}).motifs() == []  # masking helps: no harm
    assert read({}).motifs() == []


def test_what_is_everywhere_is_not_localised():
    everywhere = {("mlp", region, "current"): 0.3 for region in REGIONS}
    assert read(everywhere, spread=0.1).motifs() == []
    more_in_one = {**everywhere, ("mlp", "late", "current"): 0.315}
    assert read(more_in_one, spread=0.3).motifs() == []  # by chance
    assert len(read(more_in_one, spread=0.005).motifs()) == 1


def test_a_family_of_one_region_is_marked():
    reader = read({("mlp", "late", "older"): 0.3})
    here = (reader.effects["family"] == "older") & (reader.effects["scope"] == "middle")
    reader.effects["applicable"] &= ~here
    (motif,) = reader.motifs()
    assert motif["only_region"] is True


@pytest.mark.parametrize(
    "change", [{"positions": "query"}, {"with_aliases": True}, {"metric": "kl"}, {"kind": "zero"}], ids=str
)
def test_other_kinds_of_rows_are_left_out(change):
    strengths = {("mlp", "late", "current"): 0.3, ("mlp", "all", "current"): 0.3}
    effects, clusters = (table.assign(**change) for table in tables(strengths))
    assert Reader(effects, clusters, HOW).motifs() == []
    assert Reader(effects, clusters, HOW).dissociation() == {}


def test_thresholds_and_margins_that_disagree_are_said_to():
    def route(family: str) -> tuple[str, str, str]:
        return "mlp", "late", family

    strengths = {route("embedding"): 3 * MATTERS, route("current"): 1.5 * MATTERS, route("older"): 0.7 * MATTERS}
    to_mean = {route("embedding"): 3 * MATTERS, route("prev_completed"): 3 * MATTERS}
    found = read_motifs(*tables(strengths, to_mean=to_mean), HOW)
    about = {m["family"]: (m["at_twice_tau"], m["on_both_margins"]) for m in found["motifs"]}
    assert about == {"embedding": (True, True), "current": (False, False)}
    assert [m["family"] for m in found["motifs_at_half_tau"]] == ["older"]
    assert [m["family"] for m in found["motifs_to_mean_only"]] == ["prev_completed"]


# --- The criterion, near all of its thresholds -----------------------------------------------------------------------


def simulated_harm(seed: int, num_sequences: int = 24) -> Harm:
    """One family in three regions and the whole depth, of four; none, some or all criteria hold."""
    rng = np.random.default_rng(seed)
    routes = [Route("mlp", scope, f) for scope in (*REGIONS, ALL) for f in ("embedding", "current")]
    margins = rng.normal(2.0, rng.choice([1.0, 6.0]), num_sequences)
    strengths = MATTERS + rng.uniform(0, 1.0, len(routes)) * (rng.uniform(size=len(routes)) < 0.5)
    sums = 2.0 * strengths + rng.exponential(0.5, (num_sequences, len(routes))) - 0.5
    sums[:, rng.integers(len(routes))] = np.nan
    return Harm(routes, sums, margins, rng.integers(3, 6, num_sequences), rng.integers(1, 4, len(routes)).astype(float))


def naive_holds(harm: Harm, how: Inference) -> tuple[list[bool], list[bool], bool]:
    """By p-values and intervals: whether each route matters, whether it is a motif, and whether there is a strength."""

    def bootstrap(sums) -> stats.BootstrapT:
        return stats.bootstrap_t(np.array(sums).reshape(len(harm.counts), -1), harm.counts, *how.resampling)

    clear = bootstrap(harm.margins).interval()[0][0] > 0
    above = harm.sums - how.matters * harm.margins[:, None]
    _, p_values = Grid(above, harm.counts, "nll", how=how).test(above)
    matters = [p <= 0.05 and column.sum() > 0 for p, column in zip(p_values, above.T, strict=True)]
    found = []
    for i, route in enumerate(harm.routes):
        localised = route.scope in REGIONS
        for j, other in enumerate(harm.routes):
            same = (other.sublayer, other.family) == (route.sublayer, route.family)
            if i != j and same and {route.scope, other.scope} <= set(REGIONS) and not np.isnan(harm.sums[:, j]).any():
                more = harm.sums[:, i] / harm.n_reads[i] - harm.sums[:, j] / harm.n_reads[j]
                localised &= bool(bootstrap(more).p_above(0.0)[0] <= 0.05)
        found.append(bool(clear and matters[i] and (localised or route.scope not in REGIONS)))
    return matters, found, bool(clear)


def test_the_criterion_is_that_of_p_values_and_intervals():
    how, seen = Inference(num_resamples=199), []
    for seed in range(60):
        harm = simulated_harm(seed)
        matters, expected, clear = naive_holds(harm, how)
        found = harm.holds(np.ones((1, len(harm.counts))), how)[0]
        assert found.tolist() == expected, seed
        in_regions = [i for i, route in enumerate(harm.routes) if route.scope in REGIONS]
        seen.append((any(matters[i] for i in in_regions), any(expected[i] for i in in_regions), clear))
    assert {(True, True, True), (True, False, True), (True, False, False), (False, False, True)} <= set(seen)


def test_no_motif_without_a_strength():
    """A margin whose one-sided test finds it above zero, and whose 95 % interval does not."""
    rng, n = np.random.default_rng(1), 40
    noise = rng.normal(size=n)
    margins = 1.8 * np.sqrt((n - 1) / n) * noise.std(ddof=1) / np.sqrt(n) + noise - noise.mean()
    sums = np.stack([10 + rng.normal(size=n), rng.normal(size=n)], axis=1)
    harm = Harm([Route("mlp", r, "current") for r in ("early", "late")], sums, margins, np.ones(n), np.ones(2))
    strengths = Grid(-sums, harm.counts, MARGIN, margins, how=HOW)
    bootstrap = stats.bootstrap_t(margins[:, None], harm.counts, *HOW.resampling)
    assert bootstrap.p_above(0.0)[0] <= 0.05
    assert strengths.no_strength
    assert not harm.holds(np.ones((1, n)), HOW).any()
    assert replace(harm, margins=margins + 0.2).holds(np.ones((1, n)), HOW).tolist() == [[True, False]]
