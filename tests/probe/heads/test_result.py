"""Tables: strengths and interactions by hand, and models whose heads are set by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probe.analysis.inference import Inference
from probe.examples.examples import Examples
from probe.heads import KINDS, measure_heads
from probe.heads.result import HEAD_COLUMNS, PAIR_COLUMNS
from tests.support.planted import LOUD, TASK, P, R, look_back, look_up, move, rms, solver, state

FEW = Inference(num_resamples=200)
GONE = 0.8
"""Of the margin; the mean over sequences knows some of the answer."""
BIND, FIRST, SECOND = (0, 0), (3, 0), (3, 1)


def planted(twice: bool):
    """Layer 0 head 0 writes each token's predecessor; layer 3 head 0 looks up what followed the key. With `twice`,
    head 1 does the same, and the last norm takes out that the output is written twice."""
    model = solver("cumulative", num_blocks=3)
    look_back(model, *BIND, 1)
    move(model, *BIND, R, P, rms(state(C=1, R=1)))
    look_up(model, FIRST[0], R, head=FIRST[1], amount=10 * LOUD)
    if twice:
        look_up(model, SECOND[0], R, head=SECOND[1], amount=10 * LOUD)
    return model


@pytest.fixture(scope="module")
def examples() -> Examples:
    return Examples.from_batch(TASK.batch("probe", range(32)))


def rows(table, kind):
    return table[(table["kind"] == kind) & (table["metric"] == "logit_diff")]


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_cover_for_each_other_interact_and_do_no_harm_alone(examples, kind):
    found = measure_heads(planted(twice=True), examples, (kind,), pairs=[(FIRST, SECOND), (BIND, SECOND)])
    heads = rows(found.table(FEW), kind).set_index(["layer", "head"])
    both, chain = rows(found.pair_table(FEW), kind).itertuples()
    assert heads.loc[BIND, "strength"] > GONE
    assert both.strength_both > GONE
    assert both.strength_low > 0.3
    assert both.p_matters <= 0.05
    assert both.interaction == pytest.approx(both.strength * both.margin)
    assert abs(chain.strength_b - heads.loc[SECOND, "strength"]) < 1e-6
    if kind == "resample":  # what another sequence's head says is wrong, not silent
        assert heads.loc[[FIRST, SECOND], "strength"].max() < both.strength_both / 2
    else:
        assert heads.loc[[FIRST, SECOND], "strength"].abs().max() < 0.1
        assert both.strength == pytest.approx(both.strength_both, abs=0.2)
    for head in (FIRST, SECOND):
        assert heads.loc[head, "attention_to_value"] > 0.9
    assert heads.loc[BIND, "attention_to_value"] < 0.5
    others = heads.drop([BIND, FIRST, SECOND])
    assert (others["strength"].abs() < 1e-4).all()
    assert (others["p_adjusted"] > 0.05).all()


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_both_are_needed_interact_the_other_way(examples, kind):
    found = measure_heads(planted(twice=False), examples, (kind,), pairs=[(BIND, FIRST), (FIRST, SECOND)])
    needed, other = rows(found.pair_table(FEW), kind).itertuples()
    assert min(needed.strength_a, needed.strength_b, needed.strength_both) > GONE
    assert needed.strength_high < -GONE
    assert needed.p_matters <= 0.05
    assert abs(other.strength) < 1e-4  # head 1 is idle
    assert other.p_matters == 1


@pytest.fixture(scope="module")
def of_small(make_model):
    return make_model(vocab_size=40, num_hidden_layers=2), Examples.from_batch(TASK.batch("probe", range(12)))


def test_tables_are_sums_over_sequences(of_small):
    model, examples = of_small
    found = measure_heads(model, examples, pairs=2)
    table, pairs = found.table(FEW), found.pair_table(FEW)
    assert list(table.columns) == HEAD_COLUMNS
    assert list(pairs.columns) == PAIR_COLUMNS
    assert len(table) == 2 * 3 * 4
    assert len(pairs) == 2 * 3
    for metric, values in found.singles.items():
        margin = found.clean[metric].sum()
        chosen = table[table["metric"] == metric]
        counts = found.counts.sum()
        np.testing.assert_allclose(chosen["effect"], values.sum(-1).ravel() / counts)
        np.testing.assert_allclose(chosen["margin"], margin / counts)
        tested, kinds = found.tested, [each.kind for each in found.pair_ablations]
        for i, row in enumerate(pairs[pairs["metric"] == metric].itertuples()):
            of_kind = values[found.kinds.index(kinds[i])]
            a, b = (of_kind[found.heads.index(head)] for head in found.pair_ablations[i].heads)
            interaction = (a + b - found.pairs[metric][i])[tested]
            assert row.interaction == pytest.approx(interaction.sum() / found.counts[tested].sum())


def test_multiplying_logits_changes_no_strength():
    examples = Examples.from_batch(TASK.batch("probe", range(16)))
    tables = []
    for factor in (1, 4):
        model = planted(twice=True)
        model.lm_head.weight.mul_(factor)
        found = measure_heads(model, examples, ("zero", "resample"), pairs=[(BIND, FIRST), (FIRST, SECOND)])
        tables.append((found.table(FEW), found.pair_table(FEW)))
    for once, four in zip(*tables, strict=True):
        assert (once["no_strength"] == "").all()
        for name in ("strength", "strength_low", "strength_high", "p_matters", "p_equivalent"):
            np.testing.assert_allclose(once[name], four[name], rtol=1e-3, atol=1e-5, err_msg=name)
        assert (once["p_adjusted"] <= 0.05).equals(four["p_adjusted"] <= 0.05)


def test_without_a_margin_there_is_no_strength(make_model):
    model = make_model(vocab_size=40, num_hidden_layers=2)
    torch.nn.init.zeros_(model.lm_head.weight)
    examples = Examples.from_batch(TASK.batch("probe", range(8)))
    found = measure_heads(model, examples, pairs=100)
    for table in (found.table(FEW), found.pair_table(FEW)):
        assert (table["no_strength"] == "the clean margin is not clear of zero").all()
        assert table.filter(like="strength").drop(columns="no_strength").isna().all(axis=None)
        assert table["below_floor"].all()


def test_without_pairs_the_table_of_pairs_is_empty(of_small):
    found = measure_heads(*of_small, pairs=0)
    assert found.pair_table(FEW).empty
    assert list(found.pair_table(FEW).columns) == PAIR_COLUMNS
