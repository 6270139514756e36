"""The tables of a probe: their invariants, what they say of masses, doses and aliases, and how they are kept."""

from __future__ import annotations

from types import SimpleNamespace as Namespace

import numpy as np
import pandas as pd
import pytest
import torch

from attnres import FAMILIES, Read
from attnres.tasks import MQAR
from probe.ablation.engine import Engine
from probe.ablation.grid import Kind, build_grid
from probe.ablation.interventions import MaskRenormalise
from probe.analysis import effects as results
from probe.analysis import stats
from probe.analysis.inference import NOT_APPLICABLE, OF_STRENGTH, Inference
from probe.examples.examples import Examples
from probe.files import tables as storage
from probe.runner import mean_bias, measure
from probe.settings import ProbeSettings
from probe.vocabulary import MARGINS

TASK = MQAR(num_pairs=4, vocab_size=40)
INPUTS = Examples.from_batch(TASK.batch("probe", range(6)))
INFO = results.RunInfo("run", "cumulative", 0, 7, "data", TASK.num_pairs)


def probe(model, positions=("all", "query"), batch_size=64, **grid):
    cells = build_grid(model.model.sites, Kind(MaskRenormalise), **grid)
    return Engine(model, cells, positions, batch_size).run(INPUTS)


@pytest.fixture(scope="module")
def tables(make_model):
    result = probe(make_model(num_hidden_layers=5, attnres_num_blocks=3))
    return (result, *results.build_tables(result, INFO, Inference(num_resamples=200)))


def test_columns_and_keys(tables):
    _, effects, clusters = tables
    assert list(effects.columns) == results.EFFECT_COLUMNS
    assert list(clusters.columns) == results.CLUSTER_COLUMNS
    assert not effects.duplicated(results.CELL_KEYS).any()
    assert set(effects["scope"]) == {"early", "middle", "late", "all", *(f"layer:{i}" for i in range(5))}
    assert set(effects["sublayer"]) == {"self_attn", "mlp", "both"}
    assert set(effects["family"]) == set(FAMILIES)


def test_masses_of_the_families_sum_to_one_in_every_cell(tables):
    _, effects, clusters = tables
    cell = [key for key in results.CELL_KEYS if key != "family"]
    np.testing.assert_allclose(effects.groupby(cell)["mass"].sum(), 1, atol=1e-6)
    np.testing.assert_allclose(clusters.groupby([*cell, "sequence"])["mass"].sum(), 1, atol=1e-6)


def test_not_applicable_rows_are_marked_and_never_zero(tables):
    _, effects, clusters = tables
    absent = effects[(effects["scope"] == "layer:0") & effects["family"].isin(["prev_completed", "older"])]
    assert len(absent)
    assert not absent["applicable"].any()
    assert (absent["no_strength"] == NOT_APPLICABLE).all()
    assert not absent["below_floor"].any()
    numbers = ["effect", "ci_low", "ci_high", "p_value", "mass_applicable", "dose", *OF_STRENGTH]
    assert effects.loc[~effects["applicable"], numbers].isna().all(axis=None)
    assert effects.loc[effects["applicable"], ["effect", "ci_low", "ci_high", "mass_applicable"]].notna().all(axis=None)
    assert (absent["mass"] == 0).all()
    merged = clusters.merge(effects[[*results.CELL_KEYS, "applicable"]], on=results.CELL_KEYS)
    assert (merged["summed_effect"].isna() == ~merged["applicable"]).all()


def test_clusters_aggregate_to_effects(tables):
    _, effects, clusters = tables
    grouped = clusters.groupby(results.CELL_KEYS, sort=False)
    again = pd.DataFrame(
        {
            "effect": grouped["summed_effect"].sum(min_count=1) / grouped["n_queries"].sum(),
            "mass": grouped["mass"].mean(),
            "n_queries": grouped["n_queries"].sum(),
            "n_sequences": grouped.size(),
        }
    ).reset_index()
    both = effects.merge(again, on=results.CELL_KEYS, suffixes=("", "_again"), validate="one_to_one")
    assert len(both) == len(effects)
    for column in ("effect", "mass", "n_queries", "n_sequences"):
        np.testing.assert_allclose(both[column], both[f"{column}_again"], rtol=1e-9, atol=1e-12)


def test_aliased_mass_is_that_of_the_reads_that_open_a_block(make_model):
    """Cumulative: at the attention read that opens a block `current` is the newest completed source."""
    result = probe(make_model(num_hidden_layers=6, attnres_num_blocks=3), positions=("all",))
    effects, _ = results.build_tables(result, INFO, Inference(num_resamples=10))
    rows = effects[effects["metric"] == "nll"].set_index(["sublayer", "scope", "family"]).sort_index()
    assert rows.loc["mlp", "aliased_mass"].eq(0).all()
    for layer in range(6):
        current = rows.loc[("self_attn", f"layer:{layer}", "current")]
        assert current["aliased_mass"] == pytest.approx(current["mass"] if layer % 2 == 0 else 0)
        assert current["n_unaliased_reads"] == layer % 2
    assert rows.loc[("self_attn", "all", "current"), "n_unaliased_reads"] == 3
    assert rows.loc[("self_attn", "all", "prev_completed"), "n_reads"] == 4
    assert rows.loc[("self_attn", "all", "prev_completed"), "n_unaliased_reads"] == 2


def test_taking_a_family_out_with_its_aliases_is_not_applicable_where_nothing_is_left(make_model):
    result = probe(make_model(), positions=("all",), with_aliases=(False, True), scopes=("layer:0", "layer:2"))
    effects, _ = results.build_tables(result, INFO, Inference(num_resamples=10))
    rows = effects[(effects["metric"] == "nll") & (effects["sublayer"] == "self_attn")]
    rows = rows.set_index(["scope", "family", "with_aliases"])
    assert rows.loc[("layer:0", "current", False), "applicable"]
    assert rows.loc[("layer:0", "current", False), "effect"] == pytest.approx(0, abs=1e-6)  # reachable by its alias
    assert not rows.loc[("layer:0", "current", True), "applicable"]
    assert abs(rows.loc[("layer:2", "current", True), "effect"]) > 1e-4
    assert rows.loc[("layer:2", "current", True), "effect"] == rows.loc[("layer:2", "prev_completed", True), "effect"]


def test_what_comes_to_nothing_is_called_rounding(make_model):
    """Layer 0's attention reads the embedding under two names: taking one away changes nothing but the last digits."""
    settings = ProbeSettings(positions=("all",), scopes=("layer:0", "layer:1"), num_resamples=200)
    rows = measure(make_model(), INPUTS, settings).effects
    rows = rows[rows["applicable"] & rows["metric"].isin([*MARGINS, "nll"])]
    assert rows["floor"].between(1e-7, 1e-4).all()  # 8 units of float32 and logits of about ten
    is_twin = (rows["scope"] == "layer:0") & (rows["sublayer"] == "self_attn")
    twins, others = rows[is_twin], rows[~is_twin & (rows["scope"] == "layer:1")]
    assert set(twins["family"]) == {"embedding", "current"}
    assert (twins["effect"].abs() <= twins["floor"]).all()
    assert twins["below_floor"].all()
    assert (twins[["p_value", "p_adjusted"]] == 1).all(axis=None)
    assert (others["effect"].abs() > 10 * others["floor"]).any()
    assert (others["below_floor"] == (others["effect"].abs() <= others["floor"])).all()


def test_margins_stand_in_every_row(tables):
    """That of the row's metric, or the one to the strongest distractor; per query, as the clusters have it."""
    _, effects, clusters = tables
    sums = clusters.groupby("metric")[["summed_clean", "n_queries"]].sum()
    means = sums["summed_clean"] / sums["n_queries"]
    for metric, rows in effects.groupby("metric"):
        np.testing.assert_allclose(rows["margin"], means[metric if metric in MARGINS else "logit_diff"])
        np.testing.assert_allclose(rows["clean"], means[metric], atol=1e-12)
    assert means["logit_diff"] < means["logit_diff_mean"]  # the strongest is above the mean
    others = effects[~effects["metric"].isin(MARGINS)]
    assert others[list(OF_STRENGTH)].isna().all(axis=None)
    assert (others["no_strength"] != "").all()


@pytest.mark.parametrize(
    ("right", "of", "num_pairs", "learned"),
    [(64, 64, 16, True), (40, 64, 16, False), (45, 64, 16, True), (64, 64, 2, True), (53, 64, 2, False)],
)
def test_the_task_is_learned_where_accuracy_is_surely_half_way_from_chance(right, of, num_pairs, learned):
    """The lower end of its interval, with each sequence a single answer, against (1 + 1/K) / 2."""
    result = Namespace(clean={"accuracy": np.array([4.0] * right + [0.0] * (of - right))}, counts=np.full(of, 4))
    found = results.describe_clean(result, results.RunInfo("r", "c", 0, 0, "d", num_pairs))
    assert found["task_learned"] is learned
    assert found["saturated"] is (right == of)
    assert found["accuracy_low"] < right / of


def test_the_final_read_of_block_sum_is_a_scope_of_its_own(make_model):
    effects, _ = results.build_tables(probe(make_model(attnres_source="block_sum")), INFO, Inference(num_resamples=10))
    final = effects[effects["scope"] == "final"]
    assert set(final["sublayer"]) == {"final"}
    assert final.loc[final["family"] == "embedding", "applicable"].all()
    assert not final.loc[final["family"] == "current", "applicable"].any()
    assert set(effects.loc[effects["sublayer"] == "final", "scope"]) == {"final"}


def test_rows_of_later_steps_are_dropped(tables, tmp_path):
    _, effects, clusters = tables
    storage.write_tables(tmp_path, {"effects": effects, "clusters": clusters})
    storage.write_tables(tmp_path, {"effects": effects.assign(step=9), "clusters": clusters.assign(step=9)})
    storage.drop_steps_after(tmp_path, 8)
    assert set(storage.read_effects(tmp_path)["step"]) == {7}
    assert set(pd.read_parquet(tmp_path / "clusters.parquet")["step"]) == {7}


def test_rows_of_the_same_run_and_step_are_replaced(tables, tmp_path):
    _, effects, clusters = tables
    storage.write_tables(tmp_path, {"effects": effects, "clusters": clusters})
    storage.write_tables(tmp_path, {"effects": effects.assign(step=8), "clusters": clusters.assign(step=8)})
    storage.write_tables(tmp_path, {"effects": effects.assign(effect=1.0), "clusters": clusters})
    stored = storage.read_effects(tmp_path)
    assert len(stored) == 2 * len(effects)
    assert (stored.loc[stored["step"] == 7, "effect"] == 1.0).all()
    assert len(pd.read_parquet(tmp_path / "clusters.parquet")) == 2 * len(clusters)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clusters.parquet", "effects.parquet", "manifest.json"]


def test_dose_is_the_median_relative_move_of_the_clean_run(make_model):
    model = make_model(num_hidden_layers=6, attnres_num_blocks=3)
    reads: list[Read] = []
    with torch.no_grad():
        model(INPUTS.input_ids, intervention=lambda read: reads.append(read) or read)
    result = probe(model, positions=("all",), scopes=("all",), sublayers=("mlp",))
    effects, _ = results.build_tables(result, INFO, Inference(num_resamples=10))
    for row in effects[effects["metric"] == "nll"].to_dict("records"):
        doses = []
        for read in reads:
            if read.site.sublayer != "mlp" or row["family"] not in read.site.families:
                continue
            new = MaskRenormalise([row["family"]], frozenset([read.site.index]))(read)
            values = torch.stack(read.sources, -2)
            old_h = torch.einsum("btn,btnh->bth", read.routing_weights, values)
            new_h = torch.einsum("btn,btnh->bth", new.routing_weights, values)
            doses.append(((new_h - old_h).norm(dim=-1) / old_h.norm(dim=-1)).flatten())
        assert row["dose"] == pytest.approx(float(np.median(torch.cat(doses).numpy())), rel=1e-4)


def test_positions_without_enough_left_are_not_touched_and_are_counted(make_model):
    """A read whose `current` carries all but 1e-4 cannot be masked: not applicable, not a zero effect."""
    model = make_model(randomize=False, num_hidden_layers=2, attnres_recency_bias_init=0.0)
    with torch.no_grad():
        model.model.layers[1].mlp_res_bias.fill_(20.0)
    result = probe(model)
    effects, _ = results.build_tables(result, INFO, Inference(num_resamples=10))
    row = effects[(effects["scope"] == "layer:1") & (effects["family"] == "current") & (effects["sublayer"] == "mlp")]
    assert not row["applicable"].any()
    assert row["effect"].isna().all()
    assert (row["n_reads"] == 0).all()
    assert (row["mass"] > 0.99).all()
    whole = effects[(effects["scope"] == "all") & (effects["family"] == "current") & (effects["sublayer"] == "mlp")]
    np.testing.assert_allclose(whole["applicable_share"], 0.5, atol=1e-6)
    assert whole["applicable"].all()


def test_masking_is_the_stated_move_of_the_read(make_model, make_tokens):
    """h' - h = alpha / (1 - alpha) * (h - mean source of the family), design §2."""
    model = make_model(num_hidden_layers=6, attnres_num_blocks=3)
    reads: list[Read] = []
    with torch.no_grad():
        model(make_tokens(model), intervention=lambda read: reads.append(read) or read)
    moved = 0
    for read in reads:
        values = torch.stack(read.sources, -2)
        hidden = torch.einsum("btn,btnh->bth", read.routing_weights, values)
        for family in FAMILIES:
            members = torch.tensor([name == family for name in read.site.families])
            new = MaskRenormalise([family], frozenset([read.site.index]))(read)
            if not members.any():
                assert new is read
                continue
            torch.testing.assert_close(new.routing_weights.sum(-1), torch.ones(read.routing_weights.shape[:2]))
            assert not new.routing_weights[..., members].any()
            alpha = read.routing_weights[..., members].sum(-1, keepdim=True)
            mean = torch.einsum("btn,btnh->bth", read.routing_weights * members, values) / alpha
            expected = alpha / (1 - alpha) * (hidden - mean)
            actual = torch.einsum("btn,btnh->bth", new.routing_weights, values) - hidden
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
            moved += 1
    assert moved > 20


def test_q_values_look_across_the_checkpoints_of_a_cell(tables, tmp_path):
    """Benjamini-Hochberg over steps, cell by cell, also for steps that were written before."""
    _, effects, clusters = tables
    given = {1: 0.01, 2: 0.04, 3: 0.03}
    for step, p_adjusted in given.items():
        rows = effects.assign(step=step, p_adjusted=p_adjusted)
        storage.write_tables(tmp_path, {"effects": rows, "clusters": clusters.assign(step=step)})
    stored = storage.read_effects(tmp_path).groupby("step")["q_value"].unique()
    assert {int(step): values.tolist() for step, values in stored.items()} == {
        1: [pytest.approx(0.03)],
        2: [pytest.approx(0.04)],
        3: [pytest.approx(0.04)],
    }


def test_layers_and_regions_are_two_grids(tables):
    """Adjusted p-values are those of the grid's own cells: recomputed here from the clusters."""
    _, effects, clusters = tables
    rows = effects[(effects["metric"] == "nll") & (effects["positions"] == "all") & effects["applicable"]]
    is_layer = rows["scope"].str.startswith("layer:")
    for part in (rows[is_layer], rows[~is_layer]):
        merged = clusters.merge(part[results.CELL_KEYS], on=results.CELL_KEYS)
        keys = ["sublayer", "scope", "family"]
        sums = merged.pivot(index="sequence", columns=keys, values="summed_effect")[
            pd.MultiIndex.from_frame(part[keys])
        ]
        _, by_flips = stats.sign_flip_test(sums.to_numpy(), 200, 0)
        by_bootstrap = stats.bootstrap_t(sums.to_numpy(), np.full(len(sums), TASK.num_pairs), 200, 0).p_adjusted()
        np.testing.assert_allclose(part["p_adjusted"], np.maximum(by_flips, by_bootstrap))
    assert effects.loc[effects["metric"] == "kl", ["p_value", "p_adjusted"]].isna().all(axis=None)
    assert effects.loc[effects["metric"] == "accuracy", "p_equivalent"].isna().all()


def test_masses_stand_beside_their_priors(make_model):
    """With zero queries the schedule at the mean bias is the mass itself; even weights are what b = 0 gives."""
    model = make_model(randomize=False, attnres_recency_bias_init=2.0, num_hidden_layers=6, attnres_num_blocks=3)
    info = results.RunInfo("run", "wrapped", 0, 7, "data", TASK.num_pairs, mean_bias(model))
    effects, _ = results.build_tables(probe(model, positions=("all",)), info, Inference(num_resamples=10))
    np.testing.assert_allclose(effects["mass"], effects["mass_schedule"], atol=1e-5)
    cell = [key for key in results.CELL_KEYS if key != "family"]
    np.testing.assert_allclose(effects.groupby(cell)["mass_uniform"].sum(), 1)
    row = effects.query("scope == 'layer:5' and sublayer == 'mlp' and family == 'older' and metric == 'nll'").iloc[0]
    assert row["mass_uniform"] == pytest.approx(1 / 4)
