"""The probe graded on known mechanisms (tests/support/planted.py): it must name the planted sites, and no others."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from attnres import FAMILIES, REGIONS, SUBLAYERS
from probe.ablation.engine import Engine
from probe.ablation.grid import Kind, build_grid
from probe.ablation.interventions import MaskRenormalise
from probe.analysis import effects as results
from probe.analysis.coalitions import coalition_cells, coalition_table
from probe.analysis.motifs import Reader
from probe.examples.examples import Examples
from tests.support import planted

LN_K = math.log(planted.TASK.num_pairs)
SOLVERS = {
    "embedding_to_early_mlp": planted.embedding_to_early_mlp,
    "older_to_late_attention": planted.older_to_late_attention,
    "mass_without_role": planted.mass_without_role,
    "redundant_pair": planted.redundant_pair,
}


def probe(found: planted.Planted, num_sequences=64, scopes=(*REGIONS, "all"), num_resamples=2000, coalitions=()):
    sites = found.model.model.sites
    cells = build_grid(sites, Kind(MaskRenormalise), sublayers=SUBLAYERS, scopes=scopes)
    cells += coalition_cells(sites, ["self_attn"], coalitions) if coalitions else ()
    inputs = Examples.from_recall(found.task.batch("train", range(num_sequences)))
    result = Engine(found.model, cells, ("all",)).run(inputs)
    info = results.RunInfo("planted", found.model.config.attnres_source, found.task.seed, 0, "data", 8)
    effects, clusters = results.build_tables(result, info, num_resamples)
    return Reader(effects, clusters, 8, num_resamples), coalition_table(result, info, num_resamples)


@pytest.fixture(scope="module", params=SOLVERS)
def graded(request):
    found = SOLVERS[request.param]()
    return (request.param, found, *probe(found, coalitions=("late",)))


def test_motifs_are_exactly_the_planted_sites(graded):
    name, found, reader, _ = graded
    assert reader.effects["task_learned"].all()
    assert reader.effects["clean"].max() < 0.01
    motifs = {(m["family"], m["sublayer"], m["scope"]): m for m in reader.motifs()}
    assert set(motifs) == found.sites
    rows = reader.effects.set_index(["family", "sublayer", "scope"])
    dissociation = reader.dissociation()
    for (family, sublayer, scope), motif in motifs.items():
        assert motif["effect"] > LN_K / 2
        assert motif["task_learned"]
        assert motif["p_adjusted"] < 0.01
        assert motif["only_region"] == (name == "mass_without_role")
        assert (motif["p_larger_than_elsewhere"] is None) == motif["only_region"]
        row = rows.loc[(family, sublayer, scope)]
        assert (0.8 <= row["mass"] <= 0.9) or name == "mass_without_role"
        assert row["applicable_share"] == 1
        assert dissociation[sublayer]["most_harmful"] == family
        assert family not in {entry["family"] for entry in dissociation[sublayer]["mass_without_role"]}


def test_mass_without_role_is_called_that(graded):
    """prev_completed of case (c): 30 % of all attention mass, none of it aliased, effect equivalent to zero."""
    name, _, reader, _ = graded
    if name != "mass_without_role":
        return
    found = reader.dissociation()["self_attn"]
    idle = {entry["family"]: entry for entry in found["mass_without_role"]}
    assert idle["prev_completed"]["mass"] >= 0.3
    assert idle["prev_completed"]["aliased_mass"] == 0
    assert "older" not in idle
    assert found["most_harmful"] == "older"
    assert found["heaviest"] == "embedding"
    assert found["dissociated"] is True
    assert found["p_heaviest_is_most_harmful"] == 0


def test_what_two_families_share_shows_in_the_coalition_alone(graded):
    name, _, reader, coalitions = graded
    if name != "redundant_pair":
        return
    terms = coalitions[coalitions["metric"] == "nll"].set_index("term")
    pair = ("prev_completed", "current")
    single = reader.effects.set_index(["sublayer", "scope", "family"]).sort_index().loc[("self_attn", "late")]
    for family in pair:
        assert single.loc[family, "p_equivalent"] < 0.01
        assert abs(terms.loc[f"value:{family}", "effect"]) < 0.01 * LN_K
    whole = terms.loc["value:current+prev_completed", "effect"]
    assert whole > LN_K / 2
    shares = terms.loc[[f"shapley:{family}" for family in FAMILIES], "effect"]
    assert shares.sum() == pytest.approx(terms.loc["value:all", "effect"])
    assert set(shares.nlargest(2).index) == {f"shapley:{family}" for family in pair}
    assert abs(terms.loc["value:embedding+older", "effect"]) < 0.01 * LN_K
    interactions = terms[terms.index.str.startswith("interaction:")]
    assert interactions["effect"].idxmax() == "interaction:current+prev_completed"
    assert interactions.loc["interaction:current+prev_completed", "p_adjusted"] < 0.01


@pytest.mark.parametrize("models", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_no_motif_where_effects_are_zero_in_the_mean(models):
    """Case (e), many models and data sets: large effects of either sign, and a motif in at most 5 % of them."""
    spreads, means, with_motif = [], [], 0
    for seed in range(models):
        reader, _ = probe(planted.zero_mean(seed), num_sequences=48, scopes=REGIONS, num_resamples=400)
        affected = reader.effects.loc[reader.effects["effect"].abs().idxmax()]
        assert affected["family"] == "embedding"
        assert not affected["task_learned"]
        by_sequence = reader.by_sequence("summed_effect", "mlp")[affected["scope"], "embedding"] / 8
        spreads.append(by_sequence.std())
        means.append(by_sequence.mean())
        with_motif += bool(reader.motifs())
    assert np.median(spreads) > 0.1 * LN_K  # far from no effect
    assert abs(np.mean(means)) < 3 * np.std(means) / math.sqrt(models)
    assert pd.Series(means).abs().quantile(0.9) > 0.05 * LN_K  # chance alone passes the threshold of 5 % of ln K
    assert with_motif <= max(1, models // 20), with_motif
