"""Shapley values and interactions against their definitions by permutation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from attnres.tasks import MQAR
from probe.ablation.engine import Engine
from probe.ablation.grid import Kind, build_grid
from probe.ablation.interventions import MaskRenormalise
from probe.analysis import effects as results
from probe.analysis.coalitions import coalition_cells, coalition_table, terms
from probe.analysis.inference import Inference
from probe.examples.examples import Examples
from probe.vocabulary import COALITIONS, FAMILIES

INPUTS = Examples.from_batch(MQAR(num_pairs=4, vocab_size=40).batch("probe", range(6)))
INFO = results.RunInfo("r", "c", 0, 0, "d", 4)


def game(seed: int = 0) -> dict[frozenset, float]:
    rng = np.random.default_rng(seed)
    return {frozenset(members): float(rng.normal()) for members in COALITIONS} | {frozenset(): 0.0}


def evaluate(term: str, values) -> float:
    return sum(c * values[frozenset(members)] for members, c in terms()[term].items())


def test_shapley_is_the_mean_over_orders_of_what_a_family_adds():
    values = game()
    for family in FAMILIES:
        added = []
        for order in itertools.permutations(FAMILIES):
            before = frozenset(order[: order.index(family)])
            added.append(values[before | {family}] - values[before])
        assert evaluate(f"shapley:{family}", values) == pytest.approx(np.mean(added))


def test_interaction_is_the_mean_over_orders_of_the_pair_as_one_player():
    """Shapley value of the pair's surplus when the two enter together (Grabisch and Roubens)."""
    values = game(1)
    for a, b in itertools.combinations(FAMILIES, 2):
        surplus = []
        for order in itertools.permutations([f for f in FAMILIES if f not in (a, b)] + ["pair"]):
            rest = frozenset(order[: order.index("pair")])
            surplus.append(values[rest | {a, b}] - values[rest | {a}] - values[rest | {b}] + values[rest])
        assert evaluate(f"interaction:{a}+{b}", values) == pytest.approx(np.mean(surplus))


def test_shares_sum_to_the_whole_and_null_players_get_nothing():
    values = game(2)
    assert sum(evaluate(f"shapley:{f}", values) for f in FAMILIES) == pytest.approx(values[frozenset(FAMILIES)])
    without = {s: values[s - {"older"}] for s in values}
    assert evaluate("shapley:older", without) == pytest.approx(0)
    assert evaluate("interaction:embedding+older", without) == pytest.approx(0)


@pytest.mark.parametrize("source", ["cumulative", "block_sum"])
def test_a_model_s_games(make_model, source):
    model = make_model(attnres_source=source)
    cells = coalition_cells(model.model.sites, ["self_attn", "mlp"], ["early", "all"])
    result = Engine(model, cells, ("all",)).run(INPUTS)
    table = coalition_table(result, INFO, Inference(num_resamples=50))
    rows = table[table["metric"] == "nll"].set_index(["sublayer", "scope", "term"])["effect"]
    for (sublayer, scope), game_rows in rows.groupby(["sublayer", "scope"]):
        values = game_rows.loc[sublayer, scope]
        assert values[[f"shapley:{f}" for f in FAMILIES]].sum() == pytest.approx(values["value:all"], abs=1e-9)
        assert set(values.index) == set(terms())
        if scope == "early":  # no older block there
            assert values["shapley:older"] == pytest.approx(0, abs=1e-12)
            assert values["value:older"] == 0
    for (index, _), effects in result.effects.items():
        route = cells[index].route
        mean = effects["nll"].sum() / result.counts.sum()
        assert rows[route.sublayer, route.scope, f"value:{route.family}"] == pytest.approx(mean)


def test_without_coalitions_there_is_no_table(make_model):
    model = make_model()
    result = Engine(model, build_grid(model.model.sites, Kind(MaskRenormalise), scopes=["all"]), ("all",)).run(INPUTS)
    assert coalition_table(result, INFO, Inference(num_resamples=20)).empty
